//! RMS norm of a sum: `x' = x + y`, `n = x' / sqrt(mean(x'^2) + eps) * w` (Zhang and Sennrich 2019, arXiv:1910.07467).

use super::view::view;
use crate::error::{At, Error, ErrorKind, Result};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// Rows whose weight gradients one task sums.
const ROWS: usize = 256;

/// Adds `y` (if any) to the residual stream `x` and norms the sum: `(x', n)`.
///
/// # Shapes
/// `x`, `y` and both results `[T, N]`; `weight` f32 `[N]`.
pub fn add_norm(x: &Tensor, y: Option<&Tensor>, weight: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda(x, y, weight, eps);
    }
    let sum = match y {
        Some(y) => (x + y)?,
        None => x.clone(),
    };
    // candle's fused operator has no backward pass; training needs another path.
    let normed = candle_nn::ops::rms_norm(&sum, weight, eps).at("rms norm")?;
    Ok((sum, normed))
}

/// RMS norm for training: `y = x r w` and `r = 1 / sqrt(mean(x^2) + eps)`, which [`norm_backward`] needs.
///
/// # Shapes
/// `x` and `y` `[T, N]`; `weight` `[N]`; `r` f32 `[T]`.
///
/// # Errors
/// Another shape or device.
pub fn norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    let (x_view, w) = (view(x, "norm")?, view(weight, "norm's weight")?);
    let (values, w) = (x_view.values::<f32>()?, w.values::<f32>()?);
    let n = columns(x, w.len())?;
    let (mut y, mut r) = (vec![0f32; values.len()], vec![0f32; values.len() / n]);
    y.par_chunks_mut(n).zip(values.par_chunks(n)).zip(&mut r).for_each(|((y, x), r)| {
        *r = 1.0 / (x.iter().map(|x| x * x).sum::<f32>() / n as f32 + eps).sqrt();
        y.iter_mut().zip(x).zip(w).for_each(|((y, x), w)| *y = x * *r * w);
    });
    let rows = r.len();
    Ok((Tensor::from_vec(y, x.shape(), &Device::Cpu).at("norm")?, Tensor::from_vec(r, rows, &Device::Cpu).at("norm")?))
}

/// Gradients of [`norm`]'s `x` and `weight`, given that of `y`: `dx = r (g - x r^2 mean(g x))` with `g = dy w`, and
/// `dw = sum of dy x r` over rows, in an order that does not depend on the number of threads.
///
/// # Shapes
/// `x`, `dy` and `dx` `[T, N]`; `r` f32 `[T]`; `weight` and `dw` `[N]`.
///
/// # Errors
/// Another shape or device.
pub fn norm_backward(x: &Tensor, weight: &Tensor, r: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let (x_view, w, r, dy) =
        (view(x, "norm")?, view(weight, "norm's weight")?, view(r, "norm")?, view(dy, "gradient")?);
    let (values, w, r, dy) = (x_view.values::<f32>()?, w.values::<f32>()?, r.values::<f32>()?, dy.values::<f32>()?);
    let n = columns(x, w.len())?;
    if dy.len() != values.len() || r.len() != values.len() / n {
        return Err(Error::new(
            ErrorKind::Backend,
            "norm",
            format!("{} gradients of {} values", dy.len(), values.len()),
        ));
    }
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
    Ok((dx, Tensor::from_vec(dw, n, &Device::Cpu).at("gradient of a norm")?))
}

/// Columns of `x`, of which there must be `n`.
fn columns(x: &Tensor, n: usize) -> Result<usize> {
    match x.dims() {
        [_, columns] if *columns == n && n > 0 => Ok(n),
        dims => Err(Error::new(ErrorKind::Backend, "norm", format!("{dims:?} does not fit {n} weights"))),
    }
}

#[cfg(feature = "cuda")]
fn cuda(x: &Tensor, y: Option<&Tensor>, weight: &Tensor, eps: f32) -> Result<(Tensor, Tensor)> {
    use super::cuda::{address, address_or_null, device, suffix, uninitialised, Kernel, Launch};
    let gpu = device(x)?;
    let (x, y) = (x.contiguous()?, y.map(Tensor::contiguous).transpose()?);
    let n = weight.elem_count();
    let rows = x.elem_count() / n;
    if x.dims().last() != Some(&n) || y.as_ref().is_some_and(|y| y.dims() != x.dims() || y.dtype() != x.dtype()) {
        let message = format!("{:?} and {:?} do not fit {n} weights", x.dims(), y.as_ref().map(|y| y.dims().to_vec()));
        return Err(crate::Error::new(crate::ErrorKind::Backend, "rms norm", message));
    }
    let normed = uninitialised(gpu, x.dtype(), x.shape())?;
    let sum = match y {
        Some(_) => uninitialised(gpu, x.dtype(), x.shape())?,
        None => x.clone(),
    };
    let (from, to) = ((address(&x)?, address_or_null(y.as_ref())?), (address(&sum)?, address(&normed)?));
    let (w, count, tokens, name) = (address(weight)?, n as i32, rows as i32, suffix(x.dtype())?);
    // The vectorised kernel needs rows that are aligned to 16 bytes and fit in registers.
    let aligned = [from.0, from.1, to.0, to.1, w].iter().all(|a| a % 16 == 0);
    let wide = x.dtype() != candle_core::DType::F32 && n.is_multiple_of(8) && n <= 8192 && aligned;
    let warps = n.div_ceil(1024).next_power_of_two();
    let (form, grid) = if wide { ("add_norm_wide", (rows * warps).div_ceil(8)) } else { ("add_norm", rows) };
    let kernel = Kernel::load(gpu, "pointwise", format!("{form}_{name}"))?;
    let launch = Launch::new(kernel, (grid, 1, 1), 256).with(from.0).with(from.1).with(w).with(to.0).with(to.1);
    let launch = launch.with(count).with(eps).with(tokens).with(warps as i32);
    // SAFETY: `rows` rows of `n` in every tensor; frees are ordered after the launch on the one stream.
    unsafe { launch.enqueue(false)? };
    Ok((sum, normed))
}
