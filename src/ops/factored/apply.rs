//! Stacks of untied real butterflies on the rows of a tensor, with the backward pass: the operator of factored layers.

use super::untied::{Stack, TASKS};
use super::Shape;
use crate::error::{At, Error, ErrorKind, Result};
use crate::ops::view;
use candle_core::{Device, Tensor};

/// Bytes that [`apply_backward`] takes besides its results for `factors` weights.
pub(crate) fn scratch(factors: usize) -> u64 {
    (4 * TASKS * factors) as u64
}

/// The products of every row with each of a stack of butterflies, one beside the other.
///
/// # Shapes
/// `x` f32 `[rows, n]`, contiguous; a row shorter than `N` goes on with zeros. `factors` f32 `[stack, 2 N log2 N]`,
/// contiguous: of each butterfly its factors from blocks of 2 rows to one of `N`, of each factor its `N / 2` blocks
/// `[[d1, d2], [d3, d4]]`. The result `[rows, stack N]`.
///
/// # Errors
/// Another shape, type or device.
pub fn apply(x: &Tensor, factors: &Tensor) -> Result<Tensor> {
    let (shape, stack, inputs) = checked(x, factors)?;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::rows::forward(x, factors, shape);
    }
    let rows = x.dims()[0];
    let (x, factors) = (view(x, "input")?, view(factors, "factors")?);
    let y = Stack { shape, factors: factors.values()?, inputs }.forward(x.values()?);
    Tensor::from_vec(y, (rows, stack * shape.size), &Device::Cpu).at("factored layer")
}

/// Gradients of `x` and of `factors`, given that of [`apply`]'s result. The sum over rows is taken in an order that depends
/// on their number alone.
///
/// # Shapes
/// `x` and its gradient as of [`apply`]; `dy` f32 `[rows, stack N]`, contiguous; rows that are shorter go on with zeros. The
/// gradient of the factors has their shape.
///
/// # Errors
/// As of [`apply`].
pub fn apply_backward(x: &Tensor, factors: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let (shape, stack, inputs) = checked(x, factors)?;
    let (rows, outputs) = dy.dims2().at("gradient of a factored layer")?;
    if rows != x.dims()[0] || outputs == 0 || outputs > stack * shape.size {
        return Err(refused(format!("a gradient of {:?} for {:?} by {stack} of {}", dy.dims(), x.dims(), shape.size)));
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::rows::backward(x, factors, dy, shape);
    }
    let (x_view, w, dy) = (view(x, "input")?, view(factors, "factors")?, view(dy, "gradient")?);
    let stack = Stack { shape, factors: w.values()?, inputs };
    let (dx, d_factors) = stack.backward(x_view.values()?, dy.values()?, outputs);
    let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), &Device::Cpu);
    Ok((tensor(dx, x).at("gradient of a factored layer")?, tensor(d_factors, factors).at("gradient of factors")?))
}

fn refused(message: String) -> Error {
    Error::new(ErrorKind::Tensor, "factored layer", message)
}

/// The butterfly, their number and the columns of `x`.
fn checked(x: &Tensor, factors: &Tensor) -> Result<(Shape, usize, usize)> {
    let ((_, inputs), (stack, len)) = (x.dims2().at("factored layer")?, factors.dims2().at("factors")?);
    // 2 N log2 N grows with N.
    let mut shapes = (1..usize::BITS / 2).map(|l| Shape { size: 1 << l, complex: false, tied: false });
    match shapes.find(|s| s.butterfly_len() >= len) {
        Some(s) if s.butterfly_len() == len && (1..=s.size).contains(&inputs) && stack > 0 => Ok((s, stack, inputs)),
        _ => Err(refused(format!("{:?} factors for an input of {:?}", factors.dims(), x.dims()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::factored::{backward, forward, Kept, Step};
    use candle_core::DType;
    use rand::{rngs::StdRng, Rng, SeedableRng};

    fn random(rows: usize, columns: usize, rng: &mut StdRng) -> Result<Tensor> {
        let values: Vec<f32> = (0..rows * columns).map(|_| rng.random_range(-1.0..1.0)).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).at("test")
    }

    fn off(got: &Tensor, want: &[Vec<f64>]) -> Result<f64> {
        let got: Vec<Vec<f32>> = got.to_vec2().at("test")?;
        assert_eq!((got.len(), got[0].len()), (want.len(), want[0].len()));
        let pairs = got.iter().flatten().zip(want.iter().flatten());
        Ok(pairs.map(|(g, w)| (f64::from(*g) - w).abs() / (1.0 + w.abs())).fold(0.0, f64::max))
    }

    #[test]
    fn rows_and_gradients_are_those_of_single_tiles_in_f64() -> Result<()> {
        let mut rng = StdRng::seed_from_u64(1);
        for size in [2, 4, 8, 32, 128] {
            let shape = Shape { size, complex: false, tied: false };
            for _ in 0..4 {
                let (stack, rows) = (rng.random_range(1..4), rng.random_range(1..300));
                // Rows as long as the butterfly, or shorter.
                let inputs = if rng.random() { size } else { rng.random_range(1..=size) };
                let outputs = if rng.random() { stack * size } else { rng.random_range(1..=stack * size) };
                let (x, dy) = (random(rows, inputs, &mut rng)?, random(rows, outputs, &mut rng)?);
                let factors = random(stack, shape.butterfly_len(), &mut rng)?;
                let wide = |t: &Tensor| -> Result<Vec<Vec<f64>>> {
                    t.to_dtype(DType::F64).and_then(|t| t.to_vec2()).at("test")
                };
                let (w, x_rows, dy_rows) = (wide(&factors)?, wide(&x)?, wide(&dy)?);
                let (mut y, mut dx) = (vec![vec![]; rows], vec![vec![0.0; inputs]; rows]);
                let mut dw = vec![vec![0f64; shape.butterfly_len()]; stack];
                for r in 0..rows {
                    for s in 0..stack {
                        let at = |row: &[f64], i: usize| [row.get(i).copied().unwrap_or(0.0)];
                        let mut tile: Vec<[f64; 1]> = (0..size).map(|i| at(&x_rows[r], i)).collect();
                        let (steps, mut kept) = ([Step::Butterfly(&w[s])], Kept::default());
                        forward(&shape, &steps, &mut tile, &mut kept);
                        y[r].extend(tile.iter().map(|[y]| y));
                        let mut d: Vec<[f64; 1]> = (0..size).map(|i| at(&dy_rows[r], s * size + i)).collect();
                        backward(&shape, &steps, &mut d, &mut kept, &mut dw[s]);
                        dx[r].iter_mut().zip(d).for_each(|(sum, [d])| *sum += d);
                    }
                }
                let what = format!("{stack} of {size}, {rows} rows of {inputs}, gradients of {outputs}");
                let (got_dx, got_dw) = apply_backward(&x, &factors, &dy)?;
                let worst = [off(&apply(&x, &factors)?, &y)?, off(&got_dx, &dx)?, off(&got_dw, &dw)?];
                assert!(worst.iter().all(|e| *e < 2e-5), "{what}: {worst:?}");
            }
        }
        Ok(())
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() -> Result<()> {
        let mut rng = StdRng::seed_from_u64(2);
        let factors = random(2, 16, &mut rng)?;
        for (rows, columns) in [(3, 5), (0, 0)] {
            let message = apply(&random(rows, columns, &mut rng)?, &factors).err().map(|e| e.to_string());
            assert!(message.as_ref().is_some_and(|m| m.contains("[2, 16] factors for an input of")), "{message:?}");
        }
        let x = random(3, 4, &mut rng)?;
        assert!(apply(&x, &random(2, 15, &mut rng)?).is_err());
        assert!(apply(&x, &random(2, 0, &mut rng)?).is_err());
        for (rows, columns) in [(2, 8), (3, 9), (3, 0)] {
            let message = apply_backward(&x, &factors, &random(rows, columns, &mut rng)?).err().map(|e| e.to_string());
            assert!(message.as_ref().is_some_and(|m| m.contains("by 2 of 4")), "{message:?}");
        }
        Ok(())
    }
}
