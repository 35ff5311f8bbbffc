//! Launches `kernels/attention_decode.cu`: attention of one token over ring, sinks and rows of a store.

use crate::error::Result;
use crate::ops::cuda::{suffix, uninitialised, Kernel, Launch};
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::cuda_backend::CudaDevice;
use candle_core::{DType, Tensor};
use std::sync::Mutex;

/// Query heads of a group to a thread block.
const ROWS: usize = 16;
/// Keys per thread block, at least.
const KEYS_PER_BLOCK: usize = 64;
/// Thread blocks to aim for: three for each multiprocessor of the largest GPU, as many as are resident at once.
const BLOCKS: usize = 396;
/// Partial results that the last thread block can merge.
const SPLITS: usize = 128;

/// Counters allocated at once for a device.
const LISTS: usize = 1024;

/// Counters by device, zero between launches, so that no launch has to clear new ones. All launches of a device handle
/// are on one stream, so that two never count at once.
static COUNTERS: Mutex<Vec<(candle_core::cuda_backend::DeviceId, Tensor)>> = Mutex::new(vec![]);

/// `DecodeAttentionParams` of kernels/attention_decode.cu.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct DecodeAttention {
    pub q: u64,
    pub ring_k: u64,
    pub ring_v: u64,
    pub own_k: u64,
    pub own_v: u64,
    pub sink_k: u64,
    pub sink_v: u64,
    pub mean_k: u64,
    pub mean_v: u64,
    pub routes: u64,
    pub route_bias: u64,
    pub extras: u64,
    pub store_k: u64,
    pub store_v: u64,
    pub table: u64,
    pub qkv: u64,
    pub q_norm: u64,
    pub k_norm: u64,
    pub cos: u64,
    pub sin: u64,
    pub running: u64,
    pub state: u64,
    pub partial: u64,
    pub counters: u64,
    pub out: u64,
    pub out16: u64,
    pub lse: u64,
    pub q_out: u64,
    pub extra_count: i32,
    pub position: i32,
    pub shift: i32,
    pub capacity: i32,
    pub sinks: i32,
    pub mean_rows: i32,
    pub route_width: i32,
    pub block: i32,
    pub readable: i32,
    pub table_places: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub dim: i32,
    pub window_kind: i32,
    pub window_size: i32,
    pub window_count: i32,
    pub scale: f32,
    pub eps: f32,
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for DecodeAttention {}
crate::ops::cuda::mirrored!(DecodeAttention, 296, {
    q: 0, ring_k: 8, ring_v: 16, own_k: 24, own_v: 32, sink_k: 40, sink_v: 48, mean_k: 56, mean_v: 64, routes: 72,
    route_bias: 80, extras: 88, store_k: 96, store_v: 104, table: 112, qkv: 120, q_norm: 128, k_norm: 136, cos: 144,
    sin: 152, running: 160, state: 168, partial: 176, counters: 184, out: 192, out16: 200, lse: 208, q_out: 216,
    extra_count: 224, position: 228, shift: 232, capacity: 236, sinks: 240, mean_rows: 244, route_width: 248, block: 252, readable: 256,
    table_places: 260, heads: 264, kv_heads: 268, dim: 272, window_kind: 276, window_size: 280, window_count: 284,
    scale: 288, eps: 292,
});

/// Partial results that a launch's last thread block merges; the caller keeps them alive until the launch has run.
pub(crate) struct Scratch {
    partial: Tensor,
    counters: Tensor,
}

/// The split of a launch over thread blocks, for at most `keys` keys.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Cut {
    splits: usize,
    lists: usize,
    kv_heads: usize,
    dim: usize,
}

impl Cut {
    /// The split for `heads` query heads over `kv_heads` KV heads of `dim`.
    pub fn new(keys: usize, heads: usize, kv_heads: usize, dim: usize) -> Self {
        let lists = kv_heads * (heads / kv_heads).div_ceil(ROWS);
        // One thread block takes the token itself, sinks and summaries.
        let splits = 1 + keys.div_ceil(KEYS_PER_BLOCK).clamp(1, (BLOCKS / lists).clamp(2, SPLITS) - 1);
        let dim = [64, 128, 256].into_iter().find(|x| dim <= *x).unwrap_or(256);
        Self { splits, lists, kv_heads, dim }
    }

    /// Size of the partial results (`partial` in kernels/attention_decode.cu), in f32.
    fn partial(&self, gpu: &CudaDevice) -> Result<Tensor> {
        uninitialised(gpu, DType::F32, (self.lists, self.splits, ROWS, self.dim + 4))
    }

    /// Allocates scratch with its own counters, for a captured launch.
    pub fn scratch(&self, gpu: &CudaDevice) -> Result<Scratch> {
        let partial = self.partial(gpu)?;
        let counters = Tensor::zeros(self.lists, DType::U32, &candle_core::Device::Cuda(gpu.clone()))?;
        Ok(Scratch { partial, counters })
    }

    /// Allocates scratch for an immediate launch, with the device's shared counters.
    pub fn scratch_of(&self, gpu: &CudaDevice) -> Result<Scratch> {
        let partial = self.partial(gpu)?;
        let mut all = COUNTERS.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let known = all.iter().position(|(id, c)| *id == gpu.id() && c.elem_count() >= self.lists);
        let counters = match known {
            Some(i) => all[i].1.clone(),
            None => {
                let count = self.lists.max(LISTS);
                let counters = Tensor::zeros(count, DType::U32, &candle_core::Device::Cuda(gpu.clone()))?;
                all.push((gpu.id(), counters.clone()));
                counters
            }
        };
        Ok(Scratch { partial, counters })
    }

    /// Returns the launch with the scratch's addresses filled in.
    pub fn launch(&self, gpu: &CudaDevice, dtype: DType, scratch: &Scratch, mut p: DecodeAttention) -> Result<Launch> {
        use crate::ops::cuda::address;
        p.partial = address(&scratch.partial)?;
        p.counters = address(&scratch.counters)?;
        let name = format!("attention_decode_{}_{}", suffix(dtype)?, self.dim);
        let shared = 4 * ROWS * (self.dim + 2) * 4 + (ROWS + 2) * self.dim * 2;
        let kernel = Kernel::load(gpu, &format!("attention_decode_{}", self.dim), name)?.shared(shared)?;
        Ok(Launch::new(kernel, (self.splits, self.kv_heads, self.lists / self.kv_heads), 128).with(p))
    }
}
