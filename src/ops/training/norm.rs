//! RMS norm of a sum, with its backward pass (Zhang and Sennrich 2019, arXiv:1910.07467).

use crate::error::{At, Error, ErrorKind, Result};
use crate::ops::view;
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// Rows whose weight gradients one task sums.
const ROWS: usize = 256;

/// Results of [`norm`].
#[derive(Debug, Clone)]
pub struct Normed {
    /// `x + add`, `[T, N]`.
    pub sum: Tensor,
    /// The normed sum, `[T, N]`.
    pub y: Tensor,
    /// `1 / sqrt(mean(sum^2) + eps)`, f32 `[T]`.
    pub r: Tensor,
}

/// `s = x + add`, `y = s r w` with `r = 1 / sqrt(mean(s^2) + eps)`.
///
/// # Shapes
/// `x`, `add`, `s` and `y` `[T, N]`; `weight` f32 `[N]`; `r` f32 `[T]`.
///
/// # Errors
/// Another shape or device.
pub fn norm(x: &Tensor, add: Option<&Tensor>, weight: &Tensor, eps: f32) -> Result<Normed> {
    let n = columns(x, weight.elem_count())?;
    if add.is_some_and(|add| add.dims() != x.dims()) {
        return Err(Error::new(ErrorKind::Backend, "norm", "a sum of different shapes"));
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::cuda::norm(x, add, weight, eps);
    }
    let sum = add.map_or(Ok(x.clone()), |add| (x + add).at("residual"))?;
    let (sum_view, w) = (view(&sum, "norm")?, view(weight, "norm's weight")?);
    let (values, w) = (sum_view.values::<f32>()?, w.values::<f32>()?);
    let (mut y, mut r) = (vec![0f32; values.len()], vec![0f32; values.len() / n]);
    y.par_chunks_mut(n).zip(values.par_chunks(n)).zip(&mut r).for_each(|((y, x), r)| {
        *r = 1.0 / (x.iter().map(|x| x * x).sum::<f32>() / n as f32 + eps).sqrt();
        y.iter_mut().zip(x).zip(w).for_each(|((y, x), w)| *y = x * *r * w);
    });
    let rows = r.len();
    let y = Tensor::from_vec(y, x.shape(), &Device::Cpu).at("norm")?;
    drop(sum_view);
    Ok(Normed { sum, y, r: Tensor::from_vec(r, rows, &Device::Cpu).at("norm")? })
}

/// Gradients of [`norm`]'s sum and weight, given that of `y`: `dx = add + r (g - x r^2 mean(g x))` with `g = dy w`, and
/// `dw = sum of dy x r` over rows, in an order that does not depend on the number of threads.
///
/// # Shapes
/// `x` (the sum), `dy`, `add` and `dx` `[T, N]`; `r` f32 `[T]`; `weight` and `dw` f32 `[N]`.
///
/// # Errors
/// Another shape or device.
pub fn norm_backward(
    x: &Tensor,
    weight: &Tensor,
    r: &Tensor,
    dy: &Tensor,
    add: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let n = columns(x, weight.elem_count())?;
    if dy.dims() != x.dims() || r.elem_count() * n != x.elem_count() || add.is_some_and(|a| a.dims() != x.dims()) {
        let message = format!("{:?} gradients of {:?} values", dy.dims(), x.dims());
        return Err(Error::new(ErrorKind::Backend, "norm", message));
    }
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return super::cuda::norm_backward(x, weight, r, dy, add);
    }
    let (x_view, w, r, dy) =
        (view(x, "norm")?, view(weight, "norm's weight")?, view(r, "norm")?, view(dy, "gradient")?);
    let (values, w, r, dy) = (x_view.values::<f32>()?, w.values::<f32>()?, r.values::<f32>()?, dy.values::<f32>()?);
    let mut dx = vec![0f32; values.len()];
    let tasks = dx.par_chunks_mut(ROWS * n).zip(values.par_chunks(ROWS * n)).zip(dy.par_chunks(ROWS * n));
    let sums: Vec<Vec<f32>> = tasks
        .zip(r.par_chunks(ROWS))
        .map(|(((dx, x), dy), r)| {
            let mut dw = vec![0f32; n];
            let rows = dx.chunks_mut(n).zip(x.chunks(n)).zip(dy.chunks(n)).zip(r);
            for (((dx, x), dy), r) in rows {
                let dot: f32 = x.iter().zip(dy).zip(w).map(|((x, dy), w)| x * dy * w).sum();
                let mean = dot * r * r / n as f32;
                for (i, dx) in dx.iter_mut().enumerate() {
                    *dx = r * (dy[i] * w[i] - x[i] * mean);
                    dw[i] += dy[i] * x[i] * r;
                }
            }
            dw
        })
        .collect();
    let mut dw = vec![0f32; n];
    for own in &sums {
        dw.iter_mut().zip(own).for_each(|(sum, x)| *sum += x);
    }
    let dx = Tensor::from_vec(dx, x.shape(), &Device::Cpu).at("gradient of a norm")?;
    let dx = add.map_or(Ok(dx.clone()), |add| (add + &dx).at("gradient of a norm"))?;
    Ok((dx, Tensor::from_vec(dw, n, &Device::Cpu).at("gradient of a norm")?))
}

/// Columns of `x`, of which there must be `n`.
fn columns(x: &Tensor, n: usize) -> Result<usize> {
    match x.dims() {
        [_, columns] if *columns == n && n > 0 => Ok(n),
        dims => Err(Error::new(ErrorKind::Backend, "norm", format!("{dims:?} does not fit {n} weights"))),
    }
}
