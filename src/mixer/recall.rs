//! Exact recall.
//!
//! Prefill is exact: `out[t] = attention(q[t], all positions up to start + t)`, read from the host store. A decode step
//! has three zones under one softmax: sinks and window raw, the best of the other tokens exactly, and an estimate of the
//! rest ([`crate::ops::recall`]).

use super::{ChunkContext, Phase, Projections, Qkv};
use crate::cache::{RecallKv, Ring};
use crate::error::Result;
use crate::layout::RecallLayer;
use crate::ops::recall::{attend_far, FarArgs};
use crate::ops::{attend, merge_attention, view, Attended, AttentionArgs, KeyValues, Segment};
use candle_core::Tensor;

pub(super) fn forward(
    layer: &RecallLayer,
    p: &Projections,
    x: &Tensor,
    chunk: &ChunkContext,
    cache: &mut RecallKv,
) -> Result<Tensor> {
    let Qkv { q, k, v, .. } = p.project(x, &chunk.tables[p.rope], false)?;
    if chunk.phase == Phase::Prefill {
        let attended = cache.store().attend(&q, KeyValues { k: &k, v: &v }, chunk.start, p.scale)?;
        cache.push(&k, &v, chunk.start)?;
        return p.output(&attended);
    }
    let mut parts = vec![];
    for t in 0..x.dim(0)? {
        let (q, k, v) = (q.narrow(0, t, 1)?, k.narrow(0, t, 1)?, v.narrow(0, t, 1)?);
        parts.push(step(layer, p, [&q, &k, &v], chunk.start + t, cache)?);
        cache.push(&k, &v, chunk.start + t)?;
    }
    p.output(&Tensor::cat(&parts, 0)?)
}

/// Attends one token, `[1, H, D]`, at `position`.
fn step(
    layer: &RecallLayer,
    p: &Projections,
    [q, k, v]: [&Tensor; 3],
    position: usize,
    cache: &RecallKv,
) -> Result<Tensor> {
    let mut segments = vec![Segment::Ring(cache.local.rows()), Segment::Chunk(KeyValues { k, v })];
    segments.extend(cache.sinks().map(|r: &Ring| Segment::Sinks(r.rows(), r.capacity())));
    let near = attend(&AttentionArgs {
        q,
        start: position,
        window: layer.settings.raw_window(),
        scale: p.scale,
        segments: &segments,
        lse: true,
    })?;
    let far = layer.far(position);
    if far.is_empty() {
        return Ok(near.out);
    }
    let far = {
        let lse = near.lse.as_ref().map(Tensor::flatten_all).transpose()?.map(|l| l.to_vec1::<f32>()).transpose()?;
        let (q, rows) = (view(q, "queries")?, view(cache.store().rows()?, "recall store")?);
        let exact: Vec<&[f32]> = rows.values::<f32>()?.chunks_exact(layer.ctx * 2 * p.head_dim).collect();
        let ((code, codes), values) = (cache.keys(), cache.value_rows());
        attend_far(&FarArgs {
            q: q.values()?,
            near: &lse.unwrap_or_default(),
            scale: p.scale,
            far: (far.start, far.end),
            dim: p.head_dim,
            chosen: layer.settings.recall,
            code,
            codes: &codes,
            exact: &exact,
            rest: cache.rest(&values),
        })?
    };
    let device = q.device();
    let far = Attended {
        out: Tensor::from_vec(far.out, (1, p.heads, p.head_dim), device)?,
        lse: Some(Tensor::from_vec(far.lse, (1, p.heads), device)?),
    };
    Ok(merge_attention(&[near, far])?.out)
}
