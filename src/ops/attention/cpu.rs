//! The tiled CPU path: tasks of (query tile, KV head, share of the keys), each an online softmax over key tiles whose two
//! products run through the GEMM library. A tile's work depends on what its queries may read, not on the context.

use super::{AttentionArgs, FarRow};
use crate::error::Result;
use crate::ops::gemm::{multiply_add, multiply_transposed, Matrix};
use crate::ops::simd;
use crate::ops::view::{view, View};
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Query rows (tokens times heads per KV head) per tile.
const QUERY_ROWS: usize = 192;
/// Keys per tile.
const KEYS: usize = 256;

/// Consecutive raw positions in consecutive rows of one buffer.
#[derive(Clone, Copy)]
struct Run {
    source: Source,
    row: usize,
    position: usize,
    len: usize,
}

#[derive(Clone, Copy)]
enum Source {
    Past,
    Chunk,
}

/// Queries that share their block, and what they read.
struct Tile {
    queries: Range<usize>,
    runs: Vec<Run>,
}

/// The tensors' values.
struct Buffers<'a> {
    q: &'a [f32],
    q_far: &'a [f32],
    chunk: (&'a [f32], &'a [f32]),
    past: (&'a [f32], &'a [f32]),
    sinks: (&'a [f32], &'a [f32]),
    /// Of each store.
    far: Vec<(&'a [f32], &'a [f32])>,
}

/// A worker's buffers, reused from task to task.
#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    q_far: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    logits: Vec<f32>,
}

/// What a task found: maximum and sum per query row, and the weighted values before division.
struct Partial {
    max: Vec<f32>,
    sum: Vec<f32>,
    out: Vec<f32>,
}

struct Call<'a> {
    args: &'a AttentionArgs<'a>,
    buffers: Buffers<'a>,
    group: usize,
    kv_heads: usize,
    dim: usize,
}

pub(super) fn attend(args: &AttentionArgs, (t, h, g, d): (usize, usize, usize, usize)) -> Result<Tensor> {
    let group = h / g;
    let tensors = [
        (Some(args.q), "q"),
        (args.q_far, "q_far"),
        (Some(args.k), "k"),
        (Some(args.v), "v"),
        (args.past.map(|p| p.k), "past keys"),
        (args.past.map(|p| p.v), "past values"),
        (args.sinks.map(|s| s.0.k), "sink keys"),
        (args.sinks.map(|s| s.0.v), "sink values"),
    ];
    let far = args.far.iter().flat_map(|f| [(Some(f.k), "far keys"), (Some(f.v), "far values")]);
    let views: Result<Vec<_>> =
        tensors.into_iter().chain(far).map(|(x, what)| x.map(|x| view(x, what)).transpose()).collect();
    let views = views?;
    let values = |i: usize| views[i].as_ref().map_or(Ok(&[][..]), View::values);
    let buffers = Buffers {
        q: values(0)?,
        q_far: values(1)?,
        chunk: (values(2)?, values(3)?),
        past: (values(4)?, values(5)?),
        sinks: (values(6)?, values(7)?),
        far: (0..args.far.len()).map(|i| Ok((values(8 + 2 * i)?, values(9 + 2 * i)?))).collect::<Result<_>>()?,
    };
    let call = Call { args, buffers, group, kv_heads: g, dim: d };
    let tiles = call.tiles(t);
    // With few tiles (decode) the keys are shared out too, so that no core idles.
    let threads = rayon::current_num_threads();
    let shares = if tiles.len() * g >= 2 * threads { 1 } else { (4 * threads).div_ceil(tiles.len() * g) };
    let tasks: Vec<(usize, usize, Range<usize>, bool)> = tiles
        .iter()
        .enumerate()
        .flat_map(|(i, tile)| {
            let n = tile.runs.len();
            let shares = shares.min(n.max(1));
            let cut = move |s: usize| s * n / shares;
            (0..g).flat_map(move |kv| (0..shares).map(move |s| (i, kv, cut(s)..cut(s + 1), s == 0)))
        })
        .collect();
    let partials: Vec<Partial> = tasks
        .par_iter()
        .map_init(Scratch::default, |scratch, (i, kv, runs, extras)| {
            call.task(&tiles[*i], *kv, runs.clone(), *extras, scratch)
        })
        .collect();
    let mut out = vec![0f32; t * h * d];
    let mut at = 0;
    while at < tasks.len() {
        let (i, kv, ..) = tasks[at];
        let same = tasks[at..].iter().take_while(|(j, other, ..)| (*j, *other) == (i, kv)).count();
        call.merge(&tiles[i], kv, &partials[at..at + same], &mut out);
        at += same;
    }
    Ok(Tensor::from_vec(out, (t, h, d), &Device::Cpu)?)
}

impl Call<'_> {
    /// Cuts the chunk into tiles that do not cross a block where routes or the window's edge change.
    fn tiles(&self, t: usize) -> Vec<Tile> {
        let start = self.args.start;
        let window = match self.args.window {
            super::Window::Blocks { block, .. } => Some(block),
            _ => None,
        };
        let blocks: Vec<usize> = window.into_iter().chain(self.args.far.iter().map(|f| f.block)).collect();
        let tokens = (QUERY_ROWS / self.group).max(1);
        let mut tiles = vec![];
        let mut from = 0;
        while from < t {
            let block_end = blocks.iter().map(|b| ((start + from) / b + 1) * b - start).min().unwrap_or(t);
            let to = (from + tokens).min(block_end).min(t);
            tiles.push(Tile { queries: from..to, runs: self.runs(from..to) });
            from = to;
        }
        tiles
    }

    /// The raw keys of a tile: at most [`KEYS`] to a run, split where the ring wraps.
    fn runs(&self, queries: Range<usize>) -> Vec<Run> {
        let start = self.args.start;
        let left = self.args.window.left(start + queries.start);
        let end = start + queries.end;
        let mut runs = vec![];
        let mut at = left;
        while at < end {
            let (source, row, room) = if at < start {
                let capacity = self.args.past.map_or(1, |p| p.k.dims()[0]);
                (Source::Past, at % capacity, (capacity - at % capacity).min(start - at))
            } else {
                (Source::Chunk, at - start, end - at)
            };
            let len = room.min(KEYS);
            runs.push(Run { source, row, position: at, len });
            at += len;
        }
        runs
    }

    fn task(&self, tile: &Tile, kv: usize, runs: Range<usize>, extras: bool, scratch: &mut Scratch) -> Partial {
        let rows = tile.queries.len() * self.group;
        let d = self.dim;
        self.pack_queries(self.buffers.q, tile, kv, &mut scratch.q);
        let mut partial =
            Partial { max: vec![f32::NEG_INFINITY; rows], sum: vec![0.0; rows], out: vec![0.0; rows * d] };
        if extras {
            self.extras(tile, kv, scratch, &mut partial);
        }
        let stride = self.kv_heads * d;
        let p_first = self.args.start + tile.queries.start;
        let p_last = self.args.start + tile.queries.end - 1;
        for run in &tile.runs[runs] {
            let (k, v) = match run.source {
                Source::Past => self.buffers.past,
                Source::Chunk => self.buffers.chunk,
            };
            let at = run.row * stride + kv * d;
            scratch.logits.resize(rows * run.len, 0.0);
            let logits = &mut scratch.logits[..rows * run.len];
            let q = Matrix { data: &scratch.q, stride: d };
            multiply_transposed(rows, run.len, d, q, Matrix { data: &k[at..], stride }, logits);
            let whole = run.position >= self.args.window.left(p_last) && run.position + run.len <= p_first + 1;
            if !whole {
                for (r, row) in logits.chunks_mut(run.len).enumerate() {
                    let p = p_first + r / self.group;
                    let first = self.args.window.left(p).saturating_sub(run.position).min(run.len);
                    let past = (p + 1).saturating_sub(run.position).min(run.len);
                    row[..first].fill(f32::NEG_INFINITY);
                    row[past..].fill(f32::NEG_INFINITY);
                }
            }
            partial.fold(logits, run.len, Matrix { data: &v[at..], stride }, d);
        }
        partial
    }

    /// Sinks and far rows, gathered into one small tile per query kind.
    fn extras(&self, tile: &Tile, kv: usize, scratch: &mut Scratch, partial: &mut Partial) {
        let start = self.args.start;
        let p_last = start + tile.queries.end - 1;
        let sinks = self.args.sinks.map_or(0, |s| s.1.min(self.args.window.left(p_last)));
        let rows_of = |far_query: bool| {
            self.args.far.iter().enumerate().flat_map(move |(store, far)| {
                let route = &far.routes[(start + tile.queries.start) / far.block - start / far.block];
                let rows = route.iter().filter(move |r| r.far_query == far_query);
                rows.flat_map(move |seen| {
                    (seen.row..seen.row + seen.count).map(move |row| Extra::Far { store, row, seen })
                })
            })
        };
        let near = (0..sinks).map(Extra::Sink).chain(rows_of(false));
        self.extra_tiles(near.collect(), tile, kv, false, scratch, partial);
        let far: Vec<Extra> = rows_of(true).collect();
        if !far.is_empty() {
            self.pack_queries(self.buffers.q_far, tile, kv, &mut scratch.q_far);
            self.extra_tiles(far, tile, kv, true, scratch, partial);
        }
    }

    fn extra_tiles(
        &self,
        extras: Vec<Extra>,
        tile: &Tile,
        kv: usize,
        far: bool,
        scratch: &mut Scratch,
        partial: &mut Partial,
    ) {
        let (d, stride) = (self.dim, self.kv_heads * self.dim);
        let rows = tile.queries.len() * self.group;
        for extras in extras.chunks(KEYS) {
            let n = extras.len();
            scratch.keys.clear();
            scratch.values.clear();
            for extra in extras {
                let ((k, v), row) = match extra {
                    Extra::Sink(row) => (self.buffers.sinks, *row),
                    Extra::Far { store, row, .. } => (self.buffers.far[*store], *row),
                };
                let at = row * stride + kv * d;
                scratch.keys.extend_from_slice(&k[at..at + d]);
                scratch.values.extend_from_slice(&v[at..at + d]);
            }
            scratch.logits.resize(rows * n, 0.0);
            let q = Matrix { data: if far { &scratch.q_far } else { &scratch.q }, stride: d };
            let logits = &mut scratch.logits[..rows * n];
            multiply_transposed(rows, n, d, q, Matrix { data: &scratch.keys, stride: d }, logits);
            for (r, row) in logits.chunks_mut(n).enumerate() {
                let p = self.args.start + tile.queries.start + r / self.group;
                let left = self.args.window.left(p);
                for (x, extra) in row.iter_mut().zip(extras) {
                    match extra {
                        Extra::Sink(s) if *s >= left => *x = f32::NEG_INFINITY,
                        Extra::Far { seen, .. } if !(seen.from..seen.until).contains(&p) => *x = f32::NEG_INFINITY,
                        Extra::Far { seen, .. } => *x += seen.bias,
                        Extra::Sink(_) => {}
                    }
                }
            }
            partial.fold(logits, n, Matrix { data: &scratch.values, stride: d }, d);
        }
    }

    /// Copies a tile's queries of one KV head, scaled, to rows (token, head within the group).
    fn pack_queries(&self, q: &[f32], tile: &Tile, kv: usize, out: &mut Vec<f32>) {
        let (width, head) = (self.group * self.dim, self.kv_heads * self.group * self.dim);
        out.clear();
        for t in tile.queries.clone() {
            let from = t * head + kv * width;
            out.extend(q[from..from + width].iter().map(|x| x * self.args.scale));
        }
    }

    /// Merges the shares of one tile and head, divides, and puts the rows in their places.
    fn merge(&self, tile: &Tile, kv: usize, shares: &[Partial], out: &mut [f32]) {
        let (d, width) = (self.dim, self.group * self.dim);
        let head = self.kv_heads * width;
        for r in 0..tile.queries.len() * self.group {
            let at = (tile.queries.start + r / self.group) * head + kv * width + r % self.group * d;
            let top = shares.iter().map(|s| s.max[r]).fold(f32::NEG_INFINITY, f32::max);
            let factor = |s: &Partial| simd::exp(s.max[r] - top);
            let sum: f32 = shares.iter().map(|s| s.sum[r] * factor(s)).sum();
            for s in shares {
                let f = factor(s) / sum;
                for (o, x) in out[at..at + d].iter_mut().zip(&s.out[r * d..(r + 1) * d]) {
                    *o += x * f;
                }
            }
        }
    }
}

enum Extra<'a> {
    Sink(usize),
    Far { store: usize, row: usize, seen: &'a FarRow },
}

impl Partial {
    /// Adds a tile: its logits become weights under the new maximum, what was there is rescaled.
    fn fold(&mut self, logits: &mut [f32], n: usize, values: Matrix, d: usize) {
        let rows = self.max.len();
        for (r, row) in logits.chunks_mut(n).enumerate() {
            let factor = simd::softmax_row(row, &mut self.max[r], &mut self.sum[r]);
            if factor != 1.0 {
                self.out[r * d..(r + 1) * d].iter_mut().for_each(|x| *x *= factor);
            }
        }
        multiply_add(rows, d, n, Matrix { data: logits, stride: n }, values, &mut self.out);
    }
}
