//! What a product is compared with: the columns of a matrix, or pairs of an input and its output.

use super::target::Matrix;

/// Vectors of `N` numbers, one after the other.
#[derive(Debug, Clone, PartialEq)]
pub struct Vectors {
    /// Real parts.
    pub re: Vec<f64>,
    /// Imaginary parts of complex vectors.
    pub im: Option<Vec<f64>>,
}

impl Vectors {
    /// Divides by the root mean square of the vectors' lengths and returns it; vectors of zeros stay.
    fn normalise(&mut self, count: usize) -> f64 {
        let all = || self.re.iter().chain(self.im.iter().flatten());
        let length = (all().map(|x| x * x).sum::<f64>() / count as f64).sqrt();
        if length > 0.0 {
            self.re.iter_mut().chain(self.im.iter_mut().flatten()).for_each(|x| *x /= length);
        }
        length
    }

    fn each(&self, n: usize, vector: usize, mut to: impl FnMut(usize, f64)) {
        for (plane, of) in std::iter::once(&self.re).chain(&self.im).enumerate() {
            of[vector * n..][..n].iter().enumerate().for_each(|(i, x)| to(plane * n + i, *x));
        }
    }
}

/// Inputs of an unknown linear map and its outputs.
///
/// # Shapes
/// `[pairs, N]` each.
#[derive(Debug, Clone, PartialEq)]
pub struct Pairs {
    /// `N`.
    pub size: usize,
    /// Number of pairs.
    pub count: usize,
    /// Inputs.
    pub input: Vectors,
    /// Outputs, in the order of the inputs.
    pub output: Vectors,
}

impl Pairs {
    /// Divides inputs and outputs by the root mean square of their lengths, as the columns of a unitary matrix have
    /// length 1; returns the quotient by which a product of these pairs is to be multiplied, 0 where all outputs are 0.
    pub fn normalise(&mut self) -> f64 {
        let (input, output) = (self.input.normalise(self.count), self.output.normalise(self.count));
        output / input
    }
}

/// What a product is compared with.
#[derive(Debug, Clone, Copy)]
pub enum Examples<'a> {
    /// Unit vectors, with the columns of a matrix.
    Columns(&'a Matrix),
    /// Inputs, with their outputs.
    Pairs(&'a Pairs),
}

impl<'a> From<&'a Matrix> for Examples<'a> {
    fn from(matrix: &'a Matrix) -> Self {
        Self::Columns(matrix)
    }
}

impl<'a> From<&'a Pairs> for Examples<'a> {
    fn from(pairs: &'a Pairs) -> Self {
        Self::Pairs(pairs)
    }
}

impl Examples<'_> {
    /// `N`.
    pub fn size(&self) -> usize {
        match self {
            Self::Columns(matrix) => matrix.size,
            Self::Pairs(pairs) => pairs.size,
        }
    }

    /// Number of examples.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Columns(matrix) => matrix.size,
            Self::Pairs(pairs) => pairs.count,
        }
    }

    /// Whether outputs are complex; of a real output the real part of a complex product counts.
    pub fn complex(&self) -> bool {
        match self {
            Self::Columns(matrix) => matrix.im.is_some(),
            Self::Pairs(pairs) => pairs.output.im.is_some(),
        }
    }

    /// Whether inputs are complex.
    pub fn complex_input(&self) -> bool {
        matches!(self, Self::Pairs(pairs) if pairs.input.im.is_some())
    }

    /// Calls `to` with the place and value of every number of an input that may not be 0: real parts, then imaginary.
    pub(super) fn input(&self, example: usize, mut to: impl FnMut(usize, f64)) {
        match self {
            Self::Columns(_) => to(example, 1.0),
            Self::Pairs(pairs) => pairs.input.each(pairs.size, example, to),
        }
    }

    /// The same of an output.
    pub(super) fn output(&self, example: usize, mut to: impl FnMut(usize, f64)) {
        match self {
            Self::Columns(matrix) => {
                let n = matrix.size;
                for (plane, of) in std::iter::once(&matrix.re).chain(&matrix.im).enumerate() {
                    (0..n).for_each(|row| to(plane * n + row, of[row * n + example]));
                }
            }
            Self::Pairs(pairs) => pairs.output.each(pairs.size, example, to),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{learn, Settings, Transform};
    use super::*;
    use crate::error::Result;
    use crate::stats::normal;
    use candle_core::Device;
    use rand::{rngs::StdRng, SeedableRng};

    /// Outputs of a matrix for random inputs determine it as its columns do.
    #[test]
    fn a_transform_is_learned_from_pairs_of_any_scale() -> Result<()> {
        let (n, count, mut rng) = (8, 24, StdRng::seed_from_u64(6));
        let matrix = Transform::Dft.matrix(n, 0);
        let im = matrix.im.clone().unwrap_or_default();
        let input: Vec<f64> = (0..count * n).map(|_| 5.0 * normal(&mut rng)).collect();
        let times = |m: &[f64]| -> Vec<f64> {
            let row = |x: &[f64], i: usize| 3.0 * (0..n).map(|j| m[i * n + j] * x[j]).sum::<f64>();
            input.chunks_exact(n).flat_map(|x| (0..n).map(move |i| row(x, i))).collect()
        };
        let output = Vectors { re: times(&matrix.re), im: Some(times(&im)) };
        let mut pairs = Pairs { size: n, count, input: Vectors { re: input.clone(), im: None }, output };
        let scale = pairs.normalise();
        let found =
            learn(&pairs, &Settings { starts: 8, ..Settings::new("BP", true, 0, false) }, &Device::Cpu, &|_| ())?;
        assert!(found.error < 1e-4 && (scale - 3.0).abs() < 1e-9, "{:e}, {scale}", found.error);
        // On an input that was not among the pairs, at the scale of the pairs.
        let mut product = found.product;
        product.scale(scale);
        let (factors, index) = (product.factors().to_vec(), product.permuted());
        let mut x = vec![[0f32]; 2 * n];
        x[3][0] = 2.0;
        let steps = product.hard(&factors, &index);
        crate::ops::factored::forward(&product.shape(), &steps, &mut x, &mut Default::default());
        for i in 0..n {
            let far = [(x[i][0], matrix.re[i * n + 3]), (x[n + i][0], im[i * n + 3])]
                .map(|(got, want)| (f64::from(got) - 6.0 * want).abs());
            assert!(far.iter().all(|f| *f < 6e-3), "{far:?}");
        }
        Ok(())
    }
}
