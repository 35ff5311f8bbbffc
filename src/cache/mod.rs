//! The KV cache: one fixed allocation per layer, made before the first token.
//!
//! Every state reports its bytes by pool, allocated and used, and what a dense cache would have taken. Nothing is allocated
//! afterwards, and a token past the provisioned context is refused before any work.

mod ring;
mod two_pool;

pub use ring::Ring;
pub use two_pool::TwoPool;

use crate::error::{Error, ErrorKind, Result};
use crate::retrofit::RetrofitPlan;
use crate::selector;
use crate::spec::{AttentionKind, LayerSpec, ModelSpec};
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
        refuse_too_large(spec, plan, ctx, dtype, device)?;
        let mut layers = Vec::with_capacity(spec.layers.len());
        let mut dense_bytes = 0;
        for (i, l) in spec.layers.iter().enumerate() {
            let row = (l.kv_heads, l.head_dim);
            let capacity = match l.attention {
                AttentionKind::Full => ctx,
                AttentionKind::Sliding { window } => window.min(ctx),
            };
            dense_bytes += Ring::bytes_for(capacity, row, dtype);
            layers.push(match (l.attention, plan.and_then(|p| p.ordinal(i).map(|j| (p, j)))) {
                (AttentionKind::Full, Some((plan, ordinal))) => {
                    let s = &plan.settings;
                    let (rule, grid) = (selector::find(&s.partner)?, s.grid(ctx));
                    let rows = match full {
                        true => grid.readable(),
                        false => selector::rows_needed(rule, &grid, ordinal, s.partner_count),
                    };
                    LayerState::TwoPool(Box::new(TwoPool::new(s, ctx, rows, row, dtype, device)?))
                }
                (AttentionKind::Full, None) => LayerState::Dense(Ring::new(capacity, row, dtype, device)?),
                (AttentionKind::Sliding { .. }, _) => LayerState::Ring(Ring::new(capacity, row, dtype, device)?),
            });
        }
        Ok(Self { layers, ctx, position: 0, dense_bytes })
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

/// Refuses a cache that the machine cannot hold, before the first allocation fails and ends the process.
fn refuse_too_large(
    spec: &ModelSpec,
    plan: Option<&RetrofitPlan>,
    ctx: usize,
    dtype: DType,
    device: &Device,
) -> Result<()> {
    let Some(memory) = crate::ops::memory_of(device) else { return Ok(()) };
    let rows = |(i, l): (usize, &LayerSpec)| match (l.attention, plan.filter(|p| p.ordinal(i).is_some())) {
        (AttentionKind::Full, None) => ctx,
        (AttentionKind::Full, Some(p)) => (p.settings.window + p.settings.block + p.settings.sink_tokens).min(2 * ctx),
        (AttentionKind::Sliding { window }, _) => window.min(ctx),
    };
    let layers = spec.layers.iter().enumerate();
    let need: u64 = layers.map(|(i, l)| Ring::bytes_for(rows((i, l)), (l.kv_heads, l.head_dim), dtype)).sum();
    if need <= memory {
        return Ok(());
    }
    let gib = |b: u64| b as f64 / (1u64 << 30) as f64;
    let message = format!("a cache for {ctx} tokens takes {:.1} GiB; this machine has {:.1}", gib(need), gib(memory));
    Err(Error::new(ErrorKind::Context, "--ctx", message))
}
