//! Cross-entropy of next symbols, with the gradient of the logits.

use crate::error::{At, Error, ErrorKind, Result};
use crate::ops::view;
use candle_core::{Device, Tensor};
use rayon::prelude::*;

/// A target that counts for nothing: padding, and the first symbol of a text.
pub const NO_TARGET: u32 = u32::MAX;

/// `l_t = ln Σ_i e^{z_ti} - z_ty` in nats, 0 without a target, and the gradient of `scale Σ_t l_t`:
/// `scale (softmax(z_t) - onehot(y))`.
///
/// # Shapes
/// `logits` and their gradient `[T, V]`; `targets` `T` symbols below `V`, or [`NO_TARGET`]; losses f32 `[T]`.
///
/// # Errors
/// A target beyond the vocabulary, or another shape or device.
pub fn cross_entropy(logits: &Tensor, targets: &[u32], scale: f32) -> Result<(Tensor, Tensor)> {
    let (rows, symbols) = logits.dims2().at("cross-entropy")?;
    if rows != targets.len() {
        return Err(Error::new(
            ErrorKind::Backend,
            "cross-entropy",
            format!("{} targets of {rows} rows", targets.len()),
        ));
    }
    if let Some(target) = targets.iter().find(|t| **t != NO_TARGET && **t as usize >= symbols) {
        return Err(Error::new(ErrorKind::Backend, "cross-entropy", format!("target {target} of {symbols} symbols")));
    }
    #[cfg(feature = "cuda")]
    if logits.device().is_cuda() {
        return super::cuda::cross_entropy(logits, targets, scale);
    }
    let logits = view(logits, "logits")?;
    let (mut losses, mut grad) = (vec![0f32; rows], vec![0f32; rows * symbols]);
    let rows_of = grad.par_chunks_mut(symbols).zip(logits.values::<f32>()?.par_chunks(symbols));
    rows_of.zip(targets).zip(&mut losses).for_each(|(((grad, z), target), loss)| {
        if *target == NO_TARGET {
            return;
        }
        let top = z.iter().fold(f32::NEG_INFINITY, |m, z| m.max(*z));
        let sum: f32 = z.iter().map(|z| (z - top).exp()).sum();
        grad.iter_mut().zip(z).for_each(|(g, z)| *g = scale * (z - top).exp() / sum);
        grad[*target as usize] -= scale;
        *loss = sum.ln() + top - z[*target as usize];
    });
    let losses = Tensor::from_vec(losses, rows, &Device::Cpu).at("losses")?;
    Ok((losses, Tensor::from_vec(grad, (rows, symbols), &Device::Cpu).at("gradient of the logits")?))
}
