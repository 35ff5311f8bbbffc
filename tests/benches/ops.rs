//! The attention operator against the length of the text, and against the naive reference.
//!
//! Shapes are SmolLM2's: 9 query heads on 3 KV heads of 64. Dense cost per token grows with the text; the windowed operator
//! with sinks and one summary does not. Exact recall's far zone is measured over the regions of several layers in turn, so
//! that its rows come from memory, as in a decode step.

use bfly::ops::recall::{attend_far, FarArgs, Rest};
use bfly::ops::{attend, reference, AttentionArgs, FarRow, KeyValues, RowList, Segment, Store, StoreRows, Window};
use bfly::recall::{HeadCode, ScalarCode, ValueCode};
use candle_core::{Device, Tensor};
use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};
use std::sync::Arc;

const HEADS: (usize, usize, usize) = (9, 3, 64);
const BLOCK: usize = 128;

struct Chunk {
    q: Tensor,
    k: Tensor,
    past: Tensor,
    small: Tensor,
    routes: Vec<Vec<FarRow>>,
    start: usize,
}

impl Chunk {
    fn new(start: usize, tokens: usize) -> candle_core::Result<Self> {
        let (h, g, d) = HEADS;
        let random = |rows: usize, heads: usize| Tensor::randn(0f32, 1.0, (rows, heads, d), &Device::Cpu);
        let route = vec![FarRow::one(0)];
        let blocks = (start + tokens - 1) / BLOCK - start / BLOCK + 1;
        Ok(Self {
            q: random(tokens, h)?,
            k: random(tokens, g)?,
            past: random(start.max(1), g)?,
            small: random(4, g)?,
            routes: vec![route; blocks],
            start,
        })
    }

    /// Chunk and ring, and with a window sinks and summaries too.
    fn segments(&self, window: Window) -> Vec<Segment<'_>> {
        let pair = |x| KeyValues { k: x, v: x };
        let mut segments = vec![Segment::Chunk(pair(&self.k)), Segment::Ring(pair(&self.past))];
        if window != Window::Unbounded {
            let read = RowList::Blocks { block: BLOCK, rows: &self.routes };
            segments.push(Segment::Sinks(pair(&self.small), 4));
            segments.push(Segment::Store(Store { rows: StoreRows::Tensors(pair(&self.small)), read, q: None }));
        }
        segments
    }

    fn args<'a>(&'a self, window: Window, segments: &'a [Segment<'a>]) -> AttentionArgs<'a> {
        AttentionArgs { q: &self.q, start: self.start, window, scale: 0.125, segments, lse: false }
    }
}

const BUTTERFLY: Window = Window::Blocks { block: BLOCK, count: 4 };

fn against_length(c: &mut Criterion) {
    for (name, tokens) in [("prefill of 512", 512), ("decode", 1)] {
        let mut group = c.benchmark_group(name);
        group.throughput(Throughput::Elements(tokens as u64)).sample_size(20);
        for start in [512, 2048, 8192 - 512] {
            let Ok(chunk) = Chunk::new(start, tokens) else { continue };
            for (kind, window) in [("dense", Window::Unbounded), ("butterfly", BUTTERFLY)] {
                let segments = chunk.segments(window);
                let args = chunk.args(window, &segments);
                group.bench_function(BenchmarkId::new(kind, start), |b| b.iter(|| attend(&args)));
            }
        }
        group.finish();
    }
}

fn against_reference(c: &mut Criterion) {
    let mut group = c.benchmark_group("64 queries at 512");
    group.sample_size(10);
    if let Ok(chunk) = Chunk::new(512, 64) {
        let segments = chunk.segments(BUTTERFLY);
        let args = chunk.args(BUTTERFLY, &segments);
        group.bench_function("tiled", |b| b.iter(|| attend(&args)));
        group.bench_function("reference", |b| b.iter(|| reference(&args)));
    }
    group.finish();
}

/// Layers whose far zones take turns: 100 MB of keys and values.
const LAYERS: usize = 8;

fn far_zone(c: &mut Criterion) {
    let ((heads, kv_heads, dim), n) = (HEADS, 8192);
    let random = |n: usize| Tensor::randn(0f32, 1.0, n, &Device::Cpu).and_then(|x| x.to_vec1::<f32>());
    let layers: Result<Vec<_>, _> = (0..LAYERS * kv_heads).map(|_| random(2 * n * dim)).collect();
    let (Ok(exact), Ok(q)) = (layers, random(heads * dim)) else { return };
    let units: Vec<Vec<usize>> = (0..dim / 2).map(|i| vec![i, i + dim / 2]).collect();
    let weight: Vec<f32> = (0..dim).map(|c| 0.9f32.powi((c % (dim / 2)) as i32)).collect();
    let key = ScalarCode::fit(dim / 8, &units, &vec![0.0; dim], &vec![1.0; dim], &weight);
    let rows = |exact: &[f32], part: usize| -> Vec<f32> {
        exact.chunks(dim).skip(part).step_by(2).flatten().copied().collect()
    };
    let value = ValueCode::fit(dim, &rows(&exact[0][..2 * 1024 * dim], 1));
    let codes: Vec<(Vec<u8>, Vec<u8>)> = exact
        .iter()
        .map(|exact| {
            let (mut keys, mut values) = (vec![0; n * key.bytes], vec![0; n * value.bytes()]);
            key.encode(&rows(exact, 0), &mut keys);
            value.encode(&rows(exact, 1), &mut values);
            (keys, values)
        })
        .collect();
    let code: Vec<Arc<dyn HeadCode>> = (0..kv_heads).map(|_| Arc::new(key.clone()) as _).collect();
    let value = vec![value; kv_heads];
    let mut group = c.benchmark_group("far zone of 7,600 tokens");
    for (chosen, estimate) in [(2048, true), (2048, false), (512, true), (1, true)] {
        let mut layer = 0;
        let name = BenchmarkId::new(if estimate { "codes" } else { "no rest" }, chosen);
        group.bench_function(name, |b| {
            b.iter(|| {
                layer = (layer + 1) % LAYERS;
                let at = layer * kv_heads..(layer + 1) * kv_heads;
                let exact: Vec<&[f32]> = exact[at.clone()].iter().map(Vec::as_slice).collect();
                let keys: Vec<&[u8]> = codes[at.clone()].iter().map(|c| c.0.as_slice()).collect();
                let codes: Vec<&[u8]> = codes[at].iter().map(|c| c.1.as_slice()).collect();
                let rest = Rest::Codes { code: &value, codes: &codes };
                attend_far(&FarArgs {
                    q: &q,
                    near: &vec![2.0; heads],
                    scale: 0.125,
                    far: (4, 7604),
                    dim,
                    chosen,
                    code: &code,
                    codes: &keys,
                    exact: &exact,
                    rest: if estimate { rest } else { Rest::None },
                })
            });
        });
    }
    group.finish();
}

criterion_group!(benches, against_length, against_reference, far_zone);
criterion_main!(benches);
