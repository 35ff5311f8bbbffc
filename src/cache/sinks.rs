//! Attention sinks: the first positions, which every query reads raw.

use super::Ring;
use crate::error::Result;
use candle_core::{DType, Device, Tensor};

/// Keys and values of positions `0..S`.
#[derive(Debug)]
pub struct Sinks {
    rows: Option<Ring>,
    /// `S`.
    tokens: usize,
}

impl Sinks {
    /// Allocates `rows` rows for the first `tokens` positions; the context may have fewer positions than `tokens`.
    pub fn new(rows: usize, tokens: usize, row: (usize, usize), dtype: DType, device: &Device) -> Result<Self> {
        let rows = (rows > 0).then(|| Ring::new(rows, row, dtype, device)).transpose()?;
        Ok(Self { rows, tokens })
    }

    /// Returns the rows, if there are any.
    pub fn rows(&self) -> Option<&Ring> {
        self.rows.as_ref()
    }

    /// Stores the sinks among a chunk's positions from `start` on.
    ///
    /// # Shapes
    /// `k`, `v` `[T, G, D]`.
    pub fn keep(&mut self, k: &Tensor, v: &Tensor, start: usize) -> Result<()> {
        match &mut self.rows {
            Some(rows) if start < self.tokens => {
                let n = (self.tokens - start).min(k.dims()[0]);
                rows.write(&k.narrow(0, 0, n)?, &v.narrow(0, 0, n)?, start)
            }
            _ => Ok(()),
        }
    }

    /// Returns the allocated bytes.
    pub fn capacity_bytes(&self) -> u64 {
        self.rows().map_or(0, Ring::capacity_bytes)
    }

    /// Returns the bytes in use after `position` tokens.
    pub fn used_bytes(&self, position: usize) -> u64 {
        self.rows().map_or(0, |r| r.used_bytes(position))
    }
}
