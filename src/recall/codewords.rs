//! Codewords of a product quantiser: 256 per sub-vector, fitted by k-means.

use crate::ops::{multiply_transposed, Strided};
use pulp::{Arch, Simd, WithSimd};

/// Codewords of a sub-vector.
pub const WORDS: usize = 256;
/// Iterations of k-means.
const ITERATIONS: usize = 12;
/// Points whose distances are computed at a time.
const TILE: usize = 64;

/// Fits codewords `[256, width]` to `points [n, width]` by k-means from evenly spaced points; the result depends on the
/// points alone.
pub(super) fn fit(points: &[f32], width: usize) -> Vec<f32> {
    let n = points.len() / width;
    let point = |i: usize| &points[i * width..][..width];
    let mut words = vec![0f32; WORDS * width];
    if n > 0 {
        words.chunks_exact_mut(width).enumerate().for_each(|(w, word)| word.copy_from_slice(point(w * n / WORDS)));
    }
    let mut at = vec![(0, 0.0); n];
    for _ in 0..ITERATIONS {
        let (mut sums, mut counts) = (vec![0f64; WORDS * width], vec![0usize; WORDS]);
        nearest(&words, &norms(&words, width), points, width, &mut at);
        for ((word, _), point) in at.iter().zip(points.chunks_exact(width)) {
            counts[*word] += 1;
            sums[word * width..].iter_mut().zip(point).for_each(|(s, x)| *s += f64::from(*x));
        }
        // A codeword without points moves to one of the points that are coded worst.
        let mut spare = vec![];
        if counts.contains(&0) {
            spare = (0..n).collect();
            spare.sort_by(|a, b| at[*b].1.total_cmp(&at[*a].1).then(a.cmp(b)));
        }
        let mut spare = spare.into_iter();
        for (word, (sum, count)) in words.chunks_exact_mut(width).zip(sums.chunks_exact(width).zip(&counts)) {
            match count {
                0 => spare.next().into_iter().for_each(|i| word.copy_from_slice(point(i))),
                n => word.iter_mut().zip(sum).for_each(|(w, s)| *w = (s / *n as f64) as f32),
            }
        }
    }
    words
}

/// Returns the squared norms of codewords of `width` channels.
pub(super) fn norms(words: &[f32], width: usize) -> Vec<f32> {
    words.chunks_exact(width).map(|w| w.iter().map(|x| x * x).sum()).collect()
}

/// Writes the index of the codeword nearest to each of `points [n, width]`, the first of equals, and the squared
/// distance. `norms` are those of the codewords.
pub(super) fn nearest(words: &[f32], norms: &[f32], points: &[f32], width: usize, at: &mut [(usize, f32)]) {
    let rows = |data| Strided { data, stride: width };
    let mut products = vec![0f32; TILE.min(at.len()) * WORDS];
    for (points, at) in points.chunks(TILE * width).zip(at.chunks_mut(TILE)) {
        let n = at.len();
        multiply_transposed(n, WORDS, width, rows(points), rows(words), &mut products[..n * WORDS]);
        for ((point, products), at) in points.chunks_exact(width).zip(products.chunks_exact(WORDS)).zip(at) {
            // |x - w|² = |x|² + |w|² - 2 x · w.
            let (word, least) = least(norms, products);
            *at = (word, point.iter().map(|x| x * x).sum::<f32>() + least);
        }
    }
}

/// Returns the index of the smallest `norm - 2 product`, the first of equals, and its value.
fn least(norms: &[f32], products: &[f32]) -> (usize, f32) {
    struct Least<'a>(&'a [f32], &'a [f32]);
    impl WithSimd for Least<'_> {
        type Output = (usize, f32);
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> (usize, f32) {
            // Sixteen running minima keep the search free of a serial chain.
            let (mut best, mut place) = ([f32::INFINITY; 16], [0u32; 16]);
            for (i, (norms, products)) in self.0.chunks_exact(16).zip(self.1.chunks_exact(16)).enumerate() {
                for lane in 0..16 {
                    let x = norms[lane] - 2.0 * products[lane];
                    let less = x < best[lane];
                    best[lane] = if less { x } else { best[lane] };
                    place[lane] = if less { i as u32 } else { place[lane] };
                }
            }
            let each = best.iter().zip(&place).enumerate().map(|(lane, (x, i))| (*i as usize * 16 + lane, *x));
            each.fold((0, f32::INFINITY), |a, b| if b.1 < a.1 || (b.1 == a.1 && b.0 < a.0) { b } else { a })
        }
    }
    Arch::new().dispatch(Least(norms, products))
}
