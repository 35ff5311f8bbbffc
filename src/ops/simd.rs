//! Loops compiled for the machine's widest vectors (through `pulp`), with a vectorised exponential.

use pulp::{Arch, Simd, WithSimd};

/// `eˣ` for `x ≤ 88`, to 2 ulp; 0 below -87, so that a masked logit of `-∞` has weight 0.
///
/// Range reduction to `[-ln 2 / 2, ln 2 / 2]` and Cephes' polynomial (`expf.c`, Moshier).
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to a whole number.
                                     // Comparisons and selects, and no float-to-integer cast, which would saturate lane
                                     // by lane.
    let clamped = if x > -87.0 { x } else { -87.0 };
    let clamped = if clamped < 88.0 { clamped } else { 88.0 };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    let r = n.mul_add(-0.693_359_4, clamped);
    let r = n.mul_add(2.121_944_4e-4, r);
    let p = 1.987_569_1e-4f32;
    let p = p.mul_add(r, 1.398_2e-3);
    let p = p.mul_add(r, 8.333_452e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_5e-1);
    let p = p.mul_add(r, 0.5);
    let y = p.mul_add(r * r, r) + 1.0;
    // The low bits of `shifted` are n; moved to the exponent, with the bias added, they are 2ⁿ.
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23));
    // `0 x` is 0, or NaN where x is: NaN must propagate.
    if x < -87.0 {
        0.0
    } else {
        0.0f32.mul_add(x, y * scale)
    }
}

/// Replaces a row of logits by softmax weights and updates the running maximum and sum.
///
/// Returns the factor that rescales what was accumulated under the old maximum.
pub fn softmax_row(row: &mut [f32], max: &mut f32, sum: &mut f32) -> f32 {
    struct Row<'a>(&'a mut [f32], &'a mut f32, &'a mut f32);
    impl WithSimd for Row<'_> {
        type Output = f32;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> f32 {
            let Self(row, max, sum) = self;
            // Sixteen running values keep the reductions free of a serial chain.
            let mut tops = [f32::NEG_INFINITY; 16];
            let mut chunks = row.chunks_exact(16);
            for c in &mut chunks {
                for (t, x) in tops.iter_mut().zip(c) {
                    *t = if *x > *t { *x } else { *t };
                }
            }
            let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let top = tops.iter().copied().fold(rest.max(*max), f32::max);
            if top == f32::NEG_INFINITY {
                row.fill(0.0);
                return 1.0;
            }
            let factor = exp(*max - top);
            let mut sums = [0f32; 16];
            let mut chunks = row.chunks_exact_mut(16);
            for c in &mut chunks {
                for (s, x) in sums.iter_mut().zip(c) {
                    *x = exp(*x - top);
                    *s += *x;
                }
            }
            let mut total = 0.0;
            for x in chunks.into_remainder() {
                *x = exp(*x - top);
                total += *x;
            }
            *sum = *sum * factor + total + sums.iter().sum::<f32>();
            *max = top;
            factor
        }
    }
    Arch::new().dispatch(Row(row, max, sum))
}

/// `out[i] = f(a[i], b[i])` for a vectorisable `f`.
pub fn zip_map(a: &[f32], b: &[f32], out: &mut [f32], f: impl Fn(f32, f32) -> f32) {
    struct Zip<'a, F>(&'a [f32], &'a [f32], &'a mut [f32], F);
    impl<F: Fn(f32, f32) -> f32> WithSimd for Zip<'_, F> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            for ((o, x), y) in self.2.iter_mut().zip(self.0).zip(self.1) {
                *o = (self.3)(*x, *y);
            }
        }
    }
    Arch::new().dispatch(Zip(a, b, out, f));
}

/// `x[i] = f(x[i])` for a vectorisable `f`.
pub fn map(x: &mut [f32], f: impl Fn(f32) -> f32) {
    struct Map<'a, F>(&'a mut [f32], F);
    impl<F: Fn(f32) -> f32> WithSimd for Map<'_, F> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            self.0.iter_mut().for_each(|x| *x = (self.1)(*x));
        }
    }
    Arch::new().dispatch(Map(x, f));
}

/// `sum[i] += factor · x[i]`.
pub fn add_scaled(sum: &mut [f32], factor: f32, x: &[f32]) {
    struct Add<'a>(&'a mut [f32], f32, &'a [f32]);
    impl WithSimd for Add<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) {
            self.0.iter_mut().zip(self.2).for_each(|(s, x)| *s = x.mul_add(self.1, *s));
        }
    }
    Arch::new().dispatch(Add(sum, factor, x));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_ulp_and_zero_far_below() {
        for i in -86_000..88_000 {
            let x = i as f32 / 1000.0;
            let want = (x as f64).exp();
            let error = (exp(x) as f64 - want).abs() / want;
            assert!(error < 2.4e-7, "exp({x}): relative error {error}");
        }
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1000.0), 0.0);
        assert_eq!(exp(0.0), 1.0);
    }

    #[test]
    fn softmax_rows_merge_exactly_as_one() {
        let logits: Vec<f32> = (0..100).map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0).collect();
        let want: f64 = logits.iter().map(|x| (*x as f64 - 7.0).exp()).sum();
        let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0);
        for part in [0..0, 0..33, 33..34, 34..100] {
            softmax_row(&mut logits[part].to_vec(), &mut max, &mut sum);
        }
        let got = sum as f64 * (max as f64 - 7.0).exp();
        assert!((got - want).abs() / want < 1e-6, "{got} against {want}");
    }

    #[test]
    fn a_fully_masked_row_adds_nothing() {
        let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0);
        let mut row = [f32::NEG_INFINITY; 20];
        assert_eq!(softmax_row(&mut row, &mut max, &mut sum), 1.0);
        assert_eq!((row, sum), ([0.0; 20], 0.0));
    }
}
