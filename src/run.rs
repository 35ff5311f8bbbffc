//! A run: shared weights with one layout, one cache and one device stream, processing one text.
//!
//! Many runs share one [`Weights`]. A chunk that fails leaves the cache incomplete, so the run refuses further use and
//! reports why. A prefill cancelled between chunks and a decode that stops early leave the cache at exactly the tokens
//! processed.

use crate::cache::{Cache, LayerState};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::Layout;
use crate::method::Method;
use crate::mixer::{mix, ChunkContext, Phase, Projections};
use crate::weights::{Block, Lease, Weights};
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

/// The residual stream, and a layer output still to be added to it (the addition is fused with the next norm).
type Pending = (Tensor, Option<Tensor>);

/// Inputs of an attention layer, for an [`Observer`].
pub struct Observed<'a> {
    /// Index of the layer.
    pub layer: usize,
    /// Projections of the layer.
    pub projections: &'a Projections,
    /// Normed residual stream, `[T, hidden]`.
    pub x: &'a Tensor,
    /// Inputs that all layers share.
    pub chunk: &'a ChunkContext<'a>,
    /// Cache of the layer, before the chunk is stored.
    pub state: &'a LayerState,
}

/// Callback before each attention layer.
pub type Observer<'a> = &'a mut dyn FnMut(&Observed) -> Result<()>;

/// Shared weights with a layout, a cache and a device stream.
pub struct Run {
    layout: Layout,
    cache: Cache,
    /// Why the cache is incomplete, if it is.
    poisoned: Option<String>,
    /// Shared with the runs forked from this one.
    stream: Arc<Lease>,
    weights: Arc<Weights>,
}

impl Run {
    /// Allocates the cache of `method` (a plan, or `None` for the stock model) for `ctx` positions; weights are not
    /// copied.
    ///
    /// # Errors
    /// The plan does not fit the model; the cache does not fit the device.
    pub fn new(weights: &Arc<Weights>, method: impl Into<Method>, ctx: usize) -> Result<Self> {
        Self::with_layout(weights, Layout::new(weights.spec(), method, ctx)?)
    }

    /// Allocates the cache for a given layout.
    ///
    /// # Errors
    /// The layout was made for another model; the cache does not fit the device.
    pub fn with_layout(weights: &Arc<Weights>, layout: Layout) -> Result<Self> {
        let shape = |p: &Projections| (p.heads, p.kv_heads, p.head_dim);
        let shapes = weights.blocks.iter().map(|b| b.mixer.projections().map_or((0, 0, 0), shape));
        if !shapes.eq(layout.layers.iter().map(|l| (l.heads, l.kv_heads, l.head_dim))) {
            return Err(Error::new(ErrorKind::Backend, "layout", "was made for another model"));
        }
        Self::leased(weights, layout, Arc::new(Lease::new(weights)?))
    }

    fn leased(weights: &Arc<Weights>, layout: Layout, stream: Arc<Lease>) -> Result<Self> {
        let layout = match layout.lacks_tables() {
            true => layout.calibrated((weights.calibration()?, weights.fits()), weights.spec(), &weights.ropes)?,
            false => layout,
        };
        let cache = Cache::within(&layout, weights.dtype(), stream.device(), weights.host_memory().clone())?;
        Ok(Self { layout, cache, poisoned: None, stream, weights: weights.clone() })
    }

    /// Creates a run of `method` at this run's position from a copy of this run's keys and values, without a prefill of
    /// its own; this run does not change.
    ///
    /// Keys and values of a context are the same under every method with an exact prefill
    /// ([`Layout::prefills_exactly`]): one prefill by the stock model serves all of them. Returns `None` where a
    /// prefill is needed: `method` has none that is exact, or this run stores less than every position of its
    /// full-attention layers.
    ///
    /// Both runs use one device stream, so on a GPU no two threads may use them at the same time.
    ///
    /// # Errors
    /// Those of [`Run::new`]; an earlier failure left the cache of this run incomplete.
    pub fn fork(&self, method: impl Into<Method>) -> Result<Option<Self>> {
        self.admit(0)?;
        let layout = Layout::new(self.weights.spec(), method, self.layout.ctx())?;
        if !self.layout.is_dense() || !layout.prefills_exactly() {
            return Ok(None);
        }
        let mut run = Self::leased(&self.weights, layout, self.stream.clone())?;
        run.cache.copy_from(&self.cache)?;
        Ok(Some(run))
    }

    /// Returns the weights.
    pub fn weights(&self) -> &Arc<Weights> {
        &self.weights
    }

    /// Returns the layout: what each layer computes and caches.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Returns the cache.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Returns the device, bound to the run's own stream.
    pub fn device(&self) -> &Device {
        self.stream.device()
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn cache_mut(&mut self) -> &mut Cache {
        &mut self.cache
    }

    /// Marks the cache as incomplete: every later use is refused with `why`.
    #[cfg(feature = "cuda")]
    pub(crate) fn poison(&mut self, why: impl Into<String>) {
        self.poisoned = Some(why.into());
    }

    /// Checks that the run can process `count` more tokens.
    ///
    /// # Errors
    /// The tokens do not fit the context; an earlier failure left the cache incomplete.
    pub fn admit(&self, count: usize) -> Result<()> {
        match &self.poisoned {
            None => self.cache.admit(count),
            Some(why) => {
                let message =
                    format!("cannot continue after a failure that left its cache incomplete ({why}); start a new one");
                Err(Error::new(ErrorKind::Backend, "run", message))
            }
        }
    }

    /// Processes `ids` as the next chunk and returns the logits at positions `want`, relative to the chunk.
    ///
    /// # Shapes
    /// f32 `[want.len(), vocab]`.
    ///
    /// # Errors
    /// `ids` is empty or does not fit the context, an id is outside the vocabulary, or a position is outside the chunk:
    /// refused before the cache changes. A later failure leaves the cache incomplete, and the run refuses further use.
    pub fn forward(&mut self, ids: &[u32], want: &[usize]) -> Result<Tensor> {
        self.check(ids, want)?;
        // On a worker of the pool: a parallel region entered from there starts by work stealing, from outside by a
        // thread wake-up.
        rayon::scope(|_| self.chunk(ids, want, Phase::Prefill, None))
    }

    /// Processes `ids` like [`Run::forward`], as decode steps: layers with exact recall fetch the best tokens of each
    /// step instead of reading all. Other layers make no difference between the two.
    ///
    /// # Errors
    /// Those of [`Run::forward`].
    pub fn step(&mut self, ids: &[u32], want: &[usize]) -> Result<Tensor> {
        self.check(ids, want)?;
        rayon::scope(|_| self.chunk(ids, want, Phase::Decode, None))
    }

    /// Runs [`Run::forward`] with an observer that is called before each layer's mixer.
    ///
    /// # Errors
    /// Those of [`Run::forward`] and of `observer`.
    pub fn forward_observed(&mut self, ids: &[u32], want: &[usize], observer: Observer) -> Result<Tensor> {
        self.check(ids, want)?;
        self.chunk(ids, want, Phase::Prefill, Some(observer))
    }

    /// Marks the end of the context, at which eviction rules evict ([`Cache::compress`]); they choose without having
    /// seen later tokens. [`Run::generate`] calls it at the end of its prompt.
    ///
    /// # Errors
    /// Those of [`Cache::compress`]; an earlier failure left the cache incomplete.
    pub fn compress(&mut self) -> Result<()> {
        self.admit(0)?;
        self.cache.compress()
    }

    /// Checks [`Run::admit`], and that all ids are in the vocabulary: a kernel would read past the embedding.
    pub(crate) fn admit_ids(&self, ids: &[u32]) -> Result<()> {
        self.admit(ids.len())?;
        let vocab = self.weights.spec().vocab;
        match ids.iter().find(|id| **id as usize >= vocab) {
            None => Ok(()),
            Some(id) => {
                let message = format!("{id} is outside the vocabulary of {vocab} tokens");
                Err(Error::new(ErrorKind::Usage, "token ids", message))
            }
        }
    }

    fn check(&self, ids: &[u32], want: &[usize]) -> Result<()> {
        self.admit_ids(ids)?;
        if ids.is_empty() {
            return Err(Error::new(ErrorKind::Usage, "prompt", "is empty"));
        }
        if let Some(w) = want.iter().find(|w| **w >= ids.len()) {
            return Err(Error::new(
                ErrorKind::Usage,
                "logits",
                format!("position {w} is outside a chunk of {} tokens", ids.len()),
            ));
        }
        Ok(())
    }

    fn chunk(&mut self, ids: &[u32], want: &[usize], phase: Phase, observer: Option<Observer>) -> Result<Tensor> {
        // Remains if this unwinds.
        self.poisoned = Some("a chunk panicked".into());
        let made = self.layers(ids, want, phase, observer);
        self.poisoned = made.as_ref().err().map(|e| format!("a chunk failed: {e}"));
        made
    }

    fn layers(&mut self, ids: &[u32], want: &[usize], phase: Phase, mut observer: Option<Observer>) -> Result<Tensor> {
        let (w, device, start) = (&*self.weights, self.stream.device(), self.cache.position());
        let positions = || (start..start + ids.len()).map(|p| p as f32);
        let tables: Result<Vec<_>> = w.ropes.iter().map(|r| r.table(positions(), device)).collect();
        let chunk = ChunkContext { start, phase, ropes: &w.ropes, tables: &tables? };
        let mut x = w.embed.rows(&Tensor::new(ids, device)?, w.dtype())?;
        on_stream(&x, device, "the embedding")?;
        if w.spec().embed_scale != 1.0 {
            x = (x * w.spec().embed_scale)?;
        }
        let mut pending = None;
        for (i, ((block, plan), state)) in
            w.blocks.iter().zip(&self.layout.layers).zip(&mut self.cache.layers).enumerate()
        {
            let mut pass = || -> Result<Pending> {
                let (x, normed) = block.before_mixer.add(&x, pending.as_ref())?;
                pending = None;
                if let (Some(observe), Some(projections)) = (&mut observer, block.mixer.projections()) {
                    observe(&Observed { layer: i, projections, x: &normed, chunk: &chunk, state })?;
                }
                let y = mix(plan, &block.mixer, &normed, &chunk, state)?;
                block.after_mix(x, y)
            };
            (x, pending) = pass().map_err(|e| e.within(format!("layer {i}")))?;
            on_stream(&x, device, "a layer")?;
        }
        self.cache.advance(ids.len());
        let want: Vec<u32> = want.iter().map(|w| *w as u32).collect();
        if want.is_empty() {
            return Ok(Tensor::zeros((0, w.spec().vocab), DType::F32, &Device::Cpu)?);
        }
        let want = Tensor::new(want, device)?;
        let pending = pending.map(|y| y.index_select(&want, 0)).transpose()?;
        let (_, normed) = w.norm.add(&x.index_select(&want, 0)?, pending.as_ref())?;
        let logits = w.head.forward(&normed)?.to_dtype(DType::F32)?;
        on_stream(&logits, device, "the head")?;
        Ok(logits)
    }
}

impl Block {
    /// Applies the layer after its mixer, given the mixer's output `y`: norms and the feed-forward.
    fn after_mix(&self, x: Tensor, y: Tensor) -> Result<Pending> {
        let y = self.after_mixer.as_ref().map_or(Ok(y.clone()), |n| n.forward(&y))?;
        let (x, normed) = self.before_mlp.add(&x, Some(&y))?;
        drop(y);
        let y = self.mlp.forward(&normed)?;
        let y = self.after_mlp.as_ref().map_or(Ok(y.clone()), |n| n.forward(&y))?;
        Ok((x, Some(y)))
    }
}

/// Refuses, in debug builds, a tensor on another stream than the run's: candle runs an operator on the stream of its
/// first operand, and nothing synchronises two streams.
fn on_stream(x: &Tensor, device: &Device, what: &str) -> Result<()> {
    if cfg!(debug_assertions) && !x.device().same_device(device) {
        return Err(Error::new(ErrorKind::Backend, what, "was launched on another stream than the run's"));
    }
    Ok(())
}
