//! RMS norm of a sum: `x' = x + y`, `n = x' / sqrt(mean(x'^2) + eps) * w` (Zhang and Sennrich 2019, arXiv:1910.07467).

use crate::error::{At, Result};
use candle_core::Tensor;

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
    // candle's fused operator has no backward pass; training has another (`super::training`).
    let normed = candle_nn::ops::rms_norm(&sum, weight, eps).at("rms norm")?;
    Ok((sum, normed))
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
