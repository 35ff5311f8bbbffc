//! Cache of a butterfly layer: a pool of raw rows (sinks and local ring) and a pool of summary rows, allocated once.

use super::{PoolBytes, Ring, Sinks};
use crate::error::Result;
use crate::layout::ButterflyLayer;
use crate::ops::{Pooled, RunningMean};
use candle_core::{DType, Device, Tensor};

/// Cache of a butterfly layer.
#[derive(Debug)]
pub struct TwoPool {
    /// Local ring of `(w + 1) B` raw positions: the window and the query's own block.
    pub local: Ring,
    /// Sinks, positions `0..S`.
    sinks: Sinks,
    /// The newest summaries: block `n` in row `n % rows`.
    summaries: Option<Ring>,
    /// Running mean of the block in progress.
    pub running: RunningMean,
    block: usize,
    /// Number of blocks that can be read; summaries of later blocks are not stored, so that they do not overwrite
    /// earlier ones.
    readable: usize,
}

impl TwoPool {
    /// Allocates sinks and summaries for `layer`; `local` is its ring.
    pub(super) fn new(
        layer: &ButterflyLayer,
        local: Ring,
        row: (usize, usize),
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let summaries = (layer.summary_rows > 0).then(|| Ring::new(layer.summary_rows, row, dtype, device));
        Ok(Self {
            local,
            sinks: Sinks::new(layer.sink_rows, layer.settings.sink_tokens, row, dtype, device)?,
            summaries: summaries.transpose()?,
            running: RunningMean::new(row.0 * row.1, device)?,
            block: layer.settings.block,
            readable: layer.grid.readable(),
        })
    }

    /// Returns the sinks, if the layer has any.
    pub fn sinks(&self) -> Option<&Ring> {
        self.sinks.rows()
    }

    /// Stores the sinks among a chunk's positions. Called before attention: the chunk's later queries read them.
    pub fn keep_sinks(&mut self, k: &Tensor, v: &Tensor, start: usize) -> Result<()> {
        self.sinks.keep(k, v, start)
    }

    /// Returns the summary rows, if the layer has any.
    pub fn summary_rows(&self) -> Option<&Ring> {
        self.summaries.as_ref()
    }

    /// Returns the summary rows and the blocks stored in them when all blocks before `next` are complete; block `n` is
    /// in row `n % rows`.
    pub fn summaries(&self, next: usize) -> Option<(&Ring, std::ops::Range<usize>)> {
        let ring = self.summaries.as_ref()?;
        let end = next.min(self.readable);
        Some((ring, end.saturating_sub(ring.capacity())..end))
    }

    /// Stores the summaries of blocks that a chunk completed. Called after attention: the chunk's first queries may
    /// read the rows that are overwritten.
    pub fn keep_summaries(&mut self, pooled: &Pooled) -> Result<()> {
        match &mut self.summaries {
            Some(summaries) if pooled.count > 0 && pooled.first < self.readable => {
                let n = pooled.count.min(self.readable - pooled.first);
                summaries.write(&pooled.k.narrow(0, 0, n)?, &pooled.v.narrow(0, 0, n)?, pooled.first)
            }
            _ => Ok(()),
        }
    }

    /// Returns the allocated bytes by pool.
    pub fn capacity_bytes(&self) -> PoolBytes {
        PoolBytes {
            local: self.local.capacity_bytes(),
            summary: self.summaries.as_ref().map_or(0, Ring::capacity_bytes) + self.running.bytes(),
            sink: self.sinks.capacity_bytes(),
            ..PoolBytes::default()
        }
    }

    /// Returns the bytes in use by pool after `position` tokens.
    pub fn used_bytes(&self, position: usize) -> PoolBytes {
        let stored = (position / self.block).min(self.readable);
        PoolBytes {
            local: self.local.used_bytes(position),
            summary: self.summaries.as_ref().map_or(0, |r| r.used_bytes(stored)) + self.running.bytes(),
            sink: self.sinks.used_bytes(position),
            ..PoolBytes::default()
        }
    }
}
