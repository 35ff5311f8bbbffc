//! Compressed butterfly attention: an exact window, sinks, and the means of a few earlier blocks under one softmax.
//!
//! A chunk is attended in this order: its sinks are kept; its blocks are pooled; each query block's routes are looked up among
//! the pool and the chunk's own means; the operator runs; then the chunk's tail enters the local ring and its means the
//! summary pool. Decode is the same with a chunk of one.

use super::{Projections, Qkv, Step};
use crate::cache::TwoPool;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::ButterflyLayer;
use crate::nn::Rope;
use crate::ops::{attend, pool_blocks, AttentionArgs, FarRow, KeyValues, Pooled, RowList, Segment, Store, StoreRows};
use crate::retrofit::{FarPosition, Pool};
use candle_core::Tensor;
use std::collections::BTreeMap;

/// Summaries of a chunk's query blocks, all scored by one kind of query.
struct Far {
    k: Tensor,
    v: Tensor,
    routes: Vec<Vec<FarRow>>,
    /// Whether queries rotated to the edge of the trained length score them.
    at_edge: bool,
}

pub(super) fn forward(
    layer: &ButterflyLayer,
    p: &Projections,
    x: &Tensor,
    step: &Step,
    cache: &mut TwoPool,
) -> Result<Tensor> {
    let s = &layer.settings;
    let Qkv { q, k, v, plain } = p.project(x, &step.tables[p.rope], s.pool == Pool::PreRope)?;
    cache.keep_sinks(&k, &v, step.start)?;
    let to_pool = plain.as_ref().map_or(&k, |(_, k)| k);
    let pooled = pool_blocks(to_pool, &v, step.start, s.block, s.sink_tokens, &mut cache.running)?;
    let far = far(layer, step, x.dim(0)?, cache, &pooled, &step.ropes[p.rope])?;
    let q_edge = match &plain {
        Some((plain_q, _)) if far.iter().any(|f| f.at_edge) => {
            let edge = vec![(layer.trained - 1) as f32; x.dim(0)?];
            Some(step.ropes[p.rope].table(edge.into_iter(), x.device())?.apply(plain_q)?)
        }
        _ => None,
    };
    let mut segments = vec![Segment::Ring(cache.local.rows()), Segment::Chunk(KeyValues { k: &k, v: &v })];
    segments.extend(cache.sinks().map(|r| Segment::Sinks(r.rows(), r.capacity())));
    segments.extend(far.iter().map(|f| {
        let (rows, read) =
            (StoreRows::Tensors(KeyValues { k: &f.k, v: &f.v }), RowList::Blocks { block: s.block, rows: &f.routes });
        Segment::Store(Store { rows, read, q: q_edge.as_ref().filter(|_| f.at_edge) })
    }));
    let attended = attend(&AttentionArgs {
        q: &q,
        start: step.start,
        window: s.raw_window(),
        scale: p.scale,
        segments: &segments,
        lse: false,
    })?;
    cache.local.write(&k, &v, step.start)?;
    cache.keep_summaries(&pooled)?;
    p.output(&attended.out)
}

/// The routed summaries of each query block of the chunk, gathered; none where no block reads any.
fn far(
    layer: &ButterflyLayer,
    step: &Step,
    tokens: usize,
    cache: &TwoPool,
    pooled: &Pooled,
    rope: &Rope,
) -> Result<Vec<Far>> {
    let s = &layer.settings;
    let clamp = s.far_position == FarPosition::Clamp;
    let (first, last) = (step.start / s.block, (step.start + tokens - 1) / s.block);
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
                // Within the trained distance a summary is read at its own position; from there on at that distance.
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
    if s.pool == Pool::PostRope {
        return Ok(vec![Far { k, v, routes, at_edge: false }]);
    }
    let positions: Vec<f32> = blocks.iter().map(|n| s.pooled_position(*n)).collect();
    let rotated = rope.table(positions.into_iter(), k.device())?.apply(&k)?;
    let mut far = vec![Far { k: rotated, v: v.clone(), routes, at_edge: false }];
    if clamp {
        // Unrotated, for queries rotated to the edge.
        far.push(Far { k, v, routes: at_edge, at_edge: true });
    }
    Ok(far)
}

/// Keys and values of `blocks`, from the pool or from what the chunk has just completed.
fn gather(blocks: &[usize], cache: &TwoPool, pooled: &Pooled) -> Result<(Tensor, Tensor)> {
    let missing = || Error::new(ErrorKind::Backend, "summary pool", "a routed block is not held");
    let held = cache.summaries(pooled.first);
    if !pooled.k.device().is_cpu() {
        // One lookup over both sources: a launch per row would cost more than copying the pool.
        let (ring, pool_rows) = match &held {
            Some((ring, _)) => (Some(ring.rows()), ring.capacity()),
            None => (None, 0),
        };
        let index = blocks.iter().map(|n| match n.checked_sub(pooled.first) {
            Some(i) if i < pooled.count => Ok((pool_rows + i) as u32),
            None if held.as_ref().is_some_and(|(_, blocks)| blocks.contains(n)) => Ok((n % pool_rows) as u32),
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
                let (ring, _) = held.as_ref().filter(|(_, blocks)| blocks.contains(&n)).ok_or_else(missing)?;
                (ring.rows().k, ring.rows().v, n % ring.capacity())
            }
        };
        k.push(ks.narrow(0, row, 1)?);
        v.push(vs.narrow(0, row, 1)?);
    }
    Ok((Tensor::cat(&k, 0)?, Tensor::cat(&v, 0)?))
}
