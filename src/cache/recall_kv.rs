//! Cache of a layer with exact recall: sinks and local ring, codes of every position, and every exact key and value in
//! host memory.

use super::{HostStore, PoolBytes, Ring};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{LayerPlan, RecallLayer};
use crate::ops::recall::Rest;
use crate::ops::view;
use crate::recall::{HeadCode, LayerTables, ValueCode};
use crate::retrofit::RestKind;
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

/// Cache of a layer with exact recall.
#[derive(Debug)]
pub struct RecallKv {
    /// Local ring of `(w + 1) B` raw positions: the window and the query's own block.
    pub local: Ring,
    /// Sinks, positions `0..S`.
    sinks: Option<Ring>,
    sink_tokens: usize,
    /// Every position's exact key and value.
    store: HostStore,
    tables: Arc<LayerTables>,
    /// Key codes of each KV head, `[positions, bytes]`.
    key_codes: Vec<Vec<u8>>,
    /// Value codes of each KV head, `[positions, bytes]`; empty without them.
    value_codes: Vec<Vec<u8>>,
    /// Means of the values of each KV head, `[blocks, D]`; empty without them.
    means: Vec<Vec<f32>>,
    block: usize,
    rest: RestKind,
    /// Bytes of all pools, as the layout computes them.
    bytes: PoolBytes,
    ctx: usize,
    dim: usize,
}

impl RecallKv {
    /// Allocates the cache of `layer`; `local` is its ring.
    pub(super) fn new(
        layer: &RecallLayer,
        local: Ring,
        plan: &LayerPlan,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let Some(tables) = layer.tables.clone() else {
            return Err(Error::new(ErrorKind::Usage, "recall", "needs a calibration of this model"));
        };
        if !device.is_cpu() {
            return Err(Error::unsupported("recall", "has no kernels for a GPU yet"));
        }
        let (row, ctx) = (plan.row(), layer.ctx);
        let (heads, dim) = row;
        let sink = |n: usize| (n > 0).then(|| Ring::new(n, row, dtype, device)).transpose();
        let means = match layer.settings.rest {
            RestKind::Means => vec![vec![0.0; ctx.div_ceil(layer.settings.block) * dim]; heads],
            _ => vec![],
        };
        let value_codes = match layer.settings.rest {
            RestKind::Codes => tables.values.iter().map(|v| vec![0; ctx * v.bytes()]).collect(),
            _ => vec![],
        };
        Ok(Self {
            local,
            sinks: sink(layer.sink_rows)?,
            sink_tokens: layer.settings.sink_tokens,
            store: HostStore::new(ctx, row, dtype, device)?,
            key_codes: tables.keys.iter().map(|k| vec![0; layer.coded() * k.bytes()]).collect(),
            value_codes,
            means,
            tables,
            block: layer.settings.block,
            rest: layer.settings.rest,
            bytes: plan.bytes(dtype),
            ctx,
            dim,
        })
    }

    /// Returns the sinks, if the layer has any.
    pub fn sinks(&self) -> Option<&Ring> {
        self.sinks.as_ref()
    }

    /// Returns the exact keys and values of every position.
    pub fn store(&self) -> &HostStore {
        &self.store
    }

    /// Returns the key code of each KV head and the codes.
    pub fn keys(&self) -> (&[Arc<dyn HeadCode>], Vec<&[u8]>) {
        (&self.tables.keys, slices(&self.key_codes))
    }

    /// Returns what estimates values, with slices by KV head made by [`RecallKv::value_rows`].
    pub fn rest<'a>(&'a self, rows: &'a ValueRows<'a>) -> Rest<'a> {
        match self.rest {
            RestKind::None => Rest::None,
            RestKind::Means => Rest::Means { block: self.block, means: &rows.means },
            RestKind::Codes => Rest::Codes { code: &self.tables.values, codes: &rows.codes },
        }
    }

    /// Returns the rows that estimate values, by KV head.
    pub fn value_rows(&self) -> ValueRows<'_> {
        ValueRows { codes: slices(&self.value_codes), means: slices(&self.means) }
    }

    /// Stores `T` tokens from position `start` on, after attention.
    ///
    /// # Shapes
    /// `k`, `v` `[T, G, D]`, keys rotated.
    ///
    /// # Errors
    /// Positions beyond the context.
    pub fn push(&mut self, k: &Tensor, v: &Tensor, start: usize) -> Result<()> {
        let tokens = k.dim(0)?;
        if let Some(sinks) = self.sinks.as_mut().filter(|_| start < self.sink_tokens) {
            let n = (self.sink_tokens - start).min(tokens);
            sinks.write(&k.narrow(0, 0, n)?, &v.narrow(0, 0, n)?, start)?;
        }
        self.local.write(k, v, start)?;
        self.store.write(k, v, start)?;
        let rows = view(self.store.rows()?, "recall store")?;
        let exact: Vec<&[f32]> = rows.values::<f32>()?.chunks_exact(self.ctx * 2 * self.dim).collect();
        for (g, exact) in exact.into_iter().enumerate() {
            let row = |p: usize, part: usize| &exact[(2 * p + part) * self.dim..][..self.dim];
            let code = &self.tables.keys[g];
            let first = start / code.page() * code.page();
            let keys: Vec<f32> = (first..start + tokens).flat_map(|p| row(p, 0)).copied().collect();
            code.encode(&keys, &mut self.key_codes[g][first * code.bytes()..]);
            let values = || -> Vec<f32> { (start..start + tokens).flat_map(|p| row(p, 1)).copied().collect() };
            if let Some(codes) = self.value_codes.get_mut(g) {
                let code: &ValueCode = &self.tables.values[g];
                code.encode(&values(), &mut codes[start * code.bytes()..]);
            }
            if let Some(means) = self.means.get_mut(g) {
                for p in start.max(self.sink_tokens)..start + tokens {
                    let n = p / self.block;
                    // The block's far positions up to this one: sinks are not among them.
                    let count = (p + 1 - (n * self.block).max(self.sink_tokens)) as f32;
                    let mean = &mut means[n * self.dim..][..self.dim];
                    mean.iter_mut().zip(row(p, 1)).for_each(|(m, v)| *m += (v - *m) / count);
                }
            }
        }
        Ok(())
    }

    /// Returns the allocated bytes by pool.
    pub fn capacity_bytes(&self) -> PoolBytes {
        let values: usize = self.value_codes.iter().map(Vec::len).sum();
        let means: usize = self.means.iter().map(|m| 4 * m.len()).sum();
        PoolBytes {
            local: self.local.capacity_bytes(),
            sink: self.sinks.as_ref().map_or(0, Ring::capacity_bytes),
            key_codes: self.key_codes.iter().map(|c| c.len() as u64).sum(),
            values: (values + means) as u64,
            host: self.store.capacity_bytes(),
            ..self.bytes
        }
    }

    /// Returns the bytes in use by pool after `position` tokens.
    pub fn used_bytes(&self, position: usize) -> PoolBytes {
        let all = self.capacity_bytes();
        let share = |bytes: u64| (bytes as u128 * position.min(self.ctx) as u128 / self.ctx as u128) as u64;
        PoolBytes {
            local: self.local.used_bytes(position),
            sink: self.sinks.as_ref().map_or(0, |r| r.used_bytes(position)),
            key_codes: share(all.key_codes),
            values: share(all.values),
            host: self.store.used_bytes(position),
            ..all
        }
    }
}

/// Slices of a layer's value codes and means, by KV head.
#[derive(Debug)]
pub struct ValueRows<'a> {
    codes: Vec<&'a [u8]>,
    means: Vec<&'a [f32]>,
}

fn slices<T>(rows: &[Vec<T>]) -> Vec<&[T]> {
    rows.iter().map(Vec::as_slice).collect()
}
