//! One timed run of this engine.

use super::format::{Kv, ReadBytes, Sample};
use super::machine::{begin_peak, peak, take_memory};
use super::peer::one_line;
use super::prompt::hash;
use super::summary::{kv, read_per_token};
use super::variant::Variant;
use crate::error::{Error, ErrorKind, Result};
use crate::generate::{Generation, Needs, Request, Sampler, Sampling, Session};
use crate::model::Model;
use crate::ops::release_memory;
use candle_core::Device;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// A loaded model that runs as one variant after another, at one context after another.
pub struct Engine {
    /// Taken out and put back changed: weights are held once, whatever is run.
    model: Option<Model>,
    device: Device,
    chunk: usize,
    /// Bytes that a run may take.
    budget: Option<u64>,
    /// Whether other processes need the device's memory between runs.
    shared: bool,
    /// The highest that a variant needed at a context.
    peaks: HashMap<(String, usize), u64>,
}

/// What came of a run.
pub enum Outcome {
    /// A sample, and what does not change from run to run.
    Ran(Box<Sample>, Facts),
    /// Why there is none, on one line.
    Failed(String),
}

/// What is the same for every run of a variant at a context.
#[derive(Debug, Clone, Copy, Default)]
pub struct Facts {
    /// Tokens to a prefill chunk.
    pub chunk: usize,
    /// The cache.
    pub kv: Option<Kv>,
    /// A peer's cache.
    pub kv_bytes: Option<u64>,
    /// What a new token reads.
    pub read_per_token: Option<ReadBytes>,
}

impl Engine {
    /// Runs `model` in chunks of `chunk` tokens, or of fewer where `budget` wants it; `shared` hands memory back after each run.
    pub fn new(model: Model, chunk: usize, budget: Option<u64>, shared: bool) -> Self {
        let device = model.device().clone();
        Self { model: Some(model), device, chunk, budget, shared, peaks: HashMap::new() }
    }

    /// Weights as held.
    pub fn weights_bytes(&self) -> Option<u64> {
        self.model.as_ref().map(Model::weights_bytes)
    }

    /// Reads the first `ctx - new` ids of `stream` and makes `new` tokens, whatever they are.
    ///
    /// The cache is allocated before the clock starts and dropped after it stops, so that one variant's lives at a time.
    ///
    /// # Errors
    /// Anything but a want of memory, which is an outcome.
    pub fn run(
        &mut self,
        variant: &Variant,
        ctx: usize,
        stream: &[u32],
        new: usize,
        on_tokens: &mut dyn FnMut(usize),
    ) -> Result<Outcome> {
        let begin = Instant::now();
        let prompt = stream[..ctx - new].to_vec();
        let prompt_s = begin.elapsed().as_secs_f64();
        let lost = || Error::new(ErrorKind::Backend, &variant.name, "the model was lost in an earlier run");
        let model = self.model.take().ok_or_else(lost)?.with_plan(variant.plan.as_ref(), ctx)?;
        let key = (variant.name.clone(), ctx);
        if let Some(peak) = self.peaks.get(&key).filter(|_| self.shared) {
            take_memory(&self.device, *peak);
        }
        begin_peak(&self.device);
        let chunk = match self.budget {
            None => Ok(self.chunk),
            Some(b) => Needs::of(&model, variant.plan.as_ref(), ctx).and_then(|n| n.chunk_within(b, self.chunk)),
        };
        let made = chunk.and_then(|chunk| Ok((chunk, attempt(&model, &prompt, new, chunk, on_tokens)?)));
        // The last token is made, not read.
        let positions = prompt.len()..(ctx - 1).max(prompt.len() + 1);
        let read = || {
            let (plan, element) = (variant.plan.as_ref(), model.dtype().size_in_bytes());
            read_per_token(model.spec(), plan, ctx, positions, model.bytes_per_token(), element)
        };
        let outcome = match made {
            Ok((chunk, (made, wall, kv))) => {
                let peak = peak(&self.device);
                self.peaks.insert(key, peak);
                let sample = sample(&made, wall, peak, prompt_s);
                Ok(Outcome::Ran(
                    Box::new(sample),
                    Facts { chunk, kv: Some(kv), kv_bytes: None, read_per_token: Some(read()?) },
                ))
            }
            Err(e) if does_not_fit(&e) => Ok(Outcome::Failed(format!("out of memory: {}", one_line(&e.to_string())))),
            Err(e) => Err(e.within(format!("{} at {ctx}", variant.name))),
        };
        if self.shared || !matches!(outcome, Ok(Outcome::Ran(..))) {
            release_memory(&self.device);
        }
        self.model = Some(model);
        outcome
    }
}

fn attempt(
    model: &Model,
    prompt: &[u32],
    new: usize,
    chunk: usize,
    on_tokens: &mut dyn FnMut(usize),
) -> Result<(Generation, Duration, Kv)> {
    let mut session = Session::new(model)?;
    // Allocating may still be under way.
    model.device().synchronize()?;
    let request = Request { prompt, max_new_tokens: new, chunk, stop: &[], logits_last: 1 };
    let mut sampler = Sampler::new(Sampling::GREEDY)?;
    let begin = Instant::now();
    let made = session.generate(&request, &mut sampler, on_tokens, &mut |_| true)?;
    Ok((made, begin.elapsed(), kv(session.cache())))
}

/// `wall` is the whole generation's: what lies between its parts counts too.
fn sample(made: &Generation, wall: Duration, peak_device_bytes: u64, prompt_s: f64) -> Sample {
    let timing = &made.timing;
    let mean = |batch: &[Duration]| batch.iter().sum::<Duration>().as_secs_f64() / batch.len() as f64;
    Sample {
        prefill_s: timing.prefill.as_secs_f64(),
        ttft_s: timing.first_token.as_secs_f64(),
        end_to_end_s: wall.as_secs_f64(),
        inter_token_s: timing.steps.chunks(timing.fetched.max(1)).map(mean).collect(),
        fetched_tokens: timing.fetched.max(1),
        peak_device_bytes,
        prompt_s,
        tokens_sha256: hash(&made.tokens),
    }
}

/// Whether memory is what was wanting: refused by the cache before it was asked for, or by an allocator.
fn does_not_fit(e: &Error) -> bool {
    let text = e.to_string().to_lowercase();
    matches!(e.kind(), ErrorKind::Context | ErrorKind::Memory)
        || ["out of memory", "out_of_memory", "alloc_failed"].iter().any(|w| text.contains(w))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_want_of_memory_is_an_outcome() {
        let backend = |m: &str| Error::new(ErrorKind::Backend, "candle", m);
        assert!(does_not_fit(&backend("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")")));
        assert!(does_not_fit(&backend("CublasError(CUBLAS_STATUS_ALLOC_FAILED)")));
        assert!(does_not_fit(&Error::new(
            ErrorKind::Context,
            "--ctx",
            "a cache for 8 tokens takes 1 GiB; this machine has 0.5"
        )));
        assert!(!does_not_fit(&backend("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access\")")));
    }
}
