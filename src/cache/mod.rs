//! The KV cache: one fixed allocation per layer, made before the first token.
//!
//! Every state reports its allocated and used bytes by pool. Nothing is allocated afterwards, and a token past the
//! context length is refused before any work. The exception are rules that evict once: at the end of the context
//! ([`Cache::compress`]) the kept rows are copied out of a dense cache, and [`Cache::peak_bytes`] counts both.

mod compressed_kv;
#[cfg(any(test, feature = "cuda"))]
mod decoded_keys;
#[cfg(feature = "cuda")]
mod gpu_store;
mod host;
mod host_memory;
mod recall_codes;
#[cfg(feature = "cuda")]
mod recall_gpu;
mod recall_kv;
#[cfg(feature = "cuda")]
mod recall_text;
mod recurrent;
mod ring;
mod sinks;
mod two_pool;

pub use compressed_kv::CompressedKv;
#[cfg(feature = "cuda")]
pub use gpu_store::GpuStore;
pub use host::HostStore;
pub(crate) use host::TILE_BYTES;
pub use host_memory::HostMemory;
pub use recall_codes::{CpuCodes, ValueRows};
#[cfg(feature = "cuda")]
pub use recall_gpu::GpuCodes;
#[cfg(feature = "cuda")]
pub(crate) use recall_gpu::StepAddresses;
pub use recall_kv::{Codes, Fetched, RecallKv};
pub use recurrent::Recurrent;
pub use ring::Ring;
pub use sinks::Sinks;
pub use two_pool::TwoPool;

use recall_kv::Workspace;

use crate::error::{Error, ErrorKind, Result};
use crate::layout::{CacheBytes, LayerKind, LayerPlan, Layout};
use crate::method::Method;
use crate::ops::{human_bytes, KeyValues};
use candle_core::{DType, Device};
use serde::Serialize;
use std::sync::Arc;

/// Tokens copied at a time from a dense cache to one with exact recall, which bounds the memory of the copy.
const COPIED_TOKENS: usize = 4096;

/// Cache bytes by pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct PoolBytes {
    /// Bytes of raw positions: dense caches, rings, and the kept rows and last queries of evicting layers.
    pub local: u64,
    /// Bytes of block summaries and of the running sums of blocks in progress.
    pub summary: u64,
    /// Bytes of attention sinks.
    pub sink: u64,
    /// Bytes of the key codes of exact recall.
    pub key_codes: u64,
    /// Bytes of what estimates the values that exact recall does not fetch: value codes or block means.
    pub values: u64,
    /// Bytes of the tables that key codes and value codes are read with.
    pub tables: u64,
    /// Bytes of exact keys and values in host memory; not part of the total.
    pub host: u64,
    /// Bytes of the states of recurrent layers, which do not depend on the context; not part of the total.
    pub recurrent: u64,
}

impl PoolBytes {
    /// Returns the bytes of all pools of keys and values on the device.
    pub fn total(&self) -> u64 {
        self.local + self.summary + self.sink + self.key_codes + self.values + self.tables
    }

    /// Returns the bytes of all pools on the device, with the states of recurrent layers.
    pub fn on_device(&self) -> u64 {
        self.total() + self.recurrent
    }
}

impl std::ops::AddAssign for PoolBytes {
    fn add_assign(&mut self, other: Self) {
        self.local += other.local;
        self.summary += other.summary;
        self.sink += other.sink;
        self.key_codes += other.key_codes;
        self.values += other.values;
        self.tables += other.tables;
        self.host += other.host;
        self.recurrent += other.recurrent;
    }
}

/// Cache of one layer.
#[derive(Debug)]
pub enum LayerState {
    /// Dense attention: every position of the context.
    Dense(Ring),
    /// Sliding-window attention: the last positions.
    Ring(Ring),
    /// Butterfly attention: local ring, sinks and summaries.
    TwoPool(Box<TwoPool>),
    /// Exact recall: local ring, sinks, codes, and every position in host memory.
    Recall(Box<RecallKv>),
    /// Eviction: the tokens that a rule keeps, different ones in each KV head.
    CompressedKv(Box<CompressedKv>),
    /// Gated DeltaNet: a state of constant size.
    Recurrent(Box<Recurrent>),
}

impl LayerState {
    fn new(plan: &LayerPlan, workspace: &mut Workspace, dtype: DType, device: &Device) -> Result<Self> {
        let ring = || Ring::new(plan.raw_rows, plan.row(), dtype, device);
        Ok(match &plan.kind {
            LayerKind::Full => Self::Dense(ring()?),
            LayerKind::Sliding { .. } => Self::Ring(ring()?),
            LayerKind::Butterfly(b) => Self::TwoPool(Box::new(TwoPool::new(b, ring()?, plan.row(), dtype, device)?)),
            LayerKind::Recall(r) => {
                Self::Recall(Box::new(RecallKv::new(r, ring()?, plan, workspace, (dtype, device))?))
            }
            LayerKind::Evict(e) => Self::CompressedKv(Box::new(CompressedKv::new(e, ring()?, plan.heads, device)?)),
            LayerKind::Delta(spec) => Self::Recurrent(Box::new(Recurrent::new(spec, device)?)),
        })
    }

    /// Fills this empty state with positions `0..count`, those that it stores, of a layer that caches them all.
    fn copy_from(&mut self, other: &Self, count: usize) -> Result<()> {
        match (self, other) {
            (Self::Dense(to), Self::Dense(from)) | (Self::Ring(to), Self::Ring(from)) => to.copy_from(from, count),
            (Self::Recurrent(to), Self::Recurrent(from)) => to.copy_from(from),
            (Self::Recall(to), Self::Dense(from)) => {
                let KeyValues { k, v } = from.rows();
                for start in (0..count).step_by(COPIED_TOKENS) {
                    let n = COPIED_TOKENS.min(count - start);
                    to.push(&k.narrow(0, start, n)?, &v.narrow(0, start, n)?, start)?;
                }
                Ok(())
            }
            _ => Err(Error::new(ErrorKind::Backend, "cache", "cannot be filled from one of another layout")),
        }
    }

    /// Returns the allocated bytes by pool.
    pub fn capacity_bytes(&self) -> PoolBytes {
        match self {
            Self::Dense(r) | Self::Ring(r) => PoolBytes { local: r.capacity_bytes(), ..PoolBytes::default() },
            Self::TwoPool(t) => t.capacity_bytes(),
            Self::Recall(r) => r.capacity_bytes(),
            Self::CompressedKv(k) => PoolBytes { local: k.capacity_bytes(), ..PoolBytes::default() },
            Self::Recurrent(r) => PoolBytes { recurrent: r.bytes(), ..PoolBytes::default() },
        }
    }

    /// Returns the bytes in use by pool after `position` tokens.
    pub fn used_bytes(&self, position: usize) -> PoolBytes {
        match self {
            Self::Dense(r) | Self::Ring(r) => PoolBytes { local: r.used_bytes(position), ..PoolBytes::default() },
            Self::TwoPool(t) => t.used_bytes(position),
            Self::Recall(r) => r.used_bytes(position),
            Self::CompressedKv(k) => PoolBytes { local: k.used_bytes(position), ..PoolBytes::default() },
            Self::Recurrent(r) => PoolBytes { recurrent: r.bytes(), ..PoolBytes::default() },
        }
    }
}

/// KV cache of a model.
#[derive(Debug)]
pub struct Cache {
    /// One state per layer.
    pub layers: Vec<LayerState>,
    ctx: usize,
    position: usize,
    dense_bytes: u64,
    /// Peak allocation during evictions that copy the kept rows.
    peak: PoolBytes,
}

impl Cache {
    /// Allocates the cache that `layout` describes, with keys and values in `dtype`.
    ///
    /// # Errors
    /// The cache is larger than the device's memory (refused before the first allocation); an allocation fails.
    pub fn new(layout: &Layout, dtype: DType, device: &Device) -> Result<Self> {
        Self::within(layout, dtype, device, Arc::default())
    }

    /// Allocates like [`Cache::new`], with the page-locked memory of layers with exact recall from `memory`.
    ///
    /// # Errors
    /// Those of [`Cache::new`].
    pub fn within(layout: &Layout, dtype: DType, device: &Device, memory: Arc<HostMemory>) -> Result<Self> {
        let CacheBytes { peak, dense, host, .. } = layout.bytes(dtype);
        refuse_too_large(if device.is_cpu() { peak.saturating_add(host) } else { peak }, layout.ctx(), device)?;
        if !device.is_cpu() {
            refuse_too_large(host, layout.ctx(), &Device::Cpu)?;
        }
        let mut workspace = Workspace::new(memory);
        let state = |(i, plan): (usize, &LayerPlan)| {
            LayerState::new(plan, &mut workspace, dtype, device).map_err(|e| out_of_memory(e, i, peak, layout.method()))
        };
        let layers = layout.layers.iter().enumerate().map(state).collect::<Result<_>>()?;
        Ok(Self { layers, ctx: layout.ctx(), position: 0, dense_bytes: dense, peak: PoolBytes::default() })
    }

    /// Returns the number of tokens processed.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Returns the context length that the cache is allocated for, in tokens.
    pub fn ctx(&self) -> usize {
        self.ctx
    }

    /// Checks that `count` more tokens fit.
    ///
    /// # Errors
    /// [`ErrorKind::Context`]: they exceed the context length.
    pub fn admit(&self, count: usize) -> Result<()> {
        let need = self.position.checked_add(count);
        if need.is_some_and(|n| n <= self.ctx) {
            return Ok(());
        }
        let more = need.map_or(String::new(), |n| format!("; give at least {n}"));
        let message = format!("{count} tokens after {} exceed the context length of {}{more}", self.position, self.ctx);
        Err(Error::new(ErrorKind::Context, "--ctx", message))
    }

    /// Fills this empty cache with the positions of `other`, a cache of the same model and context length in which
    /// every layer is dense or a sliding window.
    ///
    /// # Errors
    /// Layers that cannot be filled from those of `other`; the device fails.
    pub(crate) fn copy_from(&mut self, other: &Self) -> Result<()> {
        for (i, (layer, from)) in self.layers.iter_mut().zip(&other.layers).enumerate() {
            layer.copy_from(from, other.position).map_err(|e| e.within(format!("cache of layer {i}")))?;
        }
        self.position = other.position;
        Ok(())
    }

    /// Advances the position by `count` tokens, after every layer has stored them.
    pub(crate) fn advance(&mut self, count: usize) {
        self.position += count;
    }

    /// Returns the number of tokens that can be processed before the next eviction moves rows; `usize::MAX` without
    /// eviction.
    #[cfg(feature = "cuda")]
    pub(crate) fn until_eviction(&self) -> usize {
        let rows = self.layers.iter().filter_map(|l| if let LayerState::CompressedKv(r) = l { Some(r) } else { None });
        rows.map(|r| r.until_eviction(usize::MAX)).min().unwrap_or(usize::MAX)
    }

    /// Advances the position by `count` tokens (at most [`Cache::until_eviction`]) whose rows captured steps have
    /// written, and evicts where a block is complete.
    ///
    /// # Errors
    /// An eviction fails; the message names the layer.
    #[cfg(feature = "cuda")]
    pub(crate) fn advance_captured(&mut self, count: usize) -> Result<()> {
        self.advance(count);
        for (i, layer) in self.layers.iter_mut().enumerate() {
            if let LayerState::CompressedKv(rows) = layer {
                rows.advance(count).map_err(|e| e.within(format!("cache of layer {i}")))?;
            }
        }
        Ok(())
    }

    /// Returns the allocated bytes by pool.
    pub fn capacity_bytes(&self) -> PoolBytes {
        self.sum(LayerState::capacity_bytes)
    }

    /// Returns the peak of allocated bytes so far, by pool.
    pub fn peak_bytes(&self) -> PoolBytes {
        let now = self.capacity_bytes();
        if now.total() < self.peak.total() {
            self.peak
        } else {
            now
        }
    }

    /// Evicts at the end of the context: the tokens that follow are a question, or new tokens.
    ///
    /// Layers whose rule evicts once do so at the first call; layers whose rule evicts after every block cut the block
    /// in progress to their budget; other layers, and a cache without tokens, do not change.
    ///
    /// # Errors
    /// There is too little memory for the copy of the kept rows, or the device fails; the message names the layer,
    /// whose state is unchanged.
    pub fn compress(&mut self) -> Result<()> {
        let room = self.ctx - self.position;
        for i in 0..self.layers.len() {
            let mut most = self.capacity_bytes();
            let LayerState::CompressedKv(kept) = &mut self.layers[i] else { continue };
            most.local += kept.end_of_context(room).map_err(|e| e.within(format!("cache of layer {i}")))?;
            if most.total() > self.peak.total() {
                self.peak = most;
            }
        }
        Ok(())
    }

    /// Returns the bytes in use by pool.
    pub fn used_bytes(&self) -> PoolBytes {
        self.sum(|l| l.used_bytes(self.position))
    }

    /// Returns the bytes that the stock model allocates for the same context.
    pub fn dense_bytes(&self) -> u64 {
        self.dense_bytes
    }

    /// Returns the bytes that decode steps have fetched from host memory, and the share of the rows that the step before
    /// had fetched too; `None` where no layer has fetched any.
    ///
    /// # Errors
    /// The device fails.
    pub fn fetched(&self) -> Result<Option<(u64, f64)>> {
        let (mut all, mut bytes) = (Fetched::default(), 0);
        for layer in &self.layers {
            let LayerState::Recall(cache) = layer else { continue };
            let fetched = cache.fetched()?;
            bytes += fetched.rows * cache.store().row_bytes();
            all += fetched;
        }
        Ok((all.rows > 0).then(|| (bytes, all.repeated as f64 / all.rows as f64)))
    }

    fn sum(&self, f: impl Fn(&LayerState) -> PoolBytes) -> PoolBytes {
        let mut total = PoolBytes::default();
        self.layers.iter().for_each(|l| total += f(l));
        total
    }
}

/// Refuses a cache larger than the device's memory, before an allocation fails (which on a CPU aborts the process).
fn refuse_too_large(need: u64, ctx: usize, device: &Device) -> Result<()> {
    let Some(memory) = crate::ops::memory_of(device) else { return Ok(()) };
    if need <= memory {
        return Ok(());
    }
    let gib = |b: u64| b as f64 / (1u64 << 30) as f64;
    let what = if device.is_cpu() { "machine" } else { "GPU" };
    let message = format!("a cache for {ctx} tokens takes {:.1} GiB; this {what} has {:.1}", gib(need), gib(memory));
    Err(Error::new(ErrorKind::Context, "--ctx", message))
}

/// Adds to an out-of-memory error the cache's size and which settings reduce it.
fn out_of_memory(e: Error, layer: usize, need: u64, method: &Method) -> Error {
    if e.kind() != ErrorKind::Memory {
        return e;
    }
    let hint = match method {
        Method::Stock => "use a smaller --ctx, or no --stock",
        Method::Butterfly(plan) if plan.settings.recall > 0 => "use a smaller --ctx, --window or --key-code",
        Method::Butterfly(_) => "use a smaller --ctx or --window",
        Method::Evict(_) => "use a smaller --ctx or budget",
    };
    let message = format!("out of memory: the cache needs {}; {hint}", human_bytes(need));
    Error::new(ErrorKind::Memory, format!("cache of layer {layer}"), message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::retrofit::{RetrofitPlan, Settings};

    #[test]
    fn a_state_of_another_plan_is_refused_by_layer() -> Result<()> {
        let spec = Checkpoint::random("tests/fixtures/shapes/qwen3.5-0.8b", 0)?.spec;
        let cache = |plan: Option<&RetrofitPlan>| Cache::new(&Layout::new(&spec, plan, 256)?, DType::F32, &Device::Cpu);
        let plan = |recall: usize| RetrofitPlan::new(&spec, None, Settings { recall, ..Settings::default() });
        let (two_pool, recall) = (plan(0)?, plan(64)?);
        assert!(cache(Some(&recall))?.copy_from(&cache(None)?).is_ok(), "exact rows give recall's codes");
        for (to, from) in [(Some(&two_pool), None), (None, Some(&two_pool)), (Some(&two_pool), Some(&recall))] {
            let refused = cache(to)?.copy_from(&cache(from)?).err().map_or(String::new(), |e| e.to_string());
            // Layers 0 to 2 are recurrent, the same under every plan.
            assert!(refused.contains("layer 3") && refused.contains("another layout"), "{refused}");
        }
        Ok(())
    }
}
