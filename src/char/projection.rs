//! A projection of the MLP: dense or factored, with its backward pass.

use crate::error::{At, Error, ErrorKind, Result};
use crate::nn::Factored;
use crate::ops::training::FlatGradient;
use crate::ops::view;
use candle_core::{DType, Device, Tensor};

/// A matrix `[out, in]`.
pub(super) enum Projection {
    /// Its elements.
    Dense(Tensor),
    /// Its butterfly factors, in f32.
    Factored(Factored),
}

impl Projection {
    /// `x Wᵀ`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Dense(w) => product(x, w),
            Self::Factored(w) => w.forward(&wide(x)?)?.to_dtype(x.dtype()).at("projection"),
        }
    }

    /// Writes the gradient of the weights, which begin at element `start`, and returns that of `x`, given that of
    /// [`Self::forward`]'s result.
    pub fn backward(&self, x: &Tensor, dy: &Tensor, start: usize, to: &mut FlatGradient) -> Result<Tensor> {
        match self {
            Self::Dense(w) => {
                to.put_product(start, dy, x)?;
                input_gradient(dy, w)
            }
            Self::Factored(w) => {
                let (dx, factors) = w.backward(&wide(x)?, &wide(dy)?)?;
                to.put(start, &factors)?;
                dx.to_dtype(x.dtype()).at("projection")
            }
        }
    }

    /// `W x` on a CPU, in f32.
    pub fn row(&self, x: &[f32]) -> Result<Vec<f32>> {
        match self {
            Self::Dense(w) => row(w, x),
            Self::Factored(w) => {
                let x = Tensor::from_slice(x, (1, x.len()), &Device::Cpu).at("projection")?;
                w.forward(&x)?.flatten_all().and_then(|y| y.to_vec1()).at("projection")
            }
        }
    }

    /// The matrix, where a kernel reads its elements.
    #[cfg(feature = "cuda")]
    pub fn dense(&self) -> Result<&Tensor> {
        match self {
            Self::Dense(w) => Ok(w),
            Self::Factored(_) => Err(Error::unsupported("stream on CUDA", "factored layers; use --device cpu")),
        }
    }
}

/// `x` in f32, which factored layers compute in; activations are bf16 on CUDA.
fn wide(x: &Tensor) -> Result<Tensor> {
    x.to_dtype(DType::F32).at("projection")
}

/// `x Wᵀ`.
pub(super) fn product(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    weight.t().and_then(|w| x.matmul(&w)).at("product")
}

/// The gradient of `x` of `y = x Wᵀ`, given that of `y`.
pub(super) fn input_gradient(dy: &Tensor, weight: &Tensor) -> Result<Tensor> {
    dy.matmul(weight).at("gradient of a product")
}

/// `W x` with `W [out, in]`, f32 on a CPU.
pub(super) fn row(weight: &Tensor, x: &[f32]) -> Result<Vec<f32>> {
    let (out, inputs) = weight.dims2().at("projection")?;
    if inputs != x.len() {
        let message = format!("{} values for {out} x {inputs} weights", x.len());
        return Err(Error::new(ErrorKind::Backend, "stream", message));
    }
    let weight = view(weight, "projection")?;
    Ok(weight.values::<f32>()?.chunks_exact(inputs).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect())
}
