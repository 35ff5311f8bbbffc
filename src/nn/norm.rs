//! RMS norm: `y = x / sqrt(mean(x²) + ε) · w` (Zhang and Sennrich 2019, arXiv:1910.07467).

use crate::error::Result;
use crate::ops;
use candle_core::Tensor;

/// An RMS norm over the last dimension; families that store `w - 1` have 1 added on loading.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    /// A norm with `weight`, f32 `[n]`, and `eps` added to the mean square.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self { weight, eps: eps as f32 }
    }

    /// Normalises `x`.
    ///
    /// # Shapes
    /// `x` and the result `[.., n]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::add_norm(x, None, &self.weight, self.eps)?.1)
    }

    /// Returns `x + y` and its norm, in one pass.
    pub fn add(&self, x: &Tensor, y: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        ops::add_norm(x, y, &self.weight, self.eps)
    }

    /// The weight, f32 `[n]`, and epsilon.
    pub fn parts(&self) -> (&Tensor, f32) {
        (&self.weight, self.eps)
    }

    /// The same norm for [`ops::prepare_heads`].
    pub fn over_heads(&self) -> ops::HeadNorm<'_> {
        ops::HeadNorm { weight: &self.weight, eps: self.eps }
    }
}
