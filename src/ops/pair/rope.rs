//! Rotation by positions within a pair of chunks (Su et al. 2021, arXiv:2104.09864; halves of a head as in Llama).

use crate::error::{At, Error, Result};
use candle_core::{Device, Tensor};

/// Cosines and sines for positions `0 .. 2 B`.
#[derive(Debug, Clone)]
pub struct PairRope {
    chunk: usize,
    half: usize,
    /// `[2 B][D / 2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// `[2, 2 B, D / 2]` on the device: cosines, then sines.
    tables: Tensor,
}

impl PairRope {
    /// Makes the tables in f64, rounded to f32: angle `p θ^(-2 c / D)` of position `p` and channels `c`, `c + D / 2`.
    ///
    /// # Errors
    /// An odd `dim`, or a backend's failure.
    pub fn new(chunk: usize, dim: usize, theta: f64, device: &Device) -> Result<Self> {
        if dim == 0 || !dim.is_multiple_of(2) {
            return Err(Error::usage("head_dim", format!("{dim} is not even")));
        }
        let half = dim / 2;
        let angle = |i: usize| (i / half) as f64 * theta.powf(-2.0 * (i % half) as f64 / dim as f64);
        let cos: Vec<f32> = (0..2 * chunk * half).map(|i| angle(i).cos() as f32).collect();
        let sin: Vec<f32> = (0..2 * chunk * half).map(|i| angle(i).sin() as f32).collect();
        let tables =
            Tensor::from_vec([cos.as_slice(), &sin].concat(), (2, 2 * chunk, half), device).at("rope tables")?;
        Ok(Self { chunk, half, cos, sin, tables })
    }

    /// Characters of a chunk.
    pub fn chunk(&self) -> usize {
        self.chunk
    }

    /// The tables on their device, f32 `[2, 2 B, D / 2]`.
    pub fn tables(&self) -> &Tensor {
        &self.tables
    }

    /// Writes `x` rotated by position `p` to `out`.
    pub(crate) fn rotate_into(&self, x: &[f32], p: usize, out: &mut [f32]) {
        let (cos, sin) = (&self.cos[p * self.half..][..self.half], &self.sin[p * self.half..][..self.half]);
        let (low, high) = x.split_at(self.half);
        let (out_low, out_high) = out.split_at_mut(self.half);
        for c in 0..self.half {
            out_low[c] = low[c] * cos[c] - high[c] * sin[c];
            out_high[c] = high[c] * cos[c] + low[c] * sin[c];
        }
    }

    /// Adds `x` rotated back by position `p` to `out`: the gradient of [`Self::rotate_into`].
    pub(super) fn add_rotated_back(&self, x: &[f32], p: usize, out: &mut [f32]) {
        let (cos, sin) = (&self.cos[p * self.half..][..self.half], &self.sin[p * self.half..][..self.half]);
        let (low, high) = x.split_at(self.half);
        let (out_low, out_high) = out.split_at_mut(self.half);
        for c in 0..self.half {
            out_low[c] += low[c] * cos[c] + high[c] * sin[c];
            out_high[c] += high[c] * cos[c] - low[c] * sin[c];
        }
    }
}
