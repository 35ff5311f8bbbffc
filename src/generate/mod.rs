//! Generation: chunked prefill, decode, sampling, chat template.

mod budget;
mod chat;
#[cfg(feature = "cuda")]
mod graph;
mod sample;

pub use budget::MemoryNeeds;
pub use chat::{render_chat, render_messages};
pub use sample::{Sampler, Sampling};

use crate::error::{Error, ErrorKind, Result};
pub use crate::mixer::Phase;
use crate::run::Run;
use candle_core::Tensor;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// Called after each prefill chunk with the tokens read so far; `Break` cancels.
pub type OnTokens<'a> = &'a mut dyn FnMut(usize) -> ControlFlow<()>;
/// Called with each new token; `Break` stops generation.
pub type OnToken<'a> = &'a mut dyn FnMut(u32) -> ControlFlow<()>;

/// Wraps `f` as an [`OnTokens`] or [`OnToken`] callback that never breaks.
pub fn watch<T>(mut f: impl FnMut(T)) -> impl FnMut(T) -> ControlFlow<()> {
    move |x| {
        f(x);
        ControlFlow::Continue(())
    }
}

/// Durations of a generation's stages.
#[derive(Debug, Clone)]
pub struct Timing {
    /// From the start of prefill to the last position's logits, eviction at the end of the context included.
    pub prefill: Duration,
    /// From the start of prefill to the first token.
    pub first_token: Duration,
    /// Time of all tokens after the first.
    pub decode: Duration,
    /// Time of each token after the first.
    pub steps: Vec<Duration>,
    /// Tokens fetched per host synchronisation; each gets the batch's mean latency.
    pub fetched: usize,
}

impl Timing {
    fn new() -> Self {
        let none = Duration::ZERO;
        Self { prefill: none, first_token: none, decode: none, steps: vec![], fetched: 1 }
    }
}

/// Parameters of [`Run::generate`].
pub struct Request<'a> {
    /// Token ids of the prompt.
    pub prompt: &'a [u32],
    /// Maximum number of new tokens.
    pub max_new_tokens: usize,
    /// Tokens per prefill chunk.
    pub chunk: usize,
    /// Token ids that end generation.
    pub stop: &'a [u32],
    /// Number of last prompt positions whose logits are returned (0 counts as 1).
    pub logits_last: usize,
    /// How layers with exact recall process the prompt: exactly by default.
    pub phase: Phase,
}

/// Result of [`Run::generate`].
pub struct Generation {
    /// New token ids, without the stop token.
    pub tokens: Vec<u32>,
    /// Durations of the stages.
    pub timing: Timing,
    /// Logits of the prompt's last positions, f32 `[logits_last, vocab]`.
    pub prompt_logits: Tensor,
}

impl Run {
    /// Processes `ids` in chunks of `chunk` tokens and returns the logits of the last `last` positions.
    ///
    /// # Shapes
    /// f32 `[last, vocab]`.
    ///
    /// # Errors
    /// Those of [`Run::forward`]; ids that do not fit the context or the vocabulary are refused before any work.
    /// [`ErrorKind::Cancelled`] if `on_tokens` breaks: the cache then holds exactly the chunks read so far, and the run
    /// can continue.
    pub fn prefill(&mut self, ids: &[u32], chunk: usize, last: usize, on_tokens: OnTokens) -> Result<Tensor> {
        self.prefill_as(Phase::Prefill, ids, chunk, last, on_tokens)
    }

    /// Processes `ids` like [`Run::prefill`], in which layers with exact recall treat every token as `phase` says.
    ///
    /// # Errors
    /// Those of [`Run::prefill`].
    pub fn prefill_as(
        &mut self,
        phase: Phase,
        ids: &[u32],
        chunk: usize,
        last: usize,
        on_tokens: OnTokens,
    ) -> Result<Tensor> {
        self.admit_ids(ids)?;
        if last == 0 || last > ids.len() {
            return Err(Error::new(
                ErrorKind::Usage,
                "logits",
                format!("cannot return the last {last} positions of a prompt of {} tokens", ids.len()),
            ));
        }
        let from = ids.len() - last;
        let recalls = self.layout().recall().next().is_some();
        let mut parts = vec![];
        let mut done = 0;
        for piece in ids.chunks(chunk.max(1)) {
            let want: Vec<usize> = (from.saturating_sub(done)..piece.len()).collect();
            let logits = match phase {
                Phase::Prefill => self.forward(piece, &want).map(|logits| vec![logits]),
                // Layers with recall step token by token in any case, which a captured graph does with fewer launches.
                Phase::Decode if recalls && self.captures() => self.read_rows(piece, want.first().copied()),
                Phase::Decode => self.step(piece, &want).map(|logits| vec![logits]),
            };
            let logits = logits.map_err(|e| no_room(e, piece.len()))?;
            if !want.is_empty() {
                parts.extend(logits);
            }
            done += piece.len();
            if on_tokens(done).is_break() && done < ids.len() {
                let message = format!("cancelled after {done} of {} tokens", ids.len());
                return Err(Error::new(ErrorKind::Cancelled, "prefill", message));
            }
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// Processes `ids` one decode step at a time and returns the logits after each.
    ///
    /// # Shapes
    /// f32 `[ids.len(), vocab]`.
    ///
    /// # Errors
    /// Those of [`Run::forward`]; ids that do not fit the context or the vocabulary are refused before any work.
    pub fn read(&mut self, ids: &[u32]) -> Result<Tensor> {
        self.admit_ids(ids)?;
        Ok(Tensor::cat(&self.read_rows(ids, Some(0))?, 0)?)
    }

    /// Processes `ids` one decode step at a time and returns the logits after each from index `first` on.
    fn read_rows(&mut self, ids: &[u32], first: Option<usize>) -> Result<Vec<Tensor>> {
        let mut rows = vec![];
        let mut left = ids;
        let wanted = |left: &[u32]| first.is_some_and(|first| ids.len() - left.len() >= first);
        #[cfg(feature = "cuda")]
        while !left.is_empty() {
            let Some(mut graph) = graph::StepGraph::capture(self, &[])? else { break };
            let (now, later) = left.split_at(left.len().min(self.cache().until_eviction()));
            for id in now {
                let logits = graph.read(self, *id);
                let logits = logits.inspect_err(|e| self.poison(format!("a captured step failed: {e}")))?;
                if wanted(left) {
                    rows.push(logits.copy()?);
                }
                left = &left[1..];
            }
            left = later;
        }
        while let Some((id, later)) = left.split_first() {
            let logits = self.step(&[*id], &[0])?;
            if wanted(left) {
                rows.push(logits);
            }
            left = later;
        }
        Ok(rows)
    }

    /// Whether decode from here replays a captured CUDA graph; otherwise it launches each step's kernels one by one.
    pub fn captures(&self) -> bool {
        #[cfg(feature = "cuda")]
        return graph::captures(self);
        #[cfg(not(feature = "cuda"))]
        false
    }

    /// Prefills the prompt, evicts at its end ([`Run::compress`]; counted as prefill time), and decodes.
    ///
    /// The last new token is not fed back: wherever decode stops, the cache holds the prompt and the new tokens before
    /// the last.
    ///
    /// # Errors
    /// Those of [`Run::prefill`]; a prompt and new tokens that do not fit the context are refused before any work.
    pub fn generate(
        &mut self,
        request: &Request,
        sampler: &mut Sampler,
        on_tokens: OnTokens,
        on_token: OnToken,
    ) -> Result<Generation> {
        let total = request.prompt.len().checked_add(request.max_new_tokens);
        let overflow = || {
            Error::new(
                ErrorKind::Context,
                "-n",
                format!("{} new tokens do not fit any context", request.max_new_tokens),
            )
        };
        self.admit(total.ok_or_else(overflow)?)?;
        let mut timing = Timing::new();
        let begin = Instant::now();
        let last = request.logits_last.max(1);
        let prompt_logits = self.prefill_as(request.phase, request.prompt, request.chunk, last, on_tokens)?;
        self.compress()?;
        // Kernels may still be running: wait, so that the time is prefill's.
        self.device().synchronize()?;
        timing.prefill = begin.elapsed();
        let mut tokens = vec![];
        if request.max_new_tokens == 0 {
            return Ok(Generation { tokens, timing, prompt_logits });
        }
        let next = sampler.sample(&prompt_logits)?;
        timing.first_token = begin.elapsed();
        if !self.decode_captured(next, request, sampler, (&mut timing, &mut tokens), on_token)? {
            self.decode(next, request, sampler, (&mut timing, &mut tokens), on_token)?;
        }
        timing.decode = timing.steps.iter().sum();
        Ok(Generation { tokens, timing, prompt_logits })
    }

    /// Decodes from token `next`, launching each step's kernels one by one.
    fn decode(
        &mut self,
        mut next: u32,
        request: &Request,
        sampler: &mut Sampler,
        (timing, tokens): (&mut Timing, &mut Vec<u32>),
        on_token: OnToken,
    ) -> Result<()> {
        while !request.stop.contains(&next) {
            tokens.push(next);
            if on_token(next).is_break() || tokens.len() == request.max_new_tokens {
                break;
            }
            let step = Instant::now();
            let logits = self.step(&[next], &[0])?;
            next = sampler.sample(&logits)?;
            timing.steps.push(step.elapsed());
        }
        Ok(())
    }

    /// Decodes like [`Run::decode`] by replaying a captured step; returns `false`, having done nothing, if none can be
    /// captured.
    #[cfg(feature = "cuda")]
    fn decode_captured(
        &mut self,
        next: u32,
        request: &Request,
        sampler: &mut Sampler,
        (timing, tokens): (&mut Timing, &mut Vec<u32>),
        on_token: OnToken,
    ) -> Result<bool> {
        if request.stop.contains(&next) || request.max_new_tokens < 2 {
            return Ok(false);
        }
        let Some(mut graph) = graph::StepGraph::capture(self, request.stop)? else { return Ok(false) };
        tokens.push(next);
        let mut from = on_token(next).is_continue().then_some(next);
        while let Some(first) = from {
            let ran = match sampler.is_greedy() {
                true => graph.run(self, first, request, timing, tokens, on_token),
                false => graph.sample(self, first, (request, sampler), timing, tokens, on_token),
            };
            from = ran.inspect_err(|e| self.poison(format!("a captured step failed: {e}")))?;
            if from.is_none() {
                break;
            }
            let begin = Instant::now();
            let lost = || Error::new(ErrorKind::Backend, "decode graph", "cannot be captured again");
            graph = graph::StepGraph::capture(self, request.stop)?.ok_or_else(lost)?;
            // Eviction and capture count towards the token that completed the block.
            if let Some(step) = timing.steps.last_mut() {
                *step += begin.elapsed();
            }
        }
        Ok(true)
    }

    #[cfg(not(feature = "cuda"))]
    fn decode_captured(
        &mut self,
        _: u32,
        _: &Request,
        _: &mut Sampler,
        _: (&mut Timing, &mut Vec<u32>),
        _: OnToken,
    ) -> Result<bool> {
        Ok(false)
    }
}

/// Adds to an out-of-memory error which flags reduce the memory of a chunk's activations.
fn no_room(e: Error, tokens: usize) -> Error {
    match e.kind() {
        ErrorKind::Memory => {
            let message = format!(
                "{e}: no memory for the activations of a chunk of {tokens} tokens; use a smaller --prefill-chunk, or --memory-budget"
            );
            Error::new(ErrorKind::Memory, "prefill", message)
        }
        _ => e,
    }
}
