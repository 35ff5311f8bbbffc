//! Dense attention over the tokens that a rule keeps.
//!
//! `out[t] = attention of q[t] over the rows kept before its piece and the piece's positions up to t`. A chunk is cut into pieces
//! where the state may evict, so that what a query reads does not depend on how the text is fed; the state decides what stays
//! once a piece was attended ([`crate::cache::CompressedKv`]).

use super::{Projections, Qkv, Step};
use crate::cache::CompressedKv;
use crate::error::Result;
use crate::ops::{attend, AttentionArgs, KeyValues, Segment, Window};
use candle_core::Tensor;

pub(super) fn forward(p: &Projections, x: &Tensor, step: &Step, cache: &mut CompressedKv) -> Result<Tensor> {
    let Qkv { q, k, v, .. } = p.project(x, &step.tables[p.rope], false)?;
    let tokens = x.dim(0)?;
    let mut parts = vec![];
    let mut at = 0;
    while at < tokens {
        let n = cache.piece(tokens - at);
        let (q, k, v) = (q.narrow(0, at, n)?, k.narrow(0, at, n)?, v.narrow(0, at, n)?);
        let attended = attend(&AttentionArgs {
            q: &q,
            // Rows, not positions: all that lie before the piece are read, and keys carry their rotation.
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
        [whole] => p.output(whole),
        _ => p.output(&Tensor::cat(&parts, 0)?),
    }
}
