//! Value codes: a product quantiser with 256 codewords for each 16 channels, 1/64 of the bytes of bf16 keys and values.
//!
//! Source: Jégou et al., "Product quantization for nearest neighbor search" (2011),
//! <https://doi.org/10.1109/TPAMI.2010.57>.

use super::codewords::{self, nearest, norms, WORDS};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Channels of a sub-vector.
pub const SUB: usize = 16;

/// The value code of one KV head.
#[derive(Debug, Clone, PartialEq)]
pub struct ValueCode {
    dim: usize,
    /// `[bytes, 256, SUB]`; channels beyond `D` are 0.
    codebook: Vec<f32>,
    /// Squared norms of the codewords, `[bytes, 256]`.
    norms: Vec<f32>,
}

impl ValueCode {
    /// Returns a code with the given codewords.
    ///
    /// # Shapes
    /// `codebook [ceil(D / 16), 256, 16]`.
    pub fn new(dim: usize, codebook: Vec<f32>) -> Option<Self> {
        (codebook.len() == dim.div_ceil(SUB) * WORDS * SUB).then(|| Self::of(dim, codebook))
    }

    fn of(dim: usize, codebook: Vec<f32>) -> Self {
        Self { dim, norms: norms(&codebook, SUB), codebook }
    }

    /// Fits codewords to `values [n, D]` by k-means from evenly spaced values; the result depends on the values alone.
    pub fn fit(dim: usize, values: &[f32]) -> Self {
        let n = values.len() / dim;
        let book = |m: usize| {
            let width = SUB.min(dim - m * SUB);
            let at = |i: usize| {
                let mut x = [0f32; SUB];
                x[..width].copy_from_slice(&values[i * dim + m * SUB..][..width]);
                x
            };
            codewords::fit(&(0..n).flat_map(at).collect::<Vec<f32>>(), SUB)
        };
        let books: Vec<Vec<f32>> = (0..dim.div_ceil(SUB)).into_par_iter().map(book).collect();
        Self::of(dim, books.concat())
    }

    /// Changes the codewords, `[bytes, 256, 16]`.
    pub(super) fn edit(&mut self, change: impl FnOnce(&mut [f32])) {
        change(&mut self.codebook);
        self.norms = norms(&self.codebook, SUB);
    }

    /// Returns the bytes per token.
    pub fn bytes(&self) -> usize {
        self.dim.div_ceil(SUB)
    }

    /// Returns the codewords, `[bytes, 256, 16]`.
    pub fn codebook(&self) -> &[f32] {
        &self.codebook
    }

    /// Writes the codes of `values [n, D]` to `codes [n, bytes]`.
    pub fn encode(&self, values: &[f32], codes: &mut [u8]) {
        let n = values.len() / self.dim;
        let (mut points, mut at) = (vec![0f32; n * SUB], vec![(0, 0.0); n]);
        for m in 0..self.bytes() {
            for (point, value) in points.chunks_exact_mut(SUB).zip(values.chunks_exact(self.dim)) {
                let part = &value[m * SUB..((m + 1) * SUB).min(self.dim)];
                point[..part.len()].copy_from_slice(part);
                point[part.len()..].fill(0.0);
            }
            let (book, norms) = (&self.codebook[m * WORDS * SUB..][..WORDS * SUB], &self.norms[m * WORDS..][..WORDS]);
            nearest(book, norms, &points, SUB, &mut at);
            codes.iter_mut().skip(m).step_by(self.bytes()).zip(&at).for_each(|(code, (word, _))| *code = *word as u8);
        }
    }

    /// Writes the decoded value of one token's `code` to `value [D]`.
    pub fn decode(&self, code: &[u8], value: &mut [f32]) {
        for (m, (byte, part)) in code.iter().zip(value.chunks_mut(SUB)).enumerate() {
            part.copy_from_slice(&self.codebook[(m * WORDS + usize::from(*byte)) * SUB..][..part.len()]);
        }
    }

    /// Adds to `out [D]` the decoded values of `weights [bytes, 256]`, the sum of the weights of the tokens with each
    /// codeword.
    pub fn add_weighted(&self, weights: &[f32], out: &mut [f32]) {
        struct Add<'a> {
            words: &'a [[f32; SUB]],
            weights: &'a [f32],
            out: &'a mut [f32],
        }
        impl WithSimd for Add<'_> {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) {
                let mut sum = [0f32; SUB];
                for (w, word) in self.weights.iter().zip(self.words) {
                    for (s, x) in sum.iter_mut().zip(word) {
                        *s = x.mul_add(*w, *s);
                    }
                }
                self.out.iter_mut().zip(&sum).for_each(|(o, s)| *o += s);
            }
        }
        let books = self.codebook.as_chunks::<SUB>().0.chunks_exact(WORDS).zip(weights.chunks_exact(WORDS));
        for ((words, weights), out) in books.zip(out.chunks_mut(SUB)) {
            Arch::new().dispatch(Add { words, weights, out });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, dim: usize) -> Vec<f32> {
        (0..n * dim).map(|i| ((i * 7919 + 13) % 9973) as f32 / 9973.0 - 0.5).collect()
    }

    #[test]
    fn values_that_are_codewords_are_exact() {
        // 100 different values for 256 codewords.
        for dim in [64, 40] {
            let some = values(100, dim);
            let code = ValueCode::fit(dim, &some);
            let (mut codes, mut value) = (vec![0; 100 * code.bytes()], vec![0.0; dim]);
            code.encode(&some, &mut codes);
            for (want, code_of) in some.chunks(dim).zip(codes.chunks(code.bytes())) {
                code.decode(code_of, &mut value);
                let off = want.iter().zip(&value).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(off < 1e-6, "{dim}: {off}");
            }
        }
    }

    #[test]
    fn a_weighted_sum_by_codewords_is_that_of_the_decoded_values() {
        let (n, dim) = (700, 48);
        let all = values(n, dim);
        let code = ValueCode::fit(dim, &all);
        let mut codes = vec![0; n * code.bytes()];
        code.encode(&all, &mut codes);
        let (mut want, mut value, mut weights) = (vec![0.0; dim], vec![0.0; dim], vec![0.0; code.bytes() * WORDS]);
        for (i, bytes) in codes.chunks(code.bytes()).enumerate() {
            let w = (i % 17) as f32 / 17.0;
            code.decode(bytes, &mut value);
            want.iter_mut().zip(&value).for_each(|(o, v)| *o += w * v);
            bytes.iter().enumerate().for_each(|(m, b)| weights[m * WORDS + usize::from(*b)] += w);
        }
        let mut got = vec![0.0; dim];
        code.add_weighted(&weights, &mut got);
        assert!(want.iter().zip(&got).all(|(a, b)| (a - b).abs() < 1e-2), "{want:?} {got:?}");
    }
}
