//! The two pools of a swapped layer: raw rows (sinks and a local ring) and summary rows, allocated once.

use super::{PoolBytes, Ring};
use crate::error::Result;
use crate::layout::ButterflyLayer;
use crate::ops::{Pooled, RunningMean};
use candle_core::{DType, Device, Tensor};

/// A swapped layer's state.
#[derive(Debug)]
pub struct TwoPool {
    /// `(w + 1) B` raw positions, so that a token finds its whole window whatever its place in its block.
    pub local: Ring,
    /// Positions `0..S`.
    sinks: Option<Ring>,
    sink_tokens: usize,
    /// The newest summaries: block `n` in row `n % rows`.
    summaries: Option<Ring>,
    /// The block in progress.
    pub running: RunningMean,
    block: usize,
    /// Blocks from this one on are never read, so they must not push out older ones.
    readable: usize,
}

impl TwoPool {
    /// Allocates the rows that `layer` plans besides the ring `local`.
    pub(super) fn new(
        layer: &ButterflyLayer,
        local: Ring,
        row: (usize, usize),
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let pool = |n: usize| (n > 0).then(|| Ring::new(n, row, dtype, device)).transpose();
        Ok(Self {
            local,
            sinks: pool(layer.sink_rows)?,
            sink_tokens: layer.settings.sink_tokens,
            summaries: pool(layer.summary_rows)?,
            running: RunningMean::new(row.0 * row.1, device)?,
            block: layer.settings.block,
            readable: layer.grid.readable(),
        })
    }

    /// The sinks, if any are kept.
    pub fn sinks(&self) -> Option<&Ring> {
        self.sinks.as_ref()
    }

    /// Keeps the chunk's share of the sinks. Before attention, which may need them from the chunk's own second window on.
    pub fn keep_sinks(&mut self, k: &Tensor, v: &Tensor, start: usize) -> Result<()> {
        match &mut self.sinks {
            Some(sinks) if start < self.sink_tokens => {
                let n = (self.sink_tokens - start).min(k.dims()[0]);
                sinks.write(&k.narrow(0, 0, n)?, &v.narrow(0, 0, n)?, start)
            }
            _ => Ok(()),
        }
    }

    /// All summary rows, if any are kept.
    pub fn summary_rows(&self) -> Option<&Ring> {
        self.summaries.as_ref()
    }

    /// The summaries, and the blocks they are of once all blocks before `next` are complete: block `n` in row `n % rows`.
    pub fn summaries(&self, next: usize) -> Option<(&Ring, std::ops::Range<usize>)> {
        let ring = self.summaries.as_ref()?;
        let end = next.min(self.readable);
        Some((ring, end.saturating_sub(ring.capacity())..end))
    }

    /// Keeps what a chunk completed. After attention, whose first queries may still need the oldest rows.
    pub fn keep_summaries(&mut self, pooled: &Pooled) -> Result<()> {
        match &mut self.summaries {
            Some(summaries) if pooled.count > 0 && pooled.first < self.readable => {
                let n = pooled.count.min(self.readable - pooled.first);
                summaries.write(&pooled.k.narrow(0, 0, n)?, &pooled.v.narrow(0, 0, n)?, pooled.first)
            }
            _ => Ok(()),
        }
    }

    /// Allocated bytes by pool.
    pub fn capacity_bytes(&self) -> PoolBytes {
        let bytes = |r: &Option<Ring>| r.as_ref().map_or(0, Ring::capacity_bytes);
        PoolBytes {
            local: self.local.capacity_bytes(),
            summary: bytes(&self.summaries) + self.running.bytes(),
            sink: bytes(&self.sinks),
        }
    }

    /// Bytes in use after `position` tokens.
    pub fn used_bytes(&self, position: usize) -> PoolBytes {
        let bytes = |r: &Option<Ring>, n| r.as_ref().map_or(0, |r| r.used_bytes(n));
        PoolBytes {
            local: self.local.used_bytes(position),
            summary: bytes(&self.summaries, (position / self.block).min(self.readable)) + self.running.bytes(),
            sink: bytes(&self.sinks, position),
        }
    }
}
