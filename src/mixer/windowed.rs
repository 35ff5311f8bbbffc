//! Causal attention over the raw positions of a ring: all of them (dense), or the last `window` (Gemma 3's local layers).
//!
//! `out[t] = attention of q[t] over positions left(p)..=p`, `p = start + t`; the chunk's keys and values then enter the ring.

use super::{Projections, Step};
use crate::cache::Ring;
use crate::error::Result;
use crate::ops::{attend, AttentionArgs, Window};
use candle_core::Tensor;

pub(super) fn forward(p: &Projections, window: Window, x: &Tensor, step: &Step, cache: &mut Ring) -> Result<Tensor> {
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
