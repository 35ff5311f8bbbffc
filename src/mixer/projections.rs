//! Queries, keys and values from the residual stream, and back.

use crate::error::Result;
use crate::nn::{Linear, RmsNorm};
use candle_core::Tensor;

/// The projections of an attention layer.
pub struct Projections {
    /// `[H D, hidden]`.
    pub q: Linear,
    /// `[G D, hidden]`.
    pub k: Linear,
    /// `[G D, hidden]`.
    pub v: Linear,
    /// `[hidden, H D]`.
    pub out: Linear,
    /// Norms of each head of q and k, over `D`.
    pub qk_norm: Option<(RmsNorm, RmsNorm)>,
    /// `H`.
    pub heads: usize,
    /// `G`.
    pub kv_heads: usize,
    /// `D`.
    pub head_dim: usize,
    /// Factor on the logits.
    pub scale: f32,
    /// Index of the layer's rotary embedding.
    pub rope: usize,
}

/// A chunk's queries, keys and values, not yet rotated.
pub struct Qkv {
    /// `[T, H, D]`.
    pub q: Tensor,
    /// `[T, G, D]`.
    pub k: Tensor,
    /// `[T, G, D]`.
    pub v: Tensor,
}

impl Projections {
    /// # Shapes
    /// `x [T, hidden]`.
    pub fn project(&self, x: &Tensor) -> Result<Qkv> {
        let t = x.dim(0)?;
        let split = |y: Tensor, heads: usize| y.reshape((t, heads, self.head_dim));
        let [q, k, v] = Linear::forward_all([&self.q, &self.k, &self.v], x)?;
        let (mut q, mut k) = (split(q, self.heads)?, split(k, self.kv_heads)?);
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
        }
        Ok(Qkv { q, k, v: split(v, self.kv_heads)? })
    }

    /// # Shapes
    /// `o [T, H, D]` to `[T, hidden]`.
    pub fn output(&self, o: &Tensor) -> Result<Tensor> {
        self.out.forward(&o.flatten_from(1)?)
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        [&self.q, &self.k, &self.v, &self.out].iter().map(|l| l.bytes()).sum()
    }
}
