//! Keys and values of every position in host memory, KV head by KV head, a token's key and value adjacent: rows fetched
//! for one head lie in one region.

#[cfg(feature = "cuda")]
use super::gpu_store::GpuStore;
use super::HostMemory;
use crate::error::Result;
#[cfg(feature = "cuda")]
use crate::error::{Error, ErrorKind};
use crate::ops::{attend, AttentionArgs, KeyValues, Segment, Window};
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

/// Bytes of a tile of keys and values that prefill on a GPU streams to the device; two are allocated.
pub(crate) const TILE_BYTES: usize = 32 << 20;

/// Exact keys and values of every position, `[G, ctx, 2, D]`.
#[derive(Debug)]
pub struct HostStore {
    rows: Rows,
    ctx: usize,
    kv_heads: usize,
}

#[derive(Debug)]
enum Rows {
    /// Ordinary memory, for a run on a CPU.
    Memory(Tensor),
    /// Memory for a GPU, page-locked where the system allows.
    #[cfg(feature = "cuda")]
    Gpu(GpuStore),
}

impl HostStore {
    /// Allocates room for `ctx` positions, page-locked memory of `memory` where `device` is a GPU.
    ///
    /// # Errors
    /// An allocation fails.
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables))]
    pub fn new(
        ctx: usize,
        (kv_heads, dim): (usize, usize),
        dtype: DType,
        device: &Device,
        memory: &Arc<HostMemory>,
    ) -> Result<Self> {
        let ctx = ctx.max(1);
        let rows = match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => Rows::Gpu(GpuStore::new(ctx, (kv_heads, dim), dtype, device, memory)?),
            _ => Rows::Memory(Tensor::zeros((kv_heads, ctx, 2, dim), dtype, &Device::Cpu)?),
        };
        Ok(Self { rows, ctx, kv_heads })
    }

    /// Returns the allocated bytes.
    pub fn capacity_bytes(&self) -> u64 {
        match &self.rows {
            Rows::Memory(rows) => (rows.elem_count() * rows.dtype().size_in_bytes()) as u64,
            #[cfg(feature = "cuda")]
            Rows::Gpu(rows) => rows.bytes(),
        }
    }

    /// Returns the bytes of a position's key and value of one KV head.
    pub fn row_bytes(&self) -> u64 {
        self.capacity_bytes() / (self.ctx * self.kv_heads) as u64
    }

    /// Returns the bytes in use after `position` tokens.
    pub fn used_bytes(&self, position: usize) -> u64 {
        self.capacity_bytes() / self.ctx as u64 * position.min(self.ctx) as u64
    }

    /// Writes the keys and values of positions `start..start + T`.
    ///
    /// # Shapes
    /// `k`, `v` `[T, G, D]`.
    ///
    /// # Errors
    /// Positions beyond the context.
    pub fn write(&mut self, k: &Tensor, v: &Tensor, start: usize) -> Result<()> {
        let new = Tensor::stack(&[k, v], 2)?.transpose(0, 1)?.contiguous()?;
        match &self.rows {
            Rows::Memory(rows) => Ok(rows.slice_set(&new, 1, start)?),
            #[cfg(feature = "cuda")]
            Rows::Gpu(rows) => rows.write(&new, start),
        }
    }

    /// Attends queries at positions `start..start + T` to every stored position before `start`, and causally to `own`.
    ///
    /// # Shapes
    /// `q [T, H, D]`, `own.k`, `own.v` `[T, G, D]`; the result is as `q`.
    ///
    /// # Errors
    /// Those of [`attend`].
    pub fn attend(&self, q: &Tensor, own: KeyValues, start: usize, scale: f32) -> Result<Tensor> {
        match &self.rows {
            Rows::Memory(rows) => {
                let part = |i: usize| rows.narrow(2, i, 1)?.squeeze(2)?.transpose(0, 1);
                let (k, v) = (part(0)?, part(1)?);
                let segments = [Segment::Ring(KeyValues { k: &k, v: &v }), Segment::Chunk(own)];
                let window = Window::Unbounded;
                Ok(attend(&AttentionArgs { q, start, window, scale, segments: &segments, lse: false })?.out)
            }
            #[cfg(feature = "cuda")]
            Rows::Gpu(rows) => rows.attend(q, own, start, scale),
        }
    }

    /// Returns the store of a GPU.
    ///
    /// # Errors
    /// A store in ordinary memory.
    #[cfg(feature = "cuda")]
    pub(crate) fn gpu(&self) -> Result<&GpuStore> {
        match &self.rows {
            Rows::Gpu(rows) => Ok(rows),
            Rows::Memory(_) => Err(Error::new(ErrorKind::Backend, "host store", "is in ordinary memory")),
        }
    }

    /// Returns the rows of a store in ordinary memory, `[G, ctx, 2, D]`.
    ///
    /// # Errors
    /// A store for a GPU.
    pub fn rows(&self) -> Result<&Tensor> {
        match &self.rows {
            Rows::Memory(rows) => Ok(rows),
            #[cfg(feature = "cuda")]
            Rows::Gpu(_) => Err(Error::new(ErrorKind::Backend, "host store", "is for a GPU")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Ring;

    #[test]
    fn attention_over_the_store_is_that_over_a_dense_cache() -> Result<()> {
        let device = Device::Cpu;
        for (cuts, g, group, d) in [(vec![5usize, 1, 300, 64], 2, 3, 64), (vec![9, 1], 1, 1, 7), (vec![1], 3, 2, 32)] {
            let total: usize = cuts.iter().sum();
            let mut store = HostStore::new(total, (g, d), DType::F32, &device, &Arc::default())?;
            let mut ring = Ring::new(total, (g, d), DType::F32, &device)?;
            let mut start = 0;
            for t in cuts {
                let random = |heads: usize| Tensor::randn(0f32, 1.0, (t, heads, d), &device);
                let (q, k, v) = (random(g * group)?, random(g)?, random(g)?);
                let own = KeyValues { k: &k, v: &v };
                let segments = [Segment::Ring(ring.rows()), Segment::Chunk(own)];
                let args = AttentionArgs {
                    q: &q,
                    start,
                    window: Window::Unbounded,
                    scale: 0.2,
                    segments: &segments,
                    lse: false,
                };
                let (got, want) = (store.attend(&q, own, start, 0.2)?, attend(&args)?.out);
                let off = (got - want)?.abs()?.max_all()?.to_scalar::<f32>()?;
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
