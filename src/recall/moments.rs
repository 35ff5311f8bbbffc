//! Moments of keys and queries before rotation, and what rotation at uniform positions makes of them.
//!
//! RoPE turns the pair `(x₁, x₂)` of channels by the angle `ω p`. With the position `p` independent of the content and
//! uniform over a range, the rotated mean and variance follow from `E x₁`, `E x₂`, `E x₁²`, `E x₂²`, `E x₁ x₂` and the
//! means of `cos ω p`, `sin ω p`, `cos 2 ω p`, `sin 2 ω p`, which have closed forms. So one set of moments serves every
//! context length.

use std::ops::Range;

/// Moments of one KV head before rotation. Channels `i` and `i + R / 2` form a pair where `R` channels are rotated.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadMoments {
    /// `E k`, `[D]`.
    pub key_mean: Vec<f32>,
    /// `E k²`, `[D]`.
    pub key_square: Vec<f32>,
    /// `E k₁ k₂` of each pair, `[R / 2]`.
    pub key_cross: Vec<f32>,
    /// `E q²` over the queries of all heads of the group, `[D]`.
    pub query_square: Vec<f32>,
    /// `E q₁ q₂` of each pair, `[R / 2]`.
    pub query_cross: Vec<f32>,
}

/// Statistics of one KV head's rotated keys and queries in a context.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyStatistics {
    /// Mean of each key channel, `[D]`.
    pub mean: Vec<f32>,
    /// Standard deviation of each key channel, `[D]`.
    pub deviation: Vec<f32>,
    /// Mean square of each query channel, `[D]`.
    pub query: Vec<f32>,
    /// Channels that are coded alike: rotated pairs, and unrotated channels singly.
    pub units: Vec<Vec<usize>>,
}

/// Means of `(cos θ, sin θ, cos 2θ, sin 2θ)` for `θ = ω p` over the whole numbers `p` of `positions`.
fn turns(frequency: f64, positions: &Range<usize>) -> [f64; 4] {
    let n = positions.len().max(1) as f64;
    let middle = (positions.start as f64 + positions.end.max(positions.start + 1) as f64 - 1.0) / 2.0;
    let mean = |w: f64| {
        // The Dirichlet kernel: Σ e^{iwp} = e^{iw·middle} sin(nw / 2) / sin(w / 2).
        let below = (w / 2.0).sin();
        let ratio = if below.abs() < 1e-300 { 1.0 } else { (n * w / 2.0).sin() / (n * below) };
        [ratio * (w * middle).cos(), ratio * (w * middle).sin()]
    };
    let ([c, s], [c2, s2]) = (mean(frequency), mean(2.0 * frequency));
    [c, s, c2, s2]
}

impl HeadMoments {
    /// Returns the statistics after rotation by `frequencies [R / 2]` and `amplitude`, with keys at uniform `keys`
    /// positions and queries at uniform `queries` positions.
    pub fn rotated(
        &self,
        (frequencies, amplitude): (&[f32], f32),
        keys: Range<usize>,
        queries: Range<usize>,
    ) -> KeyStatistics {
        let (dim, half, a) = (self.key_mean.len(), frequencies.len(), f64::from(amplitude));
        let (mut mean, mut square) = (widen(&self.key_mean), widen(&self.key_square));
        let mut query = widen(&self.query_square);
        for (i, frequency) in frequencies.iter().enumerate() {
            let (j, frequency) = (i + half, f64::from(*frequency));
            let [c, s, c2, s2] = turns(frequency, &keys);
            (mean[i], mean[j]) = (a * (mean[i] * c - mean[j] * s), a * (mean[j] * c + mean[i] * s));
            (square[i], square[j]) = turned([square[i], square[j], f64::from(self.key_cross[i])], c2, s2, a);
            let [_, _, c2, s2] = turns(frequency, &queries);
            (query[i], query[j]) = turned([query[i], query[j], f64::from(self.query_cross[i])], c2, s2, a);
        }
        let deviation = square.iter().zip(&mean).map(|(s, m)| (s - m * m).max(0.0).sqrt() as f32).collect();
        let pairs = (0..half).map(|i| vec![i, i + half]);
        KeyStatistics {
            mean: narrow(&mean),
            deviation,
            query: narrow(&query),
            units: pairs.chain((2 * half..dim).map(|c| vec![c])).collect(),
        }
    }
}

/// `E (x₁ cos - x₂ sin)²` and `E (x₂ cos + x₁ sin)²` from `[E x₁², E x₂², E x₁ x₂]`.
fn turned([x, y, xy]: [f64; 3], c2: f64, s2: f64, amplitude: f64) -> (f64, f64) {
    let (cc, ss) = ((1.0 + c2) / 2.0, (1.0 - c2) / 2.0);
    let a = amplitude * amplitude;
    (a * (x * cc + y * ss - xy * s2), a * (y * cc + x * ss + xy * s2))
}

fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|x| *x as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closed_forms_are_the_means_over_all_positions() {
        // Six keys, one unrotated channel pair at the end; each is rotated to every position.
        let (dim, frequencies, amplitude) = (6, [0.7f32, 3e-5], 1.3f32);
        let samples: Vec<Vec<f32>> =
            (0..6).map(|i| (0..dim).map(|c| ((i * 31 + c * 17) % 13) as f32 / 6.0 - 0.7).collect()).collect();
        let mean = |f: &dyn Fn(&[f32]) -> f32| samples.iter().map(|x| f(x)).sum::<f32>() / samples.len() as f32;
        let square: Vec<f32> = (0..dim).map(|c| mean(&|x| x[c] * x[c])).collect();
        let cross: Vec<f32> = (0..2).map(|i| mean(&|x| x[i] * x[i + 2])).collect();
        let moments = HeadMoments {
            key_mean: (0..dim).map(|c| mean(&|x| x[c])).collect(),
            key_square: square.clone(),
            key_cross: cross.clone(),
            query_square: square,
            query_cross: cross,
        };
        let (keys, queries) = (4..5000usize, 2500..5000usize);
        let got = moments.rotated((&frequencies, amplitude), keys.clone(), queries.clone());
        let over = |positions: Range<usize>, c: usize| -> (f64, f64) {
            let (mut sum, mut squares, n) = (0.0, 0.0, (positions.len() * samples.len()) as f64);
            for p in positions {
                for x in &samples {
                    let y = if c < 4 {
                        let angle = f64::from(frequencies[c % 2]) * p as f64;
                        let (one, two) = (f64::from(x[c % 2]), f64::from(x[c % 2 + 2]));
                        let turned = if c < 2 {
                            one * angle.cos() - two * angle.sin()
                        } else {
                            two * angle.cos() + one * angle.sin()
                        };
                        f64::from(amplitude) * turned
                    } else {
                        f64::from(x[c])
                    };
                    (sum, squares) = (sum + y, squares + y * y);
                }
            }
            (sum / n, squares / n)
        };
        for c in 0..dim {
            let (mean, square) = over(keys.clone(), c);
            let deviation = (square - mean * mean).sqrt();
            assert!((f64::from(got.mean[c]) - mean).abs() < 1e-4, "{c}: {} and {mean}", got.mean[c]);
            assert!((f64::from(got.deviation[c]) - deviation).abs() < 1e-4, "{c}: {}", got.deviation[c]);
            let (_, query) = over(queries.clone(), c);
            assert!((f64::from(got.query[c]) - query).abs() < 1e-4, "{c}: {}", got.query[c]);
        }
        assert_eq!(got.units, [vec![0, 2], vec![1, 3], vec![4], vec![5]]);
    }
}
