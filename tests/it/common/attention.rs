//! Random calls of the attention operator: every kind of segment, ragged lengths, rings that wrap.

use super::Any;
use bfly::ops::{
    attend, reference, Attended, AttentionArgs, FarRow, KeyValues, RowList, Segment, Store, StoreRows, Window, NO_ROW,
};
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
    /// Rows of a third store that a table lists for each query block, and positions per such block.
    pub table: (usize, usize),
    pub clamp: bool,
    /// Segments that are left out: 1 the chunk, 2 the ring.
    pub without: u8,
    pub seed: u64,
}

impl Case {
    /// One token late in a text, with every segment but a table.
    pub fn decode(start: usize, (group, kv_heads, dim): (usize, usize, usize), window: Window) -> Self {
        let (sinks, far_rows, far_runs, table) = (4, 9, 3, (0, 1));
        Self {
            tokens: 1,
            start,
            group,
            kv_heads,
            dim,
            window,
            sinks,
            far_rows,
            far_runs,
            table,
            clamp: false,
            without: 0,
            seed: 5,
        }
    }
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
        table in prop_oneof![Just((0usize, 1usize)), (1usize..30, prop_oneof![Just(1usize), 2usize..50])],
        clamp in any::<bool>(),
        without in prop_oneof![3 => Just(0u8), 1 => 1u8..4],
        seed in any::<u64>(),
    ) -> Case {
        Case { tokens, start, group, kv_heads, dim, window, sinks, far_rows, far_runs, table, clamp, without, seed }
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

/// The operator's result on `device` with inputs in `dtype`, and the definition's on the same inputs: both f32 on the CPU, with the
/// log-sum-exp.
pub fn both(c: &Case, dtype: DType, device: &Device) -> Any<(Attended, Attended)> {
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
                until: if run == 4 { c.start + 30 } else { usize::MAX },
                ..FarRow::run(run * 11, length(run))
            };
            (0..c.far_runs).filter(pick).map(row).collect()
        })
        .collect();
    // Rows by KV head and query block, some places empty.
    let (places, per) = c.table;
    let listed = (c.start + c.tokens - 1) / per - c.start / per + 1;
    let index: Vec<u32> = (0..c.kv_heads * listed * places)
        .map(|i| {
            let x = (i as u64 + c.seed % 1000).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
            if x.is_multiple_of(5) {
                NO_ROW
            } else {
                (x % 100) as u32
            }
        })
        .collect();
    let index = Tensor::from_vec(index, (c.kv_heads, listed, places.max(1) * usize::from(places > 0)), &Device::Cpu);
    let index = if places > 0 { Some(index?.to_device(device)?) } else { None };
    let (table_k, table_v) = (keys(100, 11)?, keys(100, 12)?);
    let far_q = c.clamp.then_some(&q_far);
    let mut segments = vec![];
    if c.without & 1 == 0 {
        segments.push(Segment::Chunk(KeyValues { k: &k, v: &v }));
    }
    if c.without & 2 == 0 {
        segments.push(Segment::Ring(KeyValues { k: &past_k, v: &past_v }));
    }
    if c.sinks > 0 {
        segments.push(Segment::Sinks(KeyValues { k: &sink_k, v: &sink_v }, c.sinks));
    }
    // A window that reaches before the chunk needs the ring where the chunk is attended to.
    let window = if c.without == 2 { Window::Tokens(1) } else { c.window };
    let stores = [
        (c.far_rows > 0).then_some((&far_k, &far_v, RowList::Blocks { block, rows: &routes }, far_q)),
        (c.far_runs > 0).then_some((&raw_k, &raw_v, RowList::Blocks { block, rows: &runs }, None)),
        index.as_ref().map(|index| (&table_k, &table_v, RowList::Table { block: per, index }, None)),
    ];
    segments.extend(
        stores
            .into_iter()
            .flatten()
            .map(|(k, v, read, q)| Segment::Store(Store { rows: StoreRows::Tensors(KeyValues { k, v }), read, q })),
    );
    if segments.is_empty() {
        segments.push(Segment::Chunk(KeyValues { k: &k, v: &v }));
    }
    let args = AttentionArgs {
        q: &q,
        start: c.start,
        window,
        scale: 1.0 / (c.dim as f32).sqrt(),
        segments: &segments,
        lse: true,
    };
    let got = attend(&args)?;
    let host = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32);
    let got = Attended { out: host(&got.out)?, lse: got.lse.as_ref().map(host).transpose()? };
    Ok((got, reference(&args)?))
}

/// Largest difference of the log-sum-exps, in units of 16 where they are larger: a logit of 256 products in f32 is off by
/// several units in its last place, 8e-6 at 64. Infinite where only one of them is.
pub fn lse_difference(got: &Attended, want: &Attended) -> Any<f32> {
    let flat =
        |a: &Attended| -> Any<Vec<f32>> { Ok(a.lse.as_ref().ok_or("no log-sum-exp")?.flatten_all()?.to_vec1()?) };
    let apart = |(a, b): (&f32, &f32)| if a == b { 0.0 } else { (a - b).abs() / (b.abs() / 16.0).max(1.0) };
    Ok(flat(got)?
        .iter()
        .zip(&flat(want)?)
        .map(apart)
        .fold(0.0, |most, x| if x > most || x.is_nan() { x } else { most }))
}

/// The operator's result for a batch on `device` in `dtype`, and the definition's for each item alone, all f32 on the CPU.
pub fn batch(
    items: usize,
    (tokens, start): (usize, usize),
    seed: u64,
    dtype: DType,
    device: &Device,
) -> Any<(Attended, Vec<Attended>)> {
    let (heads, kv_heads, dim, stored, listed) = (6, 2, 16, 50, 9);
    let make = |shape, salt: u64| values(shape, seed ^ salt, 4.0)?.to_dtype(dtype)?.to_device(device);
    // Per item: queries, queries of the store, then keys and values of chunk, ring, sinks and store.
    let lengths = [tokens, start.max(1), 4, stored];
    let tensors = |b: u64| -> Any<Vec<Tensor>> {
        let queries = [1, 2].map(|i| make((tokens, heads, dim), 100 * b + i));
        let rows = (0..8).map(|i| make((lengths[i / 2], kv_heads, dim), 100 * b + 3 + i as u64));
        Ok(queries.into_iter().chain(rows).collect::<candle_core::Result<_>>()?)
    };
    let table = |b: u64| {
        let row = |i: usize| (i as u64 * 7 + b * 11 + seed % 13) as u32 % stored as u32;
        let rows: Vec<u32> = (0..kv_heads * tokens * listed).map(row).collect();
        Tensor::from_vec(rows, (kv_heads, tokens, listed), device)
    };
    let call = |x: &[Tensor], index: &Tensor, run: fn(&AttentionArgs) -> bfly::Result<Attended>| -> Any<Attended> {
        let pair = |i: usize| KeyValues { k: &x[2 + 2 * i], v: &x[3 + 2 * i] };
        let read = RowList::Table { block: 1, index };
        let store = Segment::Store(Store { rows: StoreRows::Tensors(pair(3)), read, q: Some(&x[1]) });
        let mut segments = vec![Segment::Chunk(pair(0)), Segment::Ring(pair(1)), Segment::Sinks(pair(2), 4)];
        // No kernel takes queries of a store with a table.
        segments.extend(device.is_cpu().then_some(store));
        let (window, scale) = (Window::Tokens(start.max(1)), 0.25);
        let attended = run(&AttentionArgs { q: &x[0], start, window, scale, segments: &segments, lse: true })?;
        let host = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32);
        Ok(Attended { out: host(&attended.out)?, lse: attended.lse.as_ref().map(host).transpose()? })
    };
    let single = (0..items as u64).map(|b| Ok((tensors(b)?, table(b)?))).collect::<Any<Vec<_>>>()?;
    let stacked = (0..10).map(|i| Tensor::stack(&single.iter().map(|(x, _)| x[i].clone()).collect::<Vec<_>>(), 0));
    let stacked = stacked.collect::<candle_core::Result<Vec<_>>>()?;
    let index = Tensor::stack(&single.iter().map(|(_, index)| index.clone()).collect::<Vec<_>>(), 0)?;
    let want = single.iter().map(|(x, index)| call(x, index, reference)).collect::<Any<Vec<_>>>()?;
    Ok((call(&stacked, &index, attend)?, want))
}
