//! Dense attention over the tokens that an eviction rule keeps.
//!
//! A chunk is cut into pieces where the cache evicts, so that results do not depend on the chunking: `out[t] =
//! attention(q[t], rows kept before its piece, positions of the piece up to t)`. The cache evicts after a piece
//! ([`crate::cache::CompressedKv`]).

use super::{ChunkContext, Projections, Qkv};
use crate::cache::CompressedKv;
use crate::error::Result;
use crate::ops::{attend, AttentionArgs, KeyValues, Segment, Window};
use candle_core::Tensor;

pub(super) fn forward(p: &Projections, x: &Tensor, chunk: &ChunkContext, cache: &mut CompressedKv) -> Result<Tensor> {
    let Qkv { q, k, v, .. } = p.project(x, &chunk.tables[p.rope], false)?;
    let tokens = x.dim(0)?;
    let mut parts = vec![];
    let mut at = 0;
    while at < tokens {
        let n = cache.until_eviction(tokens - at);
        let (q, k, v) = (q.narrow(0, at, n)?, k.narrow(0, at, n)?, v.narrow(0, at, n)?);
        let attended = attend(&AttentionArgs {
            q: &q,
            // A row index, not a position: all rows before the piece are read, and keys are stored rotated.
            start: cache.count(),
            window: Window::Unbounded,
            scale: p.scale,
            segments: &[Segment::Ring(cache.rows()), Segment::Chunk(KeyValues { k: &k, v: &v })],
            lse: false,
        })?;
        parts.push(attended.out);
        cache.push(&q, &k, &v)?;
        at += n;
    }
    match parts.as_slice() {
        [whole] => p.output(whole, x),
        _ => p.output(&Tensor::cat(&parts, 0)?, x),
    }
}
