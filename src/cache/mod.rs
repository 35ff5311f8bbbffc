//! The KV cache: one fixed allocation per layer, made before the first token.
//!
//! Every state reports its bytes by pool, allocated and used, and what a dense cache would have taken. Nothing is allocated
//! afterwards, and a token past the provisioned context is refused before any work. One state is an exception: rows that a rule
//! keeps when the context is over ([`Cache::compress`]) are copied out of a dense cache, and [`Cache::peak_bytes`] counts both.

mod compressed_kv;
mod ring;
mod two_pool;

pub use compressed_kv::CompressedKv;
pub use ring::Ring;
pub use two_pool::TwoPool;

use crate::error::{Error, ErrorKind, Result};
use crate::layout::{CacheBytes, LayerKind, LayerPlan, Layout};
use crate::method::Method;
use crate::ops::human_bytes;
use candle_core::{DType, Device};
use serde::Serialize;

/// Bytes by pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct PoolBytes {
    /// Raw positions: dense caches, sliding rings, local rings and kept rows, with the queries that score them.
    pub local: u64,
    /// Summaries and the running sums of blocks in progress.
    pub summary: u64,
    /// Sinks.
    pub sink: u64,
}

impl PoolBytes {
    /// All pools.
    pub fn total(&self) -> u64 {
        self.local + self.summary + self.sink
    }
}

impl std::ops::AddAssign for PoolBytes {
    fn add_assign(&mut self, other: Self) {
        self.local += other.local;
        self.summary += other.summary;
        self.sink += other.sink;
    }
}

/// What one layer keeps.
#[derive(Debug)]
pub enum LayerState {
    /// Every position of the provisioned context.
    Dense(Ring),
    /// The last positions of a sliding window.
    Ring(Ring),
    /// A local ring, sinks and summaries.
    TwoPool(Box<TwoPool>),
    /// The tokens that a rule keeps, other ones in each KV head.
    CompressedKv(Box<CompressedKv>),
}

impl LayerState {
    fn new(plan: &LayerPlan, dtype: DType, device: &Device) -> Result<Self> {
        let ring = || Ring::new(plan.raw_rows, plan.row(), dtype, device);
        Ok(match &plan.kind {
            LayerKind::Full => Self::Dense(ring()?),
            LayerKind::Sliding { .. } => Self::Ring(ring()?),
            LayerKind::Butterfly(b) => Self::TwoPool(Box::new(TwoPool::new(b, ring()?, plan.row(), dtype, device)?)),
            LayerKind::Evict(e) => Self::CompressedKv(Box::new(CompressedKv::new(e, ring()?, plan.heads, device)?)),
        })
    }

    /// Allocated bytes by pool.
    pub fn capacity_bytes(&self) -> PoolBytes {
        match self {
            Self::Dense(r) | Self::Ring(r) => PoolBytes { local: r.capacity_bytes(), ..PoolBytes::default() },
            Self::TwoPool(t) => t.capacity_bytes(),
            Self::CompressedKv(k) => PoolBytes { local: k.capacity_bytes(), ..PoolBytes::default() },
        }
    }

    /// Bytes that hold something after `position` tokens.
    pub fn used_bytes(&self, position: usize) -> PoolBytes {
        match self {
            Self::Dense(r) | Self::Ring(r) => PoolBytes { local: r.used_bytes(position), ..PoolBytes::default() },
            Self::TwoPool(t) => t.used_bytes(position),
            Self::CompressedKv(k) => PoolBytes { local: k.used_bytes(position), ..PoolBytes::default() },
        }
    }
}

/// The cache of a whole model.
#[derive(Debug)]
pub struct Cache {
    /// One state per layer.
    pub layers: Vec<LayerState>,
    ctx: usize,
    position: usize,
    dense_bytes: u64,
    /// The most that was allocated at once when layers were cut, a copy beside the rows that it was made from.
    peak: PoolBytes,
}

impl Cache {
    /// Allocates what `layout` plans, with keys and values in `dtype`.
    ///
    /// # Errors
    /// A cache that the device cannot hold, refused before the first allocation; an allocation that fails.
    pub fn new(layout: &Layout, dtype: DType, device: &Device) -> Result<Self> {
        let CacheBytes { peak, dense, .. } = layout.bytes(dtype);
        refuse_too_large(peak, layout.ctx(), device)?;
        let state = |(i, plan): (usize, &LayerPlan)| {
            LayerState::new(plan, dtype, device).map_err(|e| no_room(e, i, peak, layout.method()))
        };
        let layers = layout.layers.iter().enumerate().map(state).collect::<Result<_>>()?;
        Ok(Self { layers, ctx: layout.ctx(), position: 0, dense_bytes: dense, peak: PoolBytes::default() })
    }

    /// Tokens seen.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Positions provisioned.
    pub fn ctx(&self) -> usize {
        self.ctx
    }

    /// Refuses `count` more tokens where they do not fit.
    pub fn admit(&self, count: usize) -> Result<()> {
        let need = self.position.checked_add(count);
        if need.is_some_and(|n| n <= self.ctx) {
            return Ok(());
        }
        let more = need.map_or(String::new(), |n| format!("; give at least {n}"));
        let message = format!("{count} tokens after {} do not fit the {} provisioned{more}", self.position, self.ctx);
        Err(Error::new(ErrorKind::Context, "--ctx", message))
    }

    /// Counts `count` tokens as seen, once every layer has them.
    pub(crate) fn advance(&mut self, count: usize) {
        self.position += count;
    }

    /// Tokens that may be read before rows change places: all of them where nothing evicts.
    #[cfg(feature = "cuda")]
    pub(crate) fn until_eviction(&self) -> usize {
        let kept = self.layers.iter().filter_map(|l| if let LayerState::CompressedKv(k) = l { Some(k) } else { None });
        kept.map(|k| k.piece(usize::MAX)).min().unwrap_or(usize::MAX)
    }

    /// Counts `count` tokens, at most [`Cache::until_eviction`], whose rows a captured step has written; evicts after the last of them.
    #[cfg(feature = "cuda")]
    pub(crate) fn took(&mut self, count: usize) -> Result<()> {
        self.advance(count);
        for (i, layer) in self.layers.iter_mut().enumerate() {
            if let LayerState::CompressedKv(kept) = layer {
                kept.took(count).map_err(|e| e.within(format!("cache of layer {i}")))?;
            }
        }
        Ok(())
    }

    /// Allocated bytes by pool.
    pub fn capacity_bytes(&self) -> PoolBytes {
        self.sum(LayerState::capacity_bytes)
    }

    /// The most that was ever allocated at once, by pool: what is allocated now, unless evicting took more.
    pub fn peak_bytes(&self) -> PoolBytes {
        let now = self.capacity_bytes();
        if now.total() < self.peak.total() {
            self.peak
        } else {
            now
        }
    }

    /// Tells every layer that the context is over: what is read from here on is a question, or new tokens.
    ///
    /// Layers whose rule evicts once do it now, the first time they are told; those that evict all the time cut the block in
    /// progress to their budget; all others change nothing, and neither does a cache that has seen no token.
    ///
    /// # Errors
    /// Too little memory for the rows that stay, or a backend's failure: names the layer, which then holds what it held.
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

    /// Bytes in use by pool.
    pub fn used_bytes(&self) -> PoolBytes {
        self.sum(|l| l.used_bytes(self.position))
    }

    /// What the model as it came would have allocated for the same context.
    pub fn dense_bytes(&self) -> u64 {
        self.dense_bytes
    }

    fn sum(&self, f: impl Fn(&LayerState) -> PoolBytes) -> PoolBytes {
        let mut total = PoolBytes::default();
        self.layers.iter().for_each(|l| total += f(l));
        total
    }
}

/// Refuses a cache that the device cannot hold, before the first allocation fails and (on a CPU) ends the process.
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

/// A failed allocation, with what was asked for and what would ask for less.
fn no_room(e: Error, layer: usize, need: u64, method: &Method) -> Error {
    if e.kind() != ErrorKind::Memory {
        return e;
    }
    let hint = match method {
        Method::Stock => "a smaller --ctx, or no --stock,",
        Method::Butterfly(_) => "a smaller --ctx or --window",
        Method::Evict(_) => "a smaller --ctx or budget",
    };
    let message = format!("out of memory: the cache asks for {}; {hint} asks for less", human_bytes(need));
    Error::new(ErrorKind::Memory, format!("cache of layer {layer}"), message)
}
