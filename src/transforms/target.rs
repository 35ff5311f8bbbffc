//! Matrices of classical transforms on the unitary scale, as in the authors' code of arXiv:1903.05895.

use crate::stats::normal;
use rand::{rngs::StdRng, SeedableRng};
use std::f64::consts::PI;

/// A transform with a known matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transform {
    /// Discrete Fourier transform, `e^{-2πi jk / N} / √N`.
    Dft,
    /// Discrete cosine transform of type II, orthonormal.
    Dct,
    /// Discrete sine transform of type II, orthonormal.
    Dst,
    /// Hadamard matrix in natural order over `√N`.
    Hadamard,
    /// Discrete Hartley transform, `(cos + sin)(2π jk / N) / √N`.
    Hartley,
    /// Circular convolution with a filter of `N` normal numbers over `√N`.
    Convolution,
    /// Values of the first `N` Legendre polynomials at `N` points between -1 and 1, over `√N`.
    Legendre,
    /// Normal numbers over `√N`.
    Random,
}

impl Transform {
    /// Every transform, in the order of help texts and tables.
    pub const ALL: [Self; 8] = [
        Self::Dft,
        Self::Dct,
        Self::Dst,
        Self::Hadamard,
        Self::Hartley,
        Self::Convolution,
        Self::Legendre,
        Self::Random,
    ];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dft => "dft",
            Self::Dct => "dct",
            Self::Dst => "dst",
            Self::Hadamard => "hadamard",
            Self::Hartley => "hartley",
            Self::Convolution => "convolution",
            Self::Legendre => "legendre",
            Self::Random => "random",
        }
    }

    /// Modules of the product that it is learned as, left factor first, and whether their factors are complex.
    pub fn product(self) -> (&'static str, bool) {
        match self {
            Self::Dft | Self::Hartley => ("BP", true),
            Self::Hadamard => ("BP", false),
            Self::Dct | Self::Dst => ("BPP", true),
            Self::Convolution => ("BPBP", true),
            Self::Legendre | Self::Random => ("BPBP", true),
        }
    }

    /// The matrix for `n` elements; `seed` is of a convolution's filter and of random numbers.
    pub fn matrix(self, n: usize, seed: u64) -> Matrix {
        let scale = 1.0 / (n as f64).sqrt();
        let turn = |i: usize, j: usize| 2.0 * PI * ((i * j) % n) as f64 / n as f64;
        let real = |f: &dyn Fn(usize, usize) -> f64| Matrix {
            size: n,
            re: (0..n * n).map(|at| f(at / n, at % n)).collect(),
            im: None,
        };
        let edge = |at: bool| if at { scale } else { scale * 2f64.sqrt() };
        let half = |i: usize, j: usize| PI * ((i * (2 * j + 1)) % (4 * n)) as f64 / (2 * n) as f64;
        match self {
            Self::Dft => Matrix {
                im: Some((0..n * n).map(|at| -turn(at / n, at % n).sin() * scale).collect()),
                ..real(&|i, j| turn(i, j).cos() * scale)
            },
            Self::Dct => real(&|i, j| edge(i == 0) * half(i, j).cos()),
            Self::Dst => real(&|i, j| edge(i + 1 == n) * half(i + 1, j).sin()),
            Self::Hadamard => real(&|i, j| if (i & j).count_ones() % 2 == 0 { scale } else { -scale }),
            Self::Hartley => real(&|i, j| (turn(i, j).cos() + turn(i, j).sin()) * scale),
            Self::Convolution => {
                let mut rng = StdRng::seed_from_u64(seed);
                let filter: Vec<f64> = (0..n).map(|_| normal(&mut rng) * scale).collect();
                real(&|i, j| filter[(i + n - j) % n])
            }
            Self::Legendre => legendre(n),
            Self::Random => {
                let mut rng = StdRng::seed_from_u64(seed);
                Matrix { size: n, re: (0..n * n).map(|_| normal(&mut rng) * scale).collect(), im: None }
            }
        }
    }
}

/// A square matrix, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// Rows and columns.
    pub size: usize,
    /// Real parts.
    pub re: Vec<f64>,
    /// Imaginary parts of a complex matrix.
    pub im: Option<Vec<f64>>,
}

impl Matrix {
    /// Divides by the scale at which the matrix has as large entries as a unitary one, and returns it; 0 of a matrix of
    /// zeros, which stays.
    pub fn normalise(&mut self) -> f64 {
        let all = || self.re.iter().chain(self.im.iter().flatten());
        let scale = (all().map(|x| x * x).sum::<f64>() / self.size as f64).sqrt();
        if scale > 0.0 {
            self.re.iter_mut().chain(self.im.iter_mut().flatten()).for_each(|x| *x /= scale);
        }
        scale
    }
}

/// By Bonnet's recursion `(i + 1) P_{i + 1} = (2i + 1) x P_i - i P_{i - 1}` at `x_j = -1 + 2 (j + 1) / (N + 1)`.
fn legendre(n: usize) -> Matrix {
    let x: Vec<f64> = (0..n).map(|j| -1.0 + 2.0 * (j + 1) as f64 / (n + 1) as f64).collect();
    let mut rows = vec![vec![1.0; n], x.clone()];
    for i in 1..n - 1 {
        let f = i as f64;
        let next = (0..n).map(|j| ((2.0 * f + 1.0) * x[j] * rows[i][j] - f * rows[i - 1][j]) / (f + 1.0)).collect();
        rows.push(next);
    }
    let scale = 1.0 / (n as f64).sqrt();
    Matrix { size: n, re: rows.into_iter().take(n).flatten().map(|v| v * scale).collect(), im: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orthonormal_transforms_have_unit_rows_at_right_angles() {
        for n in [2, 8, 32] {
            for transform in [Transform::Dft, Transform::Dct, Transform::Dst, Transform::Hadamard, Transform::Hartley] {
                let m = transform.matrix(n, 0);
                let im = m.im.clone().unwrap_or_else(|| vec![0.0; n * n]);
                for i in 0..n {
                    for j in 0..n {
                        let of = |f: &dyn Fn(usize, usize) -> f64| (0..n).map(|k| f(i * n + k, j * n + k)).sum::<f64>();
                        let re = of(&|a, b| m.re[a] * m.re[b] + im[a] * im[b]);
                        let across = of(&|a, b| im[a] * m.re[b] - m.re[a] * im[b]);
                        let want = f64::from(i == j);
                        assert!((re - want).abs() < 1e-12 && across.abs() < 1e-12, "{transform:?} of {n}: {i}, {j}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_matrix_is_brought_to_the_unitary_scale() {
        let unitary = Transform::Dft.matrix(8, 0);
        let mut m = unitary.clone();
        m.re.iter_mut().chain(m.im.iter_mut().flatten()).for_each(|x| *x *= 7.0);
        assert!((m.normalise() - 7.0).abs() < 1e-12);
        assert!(m.re.iter().zip(&unitary.re).all(|(a, b)| (a - b).abs() < 1e-15));
        assert_eq!(Matrix { size: 2, re: vec![0.0; 4], im: None }.normalise(), 0.0);
    }

    #[test]
    fn definitions_hold_at_single_entries() {
        let n = 8;
        let root = (8f64).sqrt();
        let at = |t: Transform, i: usize, j: usize| t.matrix(n, 5).re[i * n + j];
        assert!((at(Transform::Dct, 3, 2) - 0.5 * (PI * 3.0 * 2.5 / 8.0).cos()).abs() < 1e-15);
        assert!((at(Transform::Dst, 7, 1) + 1.0 / root).abs() < 1e-15, "alternates");
        assert!((at(Transform::Hartley, 1, 1) - ((PI / 4.0).cos() + (PI / 4.0).sin()) / root).abs() < 1e-15);
        let dft = Transform::Dft.matrix(n, 0);
        assert!((dft.im.as_ref().map_or(0.0, |im| im[n + 1]) + (PI / 4.0).sin() / root).abs() < 1e-15);
        assert_eq!(at(Transform::Convolution, 5, 2), at(Transform::Convolution, 3, 0), "circulant");
        let x = -1.0 + 2.0 * 4.0 / 9.0;
        assert!((at(Transform::Legendre, 3, 3) - (5.0 * x * x * x - 3.0 * x) / 2.0 / root).abs() < 1e-15);
    }
}
