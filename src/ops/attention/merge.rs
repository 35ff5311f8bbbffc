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
