//! How a layer mixes information across positions.
//!
//! [`mix`] takes the normed residual stream of a chunk, the layer's plan, weights and state, and returns what is added to the stream.
//! Attention mixers share [`Projections`] and differ in what they keep and what they let a query read.

mod butterfly;
mod evict;
mod projections;
mod windowed;

pub use projections::{Projections, Qkv};

use crate::cache::LayerState;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{LayerKind, LayerPlan};
use crate::nn::{Rope, RopeTable};
use candle_core::Tensor;

/// What all layers of a forward pass share.
pub struct Step<'a> {
    /// Position of the chunk's first token.
    pub start: usize,
    /// The model's rotary embeddings.
    pub ropes: &'a [Rope],
    /// Each rotary embedding's table for the chunk's positions.
    pub tables: &'a [RopeTable],
}

/// Mixes a chunk in a layer that was planned as `plan`.
///
/// # Shapes
/// `x [T, hidden]` to the same.
///
/// # Errors
/// A state that was made for another plan; a backend's failure.
pub fn mix(plan: &LayerPlan, p: &Projections, x: &Tensor, step: &Step, state: &mut LayerState) -> Result<Tensor> {
    match (&plan.kind, state) {
        (LayerKind::Full, LayerState::Dense(cache)) | (LayerKind::Sliding { .. }, LayerState::Ring(cache)) => {
            windowed::forward(p, plan.window(), x, step, cache)
        }
        (LayerKind::Butterfly(layer), LayerState::TwoPool(cache)) => butterfly::forward(layer, p, x, step, cache),
        (LayerKind::Evict(_), LayerState::CompressedKv(cache)) => evict::forward(p, x, step, cache),
        _ => Err(Error::new(ErrorKind::Backend, "cache", "was made for another layout")),
    }
}
