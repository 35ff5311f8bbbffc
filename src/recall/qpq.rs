//! `qpq`: a product quantiser in the space where a key's squared error is the mean squared error of its scores.
//!
//! With `M = Σ_q^{1/2}`, `Σ_q = E q qᵀ`, the error of a decoded key has `E (q · (k̂ - k))² = |M (k̂ - k)|²`. Keys are
//! coded as `y = Wᵀ M (k - mean)`, `W` the eigenvectors of `M Σ_k M`, in sub-vectors of 4, 8 or 16 directions with 256
//! codewords each. The calibration has moments within RoPE pairs and no keys: `Σ_q` is 0 between pairs, and codewords
//! are fitted to keys drawn from the moments ([`RotatedHead::draw`](super::RotatedHead::draw)).
//!
//! Source: Guo et al., "Quantization based Fast Inner Product Search" (2015), <https://arxiv.org/abs/1509.01469>.

use super::codewords::{self, nearest, norms, WORDS};
use super::matrix::{eigen, product, roots};
use super::{HeadCode, HeadRows, KeyCode, KeyStatistics};
use crate::ops::{multiply_transposed, Strided};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Keys that codewords are fitted to.
const DRAWN: usize = 4096;
/// Keys that are projected at a time.
const TILE: usize = 256;

/// The code's registration.
#[derive(Debug)]
pub struct Qpq;

/// Returns the channels of a sub-vector, coded in 8 bits.
fn width(rate: Option<f64>) -> usize {
    (8.0 / rate.unwrap_or(1.0)).round() as usize
}

impl KeyCode for Qpq {
    fn name(&self) -> &'static str {
        "qpq"
    }

    fn about(&self) -> &'static str {
        "product codes weighted by queries, fitted to keys drawn from the calibration's moments"
    }

    fn rates(&self) -> &'static [f64] {
        &[1.0, 2.0, 0.5]
    }

    fn bytes(&self, dim: usize, rate: Option<f64>) -> usize {
        dim.div_ceil(width(rate))
    }

    fn table_bytes(&self, dim: usize, rate: Option<f64>) -> usize {
        let places = self.bytes(dim, rate) * width(rate);
        // The mean, two transforms and the codewords.
        4 * (dim + 2 * places * dim + WORDS * places)
    }

    fn needs_unrotated(&self) -> bool {
        true
    }

    fn fit(&self, keys: &KeyStatistics, rate: Option<f64>) -> Arc<dyn HeadCode> {
        Arc::new(ProductCode::fit(keys, width(rate)))
    }
}

/// The code of one KV head. A place is a direction of a sub-vector; `places = width · bytes`, of which those beyond `D`
/// are 0.
#[derive(Debug)]
struct ProductCode {
    width: usize,
    mean: Vec<f32>,
    /// `Wᵀ M`, `[places, D]`: a key less the mean to its places.
    forward: Vec<f32>,
    /// `Wᵀ M⁻¹`, `[places, D]`: a query to the places.
    backward: Vec<f32>,
    /// Codewords, `[bytes, 256, width]`.
    words: Vec<f32>,
}

/// Deals directions of variances `power`, descending, to `parts` sub-vectors so that each needs about the same bits:
/// `½ log₂(power / level)` each, with the level at which all need `bits`.
fn deal(power: &[f64], parts: usize, width: usize, bits: f64) -> Vec<Vec<usize>> {
    let logs: Vec<f64> = power.iter().map(|x| x.max(1e-20).log2()).collect();
    let need = |level: f64| logs.iter().map(|x| ((x - level) / 2.0).max(0.0)).collect::<Vec<f64>>();
    let (mut low, mut high) = (logs[logs.len() - 1] - 2.0 * bits, logs[0]);
    for _ in 0..60 {
        let middle = (low + high) / 2.0;
        match need(middle).iter().sum::<f64>() > bits {
            true => low = middle,
            false => high = middle,
        }
    }
    let mut dealt = vec![(vec![], 0.0f64); parts];
    for (i, need) in need(high).into_iter().enumerate() {
        let open = dealt.iter_mut().filter(|(of, _)| of.len() < width);
        let least = open.min_by(|a, b| a.1.total_cmp(&b.1).then(a.0.len().cmp(&b.0.len())));
        if let Some((of, sum)) = least {
            of.push(i);
            *sum += need;
        }
    }
    dealt.into_iter().map(|(of, _)| of).collect()
}

impl ProductCode {
    fn fit(keys: &KeyStatistics, width: usize) -> Self {
        let dim = keys.mean.len();
        let parts = dim.div_ceil(width);
        let mut second = keys.source.query_second();
        let trace: f64 = (0..dim).map(|c| second[c * dim + c]).sum();
        // Directions that no query reads keep an inverse.
        (0..dim).for_each(|c| second[c * dim + c] += 1e-6 * trace / dim as f64);
        let (root, inverse) = roots(&second, dim);
        let seen = product(&product(&root, &keys.source.key_covariance(), dim), &root, dim);
        let (power, vectors) = eigen(&seen, dim);
        let (forward, backward) = (product(&vectors, &root, dim), product(&vectors, &inverse, dim));
        let dealt = deal(&power, parts, width, 8.0 * parts as f64);
        let placed = |rows: &[f64]| {
            let mut out = vec![0f32; parts * width * dim];
            for (m, of) in dealt.iter().enumerate() {
                for (i, row) in of.iter().enumerate() {
                    let out = &mut out[(m * width + i) * dim..][..dim];
                    out.iter_mut().zip(&rows[row * dim..]).for_each(|(o, x)| *o = *x as f32);
                }
            }
            out
        };
        let (forward, backward) = (placed(&forward), placed(&backward));
        let mut code = Self { width, mean: keys.mean.clone(), forward, backward, words: vec![] };
        let y = code.project(&keys.source.draw(DRAWN));
        let words = |m: usize| codewords::fit(&code.part(&y, m), width);
        code.words = (0..parts).into_par_iter().map(words).collect::<Vec<_>>().concat();
        code
    }

    fn places(&self) -> usize {
        self.forward.len() / self.mean.len()
    }

    /// Returns the places of `keys [n, D]`, `[n, places]`.
    fn project(&self, keys: &[f32]) -> Vec<f32> {
        let (dim, places) = (self.mean.len(), self.places());
        let forward = Strided { data: &self.forward, stride: dim };
        let mut y = vec![0f32; keys.len() / dim * places];
        for (keys, y) in keys.chunks(TILE * dim).zip(y.chunks_mut(TILE * places)) {
            let centred = keys.chunks_exact(dim).flat_map(|k| k.iter().zip(&self.mean).map(|(k, m)| k - m));
            let centred: Vec<f32> = centred.collect();
            let centred = Strided { data: &centred, stride: dim };
            multiply_transposed(y.len() / places, places, dim, centred, forward, y);
        }
        y
    }

    /// Returns sub-vector `m` of `y [n, places]`, `[n, width]`.
    fn part(&self, y: &[f32], m: usize) -> Vec<f32> {
        y.chunks_exact(self.places()).flat_map(|y| &y[m * self.width..][..self.width]).copied().collect()
    }

    /// Returns the codewords of sub-vector `m`, `[256, width]`.
    fn book(&self, m: usize) -> &[f32] {
        &self.words[m * WORDS * self.width..][..WORDS * self.width]
    }
}

impl HeadCode for ProductCode {
    fn bytes(&self) -> usize {
        self.places() / self.width
    }

    fn encode(&self, keys: &[f32], codes: &mut [u8]) {
        let (y, bytes) = (self.project(keys), self.bytes());
        let mut at = vec![(0, 0.0); keys.len() / self.mean.len()];
        for m in 0..bytes {
            let book = self.book(m);
            nearest(book, &norms(book, self.width), &self.part(&y, m), self.width, &mut at);
            codes.iter_mut().skip(m).step_by(bytes).zip(&at).for_each(|(code, (word, _))| *code = *word as u8);
        }
    }

    fn decode(&self, rows: &HeadRows, tokens: Range<usize>, decoded: &mut [f32]) {
        let (dim, bytes) = (self.mean.len(), self.bytes());
        let codes = &rows.codes[tokens.start * bytes..tokens.end * bytes];
        for (code, key) in codes.chunks_exact(bytes).zip(decoded.chunks_exact_mut(dim)) {
            key.copy_from_slice(&self.mean);
            let words =
                code.iter().enumerate().flat_map(|(m, b)| &self.book(m)[usize::from(*b) * self.width..][..self.width]);
            for (y, row) in words.zip(self.backward.chunks_exact(dim)) {
                key.iter_mut().zip(row).for_each(|(k, r)| *k += y * r);
            }
        }
    }

    fn scores(&self, queries: &[f32], rows: &HeadRows, tokens: Range<usize>, scores: &mut [Vec<f32>]) {
        let (dim, bytes) = (self.mean.len(), self.bytes());
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        let codes = &rows.codes[tokens.start * bytes..tokens.end * bytes];
        for (q, scores) in queries.chunks_exact(dim).zip(scores) {
            let places: Vec<f32> = self.backward.chunks_exact(dim).map(|row| dot(row, q)).collect();
            let words = places.chunks_exact(self.width).enumerate();
            let table: Vec<f32> =
                words.flat_map(|(m, q)| self.book(m).chunks_exact(self.width).map(move |w| dot(w, q))).collect();
            let constant = dot(q, &self.mean);
            scores.extend(codes.chunks_exact(bytes).map(|code| {
                constant + code.iter().zip(table.chunks_exact(WORDS)).map(|(b, t)| t[usize::from(*b)]).sum::<f32>()
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::HeadMoments;
    use super::*;

    #[test]
    fn every_sub_vector_gets_a_like_share_of_the_bits() {
        let power: Vec<f64> = (0..32).map(|i| 2f64.powi(-i)).collect();
        let dealt = deal(&power, 4, 8, 32.0);
        let mut all = dealt.concat();
        all.sort_unstable();
        assert!(all.iter().copied().eq(0..32) && dealt.iter().all(|of| of.len() == 8), "{dealt:?}");
        // 32 bits over logarithms 0, -1, .. lie above level -11: ½ (11 + 10 + .. + 1) = 33.
        let need = |of: &Vec<usize>| of.iter().map(|i| (11.0 - *i as f64).max(0.0) / 2.0).sum::<f64>();
        assert!(dealt.iter().all(|of| (need(of) - 8.25).abs() <= 1.0), "{dealt:?}");
    }

    #[test]
    fn all_bits_go_to_the_directions_that_queries_read() {
        // One bit per channel; queries read 4 of 32 channels, and so a byte codes each of them.
        let (dim, half, n) = (32, 16, 2000);
        let read = |c: usize| c % half < 2;
        let moments = HeadMoments {
            key_mean: vec![0.5; dim],
            key_square: vec![1.25; dim],
            key_cross: vec![0.25; half],
            query_square: (0..dim).map(|c| if read(c) { 1.0 } else { 0.0 }).collect(),
            query_cross: vec![0.0; half],
        };
        let statistics = moments.rotated((&vec![0.0; half], 1.0), 0..n, 0..n);
        let code = ProductCode::fit(&statistics, width(Some(1.0)));
        let keys = statistics.source.draw(n);
        let (mut codes, mut decoded) = (vec![0; n * code.bytes()], vec![0.0; n * dim]);
        code.encode(&keys, &mut codes);
        code.decode(&HeadRows { codes: &codes, exact: &[] }, 0..n, &mut decoded);
        let error = |of: &dyn Fn(usize) -> bool| {
            let squares = keys.iter().zip(&decoded).enumerate().filter(|(i, _)| of(i % dim));
            squares.map(|(_, (a, b))| (a - b) * (a - b)).sum::<f32>() / (n * (0..dim).filter(|c| of(*c)).count()) as f32
        };
        // Of a variance of 1; what is not read decodes to the mean.
        let (seen, unseen) = (error(&read), error(&|c| !read(c)));
        assert!(seen < 0.01 && unseen > 0.9, "{seen}, {unseen}");
    }
}
