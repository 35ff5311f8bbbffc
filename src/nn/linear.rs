//! `y = x Wᵀ + b`, with `W` dense or quantised.

use crate::error::{At, Error, ErrorKind, Result};
use crate::ops::{self, Rows};
use candle_core::quantized::{GgmlDType, QTensor};
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
        let [y] = Self::forward_all([self], x)?;
        Ok(y)
    }

    /// Several layers on one input; few rows on a CPU go through one parallel region.
    pub fn forward_all<const N: usize>(layers: [&Self; N], x: &Tensor) -> Result<[Tensor; N]> {
        let few = x.dim(0)? <= DOT_ROWS && x.device().is_cpu();
        let products = match few.then(|| dot_rows(&layers, x)).transpose()?.flatten() {
            Some(products) => products,
            None => layers.iter().map(|l| l.product(x)).collect::<Result<_>>()?,
        };
        let biased = layers.iter().zip(products).map(|(l, y)| match &l.bias {
            Some(b) => Ok(y.broadcast_add(b)?),
            None => Ok(y),
        });
        let biased: Vec<Tensor> = biased.collect::<Result<_>>()?;
        biased.try_into().map_err(|_| Error::new(ErrorKind::Backend, "linear", "lost a result"))
    }

    fn product(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match &self.weight {
            Weight::Dense(w) => x.matmul(&w.t()?)?,
            Weight::Quantised(w) if x.dim(0)? > DOT_ROWS && x.device().is_cpu() => widened_matmul(x, w)?,
            Weight::Quantised(w) => x.apply_op1_no_bwd(w.as_ref())?,
        })
    }
}

/// The products of a few rows with matrices held in f32 or q8_0; `None` where one is held otherwise.
fn dot_rows(layers: &[&Linear], x: &Tensor) -> Result<Option<Vec<Tensor>>> {
    let (tokens, cols) = x.dims2()?;
    let mut views = vec![];
    let mut tensors = vec![];
    for layer in layers {
        match &layer.weight {
            Weight::Dense(w) if w.dtype() == DType::F32 => {
                (views.push(Some(ops::view(w, "weight")?)), tensors.push(None))
            }
            Weight::Quantised(q) if q.dtype() == GgmlDType::Q8_0 => (views.push(None), tensors.push(Some(q.clone()))),
            _ => return Ok(None),
        };
    }
    let blocks: Vec<_> =
        tensors.iter().map(|q| q.as_ref().map(|q| q.data()).transpose()).collect::<candle_core::Result<_>>()?;
    let held = views.iter().zip(&blocks).map(|pair| match pair {
        (Some(view), _) => Ok(Rows::F32(view.values()?)),
        (None, bytes) => Ok(Rows::Q8_0(bytes.as_deref().unwrap_or(&[]))),
    });
    let rows: Vec<_> = held.collect::<Result<_>>()?;
    let input = ops::view(x, "input")?;
    let products = ops::matvec(&rows, input.values()?, cols);
    let tensor = |v: Vec<f32>| {
        let shape = (tokens, v.len() / tokens);
        Ok(Tensor::from_vec(v, shape, &Device::Cpu)?)
    };
    products.into_iter().map(tensor).collect::<Result<_>>().map(Some)
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

    #[test]
    fn widened_and_dot_products_agree_with_the_dequantised_product() -> Result<()> {
        let device = Device::Cpu;
        let w = Tensor::randn(0f32, 1.0, (70, 64), &device)?;
        for dtype in [GgmlDType::Q8_0, GgmlDType::BF16, GgmlDType::Q4_0] {
            let q = Arc::new(QTensor::quantize(&w, dtype)?);
            let dense = Linear::new(Weight::Dense(q.dequantize(&device)?), None);
            let held = Linear::new(Weight::Quantised(q), None);
            let few = if dtype == GgmlDType::Q8_0 { 1e-4 } else { 0.2 };
            for (rows, tolerance) in [(DOT_ROWS + 5, 1e-4), (3, few), (1, few)] {
                // Few rows of other types than q8_0 go through candle's dot products, which round the input.
                let x = Tensor::randn(0f32, 1.0, (rows, 64), &device)?;
                let diff = (dense.forward(&x)? - held.forward(&x)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(diff < tolerance, "{dtype:?}, {rows} rows: {diff}");
            }
        }
        Ok(())
    }

    #[test]
    fn few_rows_agree_with_the_gemm_on_ragged_shapes() -> Result<()> {
        for (rows, cols, out) in [(1, 576, 1000), (3, 70, 33), (16, 200, 5), (1, 1, 1)] {
            let w = Tensor::randn(0f32, 1.0, (out, cols), &Device::Cpu)?;
            let x = Tensor::randn(0f32, 1.0, (rows, cols), &Device::Cpu)?;
            let layer = Linear::new(Weight::Dense(w.clone()), None);
            let diff = (layer.forward(&x)? - x.matmul(&w.t()?)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(diff < 1e-3, "{rows} x {cols} to {out}: {diff}");
        }
        Ok(())
    }
}
