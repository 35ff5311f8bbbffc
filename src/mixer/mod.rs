//! The seam: how a layer mixes information across positions.
//!
//! Every variant takes the normed residual stream of a chunk and the layer's state and returns what is added to the stream.
//! Attention variants share [`Projections`] and differ in what they keep and what they let a query read.

mod butterfly;
mod evict;
mod full;
mod projections;
mod sliding;

pub use butterfly::Butterfly;
pub use evict::Evict;
pub use full::Full;
pub use projections::{Projections, Qkv};
pub use sliding::Sliding;

use crate::cache::LayerState;
use crate::error::{Error, ErrorKind, Result};
use crate::nn::{Rope, RopeTable};
use candle_core::Tensor;

/// What all layers of a forward pass share.
pub struct Step<'a> {
    /// Position of the chunk's first token.
    pub start: usize,
    /// The model's rotary embeddings,
    pub ropes: &'a [Rope],
    /// and each one's table for the chunk's positions.
    pub tables: &'a [RopeTable],
}

/// A layer's mixer.
pub enum Mixer {
    /// Dense causal attention.
    Full(Full),
    /// Causal attention over a sliding window.
    Sliding(Sliding),
    /// Compressed butterfly attention.
    Butterfly(Box<Butterfly>),
    /// Dense attention over what a rule keeps.
    Evict(Evict),
}

impl Mixer {
    /// # Shapes
    /// `x [T, hidden]` to the same.
    pub fn forward(&self, x: &Tensor, step: &Step, state: &mut LayerState) -> Result<Tensor> {
        match (self, state) {
            (Self::Full(m), LayerState::Dense(cache)) => m.forward(x, step, cache),
            (Self::Sliding(m), LayerState::Ring(cache)) => m.forward(x, step, cache),
            (Self::Butterfly(m), LayerState::TwoPool(cache)) => m.forward(x, step, cache),
            (Self::Evict(m), LayerState::Kept(cache)) => m.forward(x, step, cache),
            _ => Err(Error::new(ErrorKind::Backend, "cache", "was made for another plan than the model")),
        }
    }

    /// The shared projections.
    pub fn projections(&self) -> &Projections {
        match self {
            Self::Full(m) => &m.projections,
            Self::Sliding(m) => &m.projections,
            Self::Butterfly(m) => &m.projections,
            Self::Evict(m) => &m.projections,
        }
    }
}
