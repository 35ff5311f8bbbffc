//! Moments of keys and queries before rotation, and what rotation at uniform positions makes of them.
//!
//! RoPE turns the pair `(x₁, x₂)` of channels by the angle `ω p`. With the position `p` independent of the content and
//! uniform over a range, the rotated mean and variance follow from `E x₁`, `E x₂`, `E x₁²`, `E x₂²`, `E x₁ x₂` and the
//! means of `cos ω p`, `sin ω p`, `cos 2 ω p`, `sin 2 ω p`, which have closed forms. So one set of moments serves every
//! context length.

use super::matrix::cholesky;
use crate::stats::normal;
use rand::{rngs::StdRng, SeedableRng};
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
    /// Moments and rotation that the statistics follow from, for codes that need covariances or keys to fit to.
    pub source: RotatedHead,
}

/// Moments of one KV head with the rotation of its keys and queries.
#[derive(Debug, Clone, PartialEq)]
pub struct RotatedHead {
    /// Moments before rotation.
    pub moments: HeadMoments,
    /// Angle per position of each pair, `[R / 2]`, radians.
    pub frequencies: Vec<f32>,
    /// Factor on rotated channels.
    pub amplitude: f32,
    /// Positions of keys.
    pub keys: Range<usize>,
    /// Positions of queries.
    pub queries: Range<usize>,
}

/// Means of `cos ω p` and `sin ω p` over the whole numbers `p` of `positions`.
fn turn(frequency: f64, positions: &Range<usize>) -> [f64; 2] {
    let n = positions.len().max(1) as f64;
    let middle = (positions.start as f64 + positions.end.max(positions.start + 1) as f64 - 1.0) / 2.0;
    // The Dirichlet kernel: Σ e^{iwp} = e^{iw·middle} sin(nw / 2) / sin(w / 2).
    let below = (frequency / 2.0).sin();
    let ratio = if below.abs() < 1e-300 { 1.0 } else { (n * frequency / 2.0).sin() / (n * below) };
    [ratio * (frequency * middle).cos(), ratio * (frequency * middle).sin()]
}

/// Means of `(cos θ, sin θ, cos 2θ, sin 2θ)` for `θ = ω p` over the whole numbers `p` of `positions`.
fn turns(frequency: f64, positions: &Range<usize>) -> [f64; 4] {
    let ([c, s], [c2, s2]) = (turn(frequency, positions), turn(2.0 * frequency, positions));
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
            source: RotatedHead { moments: self.clone(), frequencies: frequencies.to_vec(), amplitude, keys, queries },
        }
    }

    /// Enters the second moments of channels and pairs into `matrix [D, D]`.
    fn enter(square: &[f32], cross: &[f32], matrix: &mut [f64]) {
        let (dim, half) = (square.len(), cross.len());
        square.iter().enumerate().for_each(|(c, x)| matrix[c * dim + c] = f64::from(*x));
        for (i, x) in cross.iter().enumerate() {
            let j = i + half;
            (matrix[i * dim + j], matrix[j * dim + i]) = (f64::from(*x), f64::from(*x));
        }
    }
}

impl RotatedHead {
    fn dim(&self) -> usize {
        self.moments.key_mean.len()
    }

    /// Returns `E k kᵀ` before rotation, `[D, D]`: channels of different pairs are taken to be uncorrelated.
    fn unrotated_keys(&self) -> Vec<f64> {
        let mean = widen(&self.moments.key_mean);
        let mut second: Vec<f64> = mean.iter().flat_map(|a| mean.iter().map(move |b| a * b)).collect();
        HeadMoments::enter(&self.moments.key_square, &self.moments.key_cross, &mut second);
        second
    }

    /// Returns the covariance of the rotated keys, `[D, D]`. Pairs that hardly turn over the context correlate, as all
    /// turn with one position.
    pub fn key_covariance(&self) -> Vec<f64> {
        let mean = widen(&self.moments.key_mean);
        let mut turned = mean.clone();
        for (i, frequency) in self.frequencies.iter().enumerate() {
            let (j, a) = (i + self.frequencies.len(), f64::from(self.amplitude));
            let [c, s] = turn(f64::from(*frequency), &self.keys);
            (turned[i], turned[j]) = (a * (mean[i] * c - mean[j] * s), a * (mean[j] * c + mean[i] * s));
        }
        let mut second = self.turned_second(&self.unrotated_keys(), &self.keys);
        for (row, a) in second.chunks_exact_mut(mean.len()).zip(&turned) {
            row.iter_mut().zip(&turned).for_each(|(x, b)| *x -= a * b);
        }
        second
    }

    /// Returns the second moments `E q qᵀ` of the rotated queries, `[D, D]`; those between different pairs are 0.
    pub fn query_second(&self) -> Vec<f64> {
        let mut second = vec![0.0; self.dim() * self.dim()];
        HeadMoments::enter(&self.moments.query_square, &self.moments.query_cross, &mut second);
        self.turned_second(&second, &self.queries)
    }

    /// Returns the second moments `[D, D]` after rotation at uniform `positions`.
    ///
    /// With `z = x₁ + i x₂` of each pair, `E z_a z̄_b` turns by `ω_a - ω_b` and `E z_a z_b` by `ω_a + ω_b`.
    fn turned_second(&self, second: &[f64], positions: &Range<usize>) -> Vec<f64> {
        let (dim, half) = (self.dim(), self.frequencies.len());
        let pairs = self.frequencies.iter().enumerate();
        let pairs = pairs.map(|(i, w)| (i, Some(i + half), f64::from(*w), f64::from(self.amplitude)));
        let units: Vec<_> = pairs.chain((2 * half..dim).map(|c| (c, None, 0.0, 1.0))).collect();
        let mut out = vec![0.0; dim * dim];
        for (a1, a2, wa, amplitude_a) in &units {
            for (b1, b2, wb, amplitude_b) in &units {
                let entry = |a: Option<usize>, b: Option<usize>| a.zip(b).map_or(0.0, |(a, b)| second[a * dim + b]);
                let (xx, xy) = (entry(Some(*a1), Some(*b1)), entry(Some(*a1), *b2));
                let (yx, yy) = (entry(*a2, Some(*b1)), entry(*a2, *b2));
                let times = |re: f64, im: f64, [c, s]: [f64; 2]| {
                    let scale = amplitude_a * amplitude_b / 2.0;
                    (scale * (re * c - im * s), scale * (re * s + im * c))
                };
                let (same_re, same_im) = times(xx + yy, yx - xy, turn(wa - wb, positions));
                let (both_re, both_im) = times(xx - yy, xy + yx, turn(wa + wb, positions));
                out[a1 * dim + b1] = both_re + same_re;
                if let Some(b2) = b2 {
                    out[a1 * dim + b2] = both_im - same_im;
                }
                if let Some(a2) = a2 {
                    out[a2 * dim + b1] = both_im + same_im;
                    if let Some(b2) = b2 {
                        out[a2 * dim + b2] = same_re - both_re;
                    }
                }
            }
        }
        out
    }

    /// Draws `n` rotated keys `[n, D]`: a normal key with the moments before rotation, turned by each of evenly spaced
    /// positions. The result depends on the moments and the positions alone.
    pub fn draw(&self, n: usize) -> Vec<f32> {
        let (dim, half, mean) = (self.dim(), self.frequencies.len(), widen(&self.moments.key_mean));
        let mut covariance = self.unrotated_keys();
        for (row, a) in covariance.chunks_exact_mut(dim).zip(&mean) {
            row.iter_mut().zip(&mean).for_each(|(x, b)| *x -= a * b);
        }
        let root = cholesky(&covariance, dim);
        let mut rng = StdRng::seed_from_u64(0);
        let mut keys = Vec::with_capacity(n * dim);
        for i in 0..n {
            let noise: Vec<f64> = (0..dim).map(|_| normal(&mut rng)).collect();
            let shift = root.chunks_exact(dim).map(|row| row.iter().zip(&noise).map(|(r, x)| r * x).sum::<f64>());
            let mut key: Vec<f64> = mean.iter().zip(shift).map(|(m, x)| m + x).collect();
            let position = self.keys.start + (2 * i + 1) * self.keys.len() / (2 * n);
            for (c, frequency) in self.frequencies.iter().enumerate() {
                let (sin, cos) = (f64::from(*frequency) * position as f64).sin_cos();
                let (x, y, a) = (key[c], key[c + half], f64::from(self.amplitude));
                (key[c], key[c + half]) = (a * (x * cos - y * sin), a * (y * cos + x * sin));
            }
            keys.extend(key.into_iter().map(|x| x as f32));
        }
        keys
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

    #[test]
    fn covariances_and_drawn_keys_are_those_of_rotated_normal_keys() {
        // Two pairs that hardly turn and so correlate, one that turns often, one channel that is not rotated.
        let dim = 7;
        let moments = HeadMoments {
            key_mean: vec![1.0, -0.5, 2.0, 0.3, 1.5, -1.0, 0.7],
            key_square: vec![1.5, 1.0, 4.5, 0.5, 3.0, 2.0, 1.0],
            key_cross: vec![0.4, -0.6, -1.8],
            query_square: vec![2.0, 1.0, 0.5, 1.0, 3.0, 0.7, 1.2],
            query_cross: vec![0.9, -0.3, 0.2],
        };
        let (keys, queries) = (4..4004, 2000..4004);
        let statistics = moments.rotated((&[1.1, 3e-4, 4e-4], 1.2), keys, queries);
        let (covariance, second) = (statistics.source.key_covariance(), statistics.source.query_second());
        for c in 0..dim {
            let (deviation, square) = (f64::from(statistics.deviation[c]), f64::from(statistics.query[c]));
            assert!((covariance[c * dim + c] - deviation * deviation).abs() < 1e-5, "{c}");
            assert!((second[c * dim + c] - square).abs() < 1e-5, "{c}");
        }
        let n = 40_000;
        let drawn = statistics.source.draw(n);
        assert_eq!(drawn, statistics.source.draw(n));
        let mean = |f: &dyn Fn(&[f32]) -> f64| drawn.chunks(dim).map(f).sum::<f64>() / n as f64;
        let centred = |k: &[f32], c: usize| f64::from(k[c] - statistics.mean[c]);
        for a in 0..dim {
            assert!(mean(&|k| centred(k, a)).abs() < 0.03, "{a}");
            for b in 0..dim {
                let got = mean(&|k| centred(k, a) * centred(k, b));
                assert!((got - covariance[a * dim + b]).abs() < 0.06, "{a}, {b}: {got}, {}", covariance[a * dim + b]);
            }
        }
        // The slow pairs turn by one position: they correlate, though their keys do not before rotation.
        let between = [(1, 2), (1, 5), (4, 2), (4, 5)].map(|(a, b)| covariance[a * dim + b].abs());
        assert!(between.iter().any(|x| *x > 0.3), "{between:?}");
        assert_eq!(second[dim + 2], 0.0);
    }
}
