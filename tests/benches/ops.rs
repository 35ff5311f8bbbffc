//! The attention operator against the length of the text, and against the naive reference.
//!
//! Shapes are SmolLM2's: 9 query heads on 3 KV heads of 64. Dense cost per token grows with the text; the windowed operator
//! with sinks and one summary does not.

use bfly::ops::{attend, reference, AttentionArgs, FarRow, KeyValues, RowList, Segment, Store, StoreRows, Window};
use candle_core::{Device, Tensor};
use criterion::{criterion_group, criterion_main, BenchmarkId, Criterion, Throughput};

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

criterion_group!(benches, against_length, against_reference);
criterion_main!(benches);
