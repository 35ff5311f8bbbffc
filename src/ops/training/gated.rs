//! `silu(gate) · up` with its backward pass.

use crate::error::{At, Error, ErrorKind, Result};
use crate::ops::gated::silu;
use crate::ops::{simd, view};
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// `silu(gate) · up`, both of one tensor.
///
/// # Shapes
/// `both [T, 2 I]`: `gate`, then `up` in a row; the result `[T, I]`.
///
/// # Errors
/// Another shape or device.
pub fn gated_silu(both: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if both.device().is_cuda() {
        return super::cuda::gated_silu(both);
    }
    let (rows, wide) = both.dims2().at("gated activation")?;
    let (both, width) = (view(both, "gate and up")?, wide / 2);
    let mut out = vec![0f32; rows * width];
    out.par_chunks_mut(width).zip(both.values::<f32>()?.par_chunks(wide)).for_each(|(o, both)| {
        let (gate, up) = both.split_at(width);
        simd::zip_map(gate, up, o, silu);
    });
    Tensor::from_vec(out, (rows, width), &Device::Cpu).at("gated activation")
}

/// The gradient of [`gated_silu`]'s input, given that of its result.
///
/// # Shapes
/// `both` and the result `[T, 2 I]`; `grad [T, I]`.
///
/// # Errors
/// Another shape or device.
pub fn gated_silu_backward(both: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let (rows, wide) = both.dims2().at("gated activation")?;
    let width = wide / 2;
    if grad.dims() != [rows, width] {
        return Err(Error::new(ErrorKind::Backend, "gated activation", format!("a gradient of {:?}", grad.dims())));
    }
    #[cfg(feature = "cuda")]
    if both.device().is_cuda() {
        return super::cuda::gated_silu_backward(both, grad);
    }
    let (both, grad) = (view(both, "gate and up")?, view(grad, "gradient")?);
    let mut d = vec![0f32; rows * wide];
    let rows_of = d.par_chunks_mut(wide).zip(both.values::<f32>()?.par_chunks(wide));
    rows_of.zip(grad.values::<f32>()?.par_chunks(width)).for_each(|((d, both), grad)| {
        let (d_gate, d_up) = d.split_at_mut(width);
        for i in 0..width {
            let (gate, up) = (both[i], both[width + i]);
            let sigmoid = 1.0 / (1.0 + (-gate).min(80.0).exp());
            d_up[i] = grad[i] * gate * sigmoid;
            d_gate[i] = grad[i] * up * sigmoid * (1.0 + gate * (1.0 - sigmoid));
        }
    });
    Tensor::from_vec(d, (rows, wide), &Device::Cpu).at("gradient of a gated activation")
}
