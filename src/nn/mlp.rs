//! The gated feed-forward: `down(act(gate x) · up x)`.

use super::Linear;
use crate::error::Result;
use crate::ops;
use crate::spec::Activation;
use candle_core::Tensor;

/// Gate, up and down projections.
#[derive(Debug, Clone)]
pub struct Mlp {
    /// `[I, hidden]`.
    pub gate: Linear,
    /// `[I, hidden]`.
    pub up: Linear,
    /// `[hidden, I]`.
    pub down: Linear,
    /// Activation of the gate.
    pub activation: Activation,
}

impl Mlp {
    /// # Shapes
    /// `x [T, hidden]` to the same.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [gate, up] = Linear::forward_all([&self.gate, &self.up], x)?;
        self.down.forward(&ops::gated(&gate, &up, self.activation)?)
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }
}
