//! RMS norm: `y = x / sqrt(mean(x²) + ε) · w` (Zhang and Sennrich 2019, arXiv:1910.07467).

use crate::error::Result;
use crate::ops;
use candle_core::Tensor;

/// A norm over the last dimension. Weights are what is multiplied: a family that stores `w - 1` has 1 added on loading.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    /// `weight` is f32 `[n]`.
    pub fn new(weight: Tensor, eps: f64) -> Self {
        Self { weight, eps: eps as f32 }
    }

    /// # Shapes
    /// `x [.., n]` to the same.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(ops::add_norm(x, None, &self.weight, self.eps)?.1)
    }

    /// `x + y` and its norm, in one pass.
    pub fn add(&self, x: &Tensor, y: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
        ops::add_norm(x, y, &self.weight, self.eps)
    }

    /// f32 `[n]`, and what is added to the mean square.
    pub fn parts(&self) -> (&Tensor, f32) {
        (&self.weight, self.eps)
    }

    /// For a norm over heads.
    pub fn over_heads(&self) -> ops::HeadNorm<'_> {
        ops::HeadNorm { weight: &self.weight, eps: self.eps }
    }
}
