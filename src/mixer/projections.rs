//! Query, key, value and output projections.

use crate::error::Result;
use crate::nn::{Linear, RmsNorm, RopeTable};
use crate::ops::prepare_heads;
use candle_core::Tensor;

/// Projections of an attention layer.
pub struct Projections {
    /// Query projection, `[H D, hidden]`.
    pub q: Linear,
    /// Key projection, `[G D, hidden]`.
    pub k: Linear,
    /// Value projection, `[G D, hidden]`.
    pub v: Linear,
    /// Output projection, `[hidden, H D]`.
    pub out: Linear,
    /// Gate of the output, `[H D, hidden]`: the output is multiplied by its sigmoid.
    pub gate: Option<Linear>,
    /// RMS norms of each head of q and of k, over `D`.
    pub qk_norm: Option<(RmsNorm, RmsNorm)>,
    /// Query heads, `H`.
    pub heads: usize,
    /// Key and value heads, `G`.
    pub kv_heads: usize,
    /// Head dimension, `D`.
    pub head_dim: usize,
    /// Factor on attention logits.
    pub scale: f32,
    /// Index of the layer's rotary embedding.
    pub rope: usize,
}

/// A chunk's queries, keys and values.
pub struct Qkv {
    /// Rotated queries, `[T, H, D]`.
    pub q: Tensor,
    /// Rotated keys, `[T, G, D]`.
    pub k: Tensor,
    /// Values, `[T, G, D]`.
    pub v: Tensor,
    /// Queries and keys before rotation, if requested.
    pub plain: Option<(Tensor, Tensor)>,
}

impl Projections {
    /// Computes rotated queries, keys and values; with `keep_plain` also returns queries and keys before rotation,
    /// which takes a second pass over them.
    ///
    /// # Shapes
    /// `x [T, hidden]`; `table` covers the chunk's `T` positions.
    pub fn project(&self, x: &Tensor, table: &RopeTable, keep_plain: bool) -> Result<Qkv> {
        let [q, k, v] = Linear::products([&self.q, &self.k, &self.v], x)?;
        let (q_norm, k_norm) = match &self.qk_norm {
            Some((q, k)) => (Some(q.over_heads()), Some(k.over_heads())),
            None => (None, None),
        };
        let rotation = (!keep_plain).then(|| table.cos_sin());
        let q = prepare_heads(&q, self.heads, self.q.bias(), q_norm, rotation)?;
        let k = prepare_heads(&k, self.kv_heads, self.k.bias(), k_norm, rotation)?;
        let v = prepare_heads(&v, self.kv_heads, self.v.bias(), None, None)?;
        Ok(match keep_plain {
            true => Qkv { q: table.apply(&q)?, k: table.apply(&k)?, v, plain: Some((q, k)) },
            false => Qkv { q, k, v, plain: None },
        })
    }

    /// Applies the gate, which is computed from the layer's input `x`, and the output projection.
    ///
    /// # Shapes
    /// `o [T, H, D]` and `x [T, hidden]` to `[T, hidden]`.
    pub fn output(&self, o: &Tensor, x: &Tensor) -> Result<Tensor> {
        let o = o.flatten_from(1)?;
        match &self.gate {
            None => self.out.forward(&o),
            Some(gate) => self.out.forward(&(o * candle_nn::ops::sigmoid(&gate.forward(x)?)?)?),
        }
    }

    /// Returns the matrices.
    pub fn matrices(&self) -> impl Iterator<Item = &Linear> {
        [&self.q, &self.k, &self.v, &self.out].into_iter().chain(&self.gate)
    }
}
