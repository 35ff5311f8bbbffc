//! Keys and values of every position in host memory, KV head by KV head, a token's key and value adjacent: rows fetched
//! for one head lie in one region.

use crate::error::Result;
use candle_core::{DType, Device, Tensor};

/// Exact keys and values, `[G, ctx, 2, D]`; position `p` is in row `p`.
#[derive(Debug)]
pub struct HostStore {
    rows: Tensor,
}

impl HostStore {
    /// Allocates room for `ctx` positions.
    ///
    /// # Errors
    /// An allocation fails.
    pub fn new(ctx: usize, (kv_heads, dim): (usize, usize), dtype: DType) -> Result<Self> {
        Ok(Self { rows: Tensor::zeros((kv_heads, ctx.max(1), 2, dim), dtype, &Device::Cpu)? })
    }

    /// Returns the allocated bytes.
    pub fn capacity_bytes(&self) -> u64 {
        (self.rows.elem_count() * self.rows.dtype().size_in_bytes()) as u64
    }

    /// Returns the bytes in use after `position` tokens.
    pub fn used_bytes(&self, position: usize) -> u64 {
        let ctx = self.rows.dims()[1];
        self.capacity_bytes() / ctx as u64 * position.min(ctx) as u64
    }

    /// Writes the keys and values of positions `start..start + T`.
    ///
    /// # Shapes
    /// `k`, `v` `[T, G, D]`.
    ///
    /// # Errors
    /// Positions beyond the context.
    pub fn write(&mut self, k: &Tensor, v: &Tensor, start: usize) -> Result<()> {
        let rows = Tensor::stack(&[k, v], 2)?.transpose(0, 1)?.contiguous()?;
        Ok(self.rows.slice_set(&rows, 1, start)?)
    }

    /// Returns all rows as keys and values `[ctx, G, D]`, without a copy.
    ///
    /// # Errors
    /// None for a store that was made by [`HostStore::new`].
    pub fn keys_and_values(&self) -> Result<(Tensor, Tensor)> {
        let part = |i: usize| self.rows.narrow(2, i, 1)?.squeeze(2)?.transpose(0, 1);
        Ok((part(0)?, part(1)?))
    }

    /// Returns the rows, `[G, ctx, 2, D]`.
    pub fn rows(&self) -> &Tensor {
        &self.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Ring;
    use crate::ops::{attend, AttentionArgs, KeyValues, Segment, Window};

    #[test]
    fn attention_over_the_store_is_that_over_a_dense_cache() -> Result<()> {
        let device = Device::Cpu;
        for (cuts, g, group, d) in [(vec![5usize, 1, 300, 64], 2, 3, 64), (vec![9, 1], 1, 1, 7), (vec![1], 3, 2, 32)] {
            let total: usize = cuts.iter().sum();
            let (mut store, mut ring) =
                (HostStore::new(total, (g, d), DType::F32)?, Ring::new(total, (g, d), DType::F32, &device)?);
            let mut start = 0;
            for t in cuts {
                let random = |heads: usize| Tensor::randn(0f32, 1.0, (t, heads, d), &device);
                let (q, k, v) = (random(g * group)?, random(g)?, random(g)?);
                let chunk = Segment::Chunk(KeyValues { k: &k, v: &v });
                let over = |rows: KeyValues| {
                    let segments = [Segment::Ring(rows), chunk];
                    attend(&AttentionArgs {
                        q: &q,
                        start,
                        window: Window::Unbounded,
                        scale: 0.2,
                        segments: &segments,
                        lse: false,
                    })
                };
                let (sk, sv) = store.keys_and_values()?;
                let (got, want) = (over(KeyValues { k: &sk, v: &sv })?, over(ring.rows())?);
                let off = (got.out - want.out)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(off < 1e-5, "{off}");
                store.write(&k, &v, start)?;
                ring.write(&k, &v, start)?;
                start += t;
            }
            assert_eq!(store.capacity_bytes(), ring.capacity_bytes());
            assert!(store
                .write(
                    &Tensor::zeros((1, g, d), DType::F32, &device)?,
                    &Tensor::zeros((1, g, d), DType::F32, &device)?,
                    start
                )
                .is_err());
        }
        Ok(())
    }
}
