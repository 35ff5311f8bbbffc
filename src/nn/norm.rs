//! RMS norm: `y = x / sqrt(mean(x²) + ε) · w` (Zhang and Sennrich 2019, arXiv:1910.07467).

use crate::error::{At, Result};
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
        // candle's fused operator has no backward; training will need another path.
        candle_nn::ops::rms_norm(x, &self.weight, self.eps).at("rms norm")
    }
}
