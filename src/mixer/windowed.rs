//! Causal attention over all positions (dense), or over the last `window` (Gemma 3's sliding-window layers).
//!
//! `out[t] = attention(q[t], positions left(p)..=p)` with `p = start + t`; then the chunk's keys and values are written
//! to the ring.

use super::{ChunkContext, Projections};
use crate::cache::Ring;
use crate::error::Result;
use crate::ops::{attend, AttentionArgs, KeyValues, Segment, Window};
use candle_core::Tensor;

pub(super) fn forward(
    p: &Projections,
    window: Window,
    x: &Tensor,
    chunk: &ChunkContext,
    cache: &mut Ring,
) -> Result<Tensor> {
    let qkv = p.project(x, &chunk.tables[p.rope], false)?;
    let own = KeyValues { k: &qkv.k, v: &qkv.v };
    let attended = attend(&AttentionArgs {
        q: &qkv.q,
        start: chunk.start,
        window,
        scale: p.scale,
        segments: &[Segment::Ring(cache.rows()), Segment::Chunk(own)],
        lse: false,
    })?;
    cache.write(&qkv.k, &qkv.v, chunk.start)?;
    p.output(&attended.out, x)
}
