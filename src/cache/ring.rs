//! Keys and values of the last `capacity` positions: position `p` lies in row `p % capacity`.
//!
//! With a capacity of the whole context this is a dense cache.

use crate::error::Result;
use crate::ops::KeyValues;
use candle_core::{DType, Device, Tensor};

/// `k` and `v`, each `[capacity, G, D]`.
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

    /// Bytes of `capacity` rows of keys and values.
    pub fn bytes_for(capacity: usize, (kv_heads, dim): (usize, usize), dtype: DType) -> u64 {
        2 * (capacity * kv_heads * dim * dtype.size_in_bytes()) as u64
    }

    /// Rows.
    pub fn capacity(&self) -> usize {
        self.k.dims()[0]
    }

    /// Bytes of a row of keys and values.
    fn row_bytes(&self) -> u64 {
        self.capacity_bytes() / self.capacity() as u64
    }

    /// Bytes allocated.
    pub fn capacity_bytes(&self) -> u64 {
        2 * (self.k.elem_count() * self.k.dtype().size_in_bytes()) as u64
    }

    /// Bytes in use once `count` rows were written.
    pub fn used_bytes(&self, count: usize) -> u64 {
        self.row_bytes() * count.min(self.capacity()) as u64
    }

    /// The rows, for the operator.
    pub fn rows(&self) -> KeyValues<'_> {
        KeyValues { k: &self.k, v: &self.v }
    }

    /// Writes positions `start..start + T` of `k`, `v` `[T, G, D]`; of more than the ring holds, the last.
    pub fn write(&mut self, k: &Tensor, v: &Tensor, start: usize) -> Result<()> {
        put(&self.k, k, start)?;
        put(&self.v, v, start)
    }
}

/// Writes positions `start..start + T` of `from [T, ..]` to the rows modulo those of `into`; of more than it holds, the last.
pub(super) fn put(into: &Tensor, from: &Tensor, start: usize) -> Result<()> {
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
    fn keeps_the_last_positions_however_they_are_written() -> Result<()> {
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
