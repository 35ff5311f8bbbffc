//! A linear layer whose matrix is a product of butterfly factors (Dao, Gu, Eichhorn, Rudra and Ré 2019, arXiv:1903.05895).
//!
//! A matrix `[out, in]` is a stack of `ceil(out / N)` butterflies on `N` elements, the power of two from `in` on: the input
//! goes on with zeros, and the results, one after the other, end after `out` elements. Where `out < in` this is one
//! butterfly with most of its results left out, of which every one still reads the whole input. A butterfly has
//! `2 N log2 N` weights. There is no permutation: one that is the same for all inputs, such as reversed bits, only renames
//! the channels that the layers around this one learn to use.

use crate::error::{At, Error, ErrorKind, Result};
use crate::ops::factored::{apply, apply_backward, Shape};
use candle_core::Tensor;

/// The shape of a factored matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FactoredShape {
    /// `out`.
    pub outputs: usize,
    /// `in`.
    pub inputs: usize,
}

impl FactoredShape {
    /// The butterflies that it is a stack of.
    pub fn butterfly(self) -> Shape {
        Shape { size: self.inputs.next_power_of_two().max(2), complex: false, tied: false }
    }

    /// Shape of the factors: `[stack, 2 N log2 N]`.
    pub fn factors(self) -> [usize; 2] {
        let butterfly = self.butterfly();
        [self.outputs.div_ceil(butterfly.size), butterfly.butterfly_len()]
    }

    /// Results of the stack, before those that are left out.
    pub(crate) fn stacked(self) -> usize {
        self.outputs.next_multiple_of(self.butterfly().size)
    }

    /// What random rotations in place of the 2 x 2 blocks are multiplied by, so that elements of the matrix have a mean of 0
    /// and the standard deviation `std`.
    ///
    /// An element is a product of one number from each factor, and the square of one of a random rotation is 1/2 in the
    /// mean: without the gain the variance is `1 / N`.
    pub fn gain(self, std: f64) -> f64 {
        let butterfly = self.butterfly();
        (std * (butterfly.size as f64).sqrt()).powf(1.0 / butterfly.levels() as f64)
    }
}

/// Factored matrices of one shape, one above the other: `W` is `[count · out, in]`.
#[derive(Debug, Clone)]
pub struct Factored {
    shape: FactoredShape,
    count: usize,
    factors: Tensor,
}

impl Factored {
    /// The matrices with these factors.
    ///
    /// # Shapes
    /// `factors` f32 `[count · stack, 2 N log2 N]`, as of [`apply`].
    ///
    /// # Errors
    /// Factors of another shape, or of a matrix without rows or columns.
    pub fn new(shape: FactoredShape, factors: Tensor) -> Result<Self> {
        let (all, len) = factors.dims2().at("factors")?;
        let [stack, own] = shape.factors();
        if shape.inputs == 0 || stack == 0 || len != own || all == 0 || !all.is_multiple_of(stack) {
            let FactoredShape { outputs, inputs } = shape;
            let message = format!("{:?} are not those of {outputs} x {inputs}, [{stack}, {own}]", factors.dims());
            return Err(Error::new(ErrorKind::Tensor, "factors", message));
        }
        Ok(Self { shape, count: all / stack, factors: factors.contiguous().at("factors")? })
    }

    /// `(count · out, in)`.
    pub fn dims(&self) -> (usize, usize) {
        (self.count * self.shape.outputs, self.shape.inputs)
    }

    /// Size in memory, bytes.
    pub fn bytes(&self) -> u64 {
        (self.factors.elem_count() * self.factors.dtype().size_in_bytes()) as u64
    }

    /// The factors, `[count · stack, 2 N log2 N]`.
    pub fn factors(&self) -> &Tensor {
        &self.factors
    }

    /// Computes `x Wᵀ`.
    ///
    /// # Shapes
    /// `x` f32 `[T, in]`; the result `[T, count · out]`.
    ///
    /// # Errors
    /// Another shape or type; on CUDA more than 4,096 inputs.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let rows = self.rows(x, self.dims().1)?;
        let y = apply(&x.contiguous().at("input")?, &self.factors)?;
        let (count, out, all) = (self.count, self.shape.outputs, self.shape.stacked());
        if out == all {
            return Ok(y);
        }
        let kept = y.reshape((rows, count, all)).and_then(|y| y.narrow(2, 0, out)?.contiguous());
        kept.and_then(|y| y.reshape((rows, count * out))).at("factored layer")
    }

    /// Gradients of `x` and of the factors, given that of [`Self::forward`]'s result.
    ///
    /// # Shapes
    /// `x` and its gradient f32 `[T, in]`; `dy` f32 `[T, count · out]`; the gradient of the factors is shaped as they are.
    ///
    /// # Errors
    /// As of [`Self::forward`].
    pub fn backward(&self, x: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
        let rows = self.rows(dy, self.dims().0)?;
        self.rows(x, self.dims().1)?;
        let (count, out, all) = (self.count, self.shape.outputs, self.shape.stacked());
        let padded = || -> candle_core::Result<Tensor> {
            // Of one matrix the operator adds the zeros.
            if out == all || count == 1 {
                return dy.contiguous();
            }
            dy.reshape((rows, count, out))?.pad_with_zeros(2, 0, all - out)?.reshape((rows, count * all))
        };
        let dy = padded().at("gradient of a factored layer")?;
        apply_backward(&x.contiguous().at("input")?, &self.factors, &dy)
    }

    /// Rows of `x`, which must have `columns` columns.
    fn rows(&self, x: &Tensor, columns: usize) -> Result<usize> {
        match x.dims() {
            [rows, all] if *all == columns => Ok(*rows),
            dims => {
                let (out, inputs) = self.dims();
                let message = format!("{dims:?} for a matrix of {out} x {inputs}, which takes {columns} columns here");
                Err(Error::new(ErrorKind::Tensor, "factored layer", message))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nn::{Linear, Weight};
    use crate::train::{Init, Layout, Parameter};
    use candle_core::{DType, Device};
    use rand::{rngs::StdRng, Rng, SeedableRng};

    /// The matrices `[count · out, in]`, from the definition of a butterfly.
    fn dense(shape: FactoredShape, factors: &[f64]) -> Vec<f64> {
        let FactoredShape { outputs, inputs } = shape;
        let (n, [stack, len]) = (inputs.next_power_of_two().max(2), shape.factors());
        let mut all = vec![];
        for matrix in factors.chunks(stack * len) {
            let mut rows = vec![];
            for w in matrix.chunks(len) {
                let mut m: Vec<Vec<f64>> =
                    (0..n).map(|i| (0..n).map(|j| f64::from(u8::from(i == j))).collect()).collect();
                let mut at = 0;
                for half in (0..).map(|l| 1 << l).take_while(|half| *half < n) {
                    for i in (0..n).filter(|i| i / half % 2 == 0) {
                        let (a, b) = (m[i].clone(), m[i + half].clone());
                        for j in 0..n {
                            m[i][j] = w[at] * a[j] + w[at + 1] * b[j];
                            m[i + half][j] = w[at + 2] * a[j] + w[at + 3] * b[j];
                        }
                        at += 4;
                    }
                }
                assert_eq!(at, len);
                rows.extend(m);
            }
            all.extend(rows.into_iter().take(outputs).flat_map(|row| row.into_iter().take(inputs)));
        }
        all
    }

    fn random(count: usize, rng: &mut StdRng) -> Vec<f64> {
        // What f32 holds exactly.
        (0..count).map(|_| f64::from(rng.random_range(-1f32..1.0))).collect()
    }

    fn tensor(values: &[f64], rows: usize) -> Result<Tensor> {
        let values: Vec<f32> = values.iter().map(|x| *x as f32).collect();
        let columns = values.len() / rows;
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).at("test")
    }

    /// `a bᵀ` with `a [m, k]` and `b [n, k]`, element by strides.
    fn product(
        m: usize,
        n: usize,
        k: usize,
        a: impl Fn(usize, usize) -> f64,
        b: impl Fn(usize, usize) -> f64,
    ) -> Vec<f64> {
        (0..m * n).map(|e| (0..k).map(|i| a(e / n, i) * b(e % n, i)).sum()).collect()
    }

    fn close(got: &Tensor, want: &[f64], what: &str) -> Result<()> {
        let got: Vec<f32> = got.flatten_all().and_then(|x| x.to_vec1()).at("test")?;
        assert_eq!(got.len(), want.len(), "{what}");
        let largest = want.iter().fold(1e-3, |m: f64, x| m.max(x.abs()));
        for (i, (g, w)) in got.iter().zip(want).enumerate() {
            assert!((f64::from(*g) - w).abs() < 2e-6 * largest, "{what}: {g} at {i} where {w} is right");
        }
        Ok(())
    }

    /// Ragged shapes: `(shape, count, rows)`.
    fn cases(rng: &mut StdRng) -> Vec<(FactoredShape, usize, usize)> {
        let fixed = [(1, 1, 1, 1), (3, 1, 2, 7), (1, 33, 1, 130), (96, 24, 2, 300), (24, 40, 1, 16), (16, 16, 1, 129)];
        let mut cases = fixed.to_vec();
        cases.extend((0..12).map(|_| {
            (rng.random_range(1..50), rng.random_range(1..50), rng.random_range(1..4), rng.random_range(1..400))
        }));
        cases
            .into_iter()
            .map(|(outputs, inputs, count, rows)| (FactoredShape { outputs, inputs }, count, rows))
            .collect()
    }

    #[test]
    fn products_are_those_of_the_dense_matrix_on_ragged_shapes() -> Result<()> {
        let mut rng = StdRng::seed_from_u64(1);
        for (shape, count, rows) in cases(&mut rng) {
            let ([stack, len], all, inputs) = (shape.factors(), count * shape.outputs, shape.inputs);
            let (w, x) = (random(count * stack * len, &mut rng), random(rows * inputs, &mut rng));
            let layer = Factored::new(shape, tensor(&w, count * stack)?)?;
            assert_eq!((layer.dims(), layer.bytes()), ((all, inputs), 4 * w.len() as u64));
            let matrix = dense(shape, &w);
            let want = product(rows, all, inputs, |r, i| x[r * inputs + i], |o, i| matrix[o * inputs + i]);
            let x = tensor(&x, rows)?;
            close(&layer.forward(&x)?, &want, &format!("{shape:?}, {count}, {rows} rows"))?;
            let linear = Linear::new(Weight::Factored(layer), Some(Tensor::full(0.5f32, all, &Device::Cpu)?));
            let biased: Vec<f64> = want.iter().map(|y| y + 0.5).collect();
            close(&linear.forward(&x)?, &biased, &format!("linear layer of {shape:?}"))?;
            assert_eq!((linear.weight().dims()?, linear.bytes()), ((all, inputs), 4 * (w.len() + all) as u64));
        }
        Ok(())
    }

    #[test]
    fn gradients_are_central_differences_of_the_dense_product() -> Result<()> {
        let mut rng = StdRng::seed_from_u64(2);
        for (shape, count, rows) in cases(&mut rng) {
            let ([stack, len], all, inputs) = (shape.factors(), count * shape.outputs, shape.inputs);
            let mut w = random(count * stack * len, &mut rng);
            let (x, dy) = (random(rows * inputs, &mut rng), random(rows * all, &mut rng));
            let layer = Factored::new(shape, tensor(&w, count * stack)?)?;
            let (dx, dw) = layer.backward(&tensor(&x, rows)?, &tensor(&dy, rows)?)?;
            let matrix = dense(shape, &w);
            let want = product(rows, inputs, all, |r, o| dy[r * all + o], |i, o| matrix[o * inputs + i]);
            close(&dx, &want, &format!("input of {shape:?}, {count}, {rows} rows"))?;
            // The sum of dy times the result is linear in the matrix, whose elements are linear in each weight.
            let g = product(all, inputs, rows, |o, r| dy[r * all + o], |i, r| x[r * inputs + i]);
            let loss = |w: &[f64]| -> f64 { dense(shape, w).iter().zip(&g).map(|(m, g)| m * g).sum() };
            let mut want = vec![];
            for i in 0..w.len() {
                let own = w[i];
                let [more, less] = [0.5, -0.5].map(|step| {
                    w[i] = own + step;
                    loss(&w)
                });
                w[i] = own;
                want.push(more - less);
            }
            close(&dw, &want, &format!("factors of {shape:?}, {count}, {rows} rows"))?;
        }
        Ok(())
    }

    #[test]
    fn results_do_not_depend_on_the_number_of_threads() -> Result<()> {
        let (mut rng, shape, rows) = (StdRng::seed_from_u64(3), FactoredShape { outputs: 70, inputs: 20 }, 1001);
        let [stack, _] = shape.factors();
        let factors = tensor(&random(shape.factors().iter().product(), &mut rng), stack)?;
        let layer = Factored::new(shape, factors)?;
        let (x, dy) = (tensor(&random(rows * 20, &mut rng), rows)?, tensor(&random(rows * 70, &mut rng), rows)?);
        let run = |threads| -> Result<Vec<Vec<f32>>> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            let (y, (dx, dw)) = pool.install(|| Ok::<_, Error>((layer.forward(&x)?, layer.backward(&x, &dy)?)))?;
            [y, dx, dw].iter().map(|t| t.flatten_all().and_then(|t| t.to_vec1()).at("test")).collect()
        };
        let one = run(1)?;
        for threads in [2, 3, 8] {
            assert_eq!(run(threads)?, one, "{threads} threads");
        }
        Ok(())
    }

    #[test]
    fn initial_elements_have_the_standard_deviation_asked_for() -> Result<()> {
        for (outputs, inputs, std) in [(40, 24, 0.2), (8, 64, 0.05), (5, 2, 1.0)] {
            let shape = FactoredShape { outputs, inputs };
            let init = Init::Rotations(shape.gain(std) as f32);
            let mut layout = Layout::default();
            layout.push(Parameter { name: "w".into(), shape: shape.factors().to_vec(), init, decay: false });
            let (mut sum, mut squares, mut count) = (0.0, 0.0, 0.0);
            for seed in 0..200 {
                let w: Vec<f32> = layout.initial(seed, &Device::Cpu)?.to_vec1()?;
                let w: Vec<f64> = w.into_iter().map(f64::from).collect();
                for x in dense(shape, &w) {
                    (sum, squares, count) = (sum + x, squares + x * x, count + 1.0);
                }
            }
            let (mean, got) = (sum / count, (squares / count).sqrt());
            assert!(mean.abs() < 0.1 * std && (got / std - 1.0).abs() < 0.05, "{shape:?}: {mean}, {got} for {std}");
        }
        Ok(())
    }

    #[test]
    fn other_shapes_and_lookups_are_refused_by_name() -> Result<()> {
        let shape = FactoredShape { outputs: 5, inputs: 3 };
        assert_eq!(shape.factors(), [2, 16]);
        let zeros = |rows: usize, columns: usize| Tensor::zeros((rows, columns), DType::F32, &Device::Cpu);
        let said = |e: Option<Error>| e.map(|e| e.to_string()).unwrap_or_default();
        let layer = Factored::new(shape, zeros(2, 16)?)?;
        for (rows, columns) in [(3, 16), (2, 15), (0, 16)] {
            let message = said(Factored::new(shape, zeros(rows, columns)?).err());
            assert!(message.contains("are not those of 5 x 3, [2, 16]"), "{message}");
        }
        assert!(Factored::new(FactoredShape { outputs: 0, inputs: 3 }, zeros(2, 16)?).is_err());
        for x in [zeros(2, 4)?, zeros(2, 2)?, zeros(1, 1)?.squeeze(0)?] {
            let message = said(layer.forward(&x).err());
            assert!(message.contains("for a matrix of 5 x 3, which takes 3 columns"), "{message}");
        }
        assert!(layer.backward(&zeros(2, 3)?, &zeros(3, 5)?).is_err());
        assert!(layer.forward(&zeros(2, 3)?.to_dtype(DType::F64)?).is_err());
        assert_eq!(layer.forward(&zeros(0, 3)?)?.dims(), [0, 5]);
        let rows = Weight::Factored(layer).rows(&Tensor::new(&[0u32], &Device::Cpu)?, DType::F32);
        assert!(said(rows.err()).contains("a factored matrix has no rows to look up"));
        Ok(())
    }
}
