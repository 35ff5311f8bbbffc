//! Queries and keys between projection and attention: bias, norm per head, rotation.
//!
//! `out[t, h] = rotate(norm(x[t, h] + bias[h]))`, each part optional. The halves of a head are rotated against each
//! other (Su et al. 2021, arXiv:2104.09864).

use crate::error::{At, Result};
use candle_core::{Device, Tensor};

/// A norm over each head.
#[derive(Debug, Clone, Copy)]
pub struct HeadNorm<'a> {
    /// f32 `[D]`.
    pub weight: &'a Tensor,
    /// Added to the mean square.
    pub eps: f32,
}

/// Applies bias, norm and rotation.
///
/// # Shapes
/// `x [T, heads * D]` or `[T, heads, D]`; `bias` f32 `[heads * D]`; `table` cos and sin, f32 `[T, D / 2]`; the result
/// `[T, heads, D]`.
pub fn prepare_heads(
    x: &Tensor,
    heads: usize,
    bias: Option<&Tensor>,
    norm: Option<HeadNorm>,
    table: Option<(&Tensor, &Tensor)>,
) -> Result<Tensor> {
    let t = x.dim(0)?;
    let dim = x.elem_count() / t / heads;
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() {
        return cuda(x, (t, heads, dim), bias, norm, table);
    }
    let mut y = x.reshape((t, heads * dim))?;
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    y = y.reshape((t, heads, dim))?;
    if let Some(norm) = norm {
        y = candle_nn::ops::rms_norm(&y, norm.weight, norm.eps).at("head norm")?;
    }
    if let Some((cos, sin)) = table {
        let rotate = || candle_nn::rotary_emb::rope_thd(&y.unsqueeze(0)?.contiguous()?, cos, sin)?.squeeze(0);
        y = rotate().at("rope")?;
    }
    Ok(y)
}

/// cos and sin of `position * frequency`, times `amplitude`: each f32 `[T, F]`. Angles are the f32 product, as in
/// transformers, since at position 9,000 another rounding of the same product moves the angle by 5e-4.
pub fn rope_table(
    frequencies: &[f32],
    positions: impl ExactSizeIterator<Item = f32>,
    amplitude: f32,
    device: &Device,
) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(gpu) = device {
        let positions: Vec<f32> = positions.collect();
        return cuda_table(gpu, frequencies, &positions, amplitude);
    }
    let shape = (positions.len(), frequencies.len());
    let (mut cos, mut sin) = (Vec::with_capacity(shape.0 * shape.1), Vec::with_capacity(shape.0 * shape.1));
    for p in positions {
        for f in frequencies {
            let (s, c) = (p * f).sin_cos();
            cos.push(c * amplitude);
            sin.push(s * amplitude);
        }
    }
    let tensor = |v| Tensor::from_vec(v, shape, device).at("rope table");
    Ok((tensor(cos)?, tensor(sin)?))
}

#[cfg(feature = "cuda")]
fn cuda_table(
    gpu: &candle_core::CudaDevice,
    frequencies: &[f32],
    positions: &[f32],
    amplitude: f32,
) -> Result<(Tensor, Tensor)> {
    use super::cuda::{address, uninitialised, upload, Kernel, Launch};
    let (t, n) = (positions.len(), frequencies.len());
    let (f, p) = (upload(gpu, frequencies)?, upload(gpu, positions)?);
    let (cos, sin) =
        (uninitialised(gpu, candle_core::DType::F32, (t, n))?, uninitialised(gpu, candle_core::DType::F32, (t, n))?);
    let (c, s) = (address(&cos)?, address(&sin)?);
    let (start, tokens, count) = (0i32, t as i32, n as i32);
    let kernel = Kernel::load(gpu, "pointwise", "rope_table".into())?;
    let launch = Launch::new(kernel, ((t * n).div_ceil(256), 1, 1), 256).with(f.address).with(p.address).with(start);
    let launch = launch.with(amplitude).with(c).with(s).with(tokens).with(count);
    // SAFETY: `t` positions, `n` frequencies and two tables of both; frees are ordered after the launch on the one
    // stream.
    unsafe { launch.enqueue(false)? };
    Ok((cos, sin))
}

#[cfg(feature = "cuda")]
fn cuda(
    x: &Tensor,
    (t, heads, dim): (usize, usize, usize),
    bias: Option<&Tensor>,
    norm: Option<HeadNorm>,
    table: Option<(&Tensor, &Tensor)>,
) -> Result<Tensor> {
    use super::cuda::{address, address_or_null, device, suffix, uninitialised, Kernel, Launch};
    if bias.is_none() && norm.is_none() && table.is_none() {
        return x.reshape((t, heads, dim)).at("heads");
    }
    let gpu = device(x)?;
    // Heads are adjacent within a row; rows may be strided.
    let inner_is_dense = x.dims().len() == 2 || x.stride()[1] == dim;
    let x = if inner_is_dense { x.clone() } else { x.contiguous()? };
    let out = uninitialised(gpu, x.dtype(), (t, heads, dim))?;
    let row = x.stride()[0] as i64;
    let (from, to) = (address(&x)?, address(&out)?);
    let (b, w) = (address_or_null(bias)?, address_or_null(norm.map(|n| n.weight))?);
    let (cos, sin) = (address_or_null(table.map(|t| t.0))?, address_or_null(table.map(|t| t.1))?);
    let eps = norm.map_or(0.0, |n| n.eps);
    let (tokens, count, width) = (t as i32, heads as i32, dim as i32);
    // The vectorised kernel needs heads aligned to 16 bytes, and whole heads to a warp.
    let aligned = [from, b, w, cos, sin].iter().all(|a| a % 16 == 0) && row % 8 == 0;
    let shared_out = dim.is_multiple_of(16) && (dim / 16).is_power_of_two() && dim <= 256;
    let (form, grid) = match x.dtype() != candle_core::DType::F32 && aligned && shared_out {
        true => ("heads_wide", (t * heads * dim).div_ceil(4096)),
        false => ("heads", (t * heads).div_ceil(8)),
    };
    let kernel = Kernel::load(gpu, "pointwise", format!("{form}_{}", suffix(x.dtype())?))?;
    let launch = Launch::new(kernel, (grid, 1, 1), 256).with(from).with(row).with(b).with(w).with(eps);
    let launch = launch.with(cos).with(sin).with(to).with(tokens).with(count).with(width);
    // SAFETY: shapes as the kernel's header asks for; frees are ordered after the launch on the one stream.
    unsafe { launch.enqueue(false)? };
    Ok(out)
}
