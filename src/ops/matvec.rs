//! A few input rows times matrices as they are held: what decode spends its time on.
//!
//! Each matrix row is read once, and several matrices share one parallel region, so that the cost is the bytes read over the
//! memory's bandwidth. Inputs stay f32: candle's own quantised dot products round them to 8 bits first, quantise them on one
//! thread, and on two cores reached a third of this speed (docs/numerics.md).

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// A matrix `[rows, cols]` in memory.
#[derive(Clone, Copy)]
pub enum Rows<'a> {
    /// Row-major f32.
    F32(&'a [f32]),
    /// Row-major Q8_0: blocks of an f16 scale and 32 signed bytes.
    Q8_0(&'a [u8]),
}

/// Elements and bytes of a Q8_0 block.
const Q8_0: (usize, usize) = (32, 34);
/// Matrix elements to a task: about 20 µs of work.
const TASK: usize = 1 << 17;

impl Rows<'_> {
    fn rows(&self, cols: usize) -> usize {
        match self {
            Self::F32(w) => w.len() / cols,
            Self::Q8_0(w) => w.len() / (cols / Q8_0.0 * Q8_0.1),
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
    // Row-major by matrix row first, so that a task's results are one slice.
    let mut by_row: Vec<Vec<f32>> = matrices.iter().map(|m| vec![0.0; m.rows(cols) * tokens]).collect();
    let tasks: Vec<(Rows, &mut [f32])> = matrices
        .iter()
        .zip(&mut by_row)
        .flat_map(|(m, out)| {
            out.chunks_mut(per_task * tokens).enumerate().map(move |(i, out)| {
                let (from, rows) = (i * per_task, out.len() / tokens);
                let part = match *m {
                    Rows::F32(w) => Rows::F32(&w[from * cols..(from + rows) * cols]),
                    Rows::Q8_0(w) => {
                        let bytes = cols / Q8_0.0 * Q8_0.1;
                        Rows::Q8_0(&w[from * bytes..(from + rows) * bytes])
                    }
                };
                (part, out)
            })
        })
        .collect();
    tasks.into_par_iter().for_each(|(part, out)| Arch::new().dispatch(Task { part, x, cols, out }));
    if tokens == 1 {
        return by_row;
    }
    let transpose = |v: Vec<f32>| {
        let rows = v.len() / tokens;
        (0..v.len()).map(|i| v[i % rows * tokens + i / rows]).collect()
    };
    by_row.into_iter().map(transpose).collect()
}

struct Task<'a> {
    part: Rows<'a>,
    x: &'a [f32],
    cols: usize,
    out: &'a mut [f32],
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { part, x, cols, out } = self;
        let tokens = x.len() / cols;
        match part {
            Rows::F32(w) => {
                for (row, out) in w.chunks_exact(cols).zip(out.chunks_exact_mut(tokens)) {
                    for (x, out) in x.chunks_exact(cols).zip(out) {
                        *out = dot_f32(row, x);
                    }
                }
            }
            Rows::Q8_0(w) => {
                let bytes = cols / Q8_0.0 * Q8_0.1;
                for (row, out) in w.chunks_exact(bytes).zip(out.chunks_exact_mut(tokens)) {
                    for (x, out) in x.chunks_exact(cols).zip(out) {
                        *out = dot_q8_0(row, x);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn dot_f32(w: &[f32], x: &[f32]) -> f32 {
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

#[inline(always)]
fn dot_q8_0(row: &[u8], x: &[f32]) -> f32 {
    let mut sums = [[0f32; 16]; 2];
    for (block, x) in row.chunks_exact(Q8_0.1).zip(x.chunks_exact(Q8_0.0)) {
        let scale = f16_to_f32(u16::from_le_bytes([block[0], block[1]]));
        let (q, (x0, x1)) = (&block[2..], x.split_at(16));
        for i in 0..16 {
            sums[0][i] = (q[i] as i8 as f32 * scale).mul_add(x0[i], sums[0][i]);
            sums[1][i] = (q[16 + i] as i8 as f32 * scale).mul_add(x1[i], sums[1][i]);
        }
    }
    (0..16).map(|i| sums[0][i] + sums[1][i]).sum()
}

/// A finite half-precision number, without a call that would not be inlined: the exponent is rebased by one exact product.
#[inline(always)]
fn f16_to_f32(bits: u16) -> f32 {
    let magnitude = f32::from_bits(((bits & 0x7fff) as u32) << 13) * f32::from_bits(0x7780_0000);
    f32::from_bits(magnitude.to_bits() | ((bits & 0x8000) as u32) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision_scales_are_exact() {
        for bits in 0..=u16::MAX {
            let want = half::f16::from_bits(bits).to_f32();
            if want.is_finite() {
                assert_eq!(f16_to_f32(bits).to_bits(), want.to_bits(), "{bits:#x}");
            }
        }
    }
}
