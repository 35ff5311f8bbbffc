//! The shapes that kernels are timed on, with the FLOP and bytes of their definition.

use crate::error::Result;
use crate::layout::ButterflyLayer;
use crate::nn::{Blocks, Linear, Weight};
use crate::ops::{
    add_norm, attend, gated, highest_rows, pool_blocks, prepare_heads, rope_table, AttentionArgs, FarRow, KeyValues,
    RowList, RunningMean, Segment, Store, StoreRows, Window,
};
use crate::retrofit::Settings;
use crate::selector;
use crate::spec::Activation;
use crate::storage::{Affine, Float, Ggml, Storage};
use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, BTreeSet};

/// Launches the kernel once on one set of inputs.
pub type Iteration = Box<dyn FnMut() -> Result<()>>;

/// Allocates a set of random inputs.
pub type Prepare = Box<dyn Fn(&InputSpec) -> Result<Iteration>>;

/// Device and element type of the inputs.
#[derive(Debug, Clone)]
pub struct InputSpec {
    /// Device of the inputs.
    pub device: Device,
    /// Element type of the inputs.
    pub dtype: DType,
}

impl InputSpec {
    fn random<const N: usize>(&self, shape: [usize; N]) -> Result<Tensor> {
        Ok(Tensor::randn(0f32, 1.0, shape.as_slice(), &self.device)?.to_dtype(self.dtype)?)
    }

    fn random_f32(&self, len: usize) -> Result<Tensor> {
        Ok(Tensor::randn(0f32, 1.0, len, &self.device)?)
    }
}

/// A kernel on one shape.
pub struct Case {
    /// Name of the kernel.
    pub kernel: &'static str,
    /// Short description of the case, such as `dense causal`.
    pub case: String,
    /// Sizes by letter: T, H, G, D, keys, ...
    pub shape: BTreeMap<String, usize>,
    /// Floating-point operations of the definition; masked positions do not count.
    pub flop: f64,
    /// Elements of the inputs and outputs, each read or written once.
    pub elements: f64,
    /// Bytes of f32 and quantised tables, in addition to the elements.
    pub tables: f64,
    /// Allocates a set of random inputs.
    pub prepare: Prepare,
}

/// Returns all cases; `small` ones have 1/64 of the tokens, for a CPU.
pub fn cases(small: bool) -> Vec<Case> {
    let s = if small { 64 } else { 1 };
    let dense =
        |d: usize, heads: usize| Attention { case: "dense causal", t: (16 << 10) / s, h: heads, g: heads, d, ..BLANK };
    let window = Attention {
        case: "window 2048",
        t: (32 << 10) / s,
        h: 16,
        g: 16,
        d: 128,
        window: Window::Tokens(2048 / s),
        ..BLANK
    };
    let butterfly = |t: usize, start: usize| Attention {
        case: "butterfly",
        t,
        h: 14,
        g: 2,
        d: 64,
        start,
        butterfly: Some(64 << 10),
        ..BLANK
    };
    let raw = Attention { case: "16 raw blocks", h: 32, g: 8, d: 128, raw: 16, ..butterfly(4096 / s, (60 << 10) / s) };
    let long = Attention { case: "dense, 32k keys", t: 1, h: 32, g: 8, d: 128, start: (32 << 10) / s - 1, ..BLANK };
    let last = (60 << 10) / s;
    vec![
        dense(64, 32).case("attention_prefill"),
        dense(96, 16).case("attention_prefill"),
        dense(128, 16).case("attention_prefill"),
        dense(256, 8).case("attention_prefill"),
        window.case("attention_prefill"),
        butterfly(4096 / s, last).case("attention_prefill"),
        raw.case("attention_prefill"),
        long.case("attention_decode"),
        butterfly(1, last).case("attention_decode"),
        Attention { t: 1, ..raw }.case("attention_decode"),
        summaries(4096 / s, 8, 128),
        select(8, (32 << 10) / s, (8 << 10) / s),
        norm(4096 / s, 3584),
        activation(4096 / s, 18944),
        heads(4096 / s, 28, 128),
        quantised("one row, Q4K", 1, 18944 / s, 3584, Storage::Ggml(Ggml::Q4K)),
        quantised("many rows, Q4K", 4096 / s, 18944 / s, 3584, Storage::Ggml(Ggml::Q4K)),
        quantised("one row, affine", 1, 9216 / s, 2560, AFFINE),
        quantised("one long row, affine", 1, 2560 / s, 9216, AFFINE),
    ]
}

fn letters(sizes: &[(&str, usize)]) -> BTreeMap<String, usize> {
    sizes.iter().map(|(name, size)| (name.to_string(), *size)).collect()
}

/// A case of attention with `t` queries at positions `start..start + t`.
#[derive(Debug, Clone, Copy)]
struct Attention {
    case: &'static str,
    t: usize,
    h: usize,
    g: usize,
    d: usize,
    start: usize,
    window: Window,
    /// Context in positions of a retrofit with default settings; `None` reads the window alone.
    butterfly: Option<usize>,
    /// Number of earlier blocks that each query block reads raw, in addition.
    raw: usize,
}

const BLANK: Attention =
    Attention { case: "", t: 0, h: 0, g: 0, d: 0, start: 0, window: Window::Unbounded, butterfly: None, raw: 0 };

/// Blocks of the store from which query blocks read raw blocks.
const STORED: usize = 64;

/// Ordinal of the timed layer among the swapped layers; its stage reads 40 blocks back.
const ORDINAL: usize = 3;

impl Attention {
    fn case(mut self, kernel: &'static str) -> Case {
        let settings = self.butterfly.map(|_| Settings::default());
        if let Some(s) = &settings {
            self.window = Window::Blocks { block: s.block, count: s.window_blocks() };
        }
        let routes = self.routes();
        let sinks = settings.as_ref().map_or(0, |s| s.sink_tokens);
        let routed = |p: usize| settings.as_ref().map_or(0, |s| routes[p / s.block - self.start / s.block].len());
        let reads = |p: usize| {
            let left = self.window.left(p);
            p + 1 - left + sinks.min(left) + routed(p) + self.raw * Settings::default().block
        };
        let pairs: usize = (self.start..self.start + self.t).map(reads).sum();
        let far: BTreeSet<usize> = routes.iter().flatten().copied().collect();
        let past = self.start - self.window.left(self.start).min(self.start);
        let stored = self.distinct_raw() * Settings::default().block;
        let rows = self.t + past + far.len() + sinks.min(self.window.left(self.start + self.t - 1)) + stored;
        let mut shape = letters(&[("T", self.t), ("H", self.h), ("G", self.g), ("D", self.d)]);
        shape.insert("keys".into(), reads(self.start + self.t - 1));
        Case {
            kernel,
            case: self.case.into(),
            shape,
            flop: (4 * self.h * self.d) as f64 * pairs as f64,
            elements: (2 * self.t * self.h * self.d + 2 * rows * self.g * self.d) as f64,
            tables: 0.0,
            prepare: Box::new(move |inputs| self.prepare(inputs, &routes, sinks)),
        }
    }

    /// Returns the blocks whose summaries each query block reads.
    fn routes(&self) -> Vec<Vec<usize>> {
        let Some(ctx) = self.butterfly else { return vec![] };
        let s = Settings::default();
        let layer = ButterflyLayer::new(&s, selector::SELECTORS[0], ORDINAL, ctx);
        let blocks = self.start / s.block..=(self.start + self.t - 1) / s.block;
        blocks.map(|b| layer.route(b)).collect()
    }

    /// Returns the blocks that the `i`-th query block reads raw, spread over the store.
    fn raw_blocks(&self, i: usize) -> impl Iterator<Item = usize> {
        (0..self.raw).map(move |j| (i * 5 + j * 11) % STORED)
    }

    fn query_blocks(&self) -> usize {
        let block = Settings::default().block;
        (self.start + self.t - 1) / block - self.start / block + 1
    }

    fn distinct_raw(&self) -> usize {
        (0..self.query_blocks()).flat_map(|i| self.raw_blocks(i)).collect::<BTreeSet<_>>().len()
    }

    fn prepare(self, inputs: &InputSpec, routes: &[Vec<usize>], sinks: usize) -> Result<Iteration> {
        let (q, own) = ([self.t, self.h, self.d], [self.t, self.g, self.d]);
        let (q, k, v) = (inputs.random(q)?, inputs.random(own)?, inputs.random(own)?);
        let pair = |rows: usize| -> Result<Option<(Tensor, Tensor)>> {
            let shape = [rows, self.g, self.d];
            (rows > 0).then(|| Ok((inputs.random(shape)?, inputs.random(shape)?))).transpose()
        };
        let ring = match self.window {
            Window::Blocks { block, count } => (block * (count + 1)).min(self.start),
            _ => self.start,
        };
        let distinct: BTreeSet<usize> = routes.iter().flatten().copied().collect();
        let row = |n: &usize| distinct.range(..n).count();
        let far_row = |n| FarRow::one(row(n));
        let routes: Vec<Vec<FarRow>> = routes.iter().map(|r| r.iter().map(far_row).collect()).collect();
        let block = Settings::default().block;
        let raw = |i| self.raw_blocks(i).map(|n| FarRow::run(n * block, block)).collect();
        let raw: Vec<Vec<FarRow>> = (0..self.query_blocks()).map(raw).collect();
        let (past, sink_rows, far) = (pair(ring)?, pair(sinks)?, pair(distinct.len())?);
        let stored = pair(if self.raw > 0 { STORED * block } else { 0 })?;
        Ok(Box::new(move || {
            fn rows((k, v): &(Tensor, Tensor)) -> KeyValues<'_> {
                KeyValues { k, v }
            }
            let mut segments = vec![Segment::Chunk(KeyValues { k: &k, v: &v })];
            segments.extend(past.as_ref().map(|r| Segment::Ring(rows(r))));
            segments.extend(sink_rows.as_ref().map(|r| Segment::Sinks(rows(r), sinks)));
            for (pair, lists) in [(&far, &routes), (&stored, &raw)] {
                let read = RowList::Blocks { block, rows: lists };
                segments.extend(
                    pair.as_ref().map(|r| Segment::Store(Store { rows: StoreRows::Tensors(rows(r)), read, q: None })),
                );
            }
            let (window, scale) = (self.window, 1.0 / (self.d as f32).sqrt());
            let args = AttentionArgs { q: &q, start: self.start, window, scale, segments: &segments, lse: false };
            attend(&args).map(drop)
        }))
    }
}

fn summaries(t: usize, g: usize, d: usize) -> Case {
    let s = Settings::default();
    let prepare = move |inputs: &InputSpec| -> Result<Iteration> {
        let (k, v) = (inputs.random([t, g, d])?, inputs.random([t, g, d])?);
        let mut running = RunningMean::new(g * d, &inputs.device)?;
        let s = Settings::default();
        Ok(Box::new(move || pool_blocks(&k, &v, 0, s.block, s.sink_tokens, &mut running).map(drop)))
    };
    Case {
        kernel: "summaries",
        case: format!("blocks of {}", s.block),
        shape: letters(&[("T", t), ("G", g), ("D", d)]),
        flop: (2 * t * g * d) as f64,
        elements: (2 * g * d * (t + t / s.block)) as f64,
        tables: (2 * 4 * 2 * g * d) as f64,
        prepare: Box::new(prepare),
    }
}

fn norm(t: usize, n: usize) -> Case {
    let prepare = move |inputs: &InputSpec| -> Result<Iteration> {
        let (x, y, weight) = (inputs.random([t, n])?, inputs.random([t, n])?, inputs.random_f32(n)?);
        Ok(Box::new(move || add_norm(&x, Some(&y), &weight, 1e-6).map(drop)))
    };
    Case {
        kernel: "add_norm",
        case: "residual and norm".into(),
        shape: letters(&[("T", t), ("N", n)]),
        // Sum, square, sum of squares, two factors.
        flop: (5 * t * n) as f64,
        elements: (4 * t * n) as f64,
        tables: (4 * n) as f64,
        prepare: Box::new(prepare),
    }
}

fn select(g: usize, n: usize, keep: usize) -> Case {
    let prepare = move |inputs: &InputSpec| -> Result<Iteration> {
        let scores = inputs.random_f32(g * n)?.reshape((g, n))?;
        Ok(Box::new(move || highest_rows(&scores, keep).map(drop)))
    };
    Case {
        kernel: "select",
        case: "a quarter".into(),
        shape: letters(&[("G", g), ("N", n), ("keep", keep)]),
        // At least one comparison per score.
        flop: (g * n) as f64,
        elements: 0.0,
        tables: (4 * g * (n + keep)) as f64,
        prepare: Box::new(prepare),
    }
}

fn activation(t: usize, n: usize) -> Case {
    let prepare = move |inputs: &InputSpec| -> Result<Iteration> {
        let (gate, up) = (inputs.random([t, n])?, inputs.random([t, n])?);
        Ok(Box::new(move || gated(&gate, &up, Activation::Silu).map(drop)))
    };
    Case {
        kernel: "gated",
        case: "silu".into(),
        shape: letters(&[("T", t), ("N", n)]),
        // Exponential, sum, quotient, product.
        flop: (4 * t * n) as f64,
        elements: (3 * t * n) as f64,
        tables: 0.0,
        prepare: Box::new(prepare),
    }
}

fn heads(t: usize, h: usize, d: usize) -> Case {
    let prepare = move |inputs: &InputSpec| -> Result<Iteration> {
        let (x, bias) = (inputs.random([t, h * d])?, inputs.random_f32(h * d)?);
        let frequencies: Vec<f32> = (0..d / 2).map(|i| 1e6f32.powf(-2.0 * i as f32 / d as f32)).collect();
        let (cos, sin) = rope_table(&frequencies, (0..t).map(|p| p as f32), 1.0, &inputs.device)?;
        Ok(Box::new(move || prepare_heads(&x, h, Some(&bias), None, Some((&cos, &sin))).map(drop)))
    };
    Case {
        kernel: "prepare_heads",
        case: "bias and rope".into(),
        shape: letters(&[("T", t), ("H", h), ("D", d)]),
        // Bias, and two products and a sum per element.
        flop: (4 * t * h * d) as f64,
        elements: (2 * t * h * d) as f64,
        tables: (4 * (h * d + t * d)) as f64,
        prepare: Box::new(prepare),
    }
}

/// What most of MLX's checkpoints hold.
const AFFINE: Storage = Storage::Affine(Affine { bits: 4, group: 64, scale: Float::BF16 });

/// Rows of random values; of MLX's groups, whose numbers are any bits, the scale and the bias are 1.
fn encoded(storage: Storage, rows: usize, columns: usize) -> Result<Vec<u8>> {
    if let Some(format) = storage.candle() {
        let values = Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu)?;
        return Ok(QTensor::quantize(&values, format)?.data()?.into_owned());
    }
    let Storage::Affine(affine) = storage else { return Ok(vec![]) };
    let one = match affine.scale {
        Float::F32 => 1f32.to_le_bytes().to_vec(),
        Float::F16 => half::f16::ONE.to_le_bytes().to_vec(),
        Float::BF16 => half::bf16::ONE.to_le_bytes().to_vec(),
    };
    let head = one.repeat(2);
    let count = rows * storage.row_bytes(columns) / (head.len() + affine.value_bytes()) * affine.value_bytes();
    let numbers = Tensor::rand(0f32, 256f32, count, &Device::Cpu)?.to_dtype(DType::U8)?.to_vec1::<u8>()?;
    Ok(numbers.chunks(affine.value_bytes()).flat_map(|q| [head.as_slice(), q].concat()).collect())
}

fn quantised(case: &str, t: usize, rows: usize, columns: usize, storage: Storage) -> Case {
    let prepare = move |inputs: &InputSpec| -> Result<Iteration> {
        let x = inputs.random([t, columns])?;
        // Quantising takes longer than the product, so 32 rows are repeated; the product's time does not depend on
        // values.
        let few = encoded(storage, rows.min(32), columns)?;
        let bytes: Vec<u8> = few.iter().copied().cycle().take(rows * storage.row_bytes(columns)).collect();
        let layer = Linear::new(Weight::Blocks(Blocks::new(storage, (rows, columns), bytes, &inputs.device)?), None);
        Ok(Box::new(move || layer.forward(&x).map(drop)))
    };
    Case {
        kernel: "quantised",
        case: case.into(),
        shape: letters(&[("T", t), ("N", columns), ("rows", rows)]),
        flop: (2 * t * rows * columns) as f64,
        elements: (t * (rows + columns)) as f64,
        tables: (rows * storage.row_bytes(columns)) as f64,
        prepare: Box::new(prepare),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flop_and_elements_are_those_of_the_definition() {
        let all = cases(false);
        let find = |kernel: &str, case: &str, d: usize| {
            all.iter()
                .find(|c| c.kernel == kernel && c.case == case && c.shape.get("D").is_none_or(|x| *x == d))
                .unwrap()
        };
        // 4 T (T + 1) / 2 H D for causal attention.
        let t = 16384.0;
        assert_eq!(find("attention_prefill", "dense causal", 64).flop, 2.0 * t * (t + 1.0) * 32.0 * 64.0);
        let c = find("attention_prefill", "window 2048", 128);
        let pairs = 2048.0 * 2049.0 / 2.0 + (32768.0 - 2048.0) * 2048.0;
        assert_eq!(c.flop, 4.0 * 16.0 * 128.0 * pairs);
        let c = find("attention_decode", "dense, 32k keys", 128);
        assert_eq!((c.shape["keys"], c.flop), (32768, 4.0 * 32.0 * 128.0 * 32768.0));
        // Keys and values once, 134 MB in bf16, and the query and its output.
        assert_eq!(c.elements, 2.0 * 32768.0 * 8.0 * 128.0 + 2.0 * 32.0 * 128.0);
        // The window of 512, the query itself, 4 sinks, one summary.
        assert_eq!(find("attention_decode", "butterfly", 64).shape["keys"], 512 + 1 + 4 + 1);
    }

    #[test]
    fn small_cases_run_on_a_cpu() -> Result<()> {
        let inputs = InputSpec { device: Device::Cpu, dtype: DType::F32 };
        for case in cases(true) {
            let mut iteration = (case.prepare)(&inputs)?;
            iteration().map_err(|e| e.within(format!("{} {}", case.kernel, case.case)))?;
            iteration()?;
        }
        Ok(())
    }
}
