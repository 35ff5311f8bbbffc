//! Codes refitted to the text that they hold: what a code decodes to follows the coded tokens' own keys and values.
//!
//! A calibration is made of other text. Its errors on this one are alike for tokens that are alike, so that they do not
//! cancel in a sum over thousands of them. Two fits take away what does not cancel, for no bytes per token:
//!
//! - values: a codeword becomes the mean of the values that have it, so that `Σ v̂ = Σ v` over them;
//! - keys: mean and scale of a channel become the line of least squares of its keys over their levels.
//!
//! Codes are written with the calibration's tables throughout, so that they do not depend on how the text is cut.

use super::value::SUB;
use super::{ScalarCode, ValueCode, WORDS};

/// Tokens that the calibration's line of a channel counts as.
const PRIOR: f64 = 16.0;

/// Sums over the coded keys of one channel.
#[derive(Debug, Clone, Copy, Default)]
struct Line {
    count: f64,
    level: f64,
    key: f64,
    product: f64,
    square: f64,
}

impl Line {
    fn add(&mut self, level: f64, key: f64) {
        self.count += 1.0;
        self.level += level;
        self.key += key;
        self.product += level * key;
        self.square += level * level;
    }

    /// Returns `a` and `b` that minimise `Σ (k - a - b l)² + PRIOR ((a - mean)² + (b - scale)²)`.
    fn solve(&self, mean: f64, scale: f64) -> (f64, f64) {
        let (count, square) = (self.count + PRIOR, self.square + PRIOR);
        let (key, product) = (self.key + PRIOR * mean, self.product + PRIOR * scale);
        let determinant = count * square - self.level * self.level;
        ((key * square - product * self.level) / determinant, (count * product - self.level * key) / determinant)
    }
}

/// Sums over the coded keys of one KV head.
#[derive(Debug, Clone)]
pub struct KeyFit(Vec<Line>);

impl KeyFit {
    /// Returns a fit to no key, for heads of `dim` channels.
    pub fn new(dim: usize) -> Self {
        Self(vec![Line::default(); dim])
    }

    /// Adds `keys [n, D]` with their `codes [n, bytes]`, written by `code`.
    pub fn add(&mut self, code: &ScalarCode, keys: &[f32], codes: &[u8]) {
        let mut levels = vec![0f32; self.0.len()];
        for (key, bytes) in keys.chunks_exact(levels.len()).zip(codes.chunks_exact(code.bytes)) {
            for field in &code.fields {
                levels[field.channel] = code.level(field, bytes[field.byte]);
            }
            for ((line, level), x) in self.0.iter_mut().zip(&levels).zip(key) {
                line.add(f64::from(*level), f64::from(*x));
            }
        }
    }

    /// Returns `code` with the means and scales of the keys added so far.
    pub fn fitted(&self, code: &ScalarCode) -> ScalarCode {
        let lines = self.0.iter().zip(code.mean.iter().zip(&code.scale));
        let (mean, scale) = lines
            .map(|(line, (mean, scale))| line.solve(f64::from(*mean), f64::from(*scale)))
            .map(|(mean, scale)| (mean as f32, scale as f32))
            .unzip();
        ScalarCode { mean, scale, ..code.clone() }
    }
}

/// Numbers of the values of one KV head that have each codeword of a code.
#[derive(Debug, Clone)]
pub struct ValueFit(Vec<u32>);

impl ValueFit {
    /// Returns a fit to no value, for heads of `dim` channels.
    pub fn new(dim: usize) -> Self {
        Self(vec![0; dim.div_ceil(SUB) * WORDS])
    }

    /// Adds `values [n, D]` of `dim` channels with their `codes [n, bytes]`: the codewords of `code` become the means of the
    /// values that have them; those that no value has stay.
    pub fn add(&mut self, code: &mut ValueCode, dim: usize, values: &[f32], codes: &[u8]) {
        let mut sums = vec![0f64; self.0.len() * SUB];
        let mut new = vec![0u32; self.0.len()];
        for (value, bytes) in values.chunks_exact(dim).zip(codes.chunks_exact(code.bytes())) {
            for (m, (part, byte)) in value.chunks(SUB).zip(bytes).enumerate() {
                let word = m * WORDS + usize::from(*byte);
                new[word] += 1;
                sums[word * SUB..].iter_mut().zip(part).for_each(|(sum, x)| *sum += f64::from(*x));
            }
        }
        code.edit(|words| {
            let of = words.chunks_exact_mut(SUB).zip(sums.chunks_exact(SUB)).zip(self.0.iter_mut().zip(new));
            for ((word, sums), (count, new)) in of.filter(|(_, (_, new))| *new > 0) {
                let (before, all) = (f64::from(*count), f64::from(*count + new));
                word.iter_mut().zip(sums).for_each(|(x, sum)| *x = ((f64::from(*x) * before + sum) / all) as f32);
                *count += new;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(seed: usize, n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729 + 13) % 9973) as f32 / 4986.5 - 1.0).collect()
    }

    /// Sum of squared differences, and of differences.
    fn errors(got: &[f32], want: &[f32]) -> (f64, f64) {
        let off = || got.iter().zip(want).map(|(a, b)| f64::from(a - b));
        (off().map(|x| x * x).sum(), off().sum())
    }

    #[test]
    fn codewords_are_the_means_of_their_values_however_the_text_is_cut() {
        let (n, dim) = (900, 40);
        let code = ValueCode::fit(dim, &numbers(1, 600 * dim));
        // Another text: shifted and stretched.
        let values: Vec<f32> = numbers(2, n * dim).iter().map(|x| 0.3 + 1.2 * x).collect();
        let mut codes = vec![0; n * code.bytes()];
        code.encode(&values, &mut codes);
        let decoded = |code: &ValueCode| -> Vec<f32> {
            let mut all = vec![0.0; n * dim];
            all.chunks_mut(dim).zip(codes.chunks(code.bytes())).for_each(|(v, c)| code.decode(c, v));
            all
        };
        let fit = |cuts: &[usize]| {
            let (mut fit, mut fitted) = (ValueFit::new(dim), code.clone());
            let mut from = 0;
            for to in cuts.iter().copied().chain([n]) {
                fit.add(
                    &mut fitted,
                    dim,
                    &values[from * dim..to * dim],
                    &codes[from * code.bytes()..to * code.bytes()],
                );
                from = to;
            }
            fitted
        };
        let fitted = fit(&[]);
        let cut = fit(&[1, 250, 899]);
        let off = fitted.codebook().iter().zip(cut.codebook()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off < 1e-5, "{off}");
        let ((before, bias), (after, rest)) = (errors(&decoded(&code), &values), errors(&decoded(&fitted), &values));
        assert!(after < 0.8 * before, "{after} after {before}");
        assert!(rest.abs() < 1e-2 && bias.abs() > 100.0, "sums are kept: {rest} after {bias}");
    }

    #[test]
    fn means_and_scales_are_lines_of_least_squares() {
        let (n, dim) = (2000, 16);
        let units: Vec<Vec<usize>> = (0..dim).map(|c| vec![c]).collect();
        let weight: Vec<f32> = (0..dim).map(|c| 1.0 / (1 + c) as f32).collect();
        let code = ScalarCode::fit(1, &units, &vec![0.1; dim], &vec![0.6; dim], &weight);
        assert!(code.fields.len() < dim, "channels without bits");
        let keys: Vec<f32> = numbers(3, n * dim).iter().map(|x| 0.4 + 0.7 * x).collect();
        let mut codes = vec![0; n * code.bytes];
        code.encode(&keys, &mut codes);
        let mut fit = KeyFit::new(dim);
        fit.add(&code, &keys, &codes);
        let fitted = fit.fitted(&code);
        let decoded = |code: &ScalarCode| {
            let mut all = vec![0.0; n * dim];
            code.decode(&codes, &mut all);
            all
        };
        let ((before, bias), (after, rest)) = (errors(&decoded(&code), &keys), errors(&decoded(&fitted), &keys));
        assert!(after < 0.95 * before, "{after} after {before}");
        assert!(rest.abs() < 0.05 * bias.abs(), "{rest} after {bias}");
        // No other line is nearer, but for the calibration's share.
        for (change, by) in [(1.0, 0.02), (1.0, -0.02), (0.0, 0.02), (0.0, -0.02)] {
            let mut other = fitted.clone();
            other.mean.iter_mut().for_each(|x| *x += (change * by) as f32);
            other.scale.iter_mut().for_each(|x| *x += ((1.0 - change) * by) as f32);
            assert!(errors(&decoded(&other), &keys).0 > after, "{change} {by}");
        }
        let none = KeyFit::new(dim).fitted(&code);
        assert!(none.mean.iter().zip(&code.mean).all(|(a, b)| (a - b).abs() < 1e-6));
    }
}
