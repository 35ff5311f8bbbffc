//! From a prompt to text: chunked prefill, decode, sampling, chat template.

mod budget;
mod chat;
#[cfg(feature = "cuda")]
mod graph;
mod sample;

pub use budget::Needs;
pub use chat::render_chat;
pub use sample::{Sampler, Sampling};

use crate::cache::Cache;
use crate::error::{Error, ErrorKind, Result};
use crate::model::Model;
use candle_core::Tensor;
use std::time::{Duration, Instant};

/// A model reading one text.
pub struct Session<'a> {
    model: &'a Model,
    cache: Cache,
}

/// What a generation took.
#[derive(Debug, Clone)]
pub struct Timing {
    /// Prompt to last-position logits.
    pub prefill: Duration,
    /// Prompt to first token.
    pub first_token: Duration,
    /// All tokens after the first.
    pub decode: Duration,
    /// Each of them.
    pub steps: Vec<Duration>,
    /// Tokens that were told apart together: each has the mean of their time.
    pub fetched: usize,
}

impl Timing {
    fn new() -> Self {
        let none = Duration::ZERO;
        Self { prefill: none, first_token: none, decode: none, steps: vec![], fetched: 1 }
    }
}

/// How a generation is run.
pub struct Request<'a> {
    /// The prompt.
    pub prompt: &'a [u32],
    /// At most so many tokens.
    pub max_new_tokens: usize,
    /// Tokens to a prefill chunk.
    pub chunk: usize,
    /// Tokens that end the text.
    pub stop: &'a [u32],
    /// Logits of so many last prompt positions are kept (at least 1).
    pub logits_last: usize,
}

/// What came of a generation.
pub struct Generation {
    /// The new tokens, without the one that ended the text.
    pub tokens: Vec<u32>,
    /// What it took.
    pub timing: Timing,
    /// Logits of the prompt's last positions, f32 `[logits_last, vocab]`.
    pub prompt_logits: Tensor,
}

impl<'a> Session<'a> {
    /// Allocates the cache.
    pub fn new(model: &'a Model) -> Result<Self> {
        Ok(Self { model, cache: model.new_cache()? })
    }

    /// Goes on with a cache made by hand for this model.
    pub fn with_cache(model: &'a Model, cache: Cache) -> Self {
        Self { model, cache }
    }

    /// The cache, for its figures.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Reads `ids` in chunks and returns the logits of the last `last` positions, `[last, vocab]`.
    ///
    /// `on_tokens` hears how many tokens are done.
    pub fn prefill(
        &mut self,
        ids: &[u32],
        chunk: usize,
        last: usize,
        on_tokens: &mut dyn FnMut(usize),
    ) -> Result<Tensor> {
        self.cache.admit(ids.len())?;
        if last == 0 || last > ids.len() {
            return Err(Error::new(
                ErrorKind::Usage,
                "logits",
                format!("{last} of the last positions of a prompt of {}", ids.len()),
            ));
        }
        let from = ids.len() - last;
        let mut parts = vec![];
        let mut done = 0;
        for piece in ids.chunks(chunk.max(1)) {
            let want: Vec<usize> = (from.saturating_sub(done)..piece.len()).collect();
            let logits = self.model.forward(piece, &mut self.cache, &want).map_err(|e| no_room(e, piece.len()))?;
            if !want.is_empty() {
                parts.push(logits);
            }
            done += piece.len();
            on_tokens(done);
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// Tells the cache that the context is over, for methods that evict then ([`Cache::compress`]): what is read afterwards was
    /// unseen when they chose. [`Session::generate`] does it at the end of its prompt.
    ///
    /// # Errors
    /// Those of [`Cache::compress`].
    pub fn compress(&mut self) -> Result<()> {
        self.cache.compress()
    }

    /// Reads `ids` one at a time, as decode does, and returns the logits after each, f32 `[ids.len(), vocab]`.
    ///
    /// # Errors
    /// As [`Model::forward`]; before any work where the ids do not fit the context.
    pub fn read(&mut self, ids: &[u32]) -> Result<Tensor> {
        self.cache.admit(ids.len())?;
        let mut rows = vec![];
        let mut left = ids;
        #[cfg(feature = "cuda")]
        while !left.is_empty() {
            let Some(graph) = graph::StepGraph::capture(self.model, &self.cache, &[])? else { break };
            let (now, later) = left.split_at(left.len().min(self.cache.until_eviction()));
            rows.push(graph.read(&mut self.cache, now)?);
            left = later;
        }
        while let Some((id, later)) = left.split_first() {
            rows.push(self.model.forward(&[*id], &mut self.cache, &[0])?);
            left = later;
        }
        Ok(Tensor::cat(&rows, 0)?)
    }

    /// Whether greedy decode goes on from here as a captured CUDA graph; if not, step by step.
    pub fn captures(&self) -> bool {
        #[cfg(feature = "cuda")]
        return graph::captures(self.model, &self.cache);
        #[cfg(not(feature = "cuda"))]
        false
    }

    /// Prefills, tells the cache that the context is over, and decodes. `on_token` gets each new token and says whether to go on.
    /// What evicting takes counts as prefill.
    ///
    /// # Errors
    /// Before any work where prompt and new tokens do not fit the context.
    pub fn generate(
        &mut self,
        request: &Request,
        sampler: &mut Sampler,
        on_tokens: &mut dyn FnMut(usize),
        on_token: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Generation> {
        self.cache.admit(request.prompt.len() + request.max_new_tokens)?;
        let mut timing = Timing::new();
        let begin = Instant::now();
        let prompt_logits = self.prefill(request.prompt, request.chunk, request.logits_last.max(1), on_tokens)?;
        self.compress()?;
        // A GPU may still be at work on the logits.
        self.model.device().synchronize()?;
        timing.prefill = begin.elapsed();
        let mut tokens = vec![];
        if request.max_new_tokens == 0 {
            return Ok(Generation { tokens, timing, prompt_logits });
        }
        let mut next = sampler.sample(&prompt_logits)?;
        timing.first_token = begin.elapsed();
        #[cfg(feature = "cuda")]
        if sampler.is_greedy() && !request.stop.contains(&next) && request.max_new_tokens > 1 {
            if let Some(mut graph) = graph::StepGraph::capture(self.model, &self.cache, request.stop)? {
                tokens.push(next);
                let mut from = on_token(next).then_some(next);
                while let Some(first) = from {
                    from = graph.run(&mut self.cache, first, request, &mut timing, &mut tokens, on_token)?;
                    if from.is_none() {
                        break;
                    }
                    let begin = Instant::now();
                    let lost = || Error::new(ErrorKind::Backend, "decode graph", "cannot be captured again");
                    graph = graph::StepGraph::capture(self.model, &self.cache, request.stop)?.ok_or_else(lost)?;
                    // The token that completed a block pays for what follows from it.
                    if let Some(step) = timing.steps.last_mut() {
                        *step += begin.elapsed();
                    }
                }
                timing.decode = timing.steps.iter().sum();
                return Ok(Generation { tokens, timing, prompt_logits });
            }
        }
        loop {
            if request.stop.contains(&next) {
                break;
            }
            tokens.push(next);
            if !on_token(next) || tokens.len() == request.max_new_tokens {
                break;
            }
            let step = Instant::now();
            let logits = self.model.forward(&[next], &mut self.cache, &[0])?;
            next = sampler.sample(&logits)?;
            timing.steps.push(step.elapsed());
        }
        timing.decode = timing.steps.iter().sum();
        Ok(Generation { tokens, timing, prompt_logits })
    }
}

/// Says which setting would ask for less where a chunk's activations found no room.
fn no_room(e: Error, tokens: usize) -> Error {
    match e.kind() {
        ErrorKind::Memory => {
            let message = format!(
                "{e}: the activations of a chunk of {tokens} tokens found no room; give a smaller --prefill-chunk, or --memory-budget"
            );
            Error::new(ErrorKind::Memory, "prefill", message)
        }
        _ => e,
    }
}
