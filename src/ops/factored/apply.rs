//! Stacks of untied real butterflies on the rows of a tensor, with the backward pass: the operator of factored layers.

use super::untied::{Stack, TASKS};
use super::Shape;
use crate::error::{At, Error, ErrorKind, Result};
use crate::ops::view;
use candle_core::{Device, Tensor};

/// Refuses a device that [`apply`] and [`apply_backward`] have no kernel for.
///
/// # Errors
/// A device that is no CPU.
pub fn supported(device: &Device) -> Result<()> {
    if device.is_cpu() {
        return Ok(());
    }
    Err(Error::unsupported("device", "factored layers run on a CPU for now; give --device cpu"))
}

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
    supported(x.device())?;
    let (shape, stack, inputs) = checked(x, factors)?;
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
    supported(x.device())?;
    let (shape, stack, inputs) = checked(x, factors)?;
    let (rows, outputs) = dy.dims2().at("gradient of a factored layer")?;
    if rows != x.dims()[0] || outputs == 0 || outputs > stack * shape.size {
        return Err(refused(format!("a gradient of {:?} for {:?} by {stack} of {}", dy.dims(), x.dims(), shape.size)));
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
