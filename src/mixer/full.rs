//! Dense causal attention over a cache of the whole context.

use super::{Projections, Step};
use crate::cache::Ring;
use crate::error::Result;
use crate::ops::{attend, AttentionArgs, Window};
use candle_core::Tensor;

/// The stock layer.
pub struct Full {
    /// Its projections.
    pub projections: Projections,
}

impl Full {
    pub(super) fn forward(&self, x: &Tensor, step: &Step, cache: &mut Ring) -> Result<Tensor> {
        windowed(&self.projections, Window::Unbounded, x, step, cache)
    }
}

/// Attention over the last positions of a ring and the chunk, which then enters the ring.
pub(super) fn windowed(p: &Projections, window: Window, x: &Tensor, step: &Step, cache: &mut Ring) -> Result<Tensor> {
    let qkv = p.project(x, &step.tables[p.rope], false)?;
    let out = attend(&AttentionArgs {
        q: &qkv.q,
        q_far: None,
        k: &qkv.k,
        v: &qkv.v,
        start: step.start,
        past: Some(cache.rows()),
        sinks: None,
        window,
        far: &[],
        scale: p.scale,
    })?;
    cache.write(&qkv.k, &qkv.v, step.start)?;
    p.output(&out)
}
