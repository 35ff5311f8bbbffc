//! Untied real butterflies on rows of a matrix, `W` rows at a time: what a layer runs, forward and backward.
//!
//! A tile holds element `i` of all its rows as `[f32; W]`, as in [`super::tile`]. The backward pass computes a tile's
//! intermediate results again, so that its memory is one tile of them a thread, and adds its gradients over the rows in an
//! order that does not depend on the number of threads.

use super::Shape;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Rows of a tile.
const W: usize = 16;
/// Rows that one task reads at least, whole tiles.
const ROWS: usize = 8 * W;
/// Tasks whose gradients are summed, at most: each holds as many numbers as there are factors.
pub(super) const TASKS: usize = 64;

/// A stack of butterflies and the columns of what it reads and gives.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stack<'a> {
    /// Untied and real.
    pub shape: Shape,
    /// `[stack, butterfly_len]`.
    pub factors: &'a [f32],
    /// Columns of the input, at most `N`; the rest are zeros.
    pub inputs: usize,
}

/// `W` values of every element.
type Tile = Vec<[f32; W]>;

/// Memory of a thread.
#[derive(Default)]
struct Room {
    x: Tile,
    /// Results of all factors of a butterfly, or of the last two.
    results: Tile,
    d: Tile,
    dx: Tile,
}

impl Stack<'_> {
    /// Columns of the result.
    fn outputs(&self) -> usize {
        self.factors.len() / self.shape.butterfly_len() * self.shape.size
    }

    /// Results of all butterflies for every row, one beside the other.
    ///
    /// # Shapes
    /// `x [rows, inputs]`; the result `[rows, stack N]`.
    pub fn forward(&self, x: &[f32]) -> Vec<f32> {
        let outputs = self.outputs();
        let mut y = vec![0f32; x.len() / self.inputs * outputs];
        let task = |room: &mut Room, (x, y): (&[f32], &mut [f32])| {
            struct Rows<'a, 'b>(&'a Stack<'b>, &'a mut Room, &'a [f32], &'a mut [f32]);
            impl WithSimd for Rows<'_, '_> {
                type Output = ();
                #[inline(always)]
                fn with_simd<S: Simd>(self, _: S) {
                    let Self(stack, room, x, y) = self;
                    for (x, y) in x.chunks(W * stack.inputs).zip(y.chunks_mut(W * stack.outputs())) {
                        stack.tile(room, x, y);
                    }
                }
            }
            Arch::new().dispatch(Rows(self, room, x, y));
        };
        if x.len() <= ROWS * self.inputs {
            // A single task, such as a character of a stream, is not worth the way to another thread.
            task(&mut Room::default(), (x, &mut y));
        } else {
            let tasks = x.par_chunks(ROWS * self.inputs).zip(y.par_chunks_mut(ROWS * outputs));
            tasks.for_each_init(Room::default, task);
        }
        y
    }

    #[inline(always)]
    fn tile(&self, room: &mut Room, x: &[f32], y: &mut [f32]) {
        let n = self.shape.size;
        load(&mut room.x, n, x, self.inputs, 0);
        room.results.resize(2 * n, [0.0; W]);
        for (i, w) in self.factors.chunks_exact(self.shape.butterfly_len()).enumerate() {
            let (mut from, mut to) = room.results.split_at_mut(n);
            for (level, w) in w.chunks_exact(2 * n).enumerate() {
                factor(1 << level, w, if level == 0 { &room.x } else { from }, to);
                std::mem::swap(&mut from, &mut to);
            }
            store(from, y, self.outputs(), i * n, n);
        }
    }

    /// Gradients of the input and of the factors, given that of [`Self::forward`]'s result, of which columns from `outputs`
    /// on are 0.
    ///
    /// # Shapes
    /// `x` and the first result `[rows, inputs]`; `dy [rows, outputs]`.
    pub fn backward(&self, x: &[f32], dy: &[f32], outputs: usize) -> (Vec<f32>, Vec<f32>) {
        let rows = x.len() / self.inputs;
        // Depends on the number of rows alone.
        let each = rows.div_ceil(TASKS).next_multiple_of(W).max(ROWS);
        let mut dx = vec![0f32; x.len()];
        let task = |room: &mut Room, ((x, dy), dx): ((&[f32], &[f32]), &mut [f32])| {
            struct Rows<'a, 'b>(&'a Stack<'b>, &'a mut Room, (&'a [f32], &'a [f32]), &'a mut [f32], usize);
            impl WithSimd for Rows<'_, '_> {
                type Output = Vec<f32>;
                #[inline(always)]
                fn with_simd<S: Simd>(self, _: S) -> Vec<f32> {
                    let Self(stack, room, (x, dy), dx, outputs) = self;
                    let mut gradients = vec![0f32; stack.factors.len()];
                    let tiles = x.chunks(W * stack.inputs).zip(dy.chunks(W * outputs));
                    for ((x, dy), dx) in tiles.zip(dx.chunks_mut(W * stack.inputs)) {
                        stack.tile_back(room, (x, dy), dx, outputs, &mut gradients);
                    }
                    gradients
                }
            }
            Arch::new().dispatch(Rows(self, room, (x, dy), dx, outputs))
        };
        let read = x.par_chunks(each * self.inputs).zip(dy.par_chunks(each * outputs));
        let tasks = read.zip(dx.par_chunks_mut(each * self.inputs));
        let parts: Vec<Vec<f32>> = tasks.map_init(Room::default, task).collect();
        let mut sum = vec![0f32; self.factors.len()];
        parts.iter().for_each(|part| sum.iter_mut().zip(part).for_each(|(s, g)| *s += g));
        (dx, sum)
    }

    #[inline(always)]
    fn tile_back(
        &self,
        room: &mut Room,
        (x, dy): (&[f32], &[f32]),
        dx: &mut [f32],
        outputs: usize,
        gradients: &mut [f32],
    ) {
        let (n, len) = (self.shape.size, self.shape.butterfly_len());
        let Room { x: input, results, d, dx: sum } = room;
        load(input, n, x, self.inputs, 0);
        // The result of the last factor is not read.
        results.resize((self.shape.levels() - 1) * n, [0.0; W]);
        sum.clear();
        sum.resize(n, [0.0; W]);
        for (i, (w, g)) in self.factors.chunks_exact(len).zip(gradients.chunks_exact_mut(len)).enumerate() {
            if i * n >= outputs {
                break;
            }
            for level in 0..self.shape.levels() - 1 {
                let (before, to) = results.split_at_mut(level * n);
                let from = if level == 0 { &input[..] } else { &before[(level - 1) * n..] };
                factor(1 << level, &w[2 * n * level..][..2 * n], from, &mut to[..n]);
            }
            load(d, n, dy, outputs, i * n);
            for level in (0..self.shape.levels()).rev() {
                let from = if level == 0 { &input[..] } else { &results[(level - 1) * n..][..n] };
                let own = 2 * n * level;
                factor_back(1 << level, &w[own..][..2 * n], from, d, &mut g[own..][..2 * n]);
            }
            sum.iter_mut().zip(d.iter()).for_each(|(s, d)| (0..W).for_each(|t| s[t] += d[t]));
        }
        store(sum, dx, self.inputs, 0, self.inputs);
    }
}

/// Reads columns `first..first + n` of up to `W` rows of `width`; what is beyond them is 0.
#[inline(always)]
fn load(tile: &mut Tile, n: usize, rows: &[f32], width: usize, first: usize) {
    let columns = n.min(width - first);
    if rows.len() < W * width || columns < n || tile.len() != n {
        tile.clear();
        tile.resize(n, [0.0; W]);
    }
    for (lane, row) in rows.chunks_exact(width).enumerate() {
        tile.iter_mut().zip(&row[first..first + columns]).for_each(|(to, x)| to[lane] = *x);
    }
}

/// Writes up to `columns` elements of a tile from column `first` of up to `W` rows of `width` on.
#[inline(always)]
fn store(tile: &[[f32; W]], rows: &mut [f32], width: usize, first: usize, columns: usize) {
    for (lane, row) in rows.chunks_exact_mut(width).enumerate() {
        row[first..first + columns].iter_mut().zip(tile).for_each(|(to, x)| *to = x[lane]);
    }
}

/// The product of a tile with the factor whose blocks have `2 half` rows.
#[inline(always)]
fn factor(half: usize, w: &[f32], x: &[[f32; W]], y: &mut [[f32; W]]) {
    let blocks = x.chunks_exact(2 * half).zip(y.chunks_exact_mut(2 * half)).zip(w.chunks_exact(4 * half));
    for ((x, y), w) in blocks {
        let ((a, b), (p, q)) = (x.split_at(half), y.split_at_mut(half));
        for ((((a, b), p), q), w) in a.iter().zip(b).zip(p).zip(q).zip(w.chunks_exact(4)) {
            // Whole arrays: the compiler turns loops over their elements into vector instructions only one by one.
            let (a, b) = (*a, *b);
            *p = std::array::from_fn(|t| w[0].mul_add(a[t], w[1] * b[t]));
            *q = std::array::from_fn(|t| w[2].mul_add(a[t], w[3] * b[t]));
        }
    }
}

/// Turns the gradient of [`factor`]'s result into that of `x` and adds that of the weights to `g`.
#[inline(always)]
fn factor_back(half: usize, w: &[f32], x: &[[f32; W]], d: &mut [[f32; W]], g: &mut [f32]) {
    let read = x.chunks_exact(2 * half).zip(w.chunks_exact(4 * half));
    for ((x, w), (d, g)) in read.zip(d.chunks_exact_mut(2 * half).zip(g.chunks_exact_mut(4 * half))) {
        let ((a, b), (p, q)) = (x.split_at(half), d.split_at_mut(half));
        let weights = w.chunks_exact(4).zip(g.chunks_exact_mut(4));
        for ((((a, b), p), q), (w, g)) in a.iter().zip(b).zip(p).zip(q).zip(weights) {
            let (a, b, dp, dq) = (*a, *b, *p, *q);
            *p = std::array::from_fn(|t| w[0].mul_add(dp[t], w[2] * dq[t]));
            *q = std::array::from_fn(|t| w[1].mul_add(dp[t], w[3] * dq[t]));
            g[0] += dot(&dp, &a);
            g[1] += dot(&dp, &b);
            g[2] += dot(&dq, &a);
            g[3] += dot(&dq, &b);
        }
    }
}

#[inline(always)]
fn dot(a: &[f32; W], b: &[f32; W]) -> f32 {
    let eight: [f32; 8] = std::array::from_fn(|t| a[t].mul_add(b[t], a[t + 8] * b[t + 8]));
    let four: [f32; 4] = std::array::from_fn(|t| eight[t] + eight[t + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}
