//! Small square matrices in double precision, `[n, n]` row by row.

/// Sweeps of Jacobi rotations at most.
const SWEEPS: usize = 30;

/// Returns the product of two matrices.
pub(super) fn product(a: &[f64], b: &[f64], n: usize) -> Vec<f64> {
    let mut out = vec![0.0; n * n];
    for (row, out) in a.chunks_exact(n).zip(out.chunks_exact_mut(n)) {
        for (x, b) in row.iter().zip(b.chunks_exact(n)) {
            out.iter_mut().zip(b).for_each(|(o, b)| *o += x * b);
        }
    }
    out
}

/// Returns the eigenvalues of a symmetric matrix without negative ones, descending, and the eigenvectors as rows.
///
/// One-sided Jacobi rotations make the rows of `G A` orthogonal; the rows of `G` are then eigenvectors of `A Aᵀ`, and
/// so of `A`. Source: Hestenes, "Inversion of matrices by biorthogonalization and related results" (1958),
/// <https://doi.org/10.1137/0106005>.
pub(super) fn eigen(matrix: &[f64], n: usize) -> (Vec<f64>, Vec<f64>) {
    let mut rows: Vec<Vec<f64>> = matrix.chunks_exact(n).map(<[f64]>::to_vec).collect();
    let mut vectors: Vec<Vec<f64>> = (0..n).map(|i| (0..n).map(|j| f64::from(i == j)).collect()).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let least = 1e-28 * rows.iter().map(|r| dot(r, r)).fold(0.0, f64::max);
    for _ in 0..SWEEPS {
        let mut rotated = false;
        for i in 0..n {
            for j in i + 1..n {
                let (a, b, c) = (dot(&rows[i], &rows[i]), dot(&rows[j], &rows[j]), dot(&rows[i], &rows[j]));
                if c == 0.0 || c.abs() <= 1e-12 * (a * b).sqrt() || c.abs() <= least {
                    continue;
                }
                rotated = true;
                let zeta = (b - a) / (2.0 * c);
                let t = zeta.signum() / (zeta.abs() + (1.0 + zeta * zeta).sqrt());
                let cos = 1.0 / (1.0 + t * t).sqrt();
                for set in [&mut rows, &mut vectors] {
                    let (low, high) = set.split_at_mut(j);
                    for (x, y) in low[i].iter_mut().zip(&mut high[0]) {
                        (*x, *y) = (cos * (*x - t * *y), cos * (*y + t * *x));
                    }
                }
            }
        }
        if !rotated {
            break;
        }
    }
    let mut pairs: Vec<(f64, Vec<f64>)> = rows.iter().map(|r| dot(r, r).sqrt()).zip(vectors).collect();
    pairs.sort_by(|a, b| b.0.total_cmp(&a.0));
    (pairs.iter().map(|p| p.0).collect(), pairs.into_iter().flat_map(|p| p.1).collect())
}

/// Returns the symmetric square root of a symmetric positive definite matrix, and its inverse.
pub(super) fn roots(matrix: &[f64], n: usize) -> (Vec<f64>, Vec<f64>) {
    let (values, vectors) = eigen(matrix, n);
    let of = |f: fn(f64) -> f64| {
        let mut out = vec![0.0; n * n];
        for (value, vector) in values.iter().zip(vectors.chunks_exact(n)) {
            for (x, out) in vector.iter().zip(out.chunks_exact_mut(n)) {
                out.iter_mut().zip(vector).for_each(|(o, y)| *o += f(value.max(1e-12)) * x * y);
            }
        }
        out
    };
    (of(f64::sqrt), of(|x| 1.0 / x.sqrt()))
}

/// Returns the lower triangular root `L` of a symmetric matrix `L Lᵀ` without negative eigenvalues; pivots that
/// rounding makes negative count as 0.
pub(super) fn cholesky(matrix: &[f64], n: usize) -> Vec<f64> {
    let mut root = vec![0.0; n * n];
    for i in 0..n {
        for j in 0..=i {
            let before: f64 = (0..j).map(|k| root[i * n + k] * root[j * n + k]).sum();
            let left = matrix[i * n + j] - before;
            let pivot = root[j * n + j];
            root[i * n + j] = match (i == j, pivot > 0.0) {
                (true, _) => left.max(0.0).sqrt(),
                (false, true) => left / pivot,
                (false, false) => 0.0,
            };
        }
    }
    root
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eigenvectors_and_roots_are_those_of_their_definition() {
        // Products of random matrices of full and of lower rank.
        for (n, rank) in [(1, 1), (6, 6), (33, 33), (20, 7)] {
            let x: Vec<f64> = (0..n * rank).map(|i| ((i * 7919 + 13) % 9973) as f64 / 4986.5 - 1.0).collect();
            let entry = |i: usize, j: usize| (0..rank).map(|r| x[i * rank + r] * x[j * rank + r]).sum::<f64>();
            let mut a: Vec<f64> = (0..n * n).map(|i| entry(i / n, i % n)).collect();
            let (values, vectors) = eigen(&a, n);
            assert!(values.windows(2).all(|w| w[0] >= w[1]));
            let close = |got: &[f64], want: &[f64]| {
                let off = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(off < 1e-8, "{n}, rank {rank}: {off}");
            };
            let transposed: Vec<f64> = (0..n * n).map(|i| vectors[i % n * n + i / n]).collect();
            let one: Vec<f64> = (0..n * n).map(|i| f64::from(i / n == i % n)).collect();
            close(&product(&vectors, &transposed, n), &one);
            let scaled: Vec<f64> = vectors.iter().enumerate().map(|(i, x)| x * values[i / n]).collect();
            close(&product(&transposed, &scaled, n), &a);
            (0..n).for_each(|i| a[i * n + i] += 0.5);
            let (root, inverse) = roots(&a, n);
            close(&product(&root, &root, n), &a);
            close(&product(&root, &inverse, n), &one);
            let lower = cholesky(&a, n);
            let upper: Vec<f64> = (0..n * n).map(|i| lower[i % n * n + i / n]).collect();
            close(&product(&lower, &upper, n), &a);
        }
    }
}
