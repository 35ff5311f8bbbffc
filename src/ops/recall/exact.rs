//! Exact attention of one KV head's queries to chosen tokens, read row by row from the host store.
//!
//! The rows are scattered and read once, so that the time is that of fetching them: a tile of rows is brought to the L1
//! cache while the tile before it is multiplied, and nothing is copied.

use crate::ops::simd;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Rows of a tile; two tiles of 64 channels take half of an L1 cache of 32 KiB.
const TILE: usize = 16;
/// Chosen tokens of a task: a fixed number, so that the result does not depend on the number of threads.
const TASK: usize = 512;
/// Most query heads that share a pass over a tile.
const MOST: usize = 4;
/// Elements of a cache line.
const LINE: usize = 16;

/// Attention of a group's queries to tokens, before division.
pub(super) struct Exact {
    /// Largest logit, `[H / G]`.
    pub max: Vec<f32>,
    /// Sum of the weights relative to it, `[H / G]`.
    pub sum: Vec<f32>,
    /// Weighted values, `[H / G, D]`.
    pub out: Vec<f32>,
}

impl Exact {
    /// Attends to the tokens `chosen` of `rows`.
    ///
    /// # Shapes
    /// `rows [tokens, 2, D]`, keys before values; `queries [H / G, D]`, with the scale applied.
    pub fn new(rows: &[f32], dim: usize, queries: &[f32], chosen: &[u32]) -> Self {
        let parts: Vec<Self> =
            chosen.par_chunks(TASK).map(|chosen| Arch::new().dispatch(Part { rows, dim, queries, chosen })).collect();
        let mut parts = parts.into_iter();
        let mut all = parts.next().unwrap_or_else(|| Self::none(queries.len() / dim, dim));
        for part in parts {
            all.merge(&part, dim);
        }
        all
    }

    fn none(heads: usize, dim: usize) -> Self {
        Self { max: vec![f32::NEG_INFINITY; heads], sum: vec![0.0; heads], out: vec![0.0; heads * dim] }
    }

    fn merge(&mut self, part: &Self, dim: usize) {
        for (h, (out, more)) in self.out.chunks_exact_mut(dim).zip(part.out.chunks_exact(dim)).enumerate() {
            let top = self.max[h].max(part.max[h]);
            if top == f32::NEG_INFINITY {
                continue;
            }
            let (a, b) = (simd::exp(self.max[h] - top), simd::exp(part.max[h] - top));
            out.iter_mut().zip(more).for_each(|(x, y)| *x = a * *x + b * y);
            self.sum[h] = a * self.sum[h] + b * part.sum[h];
            self.max[h] = top;
        }
    }
}

/// One task: an online softmax over tiles of rows.
struct Part<'a> {
    rows: &'a [f32],
    dim: usize,
    queries: &'a [f32],
    chosen: &'a [u32],
}

impl WithSimd for Part<'_> {
    type Output = Exact;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Exact {
        let heads = self.queries.len() / self.dim;
        match heads.div_ceil(heads.div_ceil(MOST)) {
            1 => self.run::<S, 1>(simd),
            2 => self.run::<S, 2>(simd),
            3 => self.run::<S, 3>(simd),
            _ => self.run::<S, MOST>(simd),
        }
    }
}

impl<'a> Part<'a> {
    #[inline(always)]
    fn run<S: Simd, const H: usize>(&self, simd: S) -> Exact {
        let mut lanes: Vec<Lanes<S, H>> =
            self.queries.chunks(H * self.dim).map(|queries| Lanes::new(simd, queries, self.dim)).collect();
        let mut next = self.chosen;
        let mut ahead = [&[][..]; TILE];
        let mut n = self.take(&mut next, &mut ahead);
        while n > 0 {
            let rows = ahead;
            // Without a next tile the reads ahead hit the cache.
            let following = self.take(&mut next, &mut ahead);
            for (i, lanes) in lanes.iter_mut().enumerate() {
                lanes.tile(simd, &rows[..n], if i == 0 { &ahead } else { &rows });
            }
            n = following;
        }
        let heads = self.queries.len() / self.dim;
        let mut result = Exact { max: vec![], sum: vec![], out: vec![] };
        for lanes in lanes {
            result.max.extend(lanes.max);
            result.sum.extend(lanes.sum);
            result.out.extend(lanes.out);
        }
        result.max.truncate(heads);
        result.sum.truncate(heads);
        result.out.truncate(heads * self.dim);
        result
    }

    /// Takes the rows of the next tile from `chosen`, and returns how many there are.
    #[inline(always)]
    fn take(&self, chosen: &mut &[u32], rows: &mut [&'a [f32]; TILE]) -> usize {
        let (tile, rest) = chosen.split_at(chosen.len().min(TILE));
        for (row, i) in rows.iter_mut().zip(tile) {
            *row = &self.rows[2 * *i as usize * self.dim..][..2 * self.dim];
        }
        *chosen = rest;
        tile.len()
    }
}

/// `H` heads that share a pass over a tile, and their running softmax; the last ones may be padding.
struct Lanes<'a, S: Simd, const H: usize> {
    /// Queries, `[H, D]`; those of padding are empty.
    queries: [&'a [f32]; H],
    /// Queries by vectors of channels.
    q: Vec<[S::f32s; H]>,
    /// Logits of a tile, then its weights, `[H, TILE]`.
    weights: Vec<f32>,
    max: [f32; H],
    sum: [f32; H],
    /// `[H, D]`.
    out: Vec<f32>,
    dim: usize,
}

impl<'a, S: Simd, const H: usize> Lanes<'a, S, H> {
    #[inline(always)]
    fn new(simd: S, queries: &'a [f32], dim: usize) -> Self {
        let mut q = vec![[simd.splat_f32s(0.0); H]; S::as_simd_f32s(&queries[..dim]).0.len()];
        let mut rows = [&[][..]; H];
        for (h, query) in queries.chunks_exact(dim).enumerate() {
            q.iter_mut().zip(S::as_simd_f32s(query).0).for_each(|(q, x)| q[h] = *x);
            rows[h] = query;
        }
        let (max, sum) = ([f32::NEG_INFINITY; H], [0.0; H]);
        Self { queries: rows, q, weights: vec![0.0; H * TILE], max, sum, out: vec![0.0; H * dim], dim }
    }

    /// Adds a tile's rows, and reads an element of every cache line of the rows `ahead`.
    #[inline(always)]
    fn tile(&mut self, simd: S, rows: &[&[f32]], ahead: &[&[f32]; TILE]) {
        let (dim, mut read) = (self.dim, 0);
        self.weights.fill(f32::NEG_INFINITY);
        // In one go: as many reads as the core can have under way wait for memory together.
        for row in ahead {
            for line in row.chunks_exact(LINE) {
                read ^= line[0].to_bits();
            }
        }
        std::hint::black_box(read);
        for (r, row) in rows.iter().enumerate() {
            let (key, tail) = S::as_simd_f32s(&row[..dim]);
            let mut sums = [simd.splat_f32s(0.0); H];
            for (q, key) in self.q.iter().zip(key) {
                for (sum, q) in sums.iter_mut().zip(q) {
                    *sum = simd.mul_add_f32s(*q, *key, *sum);
                }
            }
            for (h, sum) in sums.into_iter().enumerate() {
                let mut logit = simd.reduce_sum_f32s(sum);
                for (q, key) in self.queries[h].iter().rev().zip(tail.iter().rev()) {
                    logit += q * key;
                }
                self.weights[h * TILE + r] = logit;
            }
        }
        for (h, weights) in self.weights.chunks_exact_mut(TILE).enumerate() {
            let mut top = self.max[h];
            for x in &*weights {
                top = if *x > top { *x } else { top };
            }
            // Logits of -∞ alone have no weight, and no largest one to be relative to.
            if top == f32::NEG_INFINITY {
                weights.fill(0.0);
                continue;
            }
            let factor = simd::exp(self.max[h] - top);
            for w in weights.iter_mut() {
                *w = simd::exp(*w - top);
            }
            if factor != 1.0 {
                for x in &mut self.out[h * dim..][..dim] {
                    *x *= factor;
                }
            }
            self.sum[h] = self.sum[h] * factor + weights.iter().sum::<f32>();
            self.max[h] = top;
        }
        self.add_values(simd, rows);
    }

    /// Adds a tile's values at its weights.
    #[inline(always)]
    fn add_values(&mut self, simd: S, rows: &[&[f32]]) {
        let dim = self.dim;
        let vectors = S::as_simd_f32s(&rows[0][dim..]).0.len();
        for c in (0..vectors).step_by(2) {
            let width = (vectors - c).min(2);
            let mut sums = [[simd.splat_f32s(0.0); 2]; H];
            for (r, row) in rows.iter().enumerate() {
                let values = &S::as_simd_f32s(&row[dim..]).0[c..][..width];
                let pair = [values[0], values[width - 1]];
                for (sums, weights) in sums.iter_mut().zip(self.weights.chunks_exact(TILE)) {
                    let w = simd.splat_f32s(weights[r]);
                    sums[0] = simd.mul_add_f32s(w, pair[0], sums[0]);
                    sums[1] = simd.mul_add_f32s(w, pair[1], sums[1]);
                }
            }
            for (out, sums) in self.out.chunks_exact_mut(dim).zip(&sums) {
                let out = &mut S::as_mut_simd_f32s(out).0[c..][..width];
                for (o, s) in out.iter_mut().zip(sums) {
                    *o = simd.add_f32s(*o, *s);
                }
            }
        }
        let tail = S::as_simd_f32s(&rows[0][dim..]).1.len();
        for (out, weights) in self.out.chunks_exact_mut(dim).zip(self.weights.chunks_exact(TILE)) {
            for (row, w) in rows.iter().zip(weights) {
                for (o, x) in out[dim - tail..].iter_mut().zip(&row[2 * dim - tail..]) {
                    *o += w * x;
                }
            }
        }
    }
}
