//! Token mixers: the attention variants of a layer, and recurrent layers.
//!
//! [`mix`] takes the normed residual stream of a chunk, the layer's plan, weights and cache, and returns the layer's
//! output to be added to the residual stream. All attention shares [`Projections`]; it differs in what it caches and what
//! a query reads.

mod butterfly;
mod delta;
mod evict;
mod projections;
mod recall;
mod windowed;

pub use delta::DeltaWeights;
pub use projections::{Projections, Qkv};

use crate::cache::LayerState;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{LayerKind, LayerPlan};
use crate::nn::{Linear, Rope, RopeTable};
use candle_core::Tensor;

/// How a chunk is processed by layers with exact recall; other layers make no difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Attention to every position, as the stock model.
    Prefill,
    /// Token by token: window and sinks, fetched tokens, an estimate of the others.
    Decode,
}

/// Inputs of a forward pass that all layers share.
pub struct ChunkContext<'a> {
    /// Position of the chunk's first token.
    pub start: usize,
    /// How layers with exact recall process the chunk.
    pub phase: Phase,
    /// Rotary embeddings of the model.
    pub ropes: &'a [Rope],
    /// Table of each rotary embedding for the chunk's positions.
    pub tables: &'a [RopeTable],
}

/// Weights of a layer's mixer.
pub enum MixerWeights {
    /// Attention projections, the same under every method.
    Attention(Box<Projections>),
    /// Gated DeltaNet.
    Delta(Box<DeltaWeights>),
}

impl MixerWeights {
    /// Returns the attention projections of an attention layer.
    pub fn projections(&self) -> Option<&Projections> {
        match self {
            Self::Attention(p) => Some(p),
            Self::Delta(_) => None,
        }
    }

    /// Returns the matrices.
    pub fn matrices(&self) -> Vec<&Linear> {
        match self {
            Self::Attention(p) => p.matrices().collect(),
            Self::Delta(d) => d.matrices().into(),
        }
    }
}

/// Runs the mixer of a layer on a chunk: attention with its projections, or a recurrence, and the update of the layer's
/// cache.
///
/// # Shapes
/// `x [T, hidden]` to `[T, hidden]`.
///
/// # Errors
/// `state` was made for another plan; the device fails.
pub fn mix(
    plan: &LayerPlan,
    weights: &MixerWeights,
    x: &Tensor,
    chunk: &ChunkContext,
    state: &mut LayerState,
) -> Result<Tensor> {
    let other = || Err(Error::new(ErrorKind::Backend, "cache", "was made for another layout"));
    let p = match weights {
        MixerWeights::Attention(p) => p,
        MixerWeights::Delta(w) => match state {
            LayerState::Recurrent(cache) => return delta::forward(w, x, chunk, cache),
            _ => return other(),
        },
    };
    match (&plan.kind, state) {
        (LayerKind::Full, LayerState::Dense(cache)) | (LayerKind::Sliding { .. }, LayerState::Ring(cache)) => {
            windowed::forward(p, plan.window(), x, chunk, cache)
        }
        (LayerKind::Butterfly(layer), LayerState::TwoPool(cache)) => butterfly::forward(layer, p, x, chunk, cache),
        (LayerKind::Recall(layer), LayerState::Recall(cache)) => recall::forward(layer, p, x, chunk, cache),
        (LayerKind::Evict(_), LayerState::CompressedKv(cache)) => evict::forward(p, x, chunk, cache),
        _ => other(),
    }
}
