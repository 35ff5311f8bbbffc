//! Layout: the kind of every layer and its cache sizes under a method, resolved once.
//!
//! [`Layout::new`] is the only place where a specification and a method are combined. Cache construction, mixers, the
//! memory ledger, the memory budget, byte counts of benchmarks, the captured decode step and the ablation's graph all
//! read its [`LayerPlan`]s.
//!
//! | layer of the model | method | kind | raw rows | other rows |
//! |---|---|---|---|---|
//! | sliding | any | [`LayerKind::Sliding`] | `min(window, ctx)` | |
//! | full | stock, or not in the plan | [`LayerKind::Full`] | `ctx` | |
//! | full | in the plan, `recall` 0 | [`LayerKind::Butterfly`] | `min((w + 1) B, ctx)` | sinks, summaries of its stage |
//! | full | in its `butterfly_layers` | [`LayerKind::Butterfly`] | the same | the same |
//! | full | in the plan, `recall` k | [`LayerKind::Recall`] | `(w + 1) B` | sinks, codes; all rows in host memory |
//! | full | the same, `ctx ≤ k + S + (w + 1) B` | [`LayerKind::Full`] | `ctx` | |
//! | Gated DeltaNet | any | [`LayerKind::Delta`] | | a state of constant size |
//! | full | eviction | [`LayerKind::Evict`] | by the rule | last queries that the rule observes |

use crate::cache::{PoolBytes, TILE_BYTES};
use crate::error::{Error, Result};
use crate::eviction::{Eviction, EvictionPlan, When};
use crate::method::Method;
use crate::nn::Rope;
use crate::ops::Window;
use crate::recall::{Calibration, Fit, Fits, KeyCodeChoice, LayerTables, PAGE, SUB};
use crate::retrofit::{CodeFit, PrefillKind, RestKind, Settings};
use crate::selector::{self, Grid, Selector};
use crate::spec::{AttentionKind, AttentionSpec, DeltaSpec, MixerSpec, ModelSpec};
use candle_core::DType;
use std::ops::Range;
use std::sync::Arc;

/// Layers of a model under a method, sized for a context length.
#[derive(Debug, Clone)]
pub struct Layout {
    /// One plan per layer.
    pub layers: Vec<LayerPlan>,
    method: Method,
    ctx: usize,
}

/// Kind and cache size of one layer. A recurrent layer has no heads of attention and no rows: their numbers are 0.
#[derive(Debug, Clone)]
pub struct LayerPlan {
    /// Kind of attention.
    pub kind: LayerKind,
    /// Query heads, `H`.
    pub heads: usize,
    /// Key and value heads, `G`.
    pub kv_heads: usize,
    /// Head dimension, `D`.
    pub head_dim: usize,
    /// Cache rows of raw keys and values to allocate.
    pub raw_rows: usize,
    /// Cache rows that the stock model allocates.
    pub dense_rows: usize,
}

/// Kind of attention in a layer.
#[derive(Debug, Clone)]
pub enum LayerKind {
    /// Dense causal attention.
    Full,
    /// Causal attention over the last `window` positions, the query's own included.
    Sliding {
        /// Number of positions read.
        window: usize,
    },
    /// Compressed butterfly attention.
    Butterfly(Box<ButterflyLayer>),
    /// Exact recall: window and sinks, the best of all other tokens from host memory, an estimate of the others.
    Recall(Box<RecallLayer>),
    /// Dense attention over the tokens that an eviction rule keeps.
    Evict(Box<EvictLayer>),
    /// Gated DeltaNet: a state of constant size, whatever the method.
    Delta(DeltaSpec),
}

/// A layer with exact recall.
#[derive(Debug, Clone)]
pub struct RecallLayer {
    /// Settings of the retrofit plan.
    pub settings: Settings,
    /// Key code.
    pub code: KeyCodeChoice,
    /// Sink rows to allocate.
    pub sink_rows: usize,
    /// Positions of the context.
    pub ctx: usize,
    /// Codes fitted to a calibration ([`Layout::calibrated`]); a cache cannot be made without them.
    pub tables: Option<Arc<LayerTables>>,
    /// Block summaries that a prompt is read by; `None` where prefill is exact.
    pub summaries: Option<ButterflyLayer>,
}

/// A layer with butterfly attention: settings, rule and block grid.
#[derive(Debug, Clone)]
pub struct ButterflyLayer {
    /// Settings of the retrofit plan.
    pub settings: Settings,
    /// Block grid of the context.
    pub grid: Grid,
    /// Index among the layers with block summaries, `j`.
    pub ordinal: usize,
    /// Trained length in positions: the largest distance of a summary under `--far-position clamp`.
    pub trained: usize,
    /// Sink rows to allocate.
    pub sink_rows: usize,
    /// Summary rows to allocate.
    pub summary_rows: usize,
    rule: &'static dyn Selector,
}

/// A layer with an evicting cache.
#[derive(Debug, Clone)]
pub struct EvictLayer {
    /// Eviction plan.
    pub plan: EvictionPlan,
    /// Rule of the plan.
    pub rule: &'static dyn Eviction,
    /// Number of last queries that the rule scores with.
    pub observed: usize,
    /// Factor on dot products.
    pub scale: f32,
    ctx: usize,
}

/// Largest context length: f32 represents positions exactly up to here.
pub const MAX_CONTEXT: usize = 1 << 24;

/// Sizes of a model's cache in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheBytes {
    /// Upper bound on the bytes allocated at once: all layers before eviction, plus the largest copy that a rule makes
    /// when it evicts once.
    pub peak: u64,
    /// Bytes allocated after every rule that evicts once has done so.
    pub settled: u64,
    /// Bytes that the stock model allocates.
    pub dense: u64,
    /// Bytes of exact keys and values in host memory, not counted in the others.
    pub host: u64,
}

impl Layout {
    /// Resolves `method` for every layer of `spec` with a context of `ctx` positions.
    ///
    /// # Errors
    /// `ctx` is 0 or above [`MAX_CONTEXT`]; the plan does not fit the model; a rule is unknown.
    pub fn new(spec: &ModelSpec, method: impl Into<Method>, ctx: usize) -> Result<Self> {
        let method = method.into();
        method.check(spec)?;
        Self::resolve(spec, method, ctx, false)
    }

    /// Resolves like [`Layout::new`], but with summary pools that store every block that can be read, not only the rows
    /// that the layer's stage needs. Logits are the same; tests compare the two.
    ///
    /// # Errors
    /// Those of [`Layout::new`].
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
            let layer = ButterflyLayer::new(&plan.settings, rule, plan.summary_ordinal(i)?, ctx);
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
                    match &method {
                        Method::Butterfly(plan) if plan.recalls(i) => {
                            let layer = RecallLayer::new(&plan.settings, ctx)?;
                            let by_summaries = plan.settings.prefill == PrefillKind::Butterfly;
                            layer.map_or(LayerKind::Full, |layer| {
                                let summaries = swapped(i).filter(|_| by_summaries);
                                LayerKind::Recall(Box::new(RecallLayer { summaries, ..layer }))
                            })
                        }
                        Method::Butterfly(_) => {
                            swapped(i).map_or(LayerKind::Full, |layer| LayerKind::Butterfly(Box::new(layer)))
                        }
                        Method::Evict(plan) => LayerKind::Evict(Box::new(EvictLayer::new(plan, a, ctx)?)),
                        Method::Stock => LayerKind::Full,
                    },
                ),
            };
            let raw_rows = match &kind {
                LayerKind::Full | LayerKind::Sliding { .. } => dense_rows,
                LayerKind::Delta(_) => 0,
                LayerKind::Butterfly(b) => b.settings.ring_rows().min(ctx),
                LayerKind::Recall(r) => r.settings.near_rows(),
                LayerKind::Evict(e) => e.plan.rows(ctx)?,
            };
            let (heads, kv_heads, head_dim) = (a.heads, a.kv_heads, a.head_dim);
            Ok(LayerPlan { kind, heads, kv_heads, head_dim, raw_rows, dense_rows })
        };
        let layers = spec.layers.iter().enumerate().map(|(i, l)| match &l.mixer {
            MixerSpec::Attention(a) => layer((i, a)),
            MixerSpec::Delta(d) => Ok(LayerPlan::recurrent(*d)),
        });
        let layers = layers.collect::<Result<_>>()?;
        Ok(Self { layers, method, ctx })
    }

    /// Fits the codes of layers with exact recall to `calibration`, or takes those of `fits`.
    ///
    /// # Errors
    /// The calibration was made with another number of sinks, lacks a layer, or is at natural positions, which the key
    /// code cannot use.
    pub fn calibrated(
        mut self,
        (calibration, fits): (&Calibration, &Fits),
        spec: &ModelSpec,
        ropes: &[Rope],
    ) -> Result<Self> {
        for (i, a) in spec.attention() {
            let LayerKind::Recall(r) = &mut self.layers[i].kind else { continue };
            let rope = &ropes[a.rope];
            let sinks = r.settings.sink_tokens;
            if sinks != calibration.sink_tokens {
                let made = calibration.sink_tokens;
                let message = format!("{sinks} sinks, but the calibration left out {made}; calibrate again");
                return Err(Error::usage("--sink-tokens", message));
            }
            let fit = Fit { layer: i, key_code: r.settings.key_code.clone(), ctx: r.ctx };
            r.tables = Some(fits.get(fit, || calibration.tables(i, &r.code, rope, r.ctx))?);
        }
        Ok(self)
    }

    /// Returns whether a layer with exact recall still lacks its codes.
    pub fn lacks_tables(&self) -> bool {
        self.layers.iter().any(|l| matches!(&l.kind, LayerKind::Recall(r) if r.tables.is_none()))
    }

    /// Returns the layers with exact recall, in model order.
    pub fn recall(&self) -> impl Iterator<Item = &RecallLayer> {
        self.layers.iter().filter_map(|l| if let LayerKind::Recall(r) = &l.kind { Some(&**r) } else { None })
    }

    /// Returns whether every layer caches each position that its queries may read, as in the stock model.
    pub fn is_dense(&self) -> bool {
        self.layers.iter().all(|l| matches!(l.kind, LayerKind::Full | LayerKind::Sliding { .. } | LayerKind::Delta(_)))
    }

    /// Returns whether prefill gives the stock model's keys and values: layers with exact recall attend to every
    /// position, unless they read the prompt by summaries; butterfly layers and evicting layers do not.
    pub fn prefills_exactly(&self) -> bool {
        let exact = |l: &LayerPlan| match &l.kind {
            LayerKind::Full | LayerKind::Sliding { .. } | LayerKind::Delta(_) => true,
            LayerKind::Recall(r) => r.summaries.is_none(),
            LayerKind::Butterfly(_) | LayerKind::Evict(_) => false,
        };
        self.layers.iter().all(exact)
    }

    /// Returns the method that the layout was made for.
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// Returns the context length in positions.
    pub fn ctx(&self) -> usize {
        self.ctx
    }

    /// Returns the sizes of the cache with keys and values in `dtype`.
    pub fn bytes(&self, dtype: DType) -> CacheBytes {
        let (mut own, mut settled, mut dense, mut copy, mut host) = (0, 0, 0, 0, 0);
        for l in &self.layers {
            host = u64::saturating_add(host, l.bytes(dtype).host);
            own = u64::saturating_add(own, l.bytes(dtype).on_device());
            settled = u64::saturating_add(settled, l.settled_bytes(dtype));
            dense = u64::saturating_add(dense, l.row_bytes(dtype).saturating_mul(l.dense_rows as u64));
            copy = copy.max(l.copy_bytes(dtype));
        }
        CacheBytes { peak: own.saturating_add(copy), settled, dense, host }
    }

    /// Returns the bytes of keys and values that queries at `positions` read in total; each row counts once per KV head
    /// and query.
    ///
    /// # Errors
    /// An eviction rule is unknown.
    pub fn bytes_read(&self, positions: Range<usize>, dtype: DType) -> Result<u64> {
        let read = |l: &LayerPlan| Ok(l.row_bytes(dtype) * l.rows_read(positions.clone())? as u64);
        self.layers.iter().map(read).sum()
    }

    /// Returns the layers with butterfly attention, in model order.
    pub fn butterfly(&self) -> impl Iterator<Item = &ButterflyLayer> {
        self.layers.iter().filter_map(LayerPlan::butterfly)
    }

    /// Returns the share of earlier blocks whose state reaches the last block through the swapped layers; `None`
    /// without swapped layers.
    pub fn reach(&self) -> Option<f64> {
        let first = self.butterfly().next()?;
        Some(selector::reach(first.rule, &first.grid, self.butterfly().count(), first.settings.partner_count))
    }
}

impl LayerPlan {
    fn recurrent(spec: DeltaSpec) -> Self {
        Self { kind: LayerKind::Delta(spec), heads: 0, kv_heads: 0, head_dim: 0, raw_rows: 0, dense_rows: 0 }
    }

    /// Returns the layer's butterfly attention, if it is a butterfly layer.
    pub fn butterfly(&self) -> Option<&ButterflyLayer> {
        match &self.kind {
            LayerKind::Butterfly(b) => Some(b),
            _ => None,
        }
    }

    /// Returns the shape of a cache row, `(G, D)`.
    pub fn row(&self) -> (usize, usize) {
        (self.kv_heads, self.head_dim)
    }

    /// Returns the window of raw positions that a query reads.
    pub fn window(&self) -> Window {
        match &self.kind {
            LayerKind::Full | LayerKind::Evict(_) | LayerKind::Delta(_) => Window::Unbounded,
            LayerKind::Sliding { window } => Window::Tokens(*window),
            LayerKind::Butterfly(b) => b.settings.raw_window(),
            LayerKind::Recall(r) => r.settings.raw_window(),
        }
    }

    /// Returns the bytes to allocate, by pool.
    pub fn bytes(&self, dtype: DType) -> PoolBytes {
        let rows = |n: usize| self.row_bytes(dtype).saturating_mul(n as u64);
        let mut bytes = PoolBytes { local: rows(self.raw_rows), ..PoolBytes::default() };
        match &self.kind {
            LayerKind::Full | LayerKind::Sliding { .. } => {}
            LayerKind::Delta(d) => bytes.recurrent = 4 * d.state_len() as u64,
            LayerKind::Butterfly(b) => {
                // Running sums: f32 for keys and values.
                bytes.summary = self.summary_bytes(b, dtype);
                bytes.sink = rows(b.sink_rows);
            }
            LayerKind::Recall(r) => {
                bytes.sink = rows(r.sink_rows);
                r.add_bytes(self.kv_heads, self.head_dim, dtype, &mut bytes);
                bytes.host = rows(r.ctx);
                if let Some(b) = &r.summaries {
                    // The summaries have a ring and sinks of their own: decode steps leave them as the prompt ends.
                    bytes.summary = self.summary_bytes(b, dtype) + rows(b.settings.ring_rows() + b.sink_rows);
                }
            }
            LayerKind::Evict(e) => {
                bytes.local += (e.observed * self.heads * self.head_dim * dtype.size_in_bytes()) as u64;
            }
        }
        bytes
    }

    /// Returns the rows of keys and values that queries at `positions` read in total: the window, sinks left of it and
    /// routed summaries; in an evicting layer the kept rows of the context, which ends before `positions`, and the
    /// tokens after it.
    ///
    /// # Errors
    /// The eviction rule is unknown.
    pub fn rows_read(&self, positions: Range<usize>) -> Result<usize> {
        match &self.kind {
            LayerKind::Butterfly(b) => Ok(b.rows_read(positions)),
            LayerKind::Recall(r) => Ok(r.rows_read(positions)),
            LayerKind::Evict(e) => e.plan.rows_read(positions),
            LayerKind::Delta(_) => Ok(0),
            LayerKind::Full | LayerKind::Sliding { .. } => Ok(positions.map(|p| p + 1 - self.window().left(p)).sum()),
        }
    }

    /// Returns the bytes of temporary memory of an eviction, or of a layer with exact recall on a GPU, with `element`
    /// bytes per number.
    ///
    /// # Errors
    /// The eviction rule is unknown.
    pub fn scratch(&self, element: usize) -> Result<u64> {
        match &self.kind {
            LayerKind::Evict(e) => e.plan.scratch(e.ctx, self, element),
            // Two tiles of host rows at prefill; scores, weights and a bit of every position at decode.
            LayerKind::Recall(r) => {
                let step = r.coded() * (2 * self.heads + 5 * self.kv_heads);
                Ok((2 * TILE_BYTES + step) as u64)
            }
            _ => Ok(0),
        }
    }

    /// Returns the bytes of one position's key and value, all KV heads.
    fn row_bytes(&self, dtype: DType) -> u64 {
        2 * (self.kv_heads * self.head_dim * dtype.size_in_bytes()) as u64
    }

    /// Returns the bytes of a layer's summaries, and of the running sums: f32 for keys and values.
    fn summary_bytes(&self, b: &ButterflyLayer, dtype: DType) -> u64 {
        self.row_bytes(dtype).saturating_mul(b.summary_rows as u64) + 8 * (self.kv_heads * self.head_dim) as u64
    }

    fn settled_bytes(&self, dtype: DType) -> u64 {
        match &self.kind {
            LayerKind::Evict(e) if e.when() == When::Once => e.plan.budget.min(e.ctx) as u64 * self.row_bytes(dtype),
            _ => self.bytes(dtype).on_device(),
        }
    }

    /// Returns the largest size of the copy made at the end of the context, in bytes. The copy has room for `budget`
    /// kept rows and the rest of the context, which is most when the context ends at `budget + 1` tokens.
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
    /// Creates the `ordinal`-th swapped layer under `rule` for a context of `ctx` positions; `trained` is unlimited.
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

    /// Returns the blocks whose summaries `block` reads, in ascending order; blocks of sinks alone have no summary.
    pub fn route(&self, block: usize) -> Vec<usize> {
        let s = &self.settings;
        let mut blocks = selector::route(self.rule, &self.grid, self.ordinal, s.partner_count, block);
        blocks.retain(|n| s.pooled_count(*n) > 0);
        blocks
    }

    /// Returns the bias on the logit of block `n`'s summary, `β ln(count)`.
    pub fn bias(&self, n: usize) -> f32 {
        (self.settings.summary_bias * (self.settings.pooled_count(n) as f64).ln()) as f32
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

impl RecallLayer {
    /// Returns the layer, or `None` where window, sinks and fetched tokens would cover the whole context: dense
    /// attention is then exact and smaller.
    fn new(settings: &Settings, ctx: usize) -> Result<Option<Self>> {
        if ctx <= settings.exact_tokens() {
            return Ok(None);
        }
        let code = KeyCodeChoice::parse(&settings.key_code)?;
        let settings = settings.clone();
        Ok(Some(Self { code, sink_rows: settings.sink_tokens, settings, ctx, tables: None, summaries: None }))
    }

    /// Returns the positions that a query at `position` reads by their codes: neither sinks nor in its window.
    pub fn far(&self, position: usize) -> Range<usize> {
        let left = self.settings.raw_window().left(position);
        self.settings.sink_tokens.min(left)..left
    }

    /// Returns the number of positions that codes are allocated for: whole pages, and whole words of kernels.
    pub fn coded(&self) -> usize {
        self.ctx.next_multiple_of(64.max(PAGE))
    }

    /// Adds the bytes of codes, means and tables.
    fn add_bytes(&self, kv_heads: usize, dim: usize, dtype: DType, bytes: &mut PoolBytes) {
        bytes.key_codes = (kv_heads * self.coded() * self.code.bytes(dim)) as u64;
        match self.settings.rest {
            RestKind::Codes => bytes.values = (kv_heads * self.coded() * dim.div_ceil(SUB)) as u64,
            RestKind::Means => {
                bytes.values = (kv_heads * self.ctx.div_ceil(self.settings.block) * dim * dtype.size_in_bytes()) as u64;
            }
            RestKind::None => {}
        }
        // Of keys; codewords of values.
        bytes.tables = (kv_heads * self.code.table_bytes(dim)) as u64;
        if self.settings.rest == RestKind::Codes {
            bytes.tables += (kv_heads * dim.div_ceil(SUB) * 256 * SUB * dtype.size_in_bytes().min(4)) as u64;
        }
        if self.settings.code_fit == CodeFit::Text {
            bytes.tables += self.fit_bytes(kv_heads, dim, dtype);
        }
    }

    /// Returns the bytes of tables that follow the text: means, scales and sums of keys; codewords of values with the
    /// number of values of each.
    fn fit_bytes(&self, kv_heads: usize, dim: usize, dtype: DType) -> u64 {
        let channels = if self.code.code.follows_text() { dim } else { 0 };
        let words = if self.settings.rest == RestKind::Codes { dim.div_ceil(SUB) * 256 } else { 0 };
        (kv_heads * (channels * (2 * 4 + 5 * 8) + words * (SUB * dtype.size_in_bytes().min(4) + 4))) as u64
    }

    fn rows_read(&self, positions: Range<usize>) -> usize {
        let row = |p: usize| {
            let far = self.far(p);
            p + 1 - far.end + far.start + far.len().min(self.settings.recall)
        };
        positions.map(row).sum()
    }
}

impl EvictLayer {
    fn new(plan: &EvictionPlan, a: &AttentionSpec, ctx: usize) -> Result<Self> {
        let rule = plan.find()?;
        Ok(Self { plan: plan.clone(), rule, observed: rule.observes(plan).min(ctx), scale: a.scale as f32, ctx })
    }

    /// Returns when the rule evicts.
    pub fn when(&self) -> When {
        self.rule.when(&self.plan)
    }
}
