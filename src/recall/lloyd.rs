//! Levels of the Lloyd-Max quantiser of a standard normal variable.
//!
//! Source: Max, "Quantizing for minimum distortion" (1960), <https://doi.org/10.1109/TIT.1960.1057548>.

use std::sync::OnceLock;

/// Most bits per channel.
pub const MOST_BITS: usize = 6;

/// Levels for one number of bits, and their mean squared error.
#[derive(Debug, Clone)]
pub struct Levels {
    /// The `2^b` levels, ascending.
    pub levels: Vec<f32>,
    /// The `2^b - 1` boundaries: midpoints of neighbouring levels.
    pub edges: Vec<f32>,
    /// Expected squared error.
    pub distortion: f64,
}

impl Levels {
    /// Returns the index of the level nearest to `x`.
    pub fn nearest(&self, x: f32) -> usize {
        self.edges.partition_point(|e| *e <= x)
    }
}

/// Returns the quantiser of `bits` bits, from 0 (the mean alone) to [`MOST_BITS`].
pub fn levels(bits: usize) -> &'static Levels {
    static ALL: OnceLock<Vec<Levels>> = OnceLock::new();
    &ALL.get_or_init(|| (0..=MOST_BITS).map(solve).collect())[bits]
}

/// Alternates midpoints and conditional means until neither moves.
fn solve(bits: usize) -> Levels {
    let n = 1usize << bits;
    let mut levels: Vec<f64> = (0..n).map(|i| (2.0 * (i as f64 + 0.5) / n as f64 - 1.0) * 2.5).collect();
    let mut edges = vec![];
    for _ in 0..20_000 {
        edges = levels.windows(2).map(|w| (w[0] + w[1]) / 2.0).collect();
        let at = |i: usize| match i {
            0 => f64::NEG_INFINITY,
            i if i == n => f64::INFINITY,
            i => edges[i - 1],
        };
        let mut moved = 0f64;
        for (i, level) in levels.iter_mut().enumerate() {
            let (low, high) = (at(i), at(i + 1));
            let mean = (density(low) - density(high)) / (cumulative(high) - cumulative(low));
            moved = moved.max((mean - *level).abs());
            *level = mean;
        }
        if moved < 1e-10 {
            break;
        }
    }
    // E (x - Q(x))² = 1 - E Q(x)², since each level is the mean of its cell.
    let at = |i: usize| if i == 0 { f64::NEG_INFINITY } else { edges.get(i - 1).copied().unwrap_or(f64::INFINITY) };
    let power: f64 = levels.iter().enumerate().map(|(i, l)| l * l * (cumulative(at(i + 1)) - cumulative(at(i)))).sum();
    let narrow = |x: &[f64]| x.iter().map(|x| *x as f32).collect();
    Levels { levels: narrow(&levels), edges: narrow(&edges), distortion: 1.0 - power }
}

fn density(x: f64) -> f64 {
    (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt()
}

/// The normal distribution function: a series for small arguments, a continued fraction for large ones.
fn cumulative(x: f64) -> f64 {
    if x < 0.0 {
        return 1.0 - cumulative(-x);
    }
    if x > 38.0 {
        return 1.0;
    }
    if x < 4.0 {
        // Φ(x) = 1/2 + φ(x) (x + x³/3 + x⁵/15 + ..).
        let (mut term, mut sum, mut k) = (x, x, 1.0);
        while term > 1e-18 {
            k += 2.0;
            term *= x * x / k;
            sum += term;
        }
        return 0.5 + density(x) * sum;
    }
    // Mills' ratio: 1 - Φ(x) = φ(x) / (x + 1 / (x + 2 / (x + ..))).
    let ratio = (1..=60).rev().fold(x, |tail, k| x + f64::from(k) / tail);
    1.0 - density(x) / ratio
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distortions_are_those_of_the_published_table() {
        // Max 1960, table I, whose fifth entry is off by 0.2%.
        let table = [1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499];
        for (bits, want) in table.into_iter().enumerate() {
            let got = levels(bits).distortion;
            assert!((got / want - 1.0).abs() < 3e-3, "{bits} bits: {got}, not {want}");
        }
        assert!((levels(1).levels[1] - 0.7979).abs() < 1e-4);
        assert!((levels(2).levels[3] - 1.510).abs() < 1e-3);
    }

    #[test]
    fn every_level_is_nearest_to_itself() {
        for bits in 0..=MOST_BITS {
            let all = levels(bits);
            for (i, level) in all.levels.iter().enumerate() {
                assert_eq!(all.nearest(*level), i, "{bits} bits");
            }
        }
    }
}
