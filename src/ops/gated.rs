//! `act(gate) · up`, elementwise in one pass.

use super::{simd, view::view};
use crate::error::{At, Error, ErrorKind, Result};
use crate::spec::Activation;
use candle_core::{Device, Tensor};
use rayon::prelude::*;

const CHUNK: usize = 1 << 14;

/// The gated activation of a feed-forward.
///
/// SiLU is `x σ(x)`; GELU's tanh form is `x σ(2 √(2/π) (x + 0.044715 x³))` (Hendrycks and Gimpel 2016,
/// arXiv:1606.08415).
///
/// # Shapes
/// `gate`, `up` and the result `[T, I]`, f32, contiguous.
pub fn gated(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if gate.device().is_cuda() {
        return cuda(gate, up, activation);
    }
    let (a, b) = (view(gate, "gate")?, view(up, "up")?);
    let (a, b) = (a.values()?, b.values()?);
    if a.len() != b.len() {
        return Err(Error::new(
            ErrorKind::Backend,
            "gated activation",
            format!("{} gates for {} values", a.len(), b.len()),
        ));
    }
    let mut out = vec![0f32; a.len()];
    out.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK)).zip(b.par_chunks(CHUNK)).for_each(
        |((o, a), b)| match activation {
            Activation::Silu => simd::zip_map(a, b, o, silu),
            Activation::GeluTanh => simd::zip_map(a, b, o, gelu),
        },
    );
    Tensor::from_vec(out, gate.shape(), &Device::Cpu).at("gated activation")
}

#[inline(always)]
pub(super) fn silu(x: f32, up: f32) -> f32 {
    x * up / (1.0 + simd::exp((-x).min(80.0)))
}

#[inline(always)]
fn gelu(x: f32, up: f32) -> f32 {
    let inner = 1.595_769 * (x + 0.044_715 * x * x * x);
    x * up / (1.0 + simd::exp((-inner).min(80.0)))
}

#[cfg(feature = "cuda")]
fn cuda(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    use super::cuda::{address, device, suffix, uninitialised, Kernel, Launch};
    if gate.dims() != up.dims() || !gate.is_contiguous() || !up.is_contiguous() || gate.dtype() != up.dtype() {
        return Err(Error::new(ErrorKind::Backend, "gated", "gate and up differ or are strided"));
    }
    let (gpu, n) = (device(gate)?, gate.elem_count());
    let out = uninitialised(gpu, gate.dtype(), gate.shape())?;
    let kind: i32 = match activation {
        Activation::Silu => 0,
        Activation::GeluTanh => 1,
    };
    let wide = gate.dtype() != candle_core::DType::F32 && n.is_multiple_of(8);
    let name = format!("gated_{}{}", if wide { "wide_" } else { "" }, suffix(gate.dtype())?);
    let (a, b, c, count) = (address(gate)?, address(up)?, address(&out)?, n as i64);
    let kernel = Kernel::load(gpu, "pointwise", name)?;
    let launch = Launch::new(kernel, (n.div_ceil(2048), 1, 1), 256).with(a).with(b).with(c).with(count).with(kind);
    // SAFETY: three tensors of n elements; frees are ordered after the launch on the one stream.
    unsafe { launch.enqueue(false)? };
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_candle_on_both_activations() -> Result<()> {
        let gate = Tensor::randn(0f32, 4.0, (7, 33), &Device::Cpu)?;
        let up = Tensor::randn(0f32, 1.0, (7, 33), &Device::Cpu)?;
        for (activation, want) in [(Activation::Silu, gate.silu()?), (Activation::GeluTanh, gate.gelu()?)] {
            let want = (want * &up)?;
            let diff = (gated(&gate, &up, activation)? - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(diff < 1e-5, "{activation:?}: {diff}");
        }
        Ok(())
    }
}
