//! Products of a few input rows with encoded matrices, and the dequantisation of rows for products of many.
//!
//! A decode step on a CPU spends its time here. Each matrix row is read once, and several matrices share one parallel
//! region, so that the cost is the bytes read over the memory's bandwidth. Elements are decoded to f32 and multiplied
//! in f32.

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "cuda")]
pub(crate) mod dequantise;

use super::blocks::{affine, decode, decode_tail, with_block, Block, WithBlock};
use crate::storage::{Affine, Storage};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// A matrix `[rows, cols]` in memory, row-major.
#[derive(Clone, Copy)]
pub enum Rows<'a> {
    /// f32 values.
    F32(&'a [f32]),
    /// Encoded rows.
    Encoded(Storage, &'a [u8]),
}

/// Matrix elements to a task: about 20 µs of work.
const TASK: usize = 1 << 17;

impl<'a> Rows<'a> {
    /// Elements or bytes of a row.
    fn stride(&self, cols: usize) -> usize {
        match self {
            Self::F32(_) => cols,
            Self::Encoded(t, _) => t.row_bytes(cols),
        }
    }

    fn count(&self, cols: usize) -> usize {
        let len = match self {
            Self::F32(w) => w.len(),
            Self::Encoded(_, w) => w.len(),
        };
        len / self.stride(cols)
    }

    fn part(&self, from: usize, count: usize, cols: usize) -> Self {
        let range = from * self.stride(cols)..(from + count) * self.stride(cols);
        match *self {
            Self::F32(w) => Self::F32(&w[range]),
            Self::Encoded(t, w) => Self::Encoded(t, &w[range]),
        }
    }
}

/// `out[m][t, r] = matrices[m][r] · x[t]`.
///
/// # Shapes
/// `x [T, cols]`; each result `[T, rows]`.
pub fn matvec(matrices: &[Rows], x: &[f32], cols: usize) -> Vec<Vec<f32>> {
    let tokens = x.len() / cols;
    let per_task = (TASK / cols).max(1);
    let mut permuted: Vec<affine::Input> = vec![];
    for m in matrices {
        match m {
            Rows::Encoded(Storage::Affine(format), _) if !permuted.iter().any(|x| x.is_for(*format)) => {
                permuted.push(affine::Input::new(*format, x, cols));
            }
            _ => {}
        }
    }
    // By matrix row first, so that a task's results are one slice.
    let mut by_row: Vec<Vec<f32>> = matrices.iter().map(|m| vec![0.0; m.count(cols) * tokens]).collect();
    let tasks: Vec<(Rows, &mut [f32])> = matrices
        .iter()
        .zip(&mut by_row)
        .flat_map(|(m, out)| {
            let part = move |(i, out): (usize, _)| {
                let out: &mut [f32] = out;
                (m.part(i * per_task, out.len() / tokens, cols), out)
            };
            out.chunks_mut(per_task * tokens).enumerate().map(part)
        })
        .collect();
    tasks.into_par_iter().for_each(|(part, out)| match part {
        Rows::F32(w) => Arch::new().dispatch(Plain { w, x, cols, out }),
        Rows::Encoded(storage, w) => with_block(storage, Dots { w, x, permuted: &permuted, cols, out }),
    });
    if tokens == 1 {
        return by_row;
    }
    let transpose = |v: Vec<f32>| {
        let rows = v.len() / tokens;
        (0..v.len()).map(|i| v[i % rows * tokens + i / rows]).collect()
    };
    by_row.into_iter().map(transpose).collect()
}

/// Decodes rows `first..first + out.len() / cols` of an encoded matrix, spread over the cores.
pub fn dequantise(storage: Storage, bytes: &[u8], first: usize, cols: usize, out: &mut [f32]) {
    let rows = Rows::Encoded(storage, bytes);
    let per_task = (out.len() / cols).div_ceil(rayon::current_num_threads()).max(1);
    out.par_chunks_mut(per_task * cols).enumerate().for_each(|(i, out)| {
        if let Rows::Encoded(storage, part) = rows.part(first + i * per_task, out.len() / cols, cols) {
            with_block(storage, Dequantise { part, out });
        }
    });
}

struct Plain<'a> {
    w: &'a [f32],
    x: &'a [f32],
    cols: usize,
    out: &'a mut [f32],
}

impl WithSimd for Plain<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let tokens = self.x.len() / self.cols;
        for (row, out) in self.w.chunks_exact(self.cols).zip(self.out.chunks_exact_mut(tokens)) {
            for (x, out) in self.x.chunks_exact(self.cols).zip(out) {
                *out = dot(row, x);
            }
        }
    }
}

#[inline(always)]
fn dot(w: &[f32], x: &[f32]) -> f32 {
    let mut sums = [[0f32; 16]; 4];
    let (mut wc, mut xc) = (w.chunks_exact(64), x.chunks_exact(64));
    for (w, x) in (&mut wc).zip(&mut xc) {
        for (s, (w, x)) in sums.iter_mut().zip(w.chunks_exact(16).zip(x.chunks_exact(16))) {
            for ((s, w), x) in s.iter_mut().zip(w).zip(x) {
                *s = w.mul_add(*x, *s);
            }
        }
    }
    let tail: f32 = wc.remainder().iter().zip(xc.remainder()).map(|(w, x)| w * x).sum();
    let [a, b, c, d] = sums;
    tail + (0..16).map(|i| (a[i] + b[i]) + (c[i] + d[i])).sum::<f32>()
}

struct Dots<'a> {
    w: &'a [u8],
    x: &'a [f32],
    /// The same input, as products with each of MLX's formats read it.
    permuted: &'a [affine::Input],
    cols: usize,
    out: &'a mut [f32],
}

impl WithBlock for Dots<'_> {
    type Output = ();

    fn run<B: Block>(self) {
        struct Dispatched<'a, B>(Dots<'a>, std::marker::PhantomData<B>);
        impl<B: Block> WithSimd for Dispatched<'_, B> {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) {
                let Dots { w, x, cols, out, .. } = self.0;
                let tokens = x.len() / cols;
                // Dense encodings may end within a block.
                let bytes = cols * B::BYTES / B::ELEMENTS;
                for (row, out) in w.chunks_exact(bytes).zip(out.chunks_exact_mut(tokens)) {
                    for (x, out) in x.chunks_exact(cols).zip(out) {
                        *out = dot_blocks::<B>(row, x);
                    }
                }
            }
        }
        Arch::new().dispatch(Dispatched::<B>(self, std::marker::PhantomData));
    }

    fn run_affine<const BITS: usize>(self, format: Affine) {
        let Dots { w, permuted, cols, out, .. } = self;
        if let Some(input) = permuted.iter().find(|x| x.is_for(format)) {
            Arch::new().dispatch(affine::Product::<BITS> { w, input, cols, out });
        }
    }
}

#[inline(always)]
fn dot_blocks<B: Block>(row: &[u8], x: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let mut decoded = [0f32; 256];
    let whole = x.len() / B::ELEMENTS;
    let (blocks, last) = row.split_at(whole * B::BYTES);
    let (parts, rest) = x.split_at(whole * B::ELEMENTS);
    for (block, x) in blocks.chunks_exact(B::BYTES).zip(parts.chunks_exact(B::ELEMENTS)) {
        let decoded = &mut decoded[..B::ELEMENTS];
        B::decode(block, decoded);
        for (v, x) in decoded.chunks_exact(16).zip(x.chunks_exact(16)) {
            for ((s, v), x) in sums.iter_mut().zip(v).zip(x) {
                *s = v.mul_add(*x, *s);
            }
        }
    }
    let sum = sums.iter().sum::<f32>();
    match rest.is_empty() {
        true => sum,
        false => sum + dot_tail::<B>(last, rest),
    }
}

/// The product of a dense row's last values, fewer than a block; apart, so that the loop over blocks stays small.
#[cold]
#[inline(never)]
fn dot_tail<B: Block>(row: &[u8], x: &[f32]) -> f32 {
    let mut decoded = [0f32; 256];
    decode_tail::<B>(row, x.len(), &mut decoded);
    decoded.iter().zip(x).map(|(v, x)| v * x).sum()
}

struct Dequantise<'a> {
    part: &'a [u8],
    out: &'a mut [f32],
}

impl WithBlock for Dequantise<'_> {
    type Output = ();

    fn run<B: Block>(self) {
        struct Dispatched<'a, B>(Dequantise<'a>, std::marker::PhantomData<B>);
        impl<B: Block> WithSimd for Dispatched<'_, B> {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) {
                decode::<B>(self.0.part, self.0.out);
            }
        }
        Arch::new().dispatch(Dispatched::<B>(self, std::marker::PhantomData));
    }

    fn run_affine<const BITS: usize>(self, format: Affine) {
        Arch::new().dispatch(affine::Decode::<BITS> { format, bytes: self.part, out: self.out });
    }
}
