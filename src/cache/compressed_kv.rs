//! Cache of an evicting layer: the tokens that a rule keeps.
//!
//! Rows `0..count` are in order of position, with different tokens in each KV head. Keys are stored rotated, so
//! attention needs no positions: a chunk is processed as if it started at position [`CompressedKv::count`].

use super::ring::write_wrapped;
use super::Ring;
use crate::error::{Error, ErrorKind, Result};
use crate::eviction::{Eviction, EvictionPlan, ScoreArgs, When};
use crate::layout::EvictLayer;
use crate::ops::{highest_rows, KeyValues};
use candle_core::{Device, Tensor};

/// Cache of an evicting layer.
#[derive(Debug)]
pub struct CompressedKv {
    rows: Ring,
    /// Rows in use, `0..count`.
    count: usize,
    /// The last queries `[W, H, D]`, position `p` in row `p % W`, until a rule that evicts once has scored with them.
    queries: Option<Tensor>,
    /// Tokens processed.
    position: usize,
    plan: EvictionPlan,
    rule: &'static dyn Eviction,
    /// Factor on dot products.
    scale: f32,
    /// Whether a rule that evicts once has done so.
    over: bool,
}

impl CompressedKv {
    /// Creates the state on `rows`, and allocates room for the last queries of `heads` heads if the rule of `layer`
    /// needs them.
    pub(super) fn new(layer: &EvictLayer, rows: Ring, heads: usize, device: &Device) -> Result<Self> {
        let k = rows.rows().k;
        let shape = (layer.observed, heads, k.dim(2)?);
        let queries = (layer.observed > 0).then(|| Tensor::zeros(shape, k.dtype(), device)).transpose()?;
        let (plan, rule, scale) = (layer.plan.clone(), layer.rule, layer.scale);
        Ok(Self { rows, count: 0, queries, position: 0, plan, rule, scale, over: false })
    }

    /// Returns the number of rows in use, the same for every KV head.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Returns all rows; those from [`CompressedKv::count`] on are unused.
    pub fn rows(&self) -> KeyValues<'_> {
        self.rows.rows()
    }

    /// Returns the number of rows allocated.
    pub fn capacity(&self) -> usize {
        self.rows.capacity()
    }

    /// Returns the allocated bytes.
    pub fn capacity_bytes(&self) -> u64 {
        self.rows.capacity_bytes() + self.queries.as_ref().map_or(0, bytes)
    }

    /// Returns the bytes in use after `position` tokens.
    pub fn used_bytes(&self, position: usize) -> u64 {
        let row = |q: &Tensor| bytes(q) / q.dims()[0] as u64 * position.min(q.dims()[0]) as u64;
        self.rows.used_bytes(self.count) + self.queries.as_ref().map_or(0, row)
    }

    /// Returns the number of tokens, at most `left`, that can be processed before the next eviction.
    pub fn until_eviction(&self, left: usize) -> usize {
        match self.rule.when(&self.plan) {
            When::EveryBlock(block) => left.min(block - self.position % block),
            When::Once => left,
        }
    }

    /// Stores `T` tokens after attention, and evicts where a block is complete.
    ///
    /// # Shapes
    /// `q [T, H, D]`, `k`, `v` `[T, G, D]`, rotated; `T` at most [`CompressedKv::until_eviction`].
    ///
    /// # Errors
    /// The tokens do not fit the rows; the device fails.
    pub fn push(&mut self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
        let t = k.dim(0)?;
        if self.count + t > self.capacity() {
            let message = format!("{t} tokens do not fit {} rows with {} in use", self.capacity(), self.count);
            return Err(Error::new(ErrorKind::Backend, "compressed KV", message));
        }
        self.rows.write(k, v, self.count)?;
        if let Some(queries) = &self.queries {
            write_wrapped(queries, q, self.position)?;
        }
        self.advance(t)
    }

    /// Advances the position by `t` tokens whose rows are written, and evicts where a block is complete.
    pub(super) fn advance(&mut self, t: usize) -> Result<()> {
        (self.count, self.position) = (self.count + t, self.position + t);
        match self.rule.when(&self.plan) {
            When::EveryBlock(block) if self.position.is_multiple_of(block) => self.evict(),
            _ => Ok(()),
        }
    }

    /// Returns the rows for a captured step and the number of evicted positions (position minus row index); `None`
    /// while the rule needs the last queries, which a captured step does not store.
    #[cfg(feature = "cuda")]
    pub(crate) fn captured(&self) -> Option<(&Ring, usize)> {
        self.queries.is_none().then(|| (&self.rows, self.position - self.count))
    }

    /// Evicts at the end of the context, which at most `room` tokens follow; returns the bytes allocated for the copy
    /// of the kept rows while the old rows were still allocated.
    ///
    /// # Errors
    /// There is too little memory, or the device fails; the state is then unchanged.
    pub(super) fn end_of_context(&mut self, room: usize) -> Result<u64> {
        if self.rule.when(&self.plan) != When::Once {
            return self.evict().map(|()| 0);
        }
        if self.over || self.position == 0 {
            return Ok(0);
        }
        let mut copied = 0;
        if self.count > self.plan.budget {
            let (k, v) = self.kept_rows()?;
            let (_, kv_heads, dim) = k.dims3()?;
            let mut rows = Ring::new(self.plan.budget + room, (kv_heads, dim), k.dtype(), k.device())?;
            rows.write(&k, &v, 0)?;
            copied = rows.capacity_bytes();
            (self.rows, self.count) = (rows, self.plan.budget);
        }
        (self.queries, self.over) = (None, true);
        Ok(copied)
    }

    /// Evicts down to the budget, in place.
    fn evict(&mut self) -> Result<()> {
        if self.count <= self.plan.budget {
            return Ok(());
        }
        let (k, v) = self.kept_rows()?;
        self.rows.write(&k, &v, 0)?;
        self.count = self.plan.budget;
        Ok(())
    }

    /// Returns a copy of the highest-scored keys and values, `[budget, G, D]`.
    fn kept_rows(&self) -> Result<(Tensor, Tensor)> {
        let KeyValues { k, v } = self.rows();
        let queries = self.queries.as_ref().map(|q| self.oldest_first(q)).transpose()?;
        let args = ScoreArgs { keys: &k.narrow(0, 0, self.count)?, queries: queries.as_ref(), scale: self.scale };
        let index = highest_rows(&self.rule.scores(&self.plan, &args)?, self.plan.budget)?;
        let (rows, kv_heads, dim) = k.dims3()?;
        let take = |x: &Tensor| -> Result<Tensor> {
            let taken = x.reshape((rows * kv_heads, dim))?.index_select(&index, 0)?;
            Ok(taken.reshape((self.plan.budget, kv_heads, dim))?)
        };
        Ok((take(k)?, take(v)?))
    }

    /// Returns the last queries in order of position.
    fn oldest_first(&self, queries: &Tensor) -> Result<Tensor> {
        let count = queries.dim(0)?;
        match self.position % count {
            0 => Ok(queries.clone()),
            at => Ok(Tensor::cat(&[queries.narrow(0, at, count - at)?, queries.narrow(0, 0, at)?], 0)?),
        }
    }
}

fn bytes(x: &Tensor) -> u64 {
    (x.elem_count() * x.dtype().size_in_bytes()) as u64
}
