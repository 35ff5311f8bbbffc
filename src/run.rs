//! A run: weights read by one method for one context, with a cache and a stream of its own.
//!
//! Many runs share one [`Weights`]; each reads one text. A chunk that fails leaves the cache incomplete, so the run refuses further use and
//! says why; a prefill that is cancelled between chunks, or a decode that stops early, leaves it at exactly what was read.

use crate::cache::{Cache, LayerState};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::Layout;
use crate::method::Method;
use crate::mixer::{mix, Projections, Step};
use crate::weights::{Block, Lease, Weights};
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

/// The residual stream, and what is yet to be added to it.
type Pending = (Tensor, Option<Tensor>);

/// What a layer is about to mix.
pub struct Observed<'a> {
    /// The layer's index.
    pub layer: usize,
    /// The layer's projections.
    pub projections: &'a Projections,
    /// The normed residual stream, `[T, hidden]`.
    pub x: &'a Tensor,
    /// What all layers share.
    pub step: &'a Step<'a>,
    /// The layer's cache, before the chunk enters it.
    pub state: &'a LayerState,
}

/// Called before each layer's mixer.
pub type Observer<'a> = &'a mut dyn FnMut(&Observed) -> Result<()>;

/// Weights read by one method for one context.
pub struct Run {
    layout: Layout,
    cache: Cache,
    /// Why the cache is incomplete, once it is.
    broken: Option<String>,
    stream: Lease,
    weights: Arc<Weights>,
}

impl Run {
    /// Allocates the cache of `method` (a plan, or `None` for the model as it came) for `ctx` positions; no tensor is read or copied.
    ///
    /// # Errors
    /// A plan that does not fit the model; a cache that does not fit the device.
    pub fn new(weights: &Arc<Weights>, method: impl Into<Method>, ctx: usize) -> Result<Self> {
        Self::with_layout(weights, Layout::new(weights.spec(), method, ctx)?)
    }

    /// As [`Run::new`], for a layout of the same model.
    ///
    /// # Errors
    /// A layout of another model; a cache that does not fit the device.
    pub fn with_layout(weights: &Arc<Weights>, layout: Layout) -> Result<Self> {
        let projections = weights.blocks.iter().map(|b| b.mixer.projections());
        let shapes = projections.map(|p| (p.heads, p.kv_heads, p.head_dim));
        if !shapes.eq(layout.layers.iter().map(|l| (l.heads, l.kv_heads, l.head_dim))) {
            return Err(Error::new(ErrorKind::Backend, "layout", "was made for another model"));
        }
        let stream = Lease::new(weights)?;
        let cache = Cache::new(&layout, weights.dtype(), stream.device())?;
        Ok(Self { layout, cache, broken: None, stream, weights: weights.clone() })
    }

    /// The weights.
    pub fn weights(&self) -> &Arc<Weights> {
        &self.weights
    }

    /// What each layer does.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The cache.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The device, with the run's own stream.
    pub fn device(&self) -> &Device {
        self.stream.device()
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn cache_mut(&mut self) -> &mut Cache {
        &mut self.cache
    }

    /// Marks the cache as incomplete: every later use is refused with `why`.
    #[cfg(feature = "cuda")]
    pub(crate) fn break_off(&mut self, why: impl Into<String>) {
        self.broken = Some(why.into());
    }

    /// Refuses `count` more tokens where they do not fit the context, and a run whose cache is incomplete.
    ///
    /// # Errors
    /// As said.
    pub fn admit(&self, count: usize) -> Result<()> {
        match &self.broken {
            None => self.cache.admit(count),
            Some(why) => {
                let message =
                    format!("cannot go on after a failure that left its cache incomplete ({why}); start a new one");
                Err(Error::new(ErrorKind::Backend, "run", message))
            }
        }
    }

    /// Reads `ids` after what the cache holds and returns the logits at the chunk-local positions `want`.
    ///
    /// # Shapes
    /// f32 `[want.len(), vocab]`.
    ///
    /// # Errors
    /// No ids, an id outside the vocabulary, more ids than the context has room for, or a position outside the chunk: all refused before
    /// the cache changes. A failure after that leaves the cache incomplete, and the run refuses further use.
    pub fn forward(&mut self, ids: &[u32], want: &[usize]) -> Result<Tensor> {
        self.check(ids, want)?;
        // On a worker of the pool, so that each operator's parallel region costs a steal and not a sleep of this thread.
        rayon::scope(|_| self.chunk(ids, want, None))
    }

    /// As [`Run::forward`]; `observer` is called before each layer's mixer.
    ///
    /// # Errors
    /// As [`Run::forward`], and those of `observer`.
    pub fn forward_observed(&mut self, ids: &[u32], want: &[usize], observer: Observer) -> Result<Tensor> {
        self.check(ids, want)?;
        self.chunk(ids, want, Some(observer))
    }

    /// Tells every layer that the context is over, for methods that evict then ([`Cache::compress`]): what is read afterwards was unseen
    /// when they chose. [`Run::generate`] does it at the end of its prompt.
    ///
    /// # Errors
    /// Those of [`Cache::compress`]; a run whose cache is incomplete.
    pub fn compress(&mut self) -> Result<()> {
        self.admit(0)?;
        self.cache.compress()
    }

    /// As [`Run::admit`], and refuses ids outside the vocabulary: a kernel would read past the embedding.
    pub(crate) fn admit_ids(&self, ids: &[u32]) -> Result<()> {
        self.admit(ids.len())?;
        let vocab = self.weights.spec().vocab;
        match ids.iter().find(|id| **id as usize >= vocab) {
            None => Ok(()),
            Some(id) => {
                let message = format!("{id} is outside the vocabulary of {vocab}");
                Err(Error::new(ErrorKind::Usage, "token ids", message))
            }
        }
    }

    fn check(&self, ids: &[u32], want: &[usize]) -> Result<()> {
        self.admit_ids(ids)?;
        if ids.is_empty() {
            return Err(Error::new(ErrorKind::Usage, "prompt", "holds no tokens"));
        }
        if let Some(w) = want.iter().find(|w| **w >= ids.len()) {
            return Err(Error::new(ErrorKind::Usage, "logits", format!("position {w} of a chunk of {}", ids.len())));
        }
        Ok(())
    }

    fn chunk(&mut self, ids: &[u32], want: &[usize], observer: Option<Observer>) -> Result<Tensor> {
        // Stands if this unwinds.
        self.broken = Some("a chunk panicked".into());
        let made = self.layers(ids, want, observer);
        self.broken = made.as_ref().err().map(|e| format!("a chunk failed: {e}"));
        made
    }

    fn layers(&mut self, ids: &[u32], want: &[usize], mut observer: Option<Observer>) -> Result<Tensor> {
        let (w, device, start) = (&*self.weights, self.stream.device(), self.cache.position());
        let positions = || (start..start + ids.len()).map(|p| p as f32);
        let tables: Result<Vec<_>> = w.ropes.iter().map(|r| r.table(positions(), device)).collect();
        let step = Step { start, ropes: &w.ropes, tables: &tables? };
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
                if let Some(observe) = &mut observer {
                    let projections = block.mixer.projections();
                    observe(&Observed { layer: i, projections, x: &normed, step: &step, state })?;
                }
                let y = mix(plan, block.mixer.projections(), &normed, &step, state)?;
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
    /// What follows the mixer's output `y`: returns the residual stream and what is yet to be added to it, so that additions share a
    /// pass with the norms that follow them.
    fn after_mix(&self, x: Tensor, y: Tensor) -> Result<Pending> {
        let y = self.after_mixer.as_ref().map_or(Ok(y.clone()), |n| n.forward(&y))?;
        let (x, normed) = self.before_mlp.add(&x, Some(&y))?;
        drop(y);
        let y = self.mlp.forward(&normed)?;
        let y = self.after_mlp.as_ref().map_or(Ok(y.clone()), |n| n.forward(&y))?;
        Ok((x, Some(y)))
    }
}

/// Refuses, in debug builds, a tensor that was made on another stream than the run's: candle runs an operator on the stream of its first
/// operand, and nothing orders one stream after another.
fn on_stream(x: &Tensor, device: &Device, what: &str) -> Result<()> {
    if cfg!(debug_assertions) && !x.device().same_device(device) {
        return Err(Error::new(ErrorKind::Backend, what, "was launched on another stream than the run's"));
    }
    Ok(())
}
