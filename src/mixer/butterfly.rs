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
use crate::ops::{attend, pool_blocks, AttentionArgs, FarArgs, FarRow, Pooled};
use crate::retrofit::{FarPosition, Pool};
use candle_core::Tensor;
use std::collections::BTreeMap;

/// The far rows of a chunk.
struct Far {
    k: Tensor,
    v: Tensor,
    routes: Vec<Vec<FarRow>>,
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
    let q_far = match (&far, &plain) {
        (Some(_), Some((plain_q, _))) if s.far_position == FarPosition::Clamp => {
            let edge = vec![(layer.trained - 1) as f32; x.dim(0)?];
            Some(step.ropes[p.rope].table(edge.into_iter(), x.device())?.apply(plain_q)?)
        }
        _ => None,
    };
    let far: Vec<FarArgs> =
        far.iter().map(|f| FarArgs { k: &f.k, v: &f.v, block: s.block, routes: &f.routes }).collect();
    let out = attend(&AttentionArgs {
        q: &q,
        q_far: q_far.as_ref(),
        k: &k,
        v: &v,
        start: step.start,
        past: Some(cache.local.rows()),
        sinks: cache.sinks().map(|r| (r.rows(), r.capacity())),
        window: s.raw_window(),
        far: far.as_slice(),
        scale: p.scale,
    })?;
    cache.local.write(&k, &v, step.start)?;
    cache.keep_summaries(&pooled)?;
    p.output(&out)
}

/// The routed summaries of each query block of the chunk, gathered.
fn far(
    layer: &ButterflyLayer,
    step: &Step,
    tokens: usize,
    cache: &TwoPool,
    pooled: &Pooled,
    rope: &Rope,
) -> Result<Option<Far>> {
    let s = &layer.settings;
    let clamp = s.far_position == FarPosition::Clamp;
    let (first, last) = (step.start / s.block, (step.start + tokens - 1) / s.block);
    // Each summary is gathered once, however many query blocks read it.
    let mut rows = BTreeMap::new();
    let mut blocks = vec![];
    let mut routes: Vec<Vec<FarRow>> = vec![];
    for b in first..=last {
        let mut route = vec![];
        for n in layer.route(b) {
            let row = *rows.entry(n).or_insert_with(|| {
                blocks.push(n);
                blocks.len() - 1
            });
            let near = FarRow { bias: layer.bias(n), ..FarRow::one(row) };
            if clamp {
                // Within the trained distance a summary is read at its own position; from there on at that distance.
                let edge = s.pooled_position(n).floor() as usize + layer.trained;
                route.push(FarRow { until: edge, ..near });
                route.push(FarRow { from: edge, far_query: true, ..near });
            } else {
                route.push(near);
            }
        }
        routes.push(route);
    }
    if blocks.is_empty() {
        return Ok(None);
    }
    let (mut k, mut v) = gather(&blocks, cache, pooled)?;
    if s.pool == Pool::PreRope {
        let positions: Vec<f32> = blocks.iter().map(|n| s.pooled_position(*n)).collect();
        let rotated = rope.table(positions.into_iter(), k.device())?.apply(&k)?;
        if clamp {
            // Second half: unrotated, for queries rotated to the edge.
            for r in routes.iter_mut().flatten().filter(|r| r.far_query) {
                r.row += blocks.len();
            }
            k = Tensor::cat(&[&rotated, &k], 0)?;
            v = Tensor::cat(&[&v, &v], 0)?;
        } else {
            k = rotated;
        }
    }
    Ok(Some(Far { k, v, routes }))
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
