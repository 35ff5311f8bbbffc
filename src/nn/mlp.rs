//! The gated feed-forward: `down(act(gate x) · up x)`.

use super::{Linear, Weight};
use crate::error::Result;
use crate::ops;
use crate::spec::Activation;
use candle_core::{DType, Tensor};

/// Bound in bytes on gate, up and their product on a GPU, the largest activations of a long chunk.
const BUFFER: usize = 128 << 20;

/// A gated feed-forward layer.
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
    /// Computes `down(act(gate x) · up x)`.
    ///
    /// # Shapes
    /// `x` and the result `[T, hidden]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (tokens, rows) = (x.dim(0)?, self.rows_at_once(x.dtype())?);
        if tokens <= rows || x.device().is_cpu() {
            return self.rows(x);
        }
        let out = Tensor::zeros(x.shape(), x.dtype(), x.device())?;
        for at in (0..tokens).step_by(rows) {
            let part = self.rows(&x.narrow(0, at, rows.min(tokens - at))?)?;
            out.slice_set(&part, 0, at)?;
        }
        Ok(out)
    }

    fn rows(&self, x: &Tensor) -> Result<Tensor> {
        let [gate, up] = Linear::forward_all([&self.gate, &self.up], x)?;
        self.down.forward(&ops::gated(&gate, &up, self.activation)?)
    }

    /// Rows whose three intermediate tensors stay within [`BUFFER`]; products with quantised matrices pass through f32.
    fn rows_at_once(&self, dtype: DType) -> Result<usize> {
        let wide = matches!(self.gate.weight(), Weight::Blocks(_));
        let size = dtype.size_in_bytes() + if wide { DType::F32.size_in_bytes() } else { 0 };
        let row = 3 * self.gate.weight().dims()?.0 * size;
        Ok((BUFFER / row / 128 * 128).max(128))
    }

    /// Size in memory, bytes.
    pub fn bytes(&self) -> u64 {
        self.gate.bytes() + self.up.bytes() + self.down.bytes()
    }
}
