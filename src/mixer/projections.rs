//! Queries, keys and values from the residual stream, and back.

use crate::error::Result;
use crate::nn::{Linear, RmsNorm, RopeTable};
use crate::ops::prepare_heads;
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

/// A chunk's queries, keys and values.
pub struct Qkv {
    /// `[T, H, D]`, rotated.
    pub q: Tensor,
    /// `[T, G, D]`, rotated.
    pub k: Tensor,
    /// `[T, G, D]`.
    pub v: Tensor,
    /// Queries and keys before rotation, where they were asked for.
    pub plain: Option<(Tensor, Tensor)>,
}

impl Projections {
    /// Projects and rotates, in one pass over each result unless `keep_plain` asks for what lies between.
    ///
    /// # Shapes
    /// `x [T, hidden]`, `table` of the chunk's positions.
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
