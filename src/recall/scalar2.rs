//! `scalar2`: two bits per channel between each token's own smallest and largest, centred and Hadamard-rotated first.

use super::{HeadCode, HeadRows, KeyCode, KeyStatistics};
use half::f16;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of a token's minimum and step, f16 each.
const HEADER: usize = 4;

/// The code's registration.
#[derive(Debug)]
pub struct Scalar2;

impl KeyCode for Scalar2 {
    fn name(&self) -> &'static str {
        "scalar2"
    }

    fn about(&self) -> &'static str {
        "2 bits per channel with a scale per token, for comparison"
    }

    fn bytes(&self, dim: usize, _: Option<f64>) -> usize {
        HEADER + dim.div_ceil(4)
    }

    fn fit(&self, keys: &KeyStatistics, _: Option<f64>) -> Arc<dyn HeadCode> {
        Arc::new(TwoBits { mean: keys.mean.clone() })
    }
}

#[derive(Debug)]
struct TwoBits {
    mean: Vec<f32>,
}

/// Rotates `x` by the orthonormal Hadamard matrix of its length; lengths other than powers of two stay as they are.
fn hadamard(x: &mut [f32]) {
    if !x.len().is_power_of_two() {
        return;
    }
    let mut half = 1;
    while half < x.len() {
        for block in x.chunks_exact_mut(2 * half) {
            let (a, b) = block.split_at_mut(half);
            a.iter_mut().zip(b).for_each(|(a, b)| (*a, *b) = (*a + *b, *a - *b));
        }
        half *= 2;
    }
    let norm = 1.0 / (x.len() as f32).sqrt();
    x.iter_mut().for_each(|x| *x *= norm);
}

impl HeadCode for TwoBits {
    fn bytes(&self) -> usize {
        Scalar2.bytes(self.mean.len(), None)
    }

    fn encode(&self, keys: &[f32], codes: &mut [u8]) {
        for (key, code) in keys.chunks_exact(self.mean.len()).zip(codes.chunks_exact_mut(self.bytes())) {
            let mut x: Vec<f32> = key.iter().zip(&self.mean).map(|(k, m)| k - m).collect();
            hadamard(&mut x);
            let low = x.iter().copied().fold(f32::INFINITY, f32::min);
            let high = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let (low, step) = (f16::from_f32(low), f16::from_f32((high - low) / 3.0));
            code.fill(0);
            code[..2].copy_from_slice(&low.to_le_bytes());
            code[2..4].copy_from_slice(&step.to_le_bytes());
            let inverse = if step.to_f32() > 0.0 { 1.0 / step.to_f32() } else { 0.0 };
            for (c, x) in x.iter().enumerate() {
                let level = ((x - low.to_f32()) * inverse).round().clamp(0.0, 3.0) as u8;
                code[HEADER + c / 4] |= level << (2 * (c % 4));
            }
        }
    }

    fn decode(&self, rows: &HeadRows, tokens: Range<usize>, decoded: &mut [f32]) {
        let codes = &rows.codes[tokens.start * self.bytes()..tokens.end * self.bytes()];
        for (code, key) in codes.chunks_exact(self.bytes()).zip(decoded.chunks_exact_mut(self.mean.len())) {
            let number = |i: usize| f16::from_le_bytes([code[i], code[i + 1]]).to_f32();
            for (c, x) in key.iter_mut().enumerate() {
                *x = number(0) + number(2) * f32::from(code[HEADER + c / 4] >> (2 * (c % 4)) & 3);
            }
            // The rotation is its own inverse.
            hadamard(key);
            key.iter_mut().zip(&self.mean).for_each(|(x, m)| *x += m);
        }
    }

    fn scores(&self, queries: &[f32], rows: &HeadRows, tokens: Range<usize>, scores: &mut [Vec<f32>]) {
        let dim = self.mean.len();
        for (q, scores) in queries.chunks_exact(dim).zip(scores) {
            let constant: f32 = q.iter().zip(&self.mean).map(|(q, m)| q * m).sum();
            let mut q = q.to_vec();
            hadamard(&mut q);
            let sum: f32 = q.iter().sum();
            let mut table = vec![0f32; dim.div_ceil(4) * 256];
            for (c, q) in q.iter().enumerate() {
                for (byte, x) in table[c / 4 * 256..][..256].iter_mut().enumerate() {
                    *x += q * (byte >> (2 * (c % 4)) & 3) as f32;
                }
            }
            let codes = &rows.codes[tokens.start * self.bytes()..tokens.end * self.bytes()];
            scores.extend(codes.chunks_exact(self.bytes()).map(|code| {
                let number = |i: usize| f16::from_le_bytes([code[i], code[i + 1]]).to_f32();
                let levels: f32 =
                    code[HEADER..].iter().zip(table.chunks_exact(256)).map(|(b, t)| t[usize::from(*b)]).sum();
                constant + number(0) * sum + number(2) * levels
            }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_on_the_grid_are_scored_exactly() {
        // Four levels per token: nothing is lost but the f16 of the minimum and the step.
        for dim in [16, 12] {
            let code = TwoBits { mean: vec![0.25; dim] };
            let n = 9;
            let mut keys = vec![0f32; n * dim];
            for (i, key) in keys.chunks_mut(dim).enumerate() {
                key.iter_mut().enumerate().for_each(|(c, x)| *x = ((c * (i + 1)) % 4) as f32 * 0.5 - 0.75);
                // A Hadamard rotation is its own inverse.
                hadamard(key);
                key.iter_mut().for_each(|x| *x += 0.25);
            }
            let q: Vec<f32> = (0..2 * dim).map(|i| (i as f32 - 7.0) / 9.0).collect();
            let mut codes = vec![0; n * code.bytes()];
            code.encode(&keys, &mut codes);
            let mut scores = vec![vec![]; 2];
            code.scores(&q, &HeadRows { codes: &codes, exact: &[] }, 2..n, &mut scores);
            for (q, scores) in q.chunks(dim).zip(&scores) {
                for (key, got) in keys[2 * dim..].chunks(dim).zip(scores) {
                    let want: f32 = q.iter().zip(key).map(|(q, k)| q * k).sum();
                    assert!((got - want).abs() < 5e-3, "{got}, not {want}");
                }
            }
        }
    }
}
