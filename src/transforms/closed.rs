//! Factors in closed form, of a product of one butterfly whose permutations are known (Le, Zheng, Riccietti and Gribonval
//! 2021, arXiv:2110.01230).

use super::examples::Examples;
use super::objective::Objective;
use super::polish::{error_of, LANES};
use super::product::Product;
use super::target::Matrix;
use crate::ops::factored::Shape;

/// A complex number.
type C = [f64; 2];

/// `Σ a_i conj(b_i)`.
fn dot(a: &[C], b: &[C]) -> C {
    a.iter().zip(b).fold([0.0; 2], |s, (a, b)| [s[0] + a[0] * b[0] + a[1] * b[1], s[1] + a[1] * b[0] - a[0] * b[1]])
}

/// `conj(a) b`.
fn conjugate_times(a: C, b: C) -> C {
    [a[0] * b[0] + a[1] * b[1], a[0] * b[1] - a[1] * b[0]]
}

/// The unit vector `x` for which `x x^H [u; v]` is nearest to the rows `u` and `v`: their first left singular vector.
fn direction(u: &[C], v: &[C]) -> [C; 2] {
    let (a, b, d) = (dot(u, v), dot(u, u)[0], dot(v, v)[0]);
    let gap = (b - d) / 2.0;
    let root = (gap * gap + a[0] * a[0] + a[1] * a[1]).sqrt();
    // An eigenvector of [[b, a], [conj(a), d]], in the form that loses no digits.
    let x = if gap >= 0.0 { [[gap + root, 0.0], [a[0], -a[1]]] } else { [a, [root - gap, 0.0]] };
    let length = x.iter().flatten().map(|p| p * p).sum::<f64>().sqrt();
    if length > 0.0 {
        x.map(|c| [c[0] / length, c[1] / length])
    } else {
        [[1.0, 0.0], [0.0, 0.0]]
    }
}

/// Splits block `block` of `m` rows into the factor of its level and two blocks of half its size, and goes on with them.
fn split(rows: &[Vec<C>], block: usize, n: usize, weights: &mut [[C; 4]]) {
    let (m, half) = (rows.len(), rows.len() / 2);
    let pairs = &mut weights[n / 2 * half.trailing_zeros() as usize + block * half..];
    if m == 2 {
        pairs[0] = [rows[0][0], rows[0][1], rows[1][0], rows[1][1]];
        return;
    }
    let mut halves = [vec![], vec![]];
    for (h, below) in halves.iter_mut().enumerate() {
        for j in 0..half {
            let (u, v) = (&rows[j][h * half..][..half], &rows[j + half][h * half..][..half]);
            let x = direction(u, v);
            (pairs[j][h], pairs[j][2 + h]) = (x[0], x[1]);
            let sum = |(p, q): (&C, &C)| {
                let (p, q) = (conjugate_times(x[0], *p), conjugate_times(x[1], *q));
                [p[0] + q[0], p[1] + q[1]]
            };
            below.push(u.iter().zip(v).map(sum).collect());
        }
    }
    for (h, below) in halves.iter().enumerate() {
        split(below, 2 * block + h, n, weights);
    }
}

/// The product with untied factors in closed form for the permutations of `found`, and its error over all entries; none
/// where it has no single butterfly, or where of complex factors the real part alone is known.
///
/// A butterfly is `X Y`, `X` its last factor and `Y` two blocks of half the size; rows `j` and `j + N/2` of each half of
/// the columns are then a matrix of rank 1, whose best approximation is by its singular vectors. Exact where a product is.
pub fn closed_form(matrix: &Matrix, found: &Product) -> Option<(Product, f64)> {
    let (modules, n) = (found.modules(), found.shape().size);
    if modules.matches('B').count() != 1 || found.shape().complex != matrix.im.is_some() {
        return None;
    }
    // Permutations in the order of application: those before the butterfly move columns, those after it rows.
    let (mut rows, mut columns): (Vec<usize>, Vec<usize>) = ((0..n).collect(), (0..n).collect());
    let mut index = found.permuted().into_iter();
    let mut after = false;
    for module in modules.chars().rev() {
        match module {
            'B' => after = true,
            _ => {
                let index = index.next()?;
                if after {
                    let moved = rows.clone();
                    (0..n).for_each(|i| rows[i] = moved[index[i] as usize]);
                } else {
                    let moved = columns.clone();
                    (0..n).for_each(|i| columns[i] = moved[index[i] as usize]);
                }
            }
        }
    }
    let mut block = vec![vec![[0.0; 2]; n]; n];
    for (i, row) in rows.iter().enumerate() {
        for (j, column) in columns.iter().enumerate() {
            let at = i * n + column;
            block[*row][j] = [matrix.re[at], matrix.im.as_ref().map_or(0.0, |im| im[at])];
        }
    }
    let shape = Shape { tied: false, ..found.shape() };
    let mut weights = vec![[[0.0; 2]; 4]; n / 2 * shape.levels()];
    split(&block, 0, n, &mut weights);
    let planes = shape.planes();
    let flat = weights.iter().flatten().flat_map(|c| c[..planes].iter().map(|w| *w as f32)).collect();
    let product = found.with_factors(shape, vec![flat]);
    let every: Vec<usize> = (0..n).collect();
    let whole = Objective::<f64, LANES>::of_columns(shape, &Examples::Columns(matrix), &every);
    let error = error_of(&product, (&whole, matrix.im.is_some()));
    Some((product, error))
}

#[cfg(test)]
mod tests {
    use super::super::{learn, Settings, Transform};
    use super::*;
    use crate::error::Result;
    use candle_core::Device;

    /// Learned factors of the same permutations find the transform too, and a product of other ones cannot be it.
    #[test]
    fn transforms_of_one_butterfly_have_a_closed_form() -> Result<()> {
        for (transform, n) in [(Transform::Dft, 16), (Transform::Hadamard, 32), (Transform::Dft, 2)] {
            let (product, complex) = transform.product();
            let settings = Settings { rounds: 4, ..Settings::new(product, complex, 1, false) };
            let matrix = transform.matrix(n, 0);
            let found = learn(&matrix, &settings, &Device::Cpu, &|_| ())?;
            assert!(found.error < 1e-4);
            let (closed, error) = closed_form(&matrix, &found.product).expect("one butterfly");
            assert!(error < 1e-6, "{transform:?}: {error:.1e}");
            assert_eq!(closed.permuted(), found.product.permuted());
        }
        Ok(())
    }

    #[test]
    fn other_permutations_have_the_nearest_product_of_each_split() -> Result<()> {
        let matrix = Transform::Dft.matrix(16, 0);
        let settings = Settings {
            starts: 1,
            drawn: 0,
            rounds: 0,
            relaxed_steps: 0,
            fit_steps: 0,
            ..Settings::new("BP", true, 5, false)
        };
        let found = learn(&matrix, &settings, &Device::Cpu, &|_| ())?;
        let (_, error) = closed_form(&matrix, &found.product).expect("one butterfly");
        assert!(error > 1e-2 && error < 0.25, "{error}");
        Ok(())
    }

    #[test]
    fn several_butterflies_and_real_parts_have_none() -> Result<()> {
        for (transform, product) in [(Transform::Dct, "BPP"), (Transform::Convolution, "BPBP")] {
            let settings =
                Settings { starts: 1, drawn: 0, rounds: 0, relaxed_steps: 0, ..Settings::new(product, true, 0, false) };
            let matrix = transform.matrix(8, 0);
            let found = learn(&matrix, &settings, &Device::Cpu, &|_| ())?;
            assert!(closed_form(&matrix, &found.product).is_none(), "{transform:?}");
        }
        Ok(())
    }
}
