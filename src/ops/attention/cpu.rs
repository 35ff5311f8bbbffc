//! The tiled CPU path: tasks of (query tile, KV head, part of the keys), each an online softmax over key tiles whose
//! two products run through the GEMM library. A tile's work depends on what its queries may read, not on the context.

use super::{Attended, AttentionArgs, FarRow, KeyValues, Parts, RowList, StoreRows, NO_ROW};
use crate::error::Result;
use crate::ops::gemm::{multiply_add, multiply_transposed, Strided};
use crate::ops::simd;
use crate::ops::view::{rows_view, view, View};
use candle_core::{Device, Storage, Tensor};
use rayon::prelude::*;
use std::ops::{Deref, Range};

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
    Ring,
    Chunk,
}

/// Queries of one block, and the keys that they read.
struct Tile {
    queries: Range<usize>,
    runs: Vec<Run>,
}

/// Rows of one tensor `[rows, G, D]`, at any stride.
#[derive(Clone, Copy, Default)]
struct Rows<'a> {
    values: &'a [f32],
    row: usize,
    head: usize,
}

impl<'a> Rows<'a> {
    /// The rows of KV head `kv` from `row` on.
    fn from(&self, row: usize, kv: usize) -> Strided<'a> {
        Strided { data: &self.values[row * self.row + kv * self.head..], stride: self.row }
    }
}

/// Keys and values.
type Pair<'a> = (Rows<'a>, Rows<'a>);

/// The values of a call's tensors.
struct Buffers<'a> {
    q: &'a [f32],
    chunk: Pair<'a>,
    ring: Pair<'a>,
    sinks: Pair<'a>,
    /// Per store: keys and values, and the queries that score them.
    stores: Vec<(Pair<'a>, &'a [f32])>,
    /// Per store with a table: row numbers `[G, blocks, n]`, and `n`.
    tables: Vec<Option<(Vec<u32>, usize, usize)>>,
}

/// A worker's buffers, reused across tasks.
#[derive(Default)]
struct Scratch {
    q: Vec<f32>,
    q_far: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    logits: Vec<f32>,
}

/// A task's partial softmax: maximum and sum per query row, and the weighted values before division.
struct Partial {
    max: Vec<f32>,
    sum: Vec<f32>,
    out: Vec<f32>,
}

struct Call<'a> {
    args: &'a AttentionArgs<'a>,
    parts: &'a Parts<'a>,
    buffers: Buffers<'a>,
    group: usize,
    kv_heads: usize,
    dim: usize,
}

pub(super) fn attend(args: &AttentionArgs, parts: &Parts) -> Result<Attended> {
    let (t, h, g, d) = parts.dims;
    let group = h / g;
    let mut tensors: Vec<Option<KeyValues>> = vec![parts.chunk, parts.ring, parts.sinks.map(|s| s.0)];
    for store in &parts.stores {
        match store.rows {
            StoreRows::Tensors(rows) => tensors.push(Some(rows)),
            #[cfg(feature = "cuda")]
            StoreRows::Host(_) => return super::fail("pinned host rows are for queries on a GPU".into()),
        }
    }
    let rows: Vec<_> = tensors.into_iter().map(|t| t.map(lock).transpose()).collect::<Result<_>>()?;
    let pair = |i: usize| -> Result<Pair> {
        let Some([(k, sk), (v, sv)]) = &rows[i] else { return Ok(Pair::default()) };
        let rows = |values, s: &(usize, usize)| Rows { values, row: s.0, head: s.1 };
        Ok((rows(k.values()?, sk), rows(v.values()?, sv)))
    };
    let q = view(args.q, "attention")?;
    let far: Vec<_> =
        parts.stores.iter().map(|s| s.q.map(|q| view(q, "attention")).transpose()).collect::<Result<_>>()?;
    let far = |i: usize| far[i].as_ref().map_or(Ok(&[][..]), View::values);
    let table = |store: &super::Store| -> Result<_> {
        let RowList::Table { index, .. } = store.read else { return Ok(None) };
        let (_, blocks, places) = index.dims3()?;
        let (rows, stored) = (index.flatten_all()?.to_vec1::<u32>()?, store.rows.dims()?.0);
        match rows.iter().find(|r| **r != NO_ROW && **r as usize >= stored) {
            Some(r) => super::fail(format!("a table names row {r} of {stored}")),
            None => Ok(Some((rows, blocks, places))),
        }
    };
    let stores = 0..parts.stores.len();
    let buffers = Buffers {
        q: q.values()?,
        chunk: pair(0)?,
        ring: pair(1)?,
        sinks: pair(2)?,
        stores: stores.map(|i| Ok((pair(3 + i)?, far(i)?))).collect::<Result<_>>()?,
        tables: parts.stores.iter().map(table).collect::<Result<_>>()?,
    };
    let call = Call { args, parts, buffers, group, kv_heads: g, dim: d };
    let tiles = call.tiles(t);
    // With few tiles (decode) the keys are split too, so that no core idles.
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
    let (mut out, mut lse) = (vec![0f32; t * h * d], vec![f32::NEG_INFINITY; t * h]);
    let mut at = 0;
    while at < tasks.len() {
        let (i, kv, ..) = tasks[at];
        let same = tasks[at..].iter().take_while(|(j, other, ..)| (*j, *other) == (i, kv)).count();
        call.merge(&tiles[i], kv, &partials[at..at + same], &mut out, &mut lse);
        at += same;
    }
    let lse = args.lse.then(|| Tensor::from_vec(lse, (t, h), &Device::Cpu)).transpose()?;
    Ok(Attended { out: Tensor::from_vec(out, (t, h, d), &Device::Cpu)?, lse })
}

/// A tensor's locked values and its strides.
type Locked<V> = (View<V>, (usize, usize));

fn lock<'a>(rows: KeyValues<'a>) -> Result<[Locked<impl Deref<Target = Storage> + 'a>; 2]> {
    Ok([rows_view(rows.k, "attention")?, rows_view(rows.v, "attention")?])
}

impl Call<'_> {
    /// Cuts the chunk into tiles that do not cross a block where routes or the window's edge change.
    fn tiles(&self, t: usize) -> Vec<Tile> {
        let start = self.args.start;
        let window = match self.args.window {
            super::Window::Blocks { block, .. } => Some(block),
            _ => None,
        };
        let listed = self.parts.stores.iter().map(|s| match s.read {
            RowList::Blocks { block, .. } | RowList::Table { block, .. } => block,
        });
        let blocks: Vec<usize> = window.into_iter().chain(listed).collect();
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
        let mut runs = vec![];
        let mut at = if self.parts.ring.is_some() { left } else { left.max(start) };
        let end = if self.parts.chunk.is_some() { start + queries.end } else { start };
        while at < end {
            let (source, row, room) = if at < start {
                let capacity = self.parts.ring.map_or(1, |r| r.k.dims()[0]);
                (Source::Ring, at % capacity, (capacity - at % capacity).min(start - at))
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
        let p_first = self.args.start + tile.queries.start;
        let p_last = self.args.start + tile.queries.end - 1;
        for run in &tile.runs[runs] {
            let (k, v) = match run.source {
                Source::Ring => self.buffers.ring,
                Source::Chunk => self.buffers.chunk,
            };
            scratch.logits.resize(rows * run.len, 0.0);
            let logits = &mut scratch.logits[..rows * run.len];
            let q = Strided { data: &scratch.q, stride: d };
            multiply_transposed(rows, run.len, d, q, k.from(run.row, kv), logits);
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
            partial.fold(logits, run.len, v.from(run.row, kv), d);
        }
        partial
    }

    /// Sinks and rows of stores, gathered into one small tile per kind of query.
    fn extras(&self, tile: &Tile, kv: usize, scratch: &mut Scratch, partial: &mut Partial) {
        let p_last = self.args.start + tile.queries.end - 1;
        let sinks = self.parts.sinks.map_or(0, |s| s.1.min(self.args.window.left(p_last)));
        let stores = || self.parts.stores.iter().enumerate();
        let mut near: Vec<Extra> = (0..sinks).map(Extra::Sink).collect();
        stores().filter(|(_, s)| s.q.is_none()).for_each(|(i, _)| self.listed(i, tile, kv, &mut near));
        self.extra_tiles(near, tile, kv, false, scratch, partial);
        for (i, _) in stores().filter(|(_, s)| s.q.is_some()) {
            let mut rows = vec![];
            self.listed(i, tile, kv, &mut rows);
            if !rows.is_empty() {
                self.pack_queries(self.buffers.stores[i].1, tile, kv, &mut scratch.q_far);
                self.extra_tiles(rows, tile, kv, true, scratch, partial);
            }
        }
    }

    /// The rows of a store that a tile's queries read in one KV head.
    fn listed(&self, store: usize, tile: &Tile, kv: usize, into: &mut Vec<Extra>) {
        let start = self.args.start;
        let list = |block: usize| (start + tile.queries.start) / block - start / block;
        match (self.parts.stores[store].read, &self.buffers.tables[store]) {
            (RowList::Blocks { block, rows }, _) => {
                let listed = rows[list(block)].iter();
                into.extend(listed.flat_map(|seen| {
                    (seen.row..seen.row + seen.count).map(move |row| Extra::Far { store, row, seen: *seen })
                }));
            }
            (RowList::Table { block, .. }, Some((index, blocks, places))) => {
                let from = (kv * blocks + list(block)) * places;
                let rows = index[from..from + places].iter().filter(|r| **r != NO_ROW);
                into.extend(rows.map(|r| Extra::Far { store, row: *r as usize, seen: FarRow::one(*r as usize) }));
            }
            (RowList::Table { .. }, None) => {}
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
        let d = self.dim;
        let rows = tile.queries.len() * self.group;
        for extras in extras.chunks(KEYS) {
            let n = extras.len();
            scratch.keys.clear();
            scratch.values.clear();
            for extra in extras {
                let ((k, v), row) = match extra {
                    Extra::Sink(row) => (self.buffers.sinks, *row),
                    Extra::Far { store, row, .. } => (self.buffers.stores[*store].0, *row),
                };
                scratch.keys.extend_from_slice(&k.from(row, kv).data[..d]);
                scratch.values.extend_from_slice(&v.from(row, kv).data[..d]);
            }
            scratch.logits.resize(rows * n, 0.0);
            let q = Strided { data: if far { &scratch.q_far } else { &scratch.q }, stride: d };
            let logits = &mut scratch.logits[..rows * n];
            multiply_transposed(rows, n, d, q, Strided { data: &scratch.keys, stride: d }, logits);
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
            partial.fold(logits, n, Strided { data: &scratch.values, stride: d }, d);
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

    /// Merges the parts of one tile and head, divides, and writes the rows of the output.
    fn merge(&self, tile: &Tile, kv: usize, shares: &[Partial], out: &mut [f32], lse: &mut [f32]) {
        let (d, group) = (self.dim, self.group);
        for r in 0..tile.queries.len() * group {
            let row = ((tile.queries.start + r / group) * self.kv_heads + kv) * group + r % group;
            let top = shares.iter().map(|s| s.max[r]).fold(f32::NEG_INFINITY, f32::max);
            if top == f32::NEG_INFINITY {
                continue;
            }
            let factor = |s: &Partial| simd::exp(s.max[r] - top);
            let sum: f32 = shares.iter().map(|s| s.sum[r] * factor(s)).sum();
            lse[row] = top + sum.ln();
            for s in shares {
                let f = factor(s) / sum;
                for (o, x) in out[row * d..(row + 1) * d].iter_mut().zip(&s.out[r * d..(r + 1) * d]) {
                    *o += x * f;
                }
            }
        }
    }
}

enum Extra {
    Sink(usize),
    Far { store: usize, row: usize, seen: FarRow },
}

impl Partial {
    /// Adds a tile: computes weights under the new maximum and rescales the sums so far.
    fn fold(&mut self, logits: &mut [f32], n: usize, values: Strided, d: usize) {
        let rows = self.max.len();
        for (r, row) in logits.chunks_mut(n).enumerate() {
            let factor = simd::softmax_row(row, &mut self.max[r], &mut self.sum[r]);
            if factor != 1.0 {
                self.out[r * d..(r + 1) * d].iter_mut().for_each(|x| *x *= factor);
            }
        }
        multiply_add(rows, d, n, Strided { data: logits, stride: n }, values, &mut self.out);
    }
}
