//! What each layer becomes under a method, resolved once.
//!
//! [`Layout::new`] is the only place where a specification and a method are matched. Cache construction, mixers, the ledger, the memory
//! budget, the bytes that a benchmark counts, the captured decode step and the ablation's graph all read its [`LayerPlan`]s.
//!
//! | layer of the model | method | becomes | raw rows | other rows |
//! |---|---|---|---|---|
//! | sliding | any | [`LayerKind::Sliding`] | `min(window, ctx)` | |
//! | full | stock, or not in the plan | [`LayerKind::Full`] | `ctx` | |
//! | full | in the plan | [`LayerKind::Butterfly`] | `min((w + 1) B, ctx)` | sinks; as many summaries as the rule's stage reads back |
//! | full | eviction | [`LayerKind::Evict`] | the rule's | queries that the rule must see |

use crate::cache::PoolBytes;
use crate::error::{Error, Result};
use crate::eviction::{Eviction, EvictionPlan, When};
use crate::method::Method;
use crate::ops::Window;
use crate::retrofit::Settings;
use crate::selector::{self, Grid, Selector};
use crate::spec::{AttentionKind, AttentionSpec, ModelSpec};
use candle_core::DType;
use std::ops::Range;

/// A model's layers under a method, provisioned for a context.
#[derive(Debug, Clone)]
pub struct Layout {
    /// One plan per layer.
    pub layers: Vec<LayerPlan>,
    method: Method,
    ctx: usize,
}

/// One layer: what it computes and what its cache allocates.
#[derive(Debug, Clone)]
pub struct LayerPlan {
    /// What the layer computes.
    pub kind: LayerKind,
    /// Query heads, `H`.
    pub heads: usize,
    /// Key and value heads, `G`.
    pub kv_heads: usize,
    /// Head dimension, `D`.
    pub head_dim: usize,
    /// Raw rows allocated.
    pub raw_rows: usize,
    /// Raw rows that the stock model would allocate.
    pub dense_rows: usize,
}

/// What a layer computes.
#[derive(Debug, Clone)]
pub enum LayerKind {
    /// Dense causal attention.
    Full,
    /// Causal attention over the last `window` positions, the query's own among them.
    Sliding {
        /// Positions read.
        window: usize,
    },
    /// Compressed butterfly attention.
    Butterfly(Box<ButterflyLayer>),
    /// Dense attention over the tokens that a rule keeps.
    Evict(Box<EvictLayer>),
}

/// A layer with butterfly attention: its settings, the rule and the grid resolved.
#[derive(Debug, Clone)]
pub struct ButterflyLayer {
    /// The plan's settings.
    pub settings: Settings,
    /// The block grid of the provisioned context.
    pub grid: Grid,
    /// Index among the swapped layers, `j`.
    pub ordinal: usize,
    /// Positions the model was trained for: the furthest distance under `--far-position clamp`.
    pub trained: usize,
    /// Sink rows allocated.
    pub sink_rows: usize,
    /// Summary rows allocated.
    pub summary_rows: usize,
    rule: &'static dyn Selector,
}

/// A layer whose cache evicts.
#[derive(Debug, Clone)]
pub struct EvictLayer {
    /// The plan.
    pub plan: EvictionPlan,
    /// Its rule.
    pub rule: &'static dyn Eviction,
    /// Last queries that the rule must see.
    pub observed: usize,
    /// Factor on dot products.
    pub scale: f32,
    ctx: usize,
}

/// The longest context: positions are exact in f32 that far.
pub const MAX_CONTEXT: usize = 1 << 24;

/// Bytes of a whole cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheBytes {
    /// The most that is allocated at once: where a rule evicts once, all layers before it and the copy that the largest can make.
    pub peak: u64,
    /// What is left once every rule has evicted; `peak` where none evicts.
    pub settled: u64,
    /// What the stock model allocates.
    pub dense: u64,
}

impl Layout {
    /// Resolves `method` for every layer of `spec`, provisioned for `ctx` positions.
    ///
    /// # Errors
    /// A context of 0 or above [`MAX_CONTEXT`]; a plan that does not fit the model; an unknown rule.
    pub fn new(spec: &ModelSpec, method: impl Into<Method>, ctx: usize) -> Result<Self> {
        let method = method.into();
        method.check(spec)?;
        Self::resolve(spec, method, ctx, false)
    }

    /// As [`Layout::new`], but every summary pool holds all that any block could read, instead of what the layer's stage needs: the
    /// same logits for more memory, which is how the stage-sized pools are checked.
    ///
    /// # Errors
    /// As [`Layout::new`].
    pub fn with_full_pools(spec: &ModelSpec, method: impl Into<Method>, ctx: usize) -> Result<Self> {
        let method = method.into();
        method.check(spec)?;
        Self::resolve(spec, method, ctx, true)
    }

    fn resolve(spec: &ModelSpec, method: Method, ctx: usize, full_pools: bool) -> Result<Self> {
        if ctx == 0 || ctx > MAX_CONTEXT {
            let message = format!("{ctx} is not a context length: give 1 to {MAX_CONTEXT} tokens");
            return Err(Error::usage("--ctx", message));
        }
        let rule = method.plan().map(|plan| selector::find(&plan.settings.partner)).transpose()?;
        let swapped = |i: usize| {
            let (plan, rule) = method.plan().zip(rule)?;
            let layer = ButterflyLayer::new(&plan.settings, rule, plan.ordinal(i)?, ctx);
            let mut layer = ButterflyLayer { trained: spec.max_positions, ..layer };
            if full_pools {
                layer.summary_rows = layer.grid.readable();
            }
            Some(layer)
        };
        let layer = |(i, a): (usize, &AttentionSpec)| {
            let (dense_rows, kind) = match a.kind {
                AttentionKind::Sliding { window } => (window.min(ctx), LayerKind::Sliding { window }),
                AttentionKind::Full => (
                    ctx,
                    match (swapped(i), &method) {
                        (Some(layer), _) => LayerKind::Butterfly(Box::new(layer)),
                        (None, Method::Evict(plan)) => LayerKind::Evict(Box::new(EvictLayer::new(plan, a, ctx)?)),
                        (None, _) => LayerKind::Full,
                    },
                ),
            };
            let raw_rows = match &kind {
                LayerKind::Full | LayerKind::Sliding { .. } => dense_rows,
                LayerKind::Butterfly(b) => b.ring_rows().min(ctx),
                LayerKind::Evict(e) => e.plan.rows(ctx)?,
            };
            let (heads, kv_heads, head_dim) = (a.heads, a.kv_heads, a.head_dim);
            Ok(LayerPlan { kind, heads, kv_heads, head_dim, raw_rows, dense_rows })
        };
        let layers = spec.attention().map(layer).collect::<Result<_>>()?;
        Ok(Self { layers, method, ctx })
    }

    /// How the full-attention layers are run.
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// Positions provisioned.
    pub fn ctx(&self) -> usize {
        self.ctx
    }

    /// Bytes of the cache with keys and values in `dtype`.
    pub fn bytes(&self, dtype: DType) -> CacheBytes {
        let (mut own, mut settled, mut dense, mut copy) = (0, 0, 0, 0);
        for l in &self.layers {
            own = u64::saturating_add(own, l.bytes(dtype).total());
            settled = u64::saturating_add(settled, l.settled_bytes(dtype));
            dense = u64::saturating_add(dense, l.row_bytes(dtype).saturating_mul(l.dense_rows as u64));
            copy = copy.max(l.copy_bytes(dtype));
        }
        CacheBytes { peak: own.saturating_add(copy), settled, dense }
    }

    /// Bytes of keys and values that queries at `positions` read, all together, each once per KV head.
    pub fn bytes_read(&self, positions: Range<usize>, dtype: DType) -> Result<u64> {
        let read = |l: &LayerPlan| Ok(l.row_bytes(dtype) * l.rows_read(positions.clone())? as u64);
        self.layers.iter().map(read).sum()
    }

    /// The layers with butterfly attention, in order of their ordinals.
    pub fn butterfly(&self) -> impl Iterator<Item = &ButterflyLayer> {
        self.layers.iter().filter_map(LayerPlan::butterfly)
    }

    /// Share of the earlier blocks whose state reaches the last one through the swapped layers; `None` where none is swapped.
    pub fn reach(&self) -> Option<f64> {
        let first = self.butterfly().next()?;
        Some(selector::reach(first.rule, &first.grid, self.butterfly().count(), first.settings.partner_count))
    }
}

impl LayerPlan {
    /// The layer's butterfly attention, if it has that.
    pub fn butterfly(&self) -> Option<&ButterflyLayer> {
        match &self.kind {
            LayerKind::Butterfly(b) => Some(b),
            _ => None,
        }
    }

    /// `(G, D)`.
    pub fn row(&self) -> (usize, usize) {
        (self.kv_heads, self.head_dim)
    }

    /// The raw positions that a query reads.
    pub fn window(&self) -> Window {
        match &self.kind {
            LayerKind::Full | LayerKind::Evict(_) => Window::Unbounded,
            LayerKind::Sliding { window } => Window::Tokens(*window),
            LayerKind::Butterfly(b) => b.settings.raw_window(),
        }
    }

    /// Bytes allocated by pool.
    pub fn bytes(&self, dtype: DType) -> PoolBytes {
        let rows = |n: usize| self.row_bytes(dtype).saturating_mul(n as u64);
        let mut bytes = PoolBytes { local: rows(self.raw_rows), ..PoolBytes::default() };
        match &self.kind {
            LayerKind::Full | LayerKind::Sliding { .. } => {}
            LayerKind::Butterfly(b) => {
                // Running sums: f32 for keys and values.
                bytes.summary = rows(b.summary_rows) + 8 * (self.kv_heads * self.head_dim) as u64;
                bytes.sink = rows(b.sink_rows);
            }
            LayerKind::Evict(e) => {
                bytes.local += (e.observed * self.heads * self.head_dim * dtype.size_in_bytes()) as u64;
            }
        }
        bytes
    }

    /// Rows of keys and values that queries at `positions` read, all together: the window, sinks left of it and routed summaries, or
    /// what a rule kept of the context before `positions` and the tokens after.
    pub fn rows_read(&self, positions: Range<usize>) -> Result<usize> {
        match &self.kind {
            LayerKind::Butterfly(b) => Ok(b.rows_read(positions)),
            LayerKind::Evict(e) => e.plan.rows_read(positions),
            LayerKind::Full | LayerKind::Sliding { .. } => Ok(positions.map(|p| p + 1 - self.window().left(p)).sum()),
        }
    }

    /// Bytes that evicting takes besides what the layer holds before and after, with `element` bytes a number.
    pub fn scratch(&self, element: usize) -> Result<u64> {
        match &self.kind {
            LayerKind::Evict(e) => e.plan.scratch(e.ctx, self, element),
            _ => Ok(0),
        }
    }

    /// Bytes of a key and a value, all KV heads.
    fn row_bytes(&self, dtype: DType) -> u64 {
        2 * (self.kv_heads * self.head_dim * dtype.size_in_bytes()) as u64
    }

    fn settled_bytes(&self, dtype: DType) -> u64 {
        match &self.kind {
            LayerKind::Evict(e) if e.when() == When::Once => e.plan.budget.min(e.ctx) as u64 * self.row_bytes(dtype),
            _ => self.bytes(dtype).total(),
        }
    }

    /// Most bytes of the rows that are copied when the context is over: those of the fewest tokens that are cut at all, and of what is
    /// left of the context then.
    fn copy_bytes(&self, dtype: DType) -> u64 {
        match &self.kind {
            LayerKind::Evict(e) if e.when() == When::Once && e.plan.budget < e.ctx => {
                (e.ctx - 1) as u64 * self.row_bytes(dtype)
            }
            _ => 0,
        }
    }
}

impl ButterflyLayer {
    /// The `ordinal`-th swapped layer under `rule`, provisioned for `ctx` positions; trained for any length.
    pub fn new(settings: &Settings, rule: &'static dyn Selector, ordinal: usize, ctx: usize) -> Self {
        let grid = settings.grid(ctx);
        Self {
            settings: settings.clone(),
            grid,
            ordinal,
            trained: usize::MAX,
            sink_rows: settings.sink_tokens.min(ctx),
            summary_rows: selector::rows_needed(rule, &grid, ordinal, settings.partner_count),
            rule,
        }
    }

    /// Blocks whose summaries `block` reads, in rising order: those of the rule that hold at least one pooled position.
    pub fn route(&self, block: usize) -> Vec<usize> {
        let s = &self.settings;
        let mut blocks = selector::route(self.rule, &self.grid, self.ordinal, s.partner_count, block);
        blocks.retain(|n| s.pooled_count(*n) > 0);
        blocks
    }

    /// Added to the logit of block `n`'s summary: `β ln(count)`.
    pub fn bias(&self, n: usize) -> f32 {
        (self.settings.summary_bias * (self.settings.pooled_count(n) as f64).ln()) as f32
    }

    /// Rows of the local ring: a token finds its whole window there whatever its place in its block.
    fn ring_rows(&self) -> usize {
        (self.settings.window_blocks() + 1) * self.settings.block
    }

    fn rows_read(&self, positions: Range<usize>) -> usize {
        let (s, window) = (&self.settings, self.settings.raw_window());
        let (mut sum, mut routed) = (0, (usize::MAX, 0));
        for p in positions {
            let block = p / s.block;
            if routed.0 != block {
                routed = (block, self.route(block).len());
            }
            let left = window.left(p);
            sum += p + 1 - left + s.sink_tokens.min(left) + routed.1;
        }
        sum
    }
}

impl EvictLayer {
    fn new(plan: &EvictionPlan, a: &AttentionSpec, ctx: usize) -> Result<Self> {
        let rule = plan.find()?;
        Ok(Self { plan: plan.clone(), rule, observed: rule.observes(plan).min(ctx), scale: a.scale as f32, ctx })
    }

    /// When its rule evicts.
    pub fn when(&self) -> When {
        self.rule.when(&self.plan)
    }
}
