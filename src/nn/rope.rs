//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864), always from f32 tables.
//!
//! The halves of a head are rotated against each other: `(x₁, x₂) → (x₁ cos − x₂ sin, x₂ cos + x₁ sin)`. A table covers
//! the positions of one chunk, and positions may be fractional: a pooled key has the mean position of its block. Angles
//! are the f32 product of position and frequency, as in transformers, since at position 9,000 another rounding of the
//! same product moves the angle by 5e-4.

use crate::error::Result;
use crate::ops;
use crate::spec::{RopeScaling, RopeSpec};
use candle_core::{Device, Tensor};
use std::f64::consts::PI;

/// A rotary embedding, as its scaled frequencies.
#[derive(Debug, Clone)]
pub struct Rope {
    inv_freq: Vec<f32>,
    amplitude: f32,
}

/// cos and sin of a chunk's positions, each f32 `[T, D / 2]`.
#[derive(Debug, Clone)]
pub struct RopeTable {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    /// Computes the frequencies `θ^(-2i/R)` of the `R` rotated dimensions and scales them as `spec` says. The others have
    /// frequency 0: in memory the halves of the rotated dimensions begin the halves of the head.
    pub fn new(spec: &RopeSpec) -> Self {
        let dim = spec.rotated as f64;
        let base: Vec<f64> = (0..spec.rotated / 2).map(|i| spec.theta.powf(-2.0 * i as f64 / dim)).collect();
        let mut amplitude = 1.0;
        let scaled: Vec<f64> = match &spec.scaling {
            RopeScaling::None => base,
            RopeScaling::Linear { factor } => base.iter().map(|f| f / factor).collect(),
            RopeScaling::Factors { divisors } => base.iter().zip(divisors).map(|(f, d)| f / *d as f64).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
                let one = |f: &f64| llama3(*f, *factor, *low_freq_factor, *high_freq_factor, *original as f64);
                base.iter().map(one).collect()
            }
            RopeScaling::Yarn { factor, original, beta_fast, beta_slow, attention_factor, truncate } => {
                amplitude = *attention_factor;
                let edge =
                    |rotations: f64| dim * (*original as f64 / (rotations * 2.0 * PI)).ln() / (2.0 * spec.theta.ln());
                let (mut low, mut high) = (edge(*beta_fast), edge(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let width = if high == low { 0.001 } else { high - low };
                let ramp = |i: usize| ((i as f64 - low) / width).clamp(0.0, 1.0);
                base.iter().enumerate().map(|(i, f)| f / factor * ramp(i) + f * (1.0 - ramp(i))).collect()
            }
        };
        let still = (spec.rotated / 2..spec.dim / 2).map(|_| 0.0);
        Self { inv_freq: scaled.iter().map(|f| *f as f32).chain(still).collect(), amplitude: amplitude as f32 }
    }

    /// Computes cos and sin at `positions`.
    pub fn table(&self, positions: impl ExactSizeIterator<Item = f32>, device: &Device) -> Result<RopeTable> {
        let (cos, sin) = ops::rope_table(&self.inv_freq, positions, self.amplitude, device)?;
        Ok(RopeTable { cos, sin })
    }

    /// Frequencies after scaling, and the factor on cos and sin.
    pub fn frequencies(&self) -> (&[f32], f32) {
        (&self.inv_freq, self.amplitude)
    }
}

/// Llama 3.1's ramp between unscaled and divided frequencies.
fn llama3(f: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let wavelength = 2.0 * PI / f;
    if wavelength < original / high {
        f
    } else if wavelength > original / low {
        f / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * f / factor + smooth * f
    }
}

impl RopeTable {
    /// cos and sin, each f32 `[T, D / 2]`.
    pub fn cos_sin(&self) -> (&Tensor, &Tensor) {
        (&self.cos, &self.sin)
    }

    /// Rotates `x` row by row.
    ///
    /// # Shapes
    /// `x` and the result `[T, heads, D]`.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        ops::prepare_heads(x, x.dim(1)?, None, None, Some((&self.cos, &self.sin)))
    }
}
