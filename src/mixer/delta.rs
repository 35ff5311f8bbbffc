//! Gated DeltaNet: projections around the recurrence of [`crate::ops::delta`].

use super::ChunkContext;
use crate::cache::Recurrent;
use crate::error::Result;
use crate::nn::{Linear, RmsNorm};
use crate::ops::{DeltaArgs, DeltaLayer};
use crate::spec::DeltaSpec;
use candle_core::{DType, Tensor};

/// Weights of a Gated DeltaNet layer.
pub struct DeltaWeights {
    /// Shape of the layer.
    pub spec: DeltaSpec,
    /// Projection to queries, keys and values, `[C, hidden]`.
    pub qkv: Linear,
    /// Projection to the gate of the output, `[V D_v, hidden]`.
    pub z: Linear,
    /// Projection to the step of each value head, `[V, hidden]`.
    pub beta: Linear,
    /// Projection to the decay of each value head, `[V, hidden]`.
    pub decay: Linear,
    /// Output projection, `[hidden, V D_v]`.
    pub out: Linear,
    /// Weights of the convolution, f32 `[C n]`.
    pub conv: Tensor,
    /// Rate of the decay, f32 `[V]`, negative.
    pub rate: Tensor,
    /// Bias of the decay, f32 `[V]`.
    pub decay_bias: Tensor,
    /// Norm of each head of the output.
    pub norm: RmsNorm,
    /// Whether value head `h` has key head `h mod K`, not `⌊h K / V⌋`: a property of the file.
    pub tiled: bool,
}

impl DeltaWeights {
    /// Returns what the recurrence reads of the layer.
    pub(crate) fn layer(&self) -> DeltaLayer<'_> {
        DeltaLayer {
            spec: self.spec,
            conv: &self.conv,
            rate: &self.rate,
            decay_bias: &self.decay_bias,
            norm: self.norm.parts(),
            tiled: self.tiled,
        }
    }

    /// Returns the projections whose outputs the recurrence reads.
    pub fn inputs(&self) -> [&Linear; 4] {
        [&self.qkv, &self.z, &self.beta, &self.decay]
    }

    /// Returns the matrices.
    pub fn matrices(&self) -> [&Linear; 5] {
        [&self.qkv, &self.z, &self.beta, &self.decay, &self.out]
    }
}

pub(super) fn forward(w: &DeltaWeights, x: &Tensor, chunk: &ChunkContext, cache: &mut Recurrent) -> Result<Tensor> {
    // A CPU computes the recurrence in f32; a GPU's kernels read what the products give.
    let dtype = if x.device().is_cpu() { DType::F32 } else { x.dtype() };
    let product = |l: &Linear| Ok::<_, crate::Error>(l.forward(x)?.to_dtype(dtype)?.contiguous()?);
    let (qkv, z, beta, decay) = (product(&w.qkv)?, product(&w.z)?, product(&w.beta)?, product(&w.decay)?);
    let args = DeltaArgs { layer: w.layer(), qkv: &qkv, z: &z, beta: &beta, decay: &decay, start: chunk.start };
    w.out.forward(&cache.forward(&args)?.to_dtype(x.dtype())?)
}
