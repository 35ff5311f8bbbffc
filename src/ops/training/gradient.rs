//! The gradient of all parameters as one flat vector, written part by part.

use crate::error::{At, Result};
use candle_core::{DType, Device, Tensor};

/// A gradient under construction, f32 `[len]`.
#[derive(Debug)]
pub struct FlatGradient(Tensor);

impl FlatGradient {
    /// Zeros.
    ///
    /// # Errors
    /// A backend's failure.
    pub fn zeros(len: usize, device: &Device) -> Result<Self> {
        Tensor::zeros(len, DType::F32, device).at("gradient").map(Self)
    }

    /// Writes a parameter's gradient, f32, from element `start` on.
    ///
    /// # Errors
    /// More elements than there is room, or another type or device.
    pub fn put(&mut self, start: usize, gradient: &Tensor) -> Result<()> {
        gradient.flatten_all().and_then(|g| self.0.slice_set(&g, 0, start)).at("gradient")
    }

    /// Writes the gradient of `W` in `y = x Wᵀ` given that of `y`: `dyᵀ x`, summed in f32.
    ///
    /// # Shapes
    /// `dy [T, out]`, `x [T, in]`; writes `[out, in]`.
    ///
    /// # Errors
    /// As of [`Self::put`].
    pub fn put_product(&mut self, start: usize, dy: &Tensor, x: &Tensor) -> Result<()> {
        #[cfg(feature = "cuda")]
        if x.device().is_cuda() {
            return super::cuda::product_into(&self.0, start, dy, x, 0.0);
        }
        self.put(start, &dy.t().and_then(|g| g.matmul(x)).at("gradient of a product")?)
    }

    /// Adds the rows `dx` of the symbols read to the gradient of an embedding of 256 symbols.
    ///
    /// # Shapes
    /// `dx [T, N]`, a row for each of `symbols`; adds to `[256, N]`.
    ///
    /// # Errors
    /// As of [`Self::put`].
    pub fn add_embedding(&mut self, start: usize, symbols: &[u32], dx: &Tensor) -> Result<()> {
        #[cfg(feature = "cuda")]
        if dx.device().is_cuda() {
            let read = super::cuda::one_hot(dx, symbols)?;
            return super::cuda::product_into(&self.0, start, &read, dx, 1.0);
        }
        let n = dx.dims2().at("embedding")?.1;
        let index = Tensor::new(symbols, dx.device()).at("symbols")?;
        let before = self.0.narrow(0, start, super::SYMBOLS * n).and_then(|e| e.reshape((super::SYMBOLS, n)));
        let sum = before.and_then(|e| e.index_add(&index, dx, 0)).at("gradient of the embedding")?;
        self.put(start, &sum)
    }

    /// The whole vector.
    pub fn into_tensor(self) -> Tensor {
        self.0
    }
}
