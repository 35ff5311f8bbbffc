//! Causal attention over the raw positions of a ring: all of them (dense), or the last `window` (Gemma 3's local layers).
//!
//! `out[t] = attention of q[t] over positions left(p)..=p`, `p = start + t`; the chunk's keys and values then enter the ring.

use super::{Projections, Step};
use crate::cache::Ring;
use crate::error::Result;
use crate::ops::{attend, AttentionArgs, KeyValues, Segment, Window};
use candle_core::Tensor;

pub(super) fn forward(p: &Projections, window: Window, x: &Tensor, step: &Step, cache: &mut Ring) -> Result<Tensor> {
    let qkv = p.project(x, &step.tables[p.rope], false)?;
    let own = KeyValues { k: &qkv.k, v: &qkv.v };
    let attended = attend(&AttentionArgs {
        q: &qkv.q,
        start: step.start,
        window,
        scale: p.scale,
        segments: &[Segment::Ring(cache.rows()), Segment::Chunk(own)],
        lse: false,
    })?;
    cache.write(&qkv.k, &qkv.v, step.start)?;
    p.output(&attended.out)
}
