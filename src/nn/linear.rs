//! `y = x Wᵀ + b`, with `W` dense, quantised or factored.

use super::weight::{Blocks, Weight};
use crate::error::{Error, ErrorKind, Result};
use crate::ops::{self, Rows, View};
use crate::storage::Storage;
use candle_core::{DType, Device, Module, Tensor};
use std::cell::Cell;
use std::ops::Deref;

/// Rows of input up to which a CPU multiplies by a quantised matrix row by row. Beyond, dequantising a part of the
/// matrix once and calling the f32 GEMM is cheaper than repeated dot products.
const DOT_ROWS: usize = 16;
/// Elements dequantised at a time on a CPU: 4 MiB of f32, which stays in the caches.
const PART: usize = 1 << 20;

/// A linear layer `y = x Wᵀ + b`.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
    /// The bias in the type of the activations.
    cast_bias: Option<Tensor>,
}

impl Linear {
    /// A layer with an optional `bias`, f32 `[out]`.
    pub fn new(weight: Weight, bias: Option<Tensor>) -> Self {
        Self { weight, bias, cast_bias: None }
    }

    /// Keeps a copy of the bias in `dtype`: a cast in [`Linear::forward_all`] would run on the stream that loaded it.
    ///
    /// # Errors
    /// A backend's failure.
    pub fn with_bias_in(mut self, dtype: DType) -> Result<Self> {
        self.cast_bias = self.bias.as_ref().map(|b| b.to_dtype(dtype)).transpose()?;
        Ok(self)
    }

    /// Size in memory, bytes.
    pub fn bytes(&self) -> u64 {
        self.weight.bytes() + self.bias.as_ref().map_or(0, |b| 4 * b.elem_count() as u64)
    }

    /// Computes `x Wᵀ + b`.
    ///
    /// # Shapes
    /// `x [T, in]`; the result `[T, out]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let [y] = Self::forward_all([self], x)?;
        Ok(y)
    }

    /// Applies several layers to one input; few rows on a CPU share one parallel region.
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

    /// The bias, f32 `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// The matrix.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// Bytes that a product of many rows takes besides its result, which is of `dtype` on `device`.
    pub fn scratch(&self, dtype: DType, device: &Device) -> u64 {
        let Weight::Blocks(w) = &self.weight else { return 0 };
        let (rows, columns) = w.dims();
        let elements = match device.is_cpu() {
            #[cfg(feature = "cuda")]
            false => ops::rows_to_a_part(rows, columns) * columns,
            _ => (rows * columns).min(PART),
        };
        (elements * dtype.size_in_bytes()) as u64
    }

    fn product(&self, x: &Tensor) -> Result<Tensor> {
        match &self.weight {
            Weight::Dense(w) => Ok(x.matmul(&w.t()?)?),
            #[cfg(feature = "cuda")]
            Weight::Blocks(w) if x.device().is_cuda() && x.dim(0)? == 1 => ops::quantised_row(x, w),
            #[cfg(feature = "cuda")]
            Weight::Blocks(w) if x.device().is_cuda() => ops::quantised_rows(x, w),
            Weight::Blocks(w) => dequantised_matmul(x, w),
            Weight::Factored(w) => w.forward(x),
        }
    }
}

/// A CPU weight's memory, locked for reading.
enum Locked<V> {
    F32(V),
    Encoded(Storage, V),
}

/// The products of a few rows with matrices; `None` where one is factored, or dense in another type than f32.
fn dot_rows(layers: &[&Linear], x: &Tensor) -> Result<Option<Vec<Tensor>>> {
    let (tokens, cols) = x.dims2()?;
    let locked: Result<Option<Vec<_>>> = layers.iter().map(|l| lock_weight(&l.weight)).collect();
    let Some(locked) = locked? else { return Ok(None) };
    let rows = locked.iter().map(|l| match l {
        Locked::F32(view) => Ok(Rows::F32(view.values()?)),
        Locked::Encoded(storage, view) => Ok(Rows::Encoded(*storage, view.values()?)),
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

fn lock_weight(w: &Weight) -> Result<Option<Locked<View<impl Deref<Target = candle_core::Storage> + '_>>>> {
    Ok(match w {
        Weight::Dense(w) if w.dtype() == DType::F32 => Some(Locked::F32(ops::view(w, "weight")?)),
        Weight::Dense(_) | Weight::Factored(_) => None,
        Weight::Blocks(w) => Some(Locked::Encoded(w.storage(), ops::view(w.data(), "weight")?)),
    })
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Linear::forward(self, x).map_err(candle_core::Error::wrap)
    }
}

thread_local! {
    // Kept between products: a new buffer of this size is memory that the system maps and clears each time.
    static DEQUANTISED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// `x Wᵀ` on a CPU, with a part of `W` dequantised at a time.
fn dequantised_matmul(x: &Tensor, w: &Blocks) -> Result<Tensor> {
    let (tokens, (out, cols)) = (x.dim(0)?, w.dims());
    let step = (PART / cols).clamp(1, out);
    let x = x.contiguous()?;
    let (view, input) = (ops::view(w.data(), "weight")?, ops::view(&x, "input")?);
    let (bytes, input) = (view.values()?, input.values()?);
    let mut products = vec![0f32; tokens * out];
    // Taken, not borrowed: a worker that waits inside the product may steal another run's product.
    let mut buffer = DEQUANTISED.take();
    for first in (0..out).step_by(step) {
        let rows = step.min(out - first);
        buffer.resize(buffer.len().max(rows * cols), 0.0);
        let values = &mut buffer[..rows * cols];
        ops::dequantise(w.storage(), bytes, first, cols, values);
        ops::multiply_transposed_parallel([tokens, rows, cols], input, values, &mut products[first..], out);
    }
    DEQUANTISED.set(buffer);
    Ok(Tensor::from_vec(products, (tokens, out), &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::affine_tests::{formats, random_groups};
    use crate::storage::Ggml;
    use candle_core::quantized::QTensor;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    #[test]
    fn products_with_blocks_are_those_of_the_dequantised_matrix() -> Result<()> {
        let device = Device::Cpu;
        for storage in Storage::ALL {
            // Dense encodings also with rows that end within a block of sixteen.
            for columns in [256, 512, 70, 3] {
                if !storage.fits(columns) {
                    continue;
                }
                let w = Tensor::randn(0f32, 1.0, (70, columns), &device)?;
                let q = QTensor::quantize(&w, storage.candle().expect("one of candle's"))?;
                let dense = Linear::new(Weight::Dense(q.dequantize(&device)?), None);
                let blocks = Blocks::new(storage, (70, columns), q.data()?.into_owned(), &device)?;
                let ids = Tensor::new(&[3u32, 69, 3], &device)?;
                let (rows, want) = (Weight::Blocks(blocks.clone()), dense.weight().rows(&ids, DType::F32)?);
                let off = (rows.rows(&ids, DType::F32)? - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(off < 1e-5, "{storage}, {columns} columns, rows: {off}");
                let blocks = Linear::new(Weight::Blocks(blocks), None);
                for rows in [DOT_ROWS + 5, 3, 1] {
                    let x = Tensor::randn(0f32, 1.0, (rows, columns), &device)?;
                    let off = (dense.forward(&x)? - blocks.forward(&x)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
                    assert!(off < 1e-3, "{storage}, {columns} columns, {rows} rows: {off}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn products_with_affine_groups_are_those_of_the_dequantised_matrix() -> Result<()> {
        let mut random = StdRng::seed_from_u64(3);
        for (i, format) in formats().enumerate() {
            for _ in 0..4 {
                let out = random.random_range(1..70);
                let groups = random.random_range(1..6);
                let columns = groups * usize::from(format.group);
                let (bytes, values) = random_groups(format, out * groups, i as u64);
                let w = Tensor::from_vec(values, (out, columns), &Device::Cpu)?;
                let blocks = Blocks::new(Storage::Affine(format), (out, columns), bytes, &Device::Cpu)?;
                let ids = Tensor::new(&[out as u32 - 1, 0], &Device::Cpu)?;
                let off = (Weight::Blocks(blocks.clone()).rows(&ids, DType::F32)? - w.index_select(&ids, 0)?)?;
                assert_eq!(off.abs()?.max_all()?.to_scalar::<f32>()?, 0.0, "{format:?}");
                let rows = random.random_range(1..70);
                let x = Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu)?;
                let product = Linear::new(Weight::Blocks(blocks), None).forward(&x)?;
                // In units of the norm of a row times that of an input row.
                let norms = |x: &Tensor| x.sqr()?.sum_keepdim(1)?.sqrt();
                let off = ((product - x.matmul(&w.t()?)?)?.abs()? / norms(&x)?.matmul(&norms(&w)?.t()?)?)?;
                let off = off.max_all()?.to_scalar::<f32>()?;
                assert!(off < 1e-5, "{format:?}, {rows} rows, {out} x {columns}: {off}");
            }
        }
        Ok(())
    }

    #[test]
    fn products_may_run_inside_products_of_the_same_thread() -> Result<()> {
        let (out, columns) = (512, 2048);
        let w = Tensor::randn(0f32, 1.0, (out, columns), &Device::Cpu)?;
        let q = QTensor::quantize(&w, Ggml::Q8_0.candle())?;
        let blocks = Blocks::new(Storage::Ggml(Ggml::Q8_0), (out, columns), q.data()?.into_owned(), &Device::Cpu)?;
        let layer = Linear::new(Weight::Blocks(blocks), None);
        let x = Tensor::randn(0f32, 1.0, (64, columns), &Device::Cpu)?;
        let want = layer.forward(&x)?;
        // As runs side by side do: a worker that waits for a part of its product takes up another thread's product.
        let one = || -> Result<()> {
            for _ in 0..50 {
                let off = rayon::scope(|_| layer.forward(&x))?.sub(&want)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert_eq!(off, 0.0);
            }
            Ok(())
        };
        std::thread::scope(|s| {
            let threads: Vec<_> = (0..4).map(|_| s.spawn(one)).collect();
            threads.into_iter().try_for_each(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    }

    #[test]
    fn a_row_that_does_not_exist_is_refused() -> Result<()> {
        let blocks = Blocks::new(Storage::F16, (2, 3), vec![0; 12], &Device::Cpu)?;
        let ids = Tensor::new(&[2u32], &Device::Cpu)?;
        assert!(Weight::Blocks(blocks).rows(&ids, DType::F32).is_err());
        assert!(Blocks::new(Storage::F16, (2, 3), vec![0; 11], &Device::Cpu).is_err());
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
