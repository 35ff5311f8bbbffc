//! The host store of a GPU: page-locked memory that kernels read in place and that prefill streams back tile by tile.
//!
//! Where the system locks no memory it is ordinary memory: prefill streams it too, and the host gathers the rows of a
//! decode step.

use super::{HostMemory, TILE_BYTES};
use crate::error::{At, Error, ErrorKind, Result};
use crate::ops::cuda::{address, device, uninitialised};
use crate::ops::{attend, human_bytes, AttentionArgs, KeyValues, RunningAttention, Segment, Window};
use candle_core::cuda_backend::cudarc::driver::{sys, CudaStream, DriverError, PinnedHostSlice};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use std::ops::Range;
use std::sync::Arc;

/// Exact keys and values in host memory, `[G, ctx, 2, D]`.
#[derive(Debug)]
pub struct GpuStore {
    /// The memory; `None` only while the store is dropped.
    held: Option<Held>,
    /// Where page-locked memory comes from and goes back to.
    memory: Arc<HostMemory>,
    /// Address of the memory; of page-locked memory the same on host and device under unified addressing.
    at: u64,
    /// `(G, ctx, D)`.
    dims: (usize, usize, usize),
    dtype: DType,
    /// The run's stream.
    main: Arc<CudaStream>,
    /// Stream of the copies to the device.
    copies: Arc<CudaStream>,
}

/// Memory of a store.
#[derive(Debug)]
enum Held {
    /// Page-locked, mapped into the device's addresses.
    Locked(PinnedHostSlice<u8>),
    /// Not locked: kernels cannot read it.
    Ordinary(Vec<u8>),
}

/// Size of keys and values of `(G, ctx, D)`, bytes.
fn bytes_of((kv_heads, ctx, dim): (usize, usize, usize), dtype: DType) -> usize {
    kv_heads * ctx * 2 * dim * dtype.size_in_bytes()
}

impl GpuStore {
    /// Allocates the store in page-locked memory of `memory`, or in ordinary memory where the system locks none.
    ///
    /// # Errors
    /// The system has no such memory either.
    pub fn new(
        ctx: usize,
        (kv_heads, dim): (usize, usize),
        dtype: DType,
        gpu: &Device,
        memory: &Arc<HostMemory>,
    ) -> Result<Self> {
        let Device::Cuda(gpu) = gpu else { return Err(Error::unsupported("host store", "is locked for a GPU alone")) };
        let stream = gpu.cuda_stream();
        let dims = (kv_heads, ctx, dim);
        let bytes = bytes_of(dims, dtype);
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: every position is written before attention reads it, in new and in reused memory.
        let allocate = || unsafe { stream.context().alloc_pinned_with_flags::<u8>(bytes.max(1), flags) };
        let locked = match memory.is_locked() {
            true => memory.pinned.take(bytes, allocate).ok(),
            false => None,
        };
        let (held, at) = match locked {
            Some(slice) => {
                let at = slice.as_ptr().map_err(candle_core::Error::wrap).at("host store")? as u64;
                (Held::Locked(slice), at)
            }
            None => {
                memory.lock_nothing();
                let mut rows = vec![];
                rows.try_reserve_exact(bytes).map_err(|_| {
                    let message = format!("{} of host memory cannot be allocated", human_bytes(bytes as u64));
                    Error::new(ErrorKind::Memory, "host store", message + "; use a smaller --ctx")
                })?;
                rows.resize(bytes, 0);
                let at = rows.as_mut_ptr() as u64;
                (Held::Ordinary(rows), at)
            }
        };
        let copies = stream.context().new_stream().map_err(candle_core::Error::wrap).at("host store")?;
        Ok(Self { held: Some(held), memory: memory.clone(), at, dims, dtype, main: stream, copies })
    }

    /// Returns the allocated bytes.
    pub fn bytes(&self) -> u64 {
        bytes_of(self.dims, self.dtype) as u64
    }

    /// Returns the address that kernels read and write, 0 for memory that is not page-locked.
    pub fn address(&self) -> u64 {
        match self.held {
            Some(Held::Locked(_)) => self.at,
            _ => 0,
        }
    }

    /// Returns the bytes of positions `from..until` of KV head `g`, `[until - from, 2, D]`.
    ///
    /// # Errors
    /// Positions beyond the context; page-locked memory, which kernels write.
    fn rows(&self, g: usize, from: usize, until: usize) -> Result<&[u8]> {
        let (heads, ctx, _) = self.dims;
        match &self.held {
            // Copies to memory that is not page-locked have ended when their call returns.
            Some(Held::Ordinary(all)) if g < heads && from <= until && until <= ctx => {
                Ok(&all[(g * ctx + from) * self.row_bytes()..(g * ctx + until) * self.row_bytes()])
            }
            _ => Err(Error::new(ErrorKind::Backend, "host store", format!("rows {from} to {until} cannot be read"))),
        }
    }

    /// Copies the rows at `positions`, a list per KV head, to `device`; a list may be shorter than `most`, and the rows
    /// after it are 0. For memory that is not page-locked.
    ///
    /// # Shapes
    /// The result `[G, most, 2, D]`.
    ///
    /// # Errors
    /// Positions beyond the context; the device fails.
    pub fn gather(&self, positions: &[Vec<u32>], most: usize, device: &Device) -> Result<Tensor> {
        let (heads, _, dim) = self.dims;
        let row = self.row_bytes();
        let mut rows = vec![0u8; heads * most * row];
        let lists = rows.par_chunks_mut((most * row).max(1)).zip(positions).enumerate();
        lists.try_for_each(|(g, (to, positions))| {
            to.chunks_exact_mut(row).zip(positions).try_for_each(|(to, p)| {
                let p = *p as usize;
                to.copy_from_slice(self.rows(g, p, p + 1)?);
                Ok::<_, Error>(())
            })
        })?;
        Ok(Tensor::from_raw_buffer(&rows, self.dtype, &[heads, most, 2, dim], device)?)
    }

    /// Returns the means of the values of `blocks` of `block` positions, the first `sinks` positions left out. For memory
    /// that is not page-locked.
    ///
    /// # Shapes
    /// The result f32 `[G, blocks, D]`, on the host.
    ///
    /// # Errors
    /// Positions beyond the context.
    pub fn value_means(&self, blocks: Range<usize>, block: usize, sinks: usize) -> Result<Tensor> {
        let (heads, _, dim) = self.dims;
        let mut means = vec![];
        for (g, n) in (0..heads).flat_map(|g| blocks.clone().map(move |n| (g, n))) {
            let from = (n * block).max(sinks).min((n + 1) * block);
            let count = (n + 1) * block - from;
            let rows = self.rows(g, from, (n + 1) * block)?;
            let rows = Tensor::from_raw_buffer(rows, self.dtype, &[count, 2 * dim], &Device::Cpu);
            means.push(match count {
                0 => Tensor::zeros(dim, DType::F32, &Device::Cpu)?,
                _ => (rows?.narrow(1, dim, dim)?.to_dtype(DType::F32)?.sum(0)? / count as f64)?,
            });
        }
        Ok(Tensor::stack(&means, 0)?.reshape((heads, blocks.len(), dim))?)
    }

    /// Bytes of a position of one KV head.
    fn row_bytes(&self) -> usize {
        2 * self.dims.2 * self.dtype.size_in_bytes()
    }

    /// Writes the rows of positions `start..start + T`, in the order of the run's stream.
    ///
    /// # Shapes
    /// `rows [G, T, 2, D]`, contiguous.
    ///
    /// # Errors
    /// Positions beyond the context; another shape or type; the device fails.
    pub fn write(&self, rows: &Tensor, start: usize) -> Result<()> {
        let ((heads, ctx, dim), tokens) = (self.dims, rows.dim(1)?);
        if start + tokens > ctx || rows.dims() != [heads, tokens, 2, dim] || rows.dtype() != self.dtype {
            let message = format!("{:?} rows of {:?} at {start} do not fit {:?}", rows.dims(), rows.dtype(), self.dims);
            return Err(Error::new(ErrorKind::Backend, "host store", message));
        }
        let (from, row) = (address(rows)?, self.row_bytes());
        let stream = device(rows)?.cuda_stream();
        for g in 0..heads {
            let to = self.at + ((g * ctx + start) * row) as u64;
            let (from, bytes) = (from + (g * tokens * row) as u64, tokens * row);
            // SAFETY: both ranges lie in allocations that outlive the copy: the tensor is freed in the order of the
            // same stream, and the store waits for the stream before it is freed.
            unsafe { sys::cuMemcpyDtoHAsync_v2(to as *mut _, from, bytes, stream.cu_stream()) }
                .result()
                .map_err(candle_core::Error::wrap)
                .at("host store")?;
        }
        Ok(())
    }

    /// Attends queries at positions `start..start + T` to every stored position before `start` and causally to the
    /// chunk's own: tiles are copied while the tile before is attended to, and partial results merge by log-sum-exp.
    ///
    /// # Shapes
    /// `q [T, H, D]`, `own.k`, `own.v` `[T, G, D]`; the result is as `q`.
    ///
    /// # Errors
    /// Too little memory for two tiles; the device fails.
    pub fn attend(&self, q: &Tensor, own: KeyValues, start: usize, scale: f32) -> Result<Tensor> {
        let part = |start: usize, segment: Segment, lse: bool| {
            attend(&AttentionArgs { q, start, window: Window::Unbounded, scale, segments: &[segment], lse })
        };
        if start == 0 {
            return Ok(part(0, Segment::Chunk(own), false)?.out);
        }
        let (gpu, (heads, ctx, dim)) = (device(q)?, self.dims);
        let main = gpu.cuda_stream();
        let failed = |e: DriverError| Error::new(ErrorKind::Backend, "host store", e);
        let row = self.row_bytes();
        // At least four tiles, so that most copies run beside attention.
        let most = start.div_ceil(4).next_multiple_of(256);
        let tile = (TILE_BYTES / (row * heads)).clamp(256, most);
        let buffers = [(); 2].map(|()| uninitialised(gpu, self.dtype, (heads, tile, 2, dim)));
        let [one, two] = buffers;
        let buffers = [one?, two?];
        let mut free = [main.record_event(None).map_err(failed)?, main.record_event(None).map_err(failed)?];
        let mut all = None;
        for (i, from) in (0..start).step_by(tile).enumerate() {
            let (buffer, n) = (&buffers[i % 2], tile.min(start - from));
            self.copies.wait(&free[i % 2]).map_err(failed)?;
            let to = address(buffer)?;
            for g in 0..heads {
                let source = self.at + ((g * ctx + from) * row) as u64;
                // SAFETY: the buffer is `[G, tile, 2, D]` and the store `[G, ctx, 2, D]`; the main stream waits for the
                // copies before it uses or frees the buffer.
                unsafe {
                    sys::cuMemcpyHtoDAsync_v2(
                        to + (g * tile * row) as u64,
                        source as *const _,
                        n * row,
                        self.copies.cu_stream(),
                    )
                }
                .result()
                .map_err(failed)?;
            }
            if all.is_none() {
                // The chunk as if nothing came before it, while the first tile is copied.
                all = Some(RunningAttention::new(part(0, Segment::Chunk(own), true)?)?);
            }
            main.join(&self.copies).map_err(failed)?;
            let rows = buffer.narrow(1, 0, n)?;
            let half = |i: usize| rows.narrow(2, i, 1)?.squeeze(2)?.transpose(0, 1);
            let (k, v) = (half(0)?, half(1)?);
            // A row number, not a position: every query sees the whole tile.
            let tile_part = part(n, Segment::Ring(KeyValues { k: &k, v: &v }), true)?;
            free[i % 2] = main.record_event(None).map_err(failed)?;
            if let Some(all) = &mut all {
                all.add(&tile_part)?;
            }
        }
        all.ok_or_else(|| Error::new(ErrorKind::Backend, "host store", "has no tile"))?.finish()
    }
}

impl Drop for GpuStore {
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            // Kernels and copies may still use the memory. Waiting for the whole context would break the captures of
            // other runs.
            let _ = self.main.synchronize();
            let _ = self.copies.synchronize();
            if let Held::Locked(slice) = held {
                self.memory.pinned.give_back(bytes_of(self.dims, self.dtype), slice);
            }
        }
    }
}
