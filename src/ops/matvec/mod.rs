//! A few input rows times matrices as they are held, and the widening of held rows for many input rows.
//!
//! Decode spends its time here. Each matrix row is read once, and several matrices share one parallel region, so that the cost
//! is the bytes read over the memory's bandwidth. Products are of f32 with f32: a matrix that came quantised gives the result
//! of its dequantised values, whatever form it is held in.

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "cuda")]
pub(crate) mod widen;

use super::blocks::{in_format, Block, InFormat};
use candle_core::quantized::GgmlDType;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// A matrix `[rows, cols]` in memory, row-major.
#[derive(Clone, Copy)]
pub enum Rows<'a> {
    /// Plain values.
    F32(&'a [f32]),
    /// Blocks of a format.
    Blocks(GgmlDType, &'a [u8]),
}

/// Matrix elements to a task: about 20 µs of work.
const TASK: usize = 1 << 17;

/// Whether rows of `cols` values in `dtype` have a path here.
pub fn has_blocks(dtype: GgmlDType, cols: usize) -> bool {
    struct Elements;
    impl InFormat for Elements {
        type Output = usize;
        fn run<B: Block>(self) -> usize {
            B::ELEMENTS
        }
    }
    in_format(dtype, Elements).is_some_and(|n| cols.is_multiple_of(n))
}

impl<'a> Rows<'a> {
    /// Elements or bytes of a row.
    fn stride(&self, cols: usize) -> usize {
        match self {
            Self::F32(_) => cols,
            Self::Blocks(t, _) => cols / t.block_size() * t.type_size(),
        }
    }

    fn count(&self, cols: usize) -> usize {
        let len = match self {
            Self::F32(w) => w.len(),
            Self::Blocks(_, w) => w.len(),
        };
        len / self.stride(cols)
    }

    fn part(&self, from: usize, count: usize, cols: usize) -> Self {
        let range = from * self.stride(cols)..(from + count) * self.stride(cols);
        match *self {
            Self::F32(w) => Self::F32(&w[range]),
            Self::Blocks(t, w) => Self::Blocks(t, &w[range]),
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
        Rows::Blocks(dtype, w) => {
            let known = in_format(dtype, Product { w, x, cols, out });
            debug_assert!(known.is_some(), "callers ask has_blocks first");
        }
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

/// Rows `first..first + out.len() / cols` of a matrix of blocks, as f32, spread over the cores.
pub fn widen(dtype: GgmlDType, bytes: &[u8], first: usize, cols: usize, out: &mut [f32]) {
    let rows = Rows::Blocks(dtype, bytes);
    let share = (out.len() / cols).div_ceil(rayon::current_num_threads()).max(1);
    out.par_chunks_mut(share * cols).enumerate().for_each(|(i, out)| {
        if let Rows::Blocks(dtype, part) = rows.part(first + i * share, out.len() / cols, cols) {
            let known = in_format(dtype, Widen { part, out });
            debug_assert!(known.is_some(), "callers ask has_blocks first");
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

struct Product<'a> {
    w: &'a [u8],
    x: &'a [f32],
    cols: usize,
    out: &'a mut [f32],
}

impl InFormat for Product<'_> {
    type Output = ();

    fn run<B: Block>(self) {
        struct Dispatched<'a, B>(Product<'a>, std::marker::PhantomData<B>);
        impl<B: Block> WithSimd for Dispatched<'_, B> {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) {
                let Product { w, x, cols, out } = self.0;
                let tokens = x.len() / cols;
                let bytes = cols / B::ELEMENTS * B::BYTES;
                for (row, out) in w.chunks_exact(bytes).zip(out.chunks_exact_mut(tokens)) {
                    for (x, out) in x.chunks_exact(cols).zip(out) {
                        *out = dot_blocks::<B>(row, x);
                    }
                }
            }
        }
        Arch::new().dispatch(Dispatched::<B>(self, std::marker::PhantomData));
    }
}

#[inline(always)]
fn dot_blocks<B: Block>(row: &[u8], x: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let mut wide = [0f32; 256];
    for (block, x) in row.chunks_exact(B::BYTES).zip(x.chunks_exact(B::ELEMENTS)) {
        let wide = &mut wide[..B::ELEMENTS];
        B::widen(block, wide);
        for (w, x) in wide.chunks_exact(16).zip(x.chunks_exact(16)) {
            for ((s, w), x) in sums.iter_mut().zip(w).zip(x) {
                *s = w.mul_add(*x, *s);
            }
        }
    }
    sums.iter().sum()
}

struct Widen<'a> {
    part: &'a [u8],
    out: &'a mut [f32],
}

impl InFormat for Widen<'_> {
    type Output = ();

    fn run<B: Block>(self) {
        struct Dispatched<'a, B>(Widen<'a>, std::marker::PhantomData<B>);
        impl<B: Block> WithSimd for Dispatched<'_, B> {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) {
                for (b, out) in self.0.part.chunks_exact(B::BYTES).zip(self.0.out.chunks_exact_mut(B::ELEMENTS)) {
                    B::widen(b, out);
                }
            }
        }
        Arch::new().dispatch(Dispatched::<B>(self, std::marker::PhantomData));
    }
}
