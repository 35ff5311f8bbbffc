//! `y = x Wᵀ + b`, with `W` dense or quantised.

use crate::error::{At, Result};
use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Module, Tensor};
use rayon::prelude::*;
use std::sync::Arc;

/// Rows of input up to which a quantised matrix is multiplied as it is. Beyond, widening a block of its rows once and
/// calling the f32 GEMM is cheaper than repeated dot products.
const DOT_ROWS: usize = 16;
/// Elements widened at a time: 4 MiB of f32, which stays in the caches.
const WIDEN: usize = 1 << 20;

/// A matrix `[out, in]` in the form it is held.
#[derive(Debug, Clone)]
pub enum Weight {
    /// One element type on the device.
    Dense(Tensor),
    /// Quantised blocks (on a CPU also f16 and bf16, which its GEMM cannot multiply by f32).
    Quantised(Arc<QTensor>),
}

impl Weight {
    /// `(out, in)`.
    pub fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(w) => w.dims2(),
            Self::Quantised(w) => w.shape().dims2(),
        }
        .at("weight")
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Dense(w) => (w.elem_count() * w.dtype().size_in_bytes()) as u64,
            Self::Quantised(w) => w.storage_size_in_bytes() as u64,
        }
    }

    /// Rows `ids` (u32 `[n]`), as f32 `[n, in]`.
    pub fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(w) => w.index_select(ids, 0)?.to_dtype(DType::F32),
            Self::Quantised(w) => w.embedding(ids),
        }
        .at("embedding")
    }
}

/// A linear layer.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

impl Linear {
    /// `bias` is f32 `[out]`.
    pub fn new(weight: Weight, bias: Option<Tensor>) -> Self {
        Self { weight, bias }
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.weight.bytes() + self.bias.as_ref().map_or(0, |b| 4 * b.elem_count() as u64)
    }

    /// # Shapes
    /// `x [T, in]` to `[T, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = match &self.weight {
            Weight::Dense(w) => x.matmul(&w.t()?)?,
            Weight::Quantised(w) if x.dim(0)? > DOT_ROWS && x.device().is_cpu() => widened_matmul(x, w)?,
            Weight::Quantised(w) => x.apply_op1_no_bwd(w.as_ref())?,
        };
        match &self.bias {
            Some(b) => Ok(y.broadcast_add(b)?),
            None => Ok(y),
        }
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Linear::forward(self, x).map_err(candle_core::Error::wrap)
    }
}

/// `x Wᵀ` where blocks of `W`'s rows are widened to f32, one block at a time.
fn widened_matmul(x: &Tensor, w: &QTensor) -> candle_core::Result<Tensor> {
    let (out, cols) = w.shape().dims2()?;
    let block = (WIDEN / cols).clamp(1, out);
    let parts: candle_core::Result<Vec<Tensor>> = (0..out)
        .step_by(block)
        .map(|first| {
            let rows = block.min(out - first);
            let share = rows.div_ceil(rayon::current_num_threads());
            let mut wide = vec![0f32; rows * cols];
            wide.par_chunks_mut(share * cols).enumerate().try_for_each(|(i, dst)| {
                let from = (first + i * share) as u32;
                let ids = Tensor::arange(from, from + (dst.len() / cols) as u32, &Device::Cpu)?;
                let values = w.embedding(&ids)?.flatten_all()?.to_vec1::<f32>()?;
                dst.copy_from_slice(&values);
                candle_core::Result::Ok(())
            })?;
            x.matmul(&Tensor::from_vec(wide, (rows, cols), &Device::Cpu)?.t()?)
        })
        .collect();
    Tensor::cat(&parts?, 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::GgmlDType;

    #[test]
    fn widened_and_dot_products_agree_with_the_dequantised_product() -> Result<()> {
        let device = Device::Cpu;
        let w = Tensor::randn(0f32, 1.0, (70, 64), &device)?;
        for dtype in [GgmlDType::Q8_0, GgmlDType::BF16, GgmlDType::Q4_0] {
            let q = Arc::new(QTensor::quantize(&w, dtype)?);
            let dense = Linear::new(Weight::Dense(q.dequantize(&device)?), None);
            let held = Linear::new(Weight::Quantised(q), None);
            for (rows, tolerance) in [(DOT_ROWS + 5, 1e-4), (3, 0.2)] {
                // Few rows go through dot products, which round the input to the weight's own block type.
                let x = Tensor::randn(0f32, 1.0, (rows, 64), &device)?;
                let diff = (dense.forward(&x)? - held.forward(&x)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(diff < tolerance, "{dtype:?}, {rows} rows: {diff}");
            }
        }
        Ok(())
    }
}
