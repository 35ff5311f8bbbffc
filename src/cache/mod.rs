//! The KV cache: one fixed allocation per layer, made before the first token.
//!
//! Every state reports its bytes by pool, allocated and used, and what a dense cache would have taken. Nothing is allocated
//! afterwards, and a token past the provisioned context is refused before any work.

mod ring;
mod two_pool;

pub use ring::Ring;
pub use two_pool::TwoPool;

use crate::error::{Error, ErrorKind, Result};
use crate::ops::human_bytes;
use crate::retrofit::{RetrofitPlan, Settings};
use crate::selector;
use crate::spec::{AttentionKind, ModelSpec};
use candle_core::{DType, Device};
use serde::Serialize;

/// Bytes by pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct PoolBytes {
    /// Raw positions: dense caches, sliding rings and local rings.
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
}

impl LayerState {
    /// Allocated bytes by pool.
    pub fn capacity_bytes(&self) -> PoolBytes {
        match self {
            Self::Dense(r) | Self::Ring(r) => PoolBytes { local: r.capacity_bytes(), ..PoolBytes::default() },
            Self::TwoPool(t) => t.capacity_bytes(),
        }
    }

    /// Bytes that hold something after `position` tokens.
    pub fn used_bytes(&self, position: usize) -> PoolBytes {
        match self {
            Self::Dense(r) | Self::Ring(r) => PoolBytes { local: r.used_bytes(position), ..PoolBytes::default() },
            Self::TwoPool(t) => t.used_bytes(position),
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
}

impl Cache {
    /// Allocates for `ctx` positions of keys and values in `dtype`; layers named by `plan` get two pools.
    pub fn new(
        spec: &ModelSpec,
        plan: Option<&RetrofitPlan>,
        ctx: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Self::build(spec, plan, ctx, (dtype, device), false)
    }

    /// As [`Cache::new`], but every summary pool holds all that any block could read, instead of what the layer's stage
    /// needs: the same logits for more memory, which is how the stage-sized pools are checked.
    pub fn with_full_pools(
        spec: &ModelSpec,
        plan: Option<&RetrofitPlan>,
        ctx: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        Self::build(spec, plan, ctx, (dtype, device), true)
    }

    fn build(
        spec: &ModelSpec,
        plan: Option<&RetrofitPlan>,
        ctx: usize,
        (dtype, device): (DType, &Device),
        full: bool,
    ) -> Result<Self> {
        if ctx == 0 {
            return Err(Error::usage("--ctx", "0 is not a context length"));
        }
        let (need, dense_bytes) = Self::bytes_for(spec, plan, ctx, dtype, full)?;
        refuse_too_large(need, ctx, device)?;
        let mut layers = Vec::with_capacity(spec.layers.len());
        for (i, l) in spec.layers.iter().enumerate() {
            let row = (l.kv_heads, l.head_dim);
            let pools = pools(spec, plan, i, ctx, full)?;
            let ring = || Ring::new(pools.local, row, dtype, device);
            let made = match (pools.swapped, l.attention) {
                (Some(settings), _) => {
                    TwoPool::new(settings, ctx, &pools, row, dtype, device).map(|p| LayerState::TwoPool(Box::new(p)))
                }
                (None, AttentionKind::Full) => ring().map(LayerState::Dense),
                (None, AttentionKind::Sliding { .. }) => ring().map(LayerState::Ring),
            };
            layers.push(made.map_err(|e| no_room(e, i, need, plan.is_some()))?);
        }
        Ok(Self { layers, ctx, position: 0, dense_bytes })
    }

    /// What a cache takes, and what a dense one would.
    pub(crate) fn bytes_for(
        spec: &ModelSpec,
        plan: Option<&RetrofitPlan>,
        ctx: usize,
        dtype: DType,
        full: bool,
    ) -> Result<(u64, u64)> {
        let (mut own, mut dense) = (0, 0);
        for (i, l) in spec.layers.iter().enumerate() {
            let row = (l.kv_heads, l.head_dim);
            let p = pools(spec, plan, i, ctx, full)?;
            let bytes = |rows: usize| if rows == 0 { 0 } else { Ring::bytes_for(rows, row, dtype) };
            own += bytes(p.local) + bytes(p.sinks) + bytes(p.summaries);
            // Running sums: f32 for keys and values.
            own += if p.swapped.is_some() { 8 * (row.0 * row.1) as u64 } else { 0 };
            dense += bytes(pools(spec, None, i, ctx, false)?.local);
        }
        Ok((own, dense))
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
        let need = self.position + count;
        if need <= self.ctx {
            return Ok(());
        }
        let message = format!("{need} tokens do not fit the {} provisioned; give at least {need}", self.ctx);
        Err(Error::new(ErrorKind::Context, "--ctx", message))
    }

    /// Counts `count` tokens as seen, once every layer has them.
    pub(crate) fn advance(&mut self, count: usize) {
        self.position += count;
    }

    /// Allocated bytes by pool.
    pub fn capacity_bytes(&self) -> PoolBytes {
        self.sum(LayerState::capacity_bytes)
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

/// Rows of a layer's pools, none longer than the context, and the settings that it is swapped with, if it is.
struct Pools<'a> {
    local: usize,
    sinks: usize,
    summaries: usize,
    swapped: Option<&'a Settings>,
}

fn pools<'a>(spec: &ModelSpec, plan: Option<&'a RetrofitPlan>, i: usize, ctx: usize, full: bool) -> Result<Pools<'a>> {
    let whole = |local: usize| Ok(Pools { local, sinks: 0, summaries: 0, swapped: None });
    let swapped = plan.and_then(|p| p.ordinal(i).map(|j| (&p.settings, j)));
    match (spec.layers[i].attention, swapped) {
        (AttentionKind::Sliding { window }, _) => whole(window.min(ctx)),
        (AttentionKind::Full, None) => whole(ctx),
        (AttentionKind::Full, Some((s, ordinal))) => {
            let (rule, grid) = (selector::find(&s.partner)?, s.grid(ctx));
            let rows = match full {
                true => grid.readable(),
                false => selector::rows_needed(rule, &grid, ordinal, s.partner_count),
            };
            let local = (s.window_blocks() + 1) * s.block;
            Ok(Pools { local: local.min(ctx), sinks: s.sink_tokens.min(ctx), summaries: rows, swapped: Some(s) })
        }
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
fn no_room(e: Error, layer: usize, need: u64, swapped: bool) -> Error {
    if e.kind() != ErrorKind::Memory {
        return e;
    }
    let hint = if swapped { "a smaller --ctx or --window" } else { "a smaller --ctx, or no --stock," };
    let message = format!("out of memory: the cache asks for {}; {hint} asks for less", human_bytes(need));
    Error::new(ErrorKind::Memory, format!("cache of layer {layer}"), message)
}
