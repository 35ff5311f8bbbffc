//! The tokens that an eviction rule keeps.
//!
//! Rows lie in order of position from row 0 on, whatever their positions are; each KV head has its own tokens in them. Keys are
//! stored rotated, so that attention needs no position: a chunk is attended as if it began at position [`CompressedKv::count`].

use super::ring::put;
use super::Ring;
use crate::error::{Error, ErrorKind, Result};
use crate::eviction::{Eviction, EvictionPlan, Seen, When};
use crate::layout::EvictLayer;
use crate::ops::{highest_rows, KeyValues};
use candle_core::{Device, Tensor};

/// An evicting layer's state.
#[derive(Debug)]
pub struct CompressedKv {
    rows: Ring,
    /// Rows in use, `0..count`.
    count: usize,
    /// The last queries `[W, H, D]`, position `p` in row `p % W`, until the rule has seen them.
    queries: Option<Tensor>,
    /// Tokens read.
    position: usize,
    plan: EvictionPlan,
    rule: &'static dyn Eviction,
    /// The layer's factor on dot products.
    scale: f32,
    /// Whether a rule that evicts once was told that the context is over.
    over: bool,
}

impl CompressedKv {
    /// Takes `rows` and allocates the queries of `heads` heads that the rule of `layer` must see.
    pub(super) fn new(layer: &EvictLayer, rows: Ring, heads: usize, device: &Device) -> Result<Self> {
        let k = rows.rows().k;
        let shape = (layer.observed, heads, k.dim(2)?);
        let queries = (layer.observed > 0).then(|| Tensor::zeros(shape, k.dtype(), device)).transpose()?;
        let (plan, rule, scale) = (layer.plan.clone(), layer.rule, layer.scale);
        Ok(Self { rows, count: 0, queries, position: 0, plan, rule, scale, over: false })
    }

    /// Rows in use, the same in every KV head.
    pub fn count(&self) -> usize {
        self.count
    }

    /// All rows; those from [`CompressedKv::count`] on hold nothing.
    pub fn rows(&self) -> KeyValues<'_> {
        self.rows.rows()
    }

    /// Rows allocated.
    pub fn capacity(&self) -> usize {
        self.rows.capacity()
    }

    /// Bytes allocated.
    pub fn capacity_bytes(&self) -> u64 {
        self.rows.capacity_bytes() + self.queries.as_ref().map_or(0, bytes)
    }

    /// Bytes in use after `position` tokens.
    pub fn used_bytes(&self, position: usize) -> u64 {
        let row = |q: &Tensor| bytes(q) / q.dims()[0] as u64 * position.min(q.dims()[0]) as u64;
        self.rows.used_bytes(self.count) + self.queries.as_ref().map_or(0, row)
    }

    /// How many of `left` tokens are attended at once before something may be evicted.
    pub fn piece(&self, left: usize) -> usize {
        match self.rule.when(&self.plan) {
            When::EveryBlock(block) => left.min(block - self.position % block),
            When::Once => left,
        }
    }

    /// Takes a piece that was attended, and evicts where a block is complete.
    ///
    /// # Shapes
    /// `q [T, H, D]`, `k`, `v` `[T, G, D]`, rotated; `T` at most what [`CompressedKv::piece`] allows.
    pub fn push(&mut self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        let t = k.dim(0)?;
        if self.count + t > self.capacity() {
            let message = format!("{t} tokens do not fit {} rows with {} in use", self.capacity(), self.count);
            return Err(Error::new(ErrorKind::Backend, "kept rows", message));
        }
        self.rows.write(k, v, self.count)?;
        if let Some(queries) = &self.queries {
            put(queries, q, self.position)?;
        }
        self.took(t)
    }

    /// Counts rows that are written, and evicts where a block is complete.
    pub(super) fn took(&mut self, t: usize) -> Result<()> {
        (self.count, self.position) = (self.count + t, self.position + t);
        match self.rule.when(&self.plan) {
            When::EveryBlock(block) if self.position.is_multiple_of(block) => self.evict(),
            _ => Ok(()),
        }
    }

    /// The rows as a captured step sees them, and how many positions before its token's have none; `None` while the rule must see
    /// queries, which such a step does not keep.
    #[cfg(feature = "cuda")]
    pub(crate) fn captured(&self) -> Option<(&Ring, usize)> {
        self.queries.is_none().then(|| (&self.rows, self.position - self.count))
    }

    /// Evicts for the end of the context, after which at most `room` tokens come; returns the bytes that were allocated for that
    /// while everything else still was.
    ///
    /// # Errors
    /// Too little memory, or a backend's failure; the state is then what it was.
    pub(super) fn end_of_context(&mut self, room: usize) -> Result<u64> {
        if self.rule.when(&self.plan) != When::Once {
            return self.evict().map(|()| 0);
        }
        if self.over || self.position == 0 {
            return Ok(0);
        }
        let mut copied = 0;
        if self.count > self.plan.budget {
            let (k, v) = self.chosen()?;
            let (_, kv_heads, dim) = k.dims3()?;
            let mut rows = Ring::new(self.plan.budget + room, (kv_heads, dim), k.dtype(), k.device())?;
            rows.write(&k, &v, 0)?;
            copied = rows.capacity_bytes();
            (self.rows, self.count) = (rows, self.plan.budget);
        }
        (self.queries, self.over) = (None, true);
        Ok(copied)
    }

    /// Cuts to the budget within the rows allocated.
    fn evict(&mut self) -> Result<()> {
        if self.count <= self.plan.budget {
            return Ok(());
        }
        let (k, v) = self.chosen()?;
        self.rows.write(&k, &v, 0)?;
        self.count = self.plan.budget;
        Ok(())
    }

    /// Keys and values that stay, `[budget, G, D]`.
    fn chosen(&self) -> Result<(Tensor, Tensor)> {
        let KeyValues { k, v } = self.rows();
        let queries = self.queries.as_ref().map(|q| self.in_order(q)).transpose()?;
        let seen = Seen { keys: &k.narrow(0, 0, self.count)?, queries: queries.as_ref(), scale: self.scale };
        let index = highest_rows(&self.rule.scores(&self.plan, &seen)?, self.plan.budget)?;
        let (rows, kv_heads, dim) = k.dims3()?;
        let take = |x: &Tensor| -> Result<Tensor> {
            let taken = x.reshape((rows * kv_heads, dim))?.index_select(&index, 0)?;
            Ok(taken.reshape((self.plan.budget, kv_heads, dim))?)
        };
        Ok((take(k)?, take(v)?))
    }

    /// The last queries, oldest first.
    fn in_order(&self, queries: &Tensor) -> Result<Tensor> {
        let held = queries.dim(0)?;
        match self.position % held {
            0 => Ok(queries.clone()),
            at => Ok(Tensor::cat(&[queries.narrow(0, at, held - at)?, queries.narrow(0, 0, at)?], 0)?),
        }
    }
}

fn bytes(x: &Tensor) -> u64 {
    (x.elem_count() * x.dtype().size_in_bytes()) as u64
}
