//! `y = x Wᵀ + b`, with `W` dense or quantised.

use crate::error::{At, Error, ErrorKind, Result};
use crate::ops::{self, Rows, View};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Module, Storage, Tensor};
use std::borrow::Cow;
use std::ops::Deref;
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

    /// Whether products and look-ups run on the stream of their input; candle's, for block formats without a kernel here, run on the
    /// stream that holds the matrix.
    pub(crate) fn on_any_stream(&self) -> bool {
        #[cfg(feature = "cuda")]
        if let (Self::Quantised(w), Ok((_, columns))) = (self, self.dims()) {
            return !w.device().is_cuda() || ops::on_gpu::Format::blocks(w.dtype(), columns).is_some();
        }
        true
    }

    /// Rows `ids` (u32 `[n]`), `[n, in]` in `dtype`.
    pub fn rows(&self, ids: &Tensor, dtype: DType) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(rows) = gpu_rows(self, ids, dtype)? {
            return Ok(rows);
        }
        match self {
            Self::Dense(w) => w.index_select(ids, 0)?.to_dtype(dtype),
            Self::Quantised(w) => w.embedding(ids)?.to_dtype(dtype),
        }
        .at("embedding")
    }
}

/// A linear layer.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
    /// The bias in the type of the activations, where products add it in that.
    cast_bias: Option<Tensor>,
}

impl Linear {
    /// `bias` is f32 `[out]`.
    pub fn new(weight: Weight, bias: Option<Tensor>) -> Self {
        Self { weight, bias, cast_bias: None }
    }

    /// Keeps the bias in `dtype` too: casting it in [`Linear::forward_all`] would run on the stream that holds it.
    ///
    /// # Errors
    /// A backend's failure.
    pub fn with_bias_in(mut self, dtype: DType) -> Result<Self> {
        self.cast_bias = self.bias.as_ref().map(|b| b.to_dtype(dtype)).transpose()?;
        Ok(self)
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
        let mut products = Self::products(layers, x)?;
        for (l, y) in layers.iter().zip(&mut products) {
            match (&l.cast_bias, &l.bias) {
                (Some(b), _) if b.dtype() == y.dtype() => *y = y.broadcast_add(b)?,
                (_, Some(b)) => *y = y.broadcast_add(&b.to_dtype(y.dtype())?)?,
                (_, None) => {}
            }
        }
        Ok(products)
    }

    /// As [`Linear::forward_all`], without the biases.
    pub fn products<const N: usize>(layers: [&Self; N], x: &Tensor) -> Result<[Tensor; N]> {
        let few = x.dim(0)? <= DOT_ROWS && x.device().is_cpu();
        let products = match few.then(|| dot_rows(&layers, x)).transpose()?.flatten() {
            Some(products) => products,
            None => layers.iter().map(|l| l.product(x)).collect::<Result<_>>()?,
        };
        products.try_into().map_err(|_| Error::new(ErrorKind::Backend, "linear", "lost a result"))
    }

    /// f32 `[out]`, if it has one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The matrix.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// Bytes that a product of many rows takes besides its result, which is of `dtype` on `device`.
    pub fn scratch(&self, dtype: DType, device: &Device) -> u64 {
        let Weight::Quantised(w) = &self.weight else { return 0 };
        let elements = w.shape().elem_count();
        match device.is_cpu() {
            true => 4 * elements.min(WIDEN) as u64,
            #[cfg(feature = "cuda")]
            false => ops::widened_bytes(w, dtype).unwrap_or((elements * (4 + dtype.size_in_bytes())) as u64),
            #[cfg(not(feature = "cuda"))]
            false => (elements * (4 + dtype.size_in_bytes())) as u64,
        }
    }

    fn product(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match &self.weight {
            Weight::Dense(w) => x.matmul(&w.t()?)?,
            Weight::Quantised(w) if x.dim(0)? > DOT_ROWS && x.device().is_cpu() => widened_matmul(x, w)?,
            #[cfg(feature = "cuda")]
            Weight::Quantised(w) if x.device().is_cuda() => gpu_matmul(x, w)?,
            Weight::Quantised(w) => blocks_matmul(x, w)?,
        })
    }
}

/// candle's product with blocks, which rounds `x` to 8 bits.
fn blocks_matmul(x: &Tensor, w: &QTensor) -> Result<Tensor> {
    // On a GPU some of candle's kernels answer in f32, whatever they were given.
    Ok(x.apply_op1_no_bwd(w)?.to_dtype(x.dtype())?)
}

/// Rows of a matrix on a GPU, on the stream of `ids`; `None` where the form has no kernel.
#[cfg(feature = "cuda")]
fn gpu_rows(w: &Weight, ids: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
    match w {
        _ if !ids.device().is_cuda() => Ok(None),
        Weight::Dense(w) => Ok(Some(ops::on_gpu::gather(w, ids)?.to_dtype(dtype)?)),
        Weight::Quantised(w) => ops::on_gpu::gather_blocks(w, ids, dtype),
    }
}

/// The product on a GPU: of one row as in decode, of more rows with the matrix widened.
#[cfg(feature = "cuda")]
fn gpu_matmul(x: &Tensor, w: &QTensor) -> Result<Tensor> {
    let one = x.dim(0)? == 1;
    match if one { ops::quantised_row(x, w)? } else { ops::quantised_rows(x, w)? } {
        Some(product) => Ok(product),
        None if one => blocks_matmul(x, w),
        None => Ok(x.contiguous()?.matmul(&w.dequantize(x.device())?.to_dtype(x.dtype())?.t()?)?),
    }
}

/// A weight's memory, locked for reading.
enum Locked<'a, V> {
    Plain(V),
    Blocks(GgmlDType, Cow<'a, [u8]>),
}

/// The products of a few rows with matrices; `None` where one is held in a type without a path of ours.
fn dot_rows(layers: &[&Linear], x: &Tensor) -> Result<Option<Vec<Tensor>>> {
    let (tokens, cols) = x.dims2()?;
    let locked: Result<Option<Vec<_>>> = layers.iter().map(|l| lock_weight(&l.weight, cols)).collect();
    let Some(locked) = locked? else { return Ok(None) };
    let rows = locked.iter().map(|l| match l {
        Locked::Plain(view) => Ok(Rows::F32(view.values()?)),
        Locked::Blocks(dtype, bytes) => Ok(Rows::Blocks(*dtype, bytes)),
    });
    let rows: Vec<_> = rows.collect::<Result<_>>()?;
    let input = ops::view(x, "input")?;
    let products = ops::matvec(&rows, input.values()?, cols);
    let tensor = |v: Vec<f32>| {
        let shape = (tokens, v.len() / tokens);
        Ok(Tensor::from_vec(v, shape, &Device::Cpu)?)
    };
    products.into_iter().map(tensor).collect::<Result<_>>().map(Some)
}

fn lock_weight(w: &Weight, cols: usize) -> Result<Option<Locked<'_, View<impl Deref<Target = Storage> + '_>>>> {
    Ok(match w {
        Weight::Dense(w) if w.dtype() == DType::F32 => Some(Locked::Plain(ops::view(w, "weight")?)),
        Weight::Quantised(q) if ops::has_blocks(q.dtype(), cols) => Some(Locked::Blocks(q.dtype(), q.data()?)),
        _ => None,
    })
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Linear::forward(self, x).map_err(candle_core::Error::wrap)
    }
}

/// `x Wᵀ` where some of `W`'s rows at a time are widened to f32.
fn widened_matmul(x: &Tensor, w: &QTensor) -> candle_core::Result<Tensor> {
    let (out, cols) = w.shape().dims2()?;
    let block = (WIDEN / cols).clamp(1, out);
    let bytes = ops::has_blocks(w.dtype(), cols).then(|| w.data()).transpose()?;
    let parts = (0..out).step_by(block).map(|first| {
        let rows = block.min(out - first);
        let wide = match &bytes {
            Some(bytes) => {
                let mut wide = vec![0f32; rows * cols];
                ops::widen(w.dtype(), bytes, first, cols, &mut wide);
                Tensor::from_vec(wide, (rows, cols), &Device::Cpu)?
            }
            None => w.embedding(&Tensor::arange(first as u32, (first + rows) as u32, &Device::Cpu)?)?,
        };
        x.matmul(&wide.t()?)
    });
    Tensor::cat(&parts.collect::<candle_core::Result<Vec<Tensor>>>()?, 1)
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
            for rows in [DOT_ROWS + 5, 3, 1] {
                let x = Tensor::randn(0f32, 1.0, (rows, 64), &device)?;
                let diff = (dense.forward(&x)? - held.forward(&x)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(diff < 1e-4, "{dtype:?}, {rows} rows: {diff}");
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
