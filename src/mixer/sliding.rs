//! Causal attention over the last `window` positions (Gemma 3's local layers).

use super::full::windowed;
use super::{Projections, Step};
use crate::cache::Ring;
use crate::error::Result;
use crate::ops::Window;
use candle_core::Tensor;

/// A sliding-window layer.
pub struct Sliding {
    /// Its projections.
    pub projections: Projections,
    /// Positions read, the query's own among them.
    pub window: usize,
}

impl Sliding {
    pub(super) fn forward(&self, x: &Tensor, step: &Step, cache: &mut Ring) -> Result<Tensor> {
        windowed(&self.projections, Window::Tokens(self.window), x, step, cache)
    }
}
