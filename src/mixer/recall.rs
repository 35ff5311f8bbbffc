//! Exact recall.
//!
//! Prefill is exact: `out[t] = attention(q[t], all positions up to start + t)`, read from the host store; under
//! `--prefill butterfly` it is butterfly attention, as long as the text is read by prefill alone. A decode step has three
//! zones under one softmax: sinks and window raw, the best of the other tokens exactly, and an estimate of the
//! rest ([`crate::ops::recall`]).

use super::{butterfly, ChunkContext, Phase, Projections, Qkv};
use crate::cache::{Codes, RecallKv, Ring};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::RecallLayer;
use crate::ops::recall::{attend_far, FarArgs};
use crate::ops::{attend, merge_attention, view, Attended, AttentionArgs, KeyValues, Segment};
use crate::retrofit::KeyPooling;
use candle_core::Tensor;

pub(super) fn forward(
    layer: &RecallLayer,
    p: &Projections,
    x: &Tensor,
    chunk: &ChunkContext,
    cache: &mut RecallKv,
) -> Result<Tensor> {
    let plain = layer.summaries.is_some() && layer.settings.pool == KeyPooling::PreRope;
    let qkv = p.project(x, &chunk.tables[p.rope], plain)?;
    let Qkv { q, k, v, .. } = &qkv;
    if chunk.phase == Phase::Prefill {
        let attended = match layer.summaries.as_ref().zip(cache.summaries(chunk.start, x.dim(0)?)) {
            Some((summaries, pools)) => butterfly::attend_chunk(summaries, p, &qkv, chunk, pools)?,
            None => cache.store().attend(q, KeyValues { k, v }, chunk.start, p.scale)?,
        };
        cache.push(k, v, chunk.start)?;
        return p.output(&attended, x);
    }
    let mut parts = vec![];
    for t in 0..x.dim(0)? {
        let (q, k, v) = (q.narrow(0, t, 1)?, k.narrow(0, t, 1)?, v.narrow(0, t, 1)?);
        parts.push(step(layer, p, [&q, &k, &v], chunk.start + t, cache)?);
    }
    p.output(&Tensor::cat(&parts, 0)?, x)
}

/// Attends one token, `[1, H, D]`, at `position`, and stores it.
fn step(
    layer: &RecallLayer,
    p: &Projections,
    [q, k, v]: [&Tensor; 3],
    position: usize,
    cache: &mut RecallKv,
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
    if layer.far(position).is_empty() {
        cache.push(k, v, position)?;
        return Ok(near.out);
    }
    let out = match &mut cache.codes {
        Codes::Cpu(_) => None,
        #[cfg(feature = "cuda")]
        Codes::Gpu(codes) => {
            let at = (position, layer.far(position));
            Some(codes.step([q, k, v], &near, at, (p.scale, cache.store.gpu()?))?)
        }
    };
    let out = match out {
        Some(out) => out,
        None => {
            let (far, chosen) = far_on_cpu(layer, p, q, &near, position, cache)?;
            cache.count(&chosen);
            merge_attention(&[near, far])?.out
        }
    };
    cache.push_step(k, v, position)?;
    Ok(out)
}

/// Attention of one token to the far zone, and the positions fetched for each KV head.
fn far_on_cpu(
    layer: &RecallLayer,
    p: &Projections,
    q: &Tensor,
    near: &Attended,
    position: usize,
    cache: &RecallKv,
) -> Result<(Attended, Vec<Vec<u32>>)> {
    let (store, far) = (cache.store().rows()?, layer.far(position));
    let elsewhere = || Error::new(ErrorKind::Backend, "recall", "codes are on a GPU");
    let codes = cache.codes.in_memory().ok_or_else(elsewhere)?;
    let lse = near.lse.as_ref().map(Tensor::flatten_all).transpose()?.map(|l| l.to_vec1::<f32>()).transpose()?;
    let (queries, rows, values) = (view(q, "queries")?, view(store, "recall store")?, codes.value_rows());
    let exact: Vec<&[f32]> = rows.values::<f32>()?.chunks_exact(layer.ctx * 2 * p.head_dim).collect();
    let far = attend_far(&FarArgs {
        q: queries.values()?,
        near: &lse.unwrap_or_default(),
        scale: p.scale,
        far: (far.start, far.end),
        dim: p.head_dim,
        chosen: layer.settings.recall,
        code: codes.key_codes(),
        codes: &codes.keys(),
        exact: &exact,
        rest: codes.rest(&values),
    })?;
    let attended = Attended {
        out: Tensor::from_vec(far.out, (1, p.heads, p.head_dim), q.device())?,
        lse: Some(Tensor::from_vec(far.lse, (1, p.heads), q.device())?),
    };
    Ok((attended, far.chosen))
}
