//! Ring buffer of the keys and values of the last `capacity` positions: position `p` is in row `p % capacity`.
//!
//! With the whole context as capacity it is a dense cache.

use crate::error::{Error, ErrorKind, Result};
use crate::ops::KeyValues;
use candle_core::{DType, Device, Tensor};

/// Ring buffer of keys and values, each `[capacity, G, D]`.
#[derive(Debug)]
pub struct Ring {
    k: Tensor,
    v: Tensor,
}

impl Ring {
    /// Allocates `capacity` rows (at least one, since candle has no empty tensors to write to).
    pub fn new(capacity: usize, (kv_heads, dim): (usize, usize), dtype: DType, device: &Device) -> Result<Self> {
        let zeros = || Tensor::zeros((capacity.max(1), kv_heads, dim), dtype, device);
        Ok(Self { k: zeros()?, v: zeros()? })
    }

    /// Returns the size of `capacity` rows of keys and values, in bytes.
    pub fn bytes_for(capacity: usize, (kv_heads, dim): (usize, usize), dtype: DType) -> u64 {
        2 * (capacity * kv_heads * dim * dtype.size_in_bytes()) as u64
    }

    /// Returns the number of rows.
    pub fn capacity(&self) -> usize {
        self.k.dims()[0]
    }

    /// Returns the size of one row of keys and values, in bytes.
    fn row_bytes(&self) -> u64 {
        self.capacity_bytes() / self.capacity() as u64
    }

    /// Returns the allocated bytes.
    pub fn capacity_bytes(&self) -> u64 {
        2 * (self.k.elem_count() * self.k.dtype().size_in_bytes()) as u64
    }

    /// Returns the bytes in use after `count` positions have been written.
    pub fn used_bytes(&self, count: usize) -> u64 {
        self.row_bytes() * count.min(self.capacity()) as u64
    }

    /// Returns all rows, as the attention operator takes them.
    pub fn rows(&self) -> KeyValues<'_> {
        KeyValues { k: &self.k, v: &self.v }
    }

    /// Writes `k` and `v` for positions `start..start + T`; if `T` exceeds the capacity, only the last positions.
    ///
    /// # Shapes
    /// `k`, `v` `[T, G, D]`.
    pub fn write(&mut self, k: &Tensor, v: &Tensor, start: usize) -> Result<()> {
        write_wrapped(&self.k, k, start)?;
        write_wrapped(&self.v, v, start)
    }

    /// Copies the rows of a ring of the same capacity into which `count` positions have been written.
    ///
    /// # Errors
    /// Another capacity or shape of rows.
    pub fn copy_from(&mut self, other: &Self, count: usize) -> Result<()> {
        if self.capacity() != other.capacity() {
            let message = format!("{} rows cannot be copied to {}", other.capacity(), self.capacity());
            return Err(Error::new(ErrorKind::Backend, "cache", message));
        }
        // Equal capacities: a position is in the same row of both.
        match count.min(self.capacity()) {
            0 => Ok(()),
            rows => self.write(&other.k.narrow(0, 0, rows)?, &other.v.narrow(0, 0, rows)?, 0),
        }
    }
}

/// Writes row `i` of `from [T, ..]` to row `(start + i) % capacity` of `into [capacity, ..]`; if `T` exceeds the
/// capacity, only the last rows.
pub(super) fn write_wrapped(into: &Tensor, from: &Tensor, start: usize) -> Result<()> {
    let (count, capacity) = (from.dims()[0], into.dims()[0]);
    let mut at = count.saturating_sub(capacity);
    while at < count {
        let row = (start + at) % capacity;
        let n = (capacity - row).min(count - at);
        into.slice_set(&from.narrow(0, at, n)?.contiguous()?, 0, row)?;
        at += n;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_positions_are_kept_for_any_chunking() -> Result<()> {
        let device = Device::Cpu;
        for cuts in [vec![1; 13], vec![13], vec![3, 9, 1], vec![5, 8]] {
            let mut ring = Ring::new(5, (1, 1), DType::F32, &device)?;
            let mut at = 0;
            for n in cuts {
                let k = Tensor::arange(at as f32, (at + n) as f32, &device)?.reshape((n, 1, 1))?;
                ring.write(&k, &k, at)?;
                at += n;
            }
            // Positions 8..13 at their rows modulo 5.
            assert_eq!(ring.rows().k.flatten_all()?.to_vec1::<f32>()?, [10., 11., 12., 8., 9.]);
        }
        Ok(())
    }
}
