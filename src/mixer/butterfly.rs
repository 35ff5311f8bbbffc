//! Compressed butterfly attention: an exact window, sinks, and mean-pooled summaries of a few earlier blocks under one
//! softmax.
//!
//! Order of work on a chunk: store its sinks; pool its blocks; gather the summaries that its query blocks read, from
//! the pool and from the chunk itself; run the attention operator; then write the chunk's keys and values to the local
//! ring and its summaries to the summary pool. Decode is the same with a chunk of one token.

use super::{ChunkContext, Projections, Qkv};
use crate::cache::TwoPool;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::ButterflyLayer;
use crate::nn::Rope;
use crate::ops::{attend, pool_blocks, AttentionArgs, FarRow, KeyValues, Pooled, RowList, Segment, Store, StoreRows};
use crate::retrofit::{FarPosition, KeyPooling};
use candle_core::Tensor;
use std::collections::BTreeMap;

/// Summaries that a chunk's query blocks read, all scored with the same queries.
struct Far {
    k: Tensor,
    v: Tensor,
    routes: Vec<Vec<FarRow>>,
    /// Whether they are scored with queries rotated to the last trained position.
    at_edge: bool,
}

pub(super) fn forward(
    layer: &ButterflyLayer,
    p: &Projections,
    x: &Tensor,
    chunk: &ChunkContext,
    cache: &mut TwoPool,
) -> Result<Tensor> {
    let qkv = p.project(x, &chunk.tables[p.rope], layer.settings.pool == KeyPooling::PreRope)?;
    p.output(&attend_chunk(layer, p, &qkv, chunk, cache)?, x)
}

/// Attends a chunk to its window, sinks and routed summaries, and stores it in `cache`.
///
/// # Shapes
/// `[T, H, D]`.
pub(super) fn attend_chunk(
    layer: &ButterflyLayer,
    p: &Projections,
    Qkv { q, k, v, plain }: &Qkv,
    chunk: &ChunkContext,
    cache: &mut TwoPool,
) -> Result<Tensor> {
    let s = &layer.settings;
    let tokens = q.dim(0)?;
    cache.keep_sinks(k, v, chunk.start)?;
    let to_pool = plain.as_ref().map_or(k, |(_, k)| k);
    let pooled = pool_blocks(to_pool, v, chunk.start, s.block, s.sink_tokens, &mut cache.running)?;
    let far = far(layer, chunk, tokens, cache, &pooled, &chunk.ropes[p.rope])?;
    let q_edge = match &plain {
        Some((plain_q, _)) if far.iter().any(|f| f.at_edge) => {
            let edge = vec![(layer.trained - 1) as f32; tokens];
            Some(chunk.ropes[p.rope].table(edge.into_iter(), q.device())?.apply(plain_q)?)
        }
        _ => None,
    };
    let mut segments = vec![Segment::Ring(cache.local.rows()), Segment::Chunk(KeyValues { k, v })];
    segments.extend(cache.sinks().map(|r| Segment::Sinks(r.rows(), r.capacity())));
    segments.extend(far.iter().map(|f| {
        let (rows, read) =
            (StoreRows::Tensors(KeyValues { k: &f.k, v: &f.v }), RowList::Blocks { block: s.block, rows: &f.routes });
        Segment::Store(Store { rows, read, q: q_edge.as_ref().filter(|_| f.at_edge) })
    }));
    let attended = attend(&AttentionArgs {
        q,
        start: chunk.start,
        window: s.raw_window(),
        scale: p.scale,
        segments: &segments,
        lse: false,
    })?;
    cache.local.write(k, v, chunk.start)?;
    cache.keep_summaries(&pooled)?;
    Ok(attended.out)
}

/// Gathers the summaries that the chunk's query blocks read; empty if they read none.
fn far(
    layer: &ButterflyLayer,
    chunk: &ChunkContext,
    tokens: usize,
    cache: &TwoPool,
    pooled: &Pooled,
    rope: &Rope,
) -> Result<Vec<Far>> {
    let s = &layer.settings;
    let clamp = s.far_position == FarPosition::Clamp;
    let (first, last) = (chunk.start / s.block, (chunk.start + tokens - 1) / s.block);
    // Each summary is gathered once, however many query blocks read it.
    let mut rows = BTreeMap::new();
    let mut blocks = vec![];
    let (mut routes, mut at_edge): (Vec<Vec<FarRow>>, Vec<Vec<FarRow>>) = (vec![], vec![]);
    for b in first..=last {
        let (mut near, mut edge) = (vec![], vec![]);
        for n in layer.route(b) {
            let row = *rows.entry(n).or_insert_with(|| {
                blocks.push(n);
                blocks.len() - 1
            });
            let read = FarRow { bias: layer.bias(n), ..FarRow::one(row) };
            if clamp {
                // Up to the trained length a summary is scored at its true distance, beyond it at the trained length.
                let from = (s.pooled_position(n).floor() as usize).saturating_add(layer.trained);
                near.push(FarRow { until: from, ..read });
                edge.push(FarRow { from, ..read });
            } else {
                near.push(read);
            }
        }
        routes.push(near);
        at_edge.push(edge);
    }
    if blocks.is_empty() {
        return Ok(vec![]);
    }
    let (k, v) = gather(&blocks, cache, pooled)?;
    if s.pool == KeyPooling::PostRope {
        return Ok(vec![Far { k, v, routes, at_edge: false }]);
    }
    let positions: Vec<f32> = blocks.iter().map(|n| s.pooled_position(*n)).collect();
    let rotated = rope.table(positions.into_iter(), k.device())?.apply(&k)?;
    let mut far = vec![Far { k: rotated, v: v.clone(), routes, at_edge: false }];
    if clamp {
        // Unrotated keys, scored by queries rotated to the last trained position.
        far.push(Far { k, v, routes: at_edge, at_edge: true });
    }
    Ok(far)
}

/// Gathers the summaries of `blocks`, from the pool or from the blocks that the chunk completes.
fn gather(blocks: &[usize], cache: &TwoPool, pooled: &Pooled) -> Result<(Tensor, Tensor)> {
    let missing = || Error::new(ErrorKind::Backend, "summary pool", "the summary of a routed block is not stored");
    let stored = cache.summaries(pooled.first);
    if !pooled.k.device().is_cpu() {
        // One lookup over both sources: a launch per row would cost more than copying the pool.
        let (ring, pool_rows) = match &stored {
            Some((ring, _)) => (Some(ring.rows()), ring.capacity()),
            None => (None, 0),
        };
        let index = blocks.iter().map(|n| match n.checked_sub(pooled.first) {
            Some(i) if i < pooled.count => Ok((pool_rows + i) as u32),
            None if stored.as_ref().is_some_and(|(_, blocks)| blocks.contains(n)) => Ok((n % pool_rows) as u32),
            _ => Err(missing()),
        });
        let index = Tensor::new(index.collect::<Result<Vec<u32>>>()?, pooled.k.device())?;
        let look_up = |pool: Option<&Tensor>, own: &Tensor| match pool {
            Some(pool) => Tensor::cat(&[pool, own], 0)?.index_select(&index, 0),
            None => own.index_select(&index, 0),
        };
        return Ok((look_up(ring.map(|r| r.k), &pooled.k)?, look_up(ring.map(|r| r.v), &pooled.v)?));
    }
    let (mut k, mut v) = (vec![], vec![]);
    for &n in blocks {
        let (ks, vs, row) = match n.checked_sub(pooled.first) {
            Some(i) if i < pooled.count => (&pooled.k, &pooled.v, i),
            Some(_) => return Err(missing()),
            None => {
                let (ring, _) = stored.as_ref().filter(|(_, blocks)| blocks.contains(&n)).ok_or_else(missing)?;
                (ring.rows().k, ring.rows().v, n % ring.capacity())
            }
        };
        k.push(ks.narrow(0, row, 1)?);
        v.push(vs.narrow(0, row, 1)?);
    }
    Ok((Tensor::cat(&k, 0)?, Tensor::cat(&v, 0)?))
}
