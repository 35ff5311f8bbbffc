//! Random calls of the attention operator: every kind of segment, ragged lengths, rings that wrap.

use super::Any;
use bfly::ops::{attend, reference, AttentionArgs, FarArgs, FarRow, Past, Window};
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

#[derive(Debug, Clone)]
pub struct Case {
    pub tokens: usize,
    pub start: usize,
    pub group: usize,
    pub kv_heads: usize,
    pub dim: usize,
    pub window: Window,
    pub sinks: usize,
    pub far_rows: usize,
    /// Runs of rows of a second store.
    pub far_runs: usize,
    pub clamp: bool,
    pub seed: u64,
}

fn window() -> impl Strategy<Value = Window> {
    prop_oneof![
        Just(Window::Unbounded),
        (1usize..80).prop_map(Window::Tokens),
        (1usize..40, 0usize..4).prop_map(|(block, count)| Window::Blocks { block, count }),
    ]
}

prop_compose! {
    pub fn case()(
        tokens in 1usize..150,
        start in prop_oneof![Just(0usize), 1usize..700],
        group in 1usize..=8,
        kv_heads in 1usize..4,
        dim in prop_oneof![Just(8usize), Just(10), Just(16), Just(64), Just(80), Just(128), Just(256)],
        window in window(),
        sinks in 0usize..6,
        far_rows in 0usize..20,
        far_runs in 0usize..6,
        clamp in any::<bool>(),
        seed in any::<u64>(),
    ) -> Case {
        Case { tokens, start, group, kv_heads, dim, window, sinks, far_rows, far_runs, clamp, seed }
    }
}

/// Values that repeat from a seed, unlike candle's own.
pub fn values(shape: (usize, usize, usize), seed: u64, size: f32) -> candle_core::Result<Tensor> {
    let mut x = seed | 1;
    let next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        ((x >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * size
    };
    Tensor::from_iter(std::iter::repeat_with(next).take(shape.0 * shape.1 * shape.2), &Device::Cpu)?.reshape(shape)
}

/// The operator's result on `device` with inputs in `dtype`, and the definition's on the same inputs: both f32 on the CPU.
pub fn both(c: &Case, dtype: DType, device: &Device) -> Any<(Tensor, Tensor)> {
    let heads = c.group * c.kv_heads;
    let make = |shape, seed| values(shape, seed, 4.0)?.to_dtype(dtype)?.to_device(device);
    let keys = |rows: usize, salt: u64| make((rows, c.kv_heads, c.dim), c.seed ^ salt);
    let (q, q_far) = (make((c.tokens, heads, c.dim), c.seed)?, make((c.tokens, heads, c.dim), !c.seed)?);
    let (k, v) = (keys(c.tokens, 1)?, keys(c.tokens, 2)?);
    let block = match c.window {
        Window::Blocks { block, .. } => block,
        _ => 16,
    };
    // Just large enough for the window, so that the ring wraps at odd places.
    let capacity = (c.start - c.window.left(c.start)).max(1) + c.seed as usize % 7;
    let (past_k, past_v) = (keys(capacity, 3)?, keys(capacity, 4)?);
    let (sink_k, sink_v) = (keys(c.sinks.max(1), 5)?, keys(c.sinks.max(1), 6)?);
    let (far_k, far_v) = (keys(c.far_rows.max(1), 7)?, keys(c.far_rows.max(1), 8)?);
    let blocks = (c.start + c.tokens - 1) / block - c.start / block + 1;
    let routes: Vec<Vec<FarRow>> = (0..blocks)
        .map(|b| {
            let pick = |row: usize| (row as u64 * 7 + b as u64 * 5 + c.seed).is_multiple_of(3);
            let far = |row: usize| FarRow {
                row,
                count: 1,
                bias: (row as f32 - 3.0) / 2.0,
                far_query: c.clamp && row.is_multiple_of(2),
                from: if c.clamp { c.start + row * 3 } else { 0 },
                until: if row % 5 == 4 { c.start + row * 6 } else { usize::MAX },
            };
            (0..c.far_rows).filter(|r| pick(*r)).map(far).collect()
        })
        .collect();
    // Raw blocks of any length, also longer than a kernel's tile, at places that overlap.
    let length = |run: usize| 1 + (c.seed as usize % 61 + run * 37) % 150;
    let (raw_k, raw_v) = (keys(40 + 150 + 6 * 11, 9)?, keys(40 + 150 + 6 * 11, 10)?);
    let runs: Vec<Vec<FarRow>> = (0..blocks)
        .map(|b| {
            let pick = |run: &usize| (*run as u64 * 3 + b as u64 * 7 + c.seed) % 4 != 1;
            let row = |run: usize| FarRow {
                bias: if run % 3 == 2 { 0.75 } else { 0.0 },
                far_query: c.clamp && run % 2 == 1,
                until: if run == 4 { c.start + 30 } else { usize::MAX },
                ..FarRow::run(run * 11, length(run))
            };
            (0..c.far_runs).filter(pick).map(row).collect()
        })
        .collect();
    let stores = [
        (c.far_rows > 0).then_some(FarArgs { k: &far_k, v: &far_v, block, routes: &routes }),
        (c.far_runs > 0).then_some(FarArgs { k: &raw_k, v: &raw_v, block, routes: &runs }),
    ];
    let stores: Vec<FarArgs> = stores.into_iter().flatten().collect();
    let args = AttentionArgs {
        q: &q,
        q_far: c.clamp.then_some(&q_far),
        k: &k,
        v: &v,
        start: c.start,
        past: Some(Past { k: &past_k, v: &past_v }),
        sinks: (c.sinks > 0).then_some((Past { k: &sink_k, v: &sink_v }, c.sinks)),
        window: c.window,
        far: &stores,
        scale: 1.0 / (c.dim as f32).sqrt(),
    };
    let got = attend(&args)?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    Ok((got, reference(&args)?))
}
