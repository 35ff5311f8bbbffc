//! Calibration: one pass of the stock model over text, from which moments of queries and keys and codewords of values
//! are collected.

use super::{Calibration, HeadMoments, LayerCalibration, Positions, ValueCode};
use crate::checkpoint::{OnProgress, TextTokenizer};
use crate::error::{Error, ErrorKind, Result};
use crate::method::Method;
use crate::run::{Observed, Run};
use crate::weights::Weights;
use candle_core::{DType, Device, Tensor};
use half::f16;
use std::sync::Arc;

/// Tokens that a calibration reads.
pub const TOKENS: usize = 32 << 10;
/// Fewest tokens that a calibration accepts: eight values per codeword.
pub const FEWEST: usize = 2 << 10;
/// Most tokens that are read as one document.
pub const LONGEST: usize = 4 << 10;
/// Most values per KV head that codewords are fitted to.
const MOST_VALUES: usize = 16 << 10;
/// Tokens per chunk.
const CHUNK: usize = 512;

/// The bundled texts, in documents separated by a form feed: public-domain prose and source code (texts/SOURCES.md).
const TEXTS: [&str; 2] = [include_str!("texts/prose.txt"), include_str!("texts/code.txt")];

/// Returns the bundled documents, prose and code in turn.
pub fn bundled() -> Vec<&'static str> {
    let [prose, code] = TEXTS.map(|t| t.split("\u{c}\n").filter(|d| !d.trim().is_empty()).collect::<Vec<_>>());
    let pairs = (0..prose.len().max(code.len())).flat_map(|i| [prose.get(i), code.get(i)]);
    pairs.flatten().copied().collect()
}

/// Tokenises documents, each cut to [`LONGEST`] tokens or the model's trained length, up to [`TOKENS`] in all.
///
/// # Errors
/// A tokenizer that fails.
pub fn tokenise(text: &TextTokenizer, documents: &[&str], trained: usize) -> Result<Vec<Vec<u32>>> {
    let (mut ids, mut total) = (vec![], 0);
    for document in documents {
        let mut of = text.encode(document, true)?;
        of.truncate(LONGEST.min(trained).min(TOKENS - total));
        total += of.len();
        ids.push(of);
        if total == TOKENS {
            break;
        }
    }
    Ok(ids)
}

/// Joins tokenised documents and cuts the whole into texts of `trained` tokens, for [`Positions::Natural`]: positions
/// then reach as far as the model was trained for.
pub fn joined(documents: &[Vec<u32>], trained: usize) -> Vec<Vec<u32>> {
    documents.concat().chunks(trained.max(1)).map(<[u32]>::to_vec).collect()
}

/// Reads `documents` with the stock model, each from position 0, and fits moments and codewords to everything after the
/// first `sink_tokens` of each. Moments are those of keys and queries before rotation under [`Positions::Uniform`],
/// after rotation at their own positions under [`Positions::Natural`].
///
/// # Errors
/// Too few tokens, an id outside the vocabulary, too little memory, or a device that fails.
pub fn calibrate(
    weights: &Arc<Weights>,
    documents: &[Vec<u32>],
    sink_tokens: usize,
    positions: Positions,
    progress: OnProgress,
) -> Result<Calibration> {
    let total: usize = documents.iter().map(Vec::len).sum();
    let usable: usize = documents.iter().map(|d| d.len().saturating_sub(sink_tokens)).sum();
    if usable < FEWEST {
        let message = format!(
            "its text has {usable} tokens after the first {sink_tokens} of each document; {FEWEST} are the fewest"
        );
        return Err(Error::new(ErrorKind::Usage, "recall calibration", message));
    }
    let spec = weights.spec();
    let every = usable.div_ceil(MOST_VALUES);
    let mut layers: Vec<Option<Sums>> = spec.layers.iter().map(|_| None).collect();
    for (i, a) in spec.full_attention() {
        layers[i] = Some(Sums::new(a.kv_heads, a.heads / a.kv_heads, a.head_dim, spec.ropes[a.rope].dim / 2));
    }
    let mut done = 0;
    for document in documents.iter().filter(|d| !d.is_empty()) {
        let mut run = Run::new(weights, Method::Stock, document.len())?;
        for chunk in document.chunks(CHUNK) {
            run.forward_observed(chunk, &[], &mut |seen| match &mut layers[seen.layer] {
                Some(sums) => sums.add(seen, (sink_tokens, positions), every),
                None => Ok(()),
            })?;
            done += chunk.len();
            progress("calibrate", done as u64, total as u64);
        }
    }
    let mut fitted = vec![];
    for (i, sums) in layers.into_iter().enumerate() {
        fitted.push(sums.map(Sums::fit));
        progress("codewords", i as u64 + 1, spec.layers.len() as u64);
    }
    Ok(Calibration { layers: fitted, sink_tokens, positions })
}

/// Sums of one layer, by KV head and channel.
struct Sums {
    kv_heads: usize,
    group: usize,
    dim: usize,
    half: usize,
    keys: Vec<f64>,
    key_squares: Vec<f64>,
    key_crosses: Vec<f64>,
    query_squares: Vec<f64>,
    query_crosses: Vec<f64>,
    tokens: usize,
    /// Every n-th value, `[n, G, D]`.
    values: Vec<f16>,
}

impl Sums {
    fn new(kv_heads: usize, group: usize, dim: usize, half: usize) -> Self {
        let channels = || vec![0.0; kv_heads * dim];
        let pairs = || vec![0.0; kv_heads * half];
        Self {
            kv_heads,
            group,
            dim,
            half,
            keys: channels(),
            key_squares: channels(),
            key_crosses: pairs(),
            query_squares: channels(),
            query_crosses: pairs(),
            tokens: 0,
            values: vec![],
        }
    }

    fn add(&mut self, seen: &Observed, (sinks, positions): (usize, Positions), every: usize) -> Result<()> {
        let p = seen.projections;
        let qkv = p.project(seen.x, &seen.chunk.tables[p.rope], positions == Positions::Uniform)?;
        let (q, k) = qkv.plain.as_ref().map_or((&qkv.q, &qkv.k), |(q, k)| (q, k));
        let (q, k, v) = (numbers(q)?, numbers(k)?, numbers(&qkv.v)?);
        let row = self.kv_heads * self.dim;
        for t in sinks.saturating_sub(seen.chunk.start)..seen.x.dim(0)? {
            if self.tokens.is_multiple_of(every) {
                self.values.extend(v[t * row..][..row].iter().map(|x| f16::from_f32(*x)));
            }
            self.tokens += 1;
            let (k, q) = (&k[t * row..][..row], &q[t * row * self.group..][..row * self.group]);
            self.keys.iter_mut().zip(k).for_each(|(s, x)| *s += f64::from(*x));
            for g in 0..self.kv_heads {
                let channels = g * self.dim..(g + 1) * self.dim;
                let pairs = g * self.half..(g + 1) * self.half;
                let k = &k[channels.clone()];
                let (squares, crosses) =
                    (&mut self.key_squares[channels.clone()], &mut self.key_crosses[pairs.clone()]);
                add_products(k, self.half, squares, crosses);
                for q in q[channels.start * self.group..channels.end * self.group].chunks_exact(self.dim) {
                    let (squares, crosses) =
                        (&mut self.query_squares[channels.clone()], &mut self.query_crosses[pairs.clone()]);
                    add_products(q, self.half, squares, crosses);
                }
            }
        }
        Ok(())
    }

    fn fit(self) -> LayerCalibration {
        let mean = |sums: &[f64], g: usize, width: usize, n: usize| -> Vec<f32> {
            sums[g * width..][..width].iter().map(|x| (x / n.max(1) as f64) as f32).collect()
        };
        let (d, half, n) = (self.dim, self.half, self.tokens);
        let head = |g: usize| HeadMoments {
            key_mean: mean(&self.keys, g, d, n),
            key_square: mean(&self.key_squares, g, d, n),
            key_cross: mean(&self.key_crosses, g, half, n),
            query_square: mean(&self.query_squares, g, d, n * self.group),
            query_cross: mean(&self.query_crosses, g, half, n * self.group),
        };
        let value = |g: usize| {
            let rows = self.values.chunks_exact(self.kv_heads * d);
            let values: Vec<f32> = rows.flat_map(|row| row[g * d..][..d].iter().map(|x| x.to_f32())).collect();
            ValueCode::fit(d, &values)
        };
        LayerCalibration {
            heads: (0..self.kv_heads).map(head).collect(),
            values: (0..self.kv_heads).map(value).collect(),
        }
    }
}

/// Adds `x_c²` and, of each rotated pair, `x_i x_{i + half}`.
fn add_products(x: &[f32], half: usize, squares: &mut [f64], crosses: &mut [f64]) {
    squares.iter_mut().zip(x).for_each(|(s, x)| *s += f64::from(*x) * f64::from(*x));
    crosses.iter_mut().zip(x.iter().zip(&x[half..])).for_each(|(s, (a, b))| *s += f64::from(*a) * f64::from(*b));
}

fn numbers(x: &Tensor) -> Result<Vec<f32>> {
    Ok(x.to_dtype(DType::F32)?.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?)
}
