//! AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) on one flat vector, in f32.

use super::Layout;
use crate::error::{At, Result};
use crate::ops::view;
use candle_core::{DType, Tensor};
use rayon::prelude::*;

/// Settings of [`AdamW`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWSettings {
    /// Decay of the mean gradient.
    pub beta1: f64,
    /// Decay of the mean squared gradient.
    pub beta2: f64,
    /// Added to the root of the mean square.
    pub eps: f64,
    /// Weight decay, times the learning rate.
    pub decay: f64,
    /// Largest norm of the gradient; a longer one is scaled down.
    pub clip: f64,
}

impl Default for AdamWSettings {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, decay: 0.1, clip: 1.0 }
    }
}

/// Master weights and moments.
#[derive(Debug, Clone)]
pub struct AdamW {
    settings: AdamWSettings,
    weights: Tensor,
    mean: Tensor,
    square: Tensor,
    decays: Tensor,
    steps: u64,
}

impl AdamW {
    /// Starts from `weights`, f32 `[len]`, with moments of zero.
    ///
    /// # Errors
    /// A vector of another length.
    pub fn new(layout: &Layout, weights: Tensor, settings: AdamWSettings) -> Result<Self> {
        layout.check(&weights, "weights")?;
        let zeros = || Tensor::zeros(layout.len(), DType::F32, weights.device()).at("moments");
        let (mean, square, decays) = (zeros()?, zeros()?, layout.decays(weights.device())?);
        Ok(Self { settings, weights, mean, square, decays, steps: 0 })
    }

    /// Master weights, f32 `[len]`.
    pub fn weights(&self) -> &Tensor {
        &self.weights
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The mean gradient and the mean squared gradient, f32 `[len]`.
    pub fn moments(&self) -> (&Tensor, &Tensor) {
        (&self.mean, &self.square)
    }

    /// Continues a run: `weights`, moments and steps as they were saved.
    ///
    /// # Errors
    /// A vector of another length.
    pub fn restore(
        &mut self,
        layout: &Layout,
        weights: Tensor,
        mean: Tensor,
        square: Tensor,
        steps: u64,
    ) -> Result<()> {
        for (tensor, what) in [(&weights, "weights"), (&mean, "first moments"), (&square, "second moments")] {
            layout.check(tensor, what)?;
        }
        (self.weights, self.mean, self.square, self.steps) = (weights, mean, square, steps);
        Ok(())
    }

    /// One step at `rate`; returns the norm that the gradient had.
    ///
    /// # Shapes
    /// `gradient` f32 `[len]`.
    ///
    /// # Errors
    /// A backend's failure.
    pub fn step(&mut self, gradient: &Tensor, rate: f64) -> Result<f64> {
        let s = self.settings;
        let norm = sum_of_squares(gradient)?.sqrt();
        let scale = if norm > s.clip { s.clip / norm } else { 1.0 };
        self.steps += 1;
        let bias = |beta: f64| 1.0 - beta.powf(self.steps as f64);
        let (bias1, bias2) = (bias(s.beta1), bias(s.beta2));
        let update = || -> candle_core::Result<_> {
            let g = (gradient * scale)?;
            let mean = ((&self.mean * s.beta1)? + (&g * (1.0 - s.beta1))?)?;
            let square = ((&self.square * s.beta2)? + (g.sqr()? * (1.0 - s.beta2))?)?;
            let root = ((&square / bias2)?.sqrt()? + s.eps)?;
            let step = ((&mean / root)? * (rate / bias1))?;
            let decayed = (&self.weights - (&self.weights * &self.decays)? * (rate * s.decay))?;
            Ok((mean, square, (decayed - step)?))
        };
        (self.mean, self.square, self.weights) = update().at("optimiser step")?;
        Ok(norm)
    }
}

/// In f64: a running sum of millions of squares in f32 loses some of them.
fn sum_of_squares(x: &Tensor) -> Result<f64> {
    if x.device().is_cpu() {
        let x = view(x, "gradient")?;
        let square = |part: &[f32]| part.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
        // Parts of one size, so that the sum does not depend on the number of threads.
        let parts: Vec<f64> = x.values::<f32>()?.par_chunks(1 << 14).map(square).collect();
        return Ok(parts.iter().sum());
    }
    let sum = x.to_dtype(DType::F64).and_then(|x| x.sqr()?.sum_all()?.to_scalar());
    sum.at("norm of the gradient")
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn the_norm_of_millions_of_elements_is_exact() -> Result<()> {
        let x = Tensor::full(0.1f32, 3_000_000, &Device::Cpu)?;
        let want = 3e6 * f64::from(0.1f32) * f64::from(0.1f32);
        assert!((sum_of_squares(&x)? / want - 1.0).abs() < 1e-12);
        Ok(())
    }
}
