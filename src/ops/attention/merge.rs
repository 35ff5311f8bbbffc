//! The exact union of attention over disjoint sets of keys.

use super::{fail, Attended};
use crate::error::Result;
use candle_core::{DType, Tensor, D};

/// `out = Σ_i e^{lse_i - lse} out_i` with `lse = ln Σ_i e^{lse_i}`: equal to attention over the keys of all parts under
/// one softmax.
///
/// A query that reads nothing in any part has output 0 and log-sum-exp `-∞`.
///
/// # Shapes
/// Every part `out [T, H, D]` of one type and `lse` f32 `[T, H]`; the result alike.
///
/// # Errors
/// No part, or one without its log-sum-exp.
pub fn merge(parts: &[Attended]) -> Result<Attended> {
    let lses = parts.iter().map(|p| p.lse.clone()).collect::<Option<Vec<_>>>();
    let Some(lses) = lses.filter(|l| !l.is_empty()) else {
        return fail("merging needs the log-sum-exp of every part".into());
    };
    // A finite floor keeps -∞ - -∞ out of the exponents; e^{-1e30 - x} is 0.
    let floor = Tensor::full(-1e30f32, lses[0].dims(), lses[0].device())?;
    let lses: Vec<Tensor> = lses.iter().map(|l| l.maximum(&floor)).collect::<candle_core::Result<_>>()?;
    let all = Tensor::stack(&lses, 0)?;
    let top = all.max(0)?;
    let weights = all.broadcast_sub(&top)?.exp()?;
    let total = weights.sum(0)?;
    let read = top.gt(&floor)?;
    let weights = weights.broadcast_div(&total)?.broadcast_mul(&read.to_dtype(DType::F32)?)?;
    let dtype = parts[0].out.dtype();
    let mut out: Option<Tensor> = None;
    for (i, part) in parts.iter().enumerate() {
        let weighed = part.out.to_dtype(DType::F32)?.broadcast_mul(&weights.get(i)?.unsqueeze(D::Minus1)?)?;
        out = Some(out.map_or(Ok(weighed.clone()), |sum| sum + &weighed)?);
    }
    let Some(out) = out else { return fail("nothing to merge".into()) };
    let none = Tensor::full(f32::NEG_INFINITY, top.dims(), top.device())?;
    let lse = read.where_cond(&(top + total.log()?)?, &none)?;
    Ok(Attended { out: out.to_dtype(dtype)?, lse: Some(lse) })
}

/// Attention over a growing set of keys on a GPU, summed in f32 and in place.
#[cfg(feature = "cuda")]
#[derive(Debug)]
pub struct RunningAttention {
    /// f32 `[T, H, D]`.
    out: Tensor,
    /// f32 `[T, H]`.
    lse: Tensor,
    dtype: DType,
}

#[cfg(feature = "cuda")]
impl RunningAttention {
    /// Starts from attention over the first keys.
    ///
    /// # Errors
    /// `first` lacks its log-sum-exp.
    pub fn new(first: Attended) -> Result<Self> {
        let dtype = first.out.dtype();
        let Some(lse) = first.lse else { return fail("merging needs the log-sum-exp of every part".into()) };
        Ok(Self { out: first.out.to_dtype(DType::F32)?, lse, dtype })
    }

    /// Adds attention over keys that no earlier part has read: the result is that of [`merge`].
    ///
    /// # Shapes
    /// `part` is shaped as the first.
    ///
    /// # Errors
    /// Another shape; no log-sum-exp; the device fails.
    pub fn add(&mut self, part: &Attended) -> Result<()> {
        use crate::ops::cuda::{address, device, suffix, Kernel, Launch};
        let Some(lse) = part.lse.as_ref().filter(|_| part.out.dims() == self.out.dims()) else {
            return fail(format!("a part of shape {:?} cannot be merged", part.out.dims()));
        };
        let (rows, dim) = (lse.elem_count(), self.out.dim(D::Minus1)?);
        let gpu = device(&self.out)?;
        let kernel = Kernel::load(gpu, "attention_merge", format!("attention_merge_{}", suffix(part.out.dtype())?))?;
        let launch = Launch::new(kernel, (rows.div_ceil(8), 1, 1), 256).with(address(&self.out)?);
        let launch = launch.with(address(&self.lse)?).with(address(&part.out)?).with(address(lse)?);
        // SAFETY: contiguous tensors of the shapes that the kernel's header names, borrowed until after the launch;
        // nothing else refers to the sum.
        unsafe { launch.with(rows as i64).with(dim as i32).enqueue(false) }
    }

    /// Returns the attention over all keys, in the type of the first part.
    ///
    /// # Errors
    /// The device fails.
    pub fn finish(self) -> Result<Tensor> {
        Ok(self.out.to_dtype(self.dtype)?)
    }
}
