//! Kernels of [`super::Plan`]: one factor of a butterfly, or two merged, over vectors of `W` elements.

use super::plan::Pass;
use pulp::{Scalar, Simd, WithSimd};

/// A real or complex number in each lane.
type Number<V> = [V; 2];

/// A pass over all elements.
///
/// `COMPLEX`: factors are complex. `REAL_IN`: imaginary parts of the input are 0 and are not read. `REAL_OUT`:
/// imaginary parts of the result are not computed.
pub(super) struct Run<'a, const W: usize, const COMPLEX: bool, const REAL_IN: bool, const REAL_OUT: bool> {
    pub pass: &'a Pass,
    pub re: &'a mut [[f32; W]],
    pub im: &'a mut [[f32; W]],
}

impl<const W: usize, const C: bool, const I: bool, const O: bool> WithSimd for Run<'_, W, C, I, O> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match (self.pass.merged, C) {
            (true, true) => self.pairs_of_factors::<S, 32>(simd),
            (true, false) => self.pairs_of_factors::<S, 16>(simd),
            (false, true) => self.single_factors::<S, 8>(simd),
            (false, false) => self.single_factors::<S, 4>(simd),
        }
    }
}

impl<const W: usize, const C: bool, const I: bool, const O: bool> Run<'_, W, C, I, O> {
    /// Two factors at once: four elements meet, as `(0, 1)` and `(2, 3)`, then as `(0, 2)` and `(1, 3)`.
    #[inline(always)]
    fn pairs_of_factors<S: Simd, const K: usize>(self, simd: S) {
        let Self { pass, re, im } = self;
        let (stride, run) = (pass.stride, pass.run);
        let weights = pass.weights.chunks::<W>().as_chunks::<K>().0;
        let blocks = re.chunks_exact_mut(4 * stride).zip(im.chunks_exact_mut(4 * stride));
        for (block, (re, im)) in blocks.enumerate() {
            let ([r0, r1, r2, r3], [i0, i1, i2, i3]) = (quarters(re), quarters(im));
            for (j, at) in (0..stride).step_by(run).enumerate() {
                let group = pass.group(block, j, weights);
                let [r0, r1, r2, r3] =
                    [&mut r0[at..][..run], &mut r1[at..][..run], &mut r2[at..][..run], &mut r3[at..][..run]];
                let [i0, i1, i2, i3] =
                    [&mut i0[at..][..run], &mut i1[at..][..run], &mut i2[at..][..run], &mut i3[at..][..run]];
                for k in 0..run {
                    let w = if pass.splat { &group[0] } else { &group[k] };
                    let re = [&mut r0[k], &mut r1[k], &mut r2[k], &mut r3[k]];
                    let im = [&mut i0[k], &mut i1[k], &mut i2[k], &mut i3[k]];
                    four::<S, W, K, C, I, O>(simd, w, re, im);
                }
            }
        }
    }

    #[inline(always)]
    fn single_factors<S: Simd, const K: usize>(self, simd: S) {
        let Self { pass, re, im } = self;
        let (stride, run) = (pass.stride, pass.run);
        let weights = pass.weights.chunks::<W>().as_chunks::<K>().0;
        let blocks = re.chunks_exact_mut(2 * stride).zip(im.chunks_exact_mut(2 * stride));
        for (block, (re, im)) in blocks.enumerate() {
            let ((r0, r1), (i0, i1)) = (re.split_at_mut(stride), im.split_at_mut(stride));
            for (j, at) in (0..stride).step_by(run).enumerate() {
                let group = pass.group(block, j, weights);
                let [r0, r1] = [&mut r0[at..][..run], &mut r1[at..][..run]];
                let [i0, i1] = [&mut i0[at..][..run], &mut i1[at..][..run]];
                for k in 0..run {
                    let w = if pass.splat { &group[0] } else { &group[k] };
                    two::<S, W, K, C, I, O>(simd, w, [&mut r0[k], &mut r1[k]], [&mut i0[k], &mut i1[k]]);
                }
            }
        }
    }
}

fn quarters<T>(all: &mut [T]) -> [&mut [T]; 4] {
    let (first, second) = all.split_at_mut(all.len() / 2);
    let (a, b) = first.split_at_mut(first.len() / 2);
    let (c, d) = second.split_at_mut(second.len() / 2);
    [a, b, c, d]
}

/// Four rows: whole vectors of the machine, and what is narrower than one lane by lane.
#[inline(always)]
fn four<S: Simd, const W: usize, const K: usize, const C: bool, const I: bool, const O: bool>(
    simd: S,
    w: &[[f32; W]; K],
    re: [&mut [f32; W]; 4],
    im: [&mut [f32; W]; 4],
) {
    let (mut re, mut im) = (re, im);
    for at in 0..W / S::F32_LANES {
        four_at::<S, W, K, C, I, O>(simd, w, &mut re, &mut im, at);
    }
    if !W.is_multiple_of(S::F32_LANES) {
        for at in 0..W {
            four_at::<Scalar, W, K, C, I, O>(Scalar, w, &mut re, &mut im, at);
        }
    }
}

#[inline(always)]
fn four_at<S: Simd, const W: usize, const K: usize, const C: bool, const I: bool, const O: bool>(
    simd: S,
    w: &[[f32; W]; K],
    re: &mut [&mut [f32; W]; 4],
    im: &mut [&mut [f32; W]; 4],
    at: usize,
) {
    let per = if C { 8 } else { 4 };
    let zero = simd.splat_f32s(0.0);
    let mut x = [[zero; 2]; 4];
    for i in 0..4 {
        x[i][0] = S::as_simd_f32s(re[i]).0[at];
        if C && !I {
            x[i][1] = S::as_simd_f32s(im[i]).0[at];
        }
    }
    let [a, b, c, d] = x;
    let (a, b) = pair::<S, W, C, I, false>(simd, &w[..per], at, a, b);
    let (c, d) = pair::<S, W, C, I, false>(simd, &w[per..][..per], at, c, d);
    let (a, c) = pair::<S, W, C, false, O>(simd, &w[2 * per..][..per], at, a, c);
    let (b, d) = pair::<S, W, C, false, O>(simd, &w[3 * per..][..per], at, b, d);
    let y = [a, b, c, d];
    for i in 0..4 {
        S::as_mut_simd_f32s(re[i]).0[at] = y[i][0];
        if C && !O {
            S::as_mut_simd_f32s(im[i]).0[at] = y[i][1];
        }
    }
}

/// Two rows, as [`four`].
#[inline(always)]
fn two<S: Simd, const W: usize, const K: usize, const C: bool, const I: bool, const O: bool>(
    simd: S,
    w: &[[f32; W]; K],
    re: [&mut [f32; W]; 2],
    im: [&mut [f32; W]; 2],
) {
    let (mut re, mut im) = (re, im);
    for at in 0..W / S::F32_LANES {
        two_at::<S, W, K, C, I, O>(simd, w, &mut re, &mut im, at);
    }
    if !W.is_multiple_of(S::F32_LANES) {
        for at in 0..W {
            two_at::<Scalar, W, K, C, I, O>(Scalar, w, &mut re, &mut im, at);
        }
    }
}

#[inline(always)]
fn two_at<S: Simd, const W: usize, const K: usize, const C: bool, const I: bool, const O: bool>(
    simd: S,
    w: &[[f32; W]; K],
    re: &mut [&mut [f32; W]; 2],
    im: &mut [&mut [f32; W]; 2],
    at: usize,
) {
    let zero = simd.splat_f32s(0.0);
    let mut x = [[zero; 2]; 2];
    for i in 0..2 {
        x[i][0] = S::as_simd_f32s(re[i]).0[at];
        if C && !I {
            x[i][1] = S::as_simd_f32s(im[i]).0[at];
        }
    }
    let (a, b) = pair::<S, W, C, I, O>(simd, w, at, x[0], x[1]);
    let y = [a, b];
    for i in 0..2 {
        S::as_mut_simd_f32s(re[i]).0[at] = y[i][0];
        if C && !O {
            S::as_mut_simd_f32s(im[i]).0[at] = y[i][1];
        }
    }
}

/// `[[d1, d2], [d3, d4]]` times `(a, b)`: rows of weights `d1` to `d4`, each of real and imaginary parts if complex.
#[inline(always)]
fn pair<S: Simd, const W: usize, const C: bool, const I: bool, const O: bool>(
    simd: S,
    w: &[[f32; W]],
    at: usize,
    a: Number<S::f32s>,
    b: Number<S::f32s>,
) -> (Number<S::f32s>, Number<S::f32s>) {
    if C {
        (row::<S, W, I, O>(simd, &w[..4], at, a, b), row::<S, W, I, O>(simd, &w[4..8], at, a, b))
    } else {
        let of = |i: usize| S::as_simd_f32s(&w[i]).0[at];
        let zero = simd.splat_f32s(0.0);
        let first = simd.mul_add_e_f32s(of(1), b[0], simd.mul_f32s(of(0), a[0]));
        let second = simd.mul_add_e_f32s(of(3), b[0], simd.mul_f32s(of(2), a[0]));
        ([first, zero], [second, zero])
    }
}

/// `d1 a + d2 b` of complex `d`.
#[inline(always)]
fn row<S: Simd, const W: usize, const I: bool, const O: bool>(
    simd: S,
    w: &[[f32; W]],
    at: usize,
    [ar, ai]: Number<S::f32s>,
    [br, bi]: Number<S::f32s>,
) -> Number<S::f32s> {
    let of = |i: usize| S::as_simd_f32s(&w[i]).0[at];
    let (d1r, d1i, d2r, d2i) = (of(0), of(1), of(2), of(3));
    let mut re = simd.mul_add_e_f32s(d2r, br, simd.mul_f32s(d1r, ar));
    if !I {
        re = simd.negate_mul_add_e_f32s(d1i, ai, re);
        re = simd.negate_mul_add_e_f32s(d2i, bi, re);
    }
    if O {
        return [re, re];
    }
    let mut im = simd.mul_add_e_f32s(d2i, br, simd.mul_f32s(d1i, ar));
    if !I {
        im = simd.mul_add_e_f32s(d1r, ai, im);
        im = simd.mul_add_e_f32s(d2r, bi, im);
    }
    [re, im]
}

/// `to[i] = from[index[i]]`, of `from` whose length is a power of two.
///
/// A function of its own, whose few pointers stay in registers: it takes as long as a pass does.
#[inline(never)]
pub(super) fn gather(to: &mut [f32], from: &[f32], index: &[u32]) {
    // The mask changes no index; it shows that every one is in bounds.
    let mask = from.len().wrapping_sub(1);
    to.iter_mut().zip(index).for_each(|(to, i)| *to = from[*i as usize & mask]);
}

/// Turns `W` rows of `len / W` elements, the elements of each vector those of different blocks, into natural order.
pub(super) struct Untranspose<'a, const W: usize> {
    pub from: &'a [[f32; W]],
    pub to: &'a mut [[f32; W]],
    /// Whether [`Simd::deinterleave_shfl_f32s`] of four vectors transposes each 4 x 4 block, which `pulp` leaves open.
    pub shuffles: bool,
}

impl<const W: usize> WithSimd for Untranspose<'_, W> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let run = self.from.len() / W;
        for (tile, to) in self.to.as_chunks_mut::<W>().0.iter_mut().enumerate() {
            match self.shuffles && S::F32_LANES >= 4 && W.is_multiple_of(S::F32_LANES) {
                true => by_fours::<S, W>(simd, &self.from[tile..], run, to),
                false => one_by_one(&self.from[tile..], run, to),
            }
        }
    }
}

/// Transposes the tile whose rows are `run` apart: blocks of 4 x 4 in registers, which are then stored apart.
#[inline(always)]
fn by_fours<S: Simd, const W: usize>(simd: S, from: &[[f32; W]], run: usize, to: &mut [[f32; W]; W]) {
    for r in (0..W).step_by(4) {
        let rows = [0, 1, 2, 3].map(|i| S::as_simd_f32s(&from[(r + i) * run]).0);
        for s in 0..W / S::F32_LANES {
            let columns = simd.deinterleave_shfl_f32s([rows[0][s], rows[1][s], rows[2][s], rows[3][s]]);
            let mut lanes = [[0f32; W]; 4];
            for (lanes, column) in lanes.iter_mut().zip(columns) {
                S::as_mut_simd_f32s(lanes).0[0] = column;
            }
            for block in 0..S::F32_LANES / 4 {
                for (m, lanes) in lanes.iter().enumerate() {
                    to[s * S::F32_LANES + 4 * block + m][r..r + 4].copy_from_slice(&lanes[4 * block..4 * block + 4]);
                }
            }
        }
    }
}

#[inline(always)]
fn one_by_one<const W: usize>(from: &[[f32; W]], run: usize, to: &mut [[f32; W]; W]) {
    for r in 0..W {
        for (to, x) in to.iter_mut().zip(&from[r * run]) {
            to[r] = *x;
        }
    }
}
