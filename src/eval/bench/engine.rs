//! Timed runs of bfly.

use super::peak::{begin_peak, peak, reserve_memory};
use super::peer::one_line;
use crate::error::{Error, ErrorKind, Result};
use crate::eval::report::{hash, KvBytes, ReadBytes, TimedRun};
use crate::eval::variant::Variant;
use crate::generate::{watch, Generation, MemoryNeeds, Phase, Request, Sampler, Sampling};
use crate::layout::Layout;
use crate::ops::{human_bytes, release_memory};
use crate::run::Run;
use crate::weights::Weights;
use candle_core::Device;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// bfly as an engine under test: one set of weights, run as any variant at any context.
pub struct BflyEngine {
    weights: Arc<Weights>,
    device: Device,
    /// Whether memory is released to the driver after each run.
    shared: bool,
    /// Peak bytes of a variant at a context.
    peaks: HashMap<(String, usize), u64>,
}

/// Prompt and limits of one run.
pub struct Workload<'a> {
    /// Positions that the cache is provisioned for, at least those of the prompt and the new tokens.
    pub ctx: usize,
    /// Ids of the prompt.
    pub prompt: &'a [u32],
    /// New tokens to generate; end-of-text tokens do not stop generation.
    pub new: usize,
    /// Largest prefill chunk in tokens; the chunk is smaller where `budget` requires it.
    pub chunk: usize,
    /// Memory limit of the run in bytes.
    pub budget: Option<u64>,
}

/// Outcome of a run.
pub enum Outcome {
    /// The run's timings and its sizes.
    Ran(Box<TimedRun>, RunSizes),
    /// The reason of the failure, on one line.
    Failed(String),
}

/// Sizes that are the same for every run of a variant at a context.
#[derive(Debug, Clone, Copy, Default)]
pub struct RunSizes {
    /// Prefill chunk in tokens.
    pub chunk: usize,
    /// Bytes of bfly's cache by pool; `None` for peers.
    pub kv: Option<KvBytes>,
    /// Bytes of a peer's cache; `None` for bfly.
    pub kv_bytes: Option<u64>,
    /// Bytes that a decode step reads; `None` for peers.
    pub read_per_token: Option<ReadBytes>,
}

impl BflyEngine {
    /// Creates an engine over `weights`. With `shared`, memory is released to the driver after each run, for other
    /// processes on the device, or so that the next run starts with the weights alone.
    pub fn new(weights: Arc<Weights>, shared: bool) -> Self {
        let device = weights.device().clone();
        Self { weights, device, shared, peaks: HashMap::new() }
    }

    /// Returns the size of the weights in memory, in bytes.
    pub fn weights_bytes(&self) -> u64 {
        self.weights.bytes()
    }

    /// Computes the memory that `variant` needs at context `ctx`.
    ///
    /// # Errors
    /// As [`MemoryNeeds::of`].
    pub fn needs(&self, variant: &Variant, ctx: usize) -> Result<MemoryNeeds> {
        MemoryNeeds::of(&self.weights, &self.layout(variant, ctx)?)
    }

    fn layout(&self, variant: &Variant, ctx: usize) -> Result<Layout> {
        Layout::new(self.weights.spec(), &variant.method, ctx)
    }

    /// Prefills the prompt of `work` and generates its new tokens.
    ///
    /// The cache is allocated before the clock starts and dropped after it stops, so that at most one exists at a time.
    ///
    /// # Errors
    /// Any failure but out of memory, which is returned as [`Outcome::Failed`].
    pub fn run(&mut self, variant: &Variant, work: &Workload, on_tokens: &mut dyn FnMut(usize)) -> Result<Outcome> {
        let (ctx, new) = (work.ctx, work.new);
        let begin = Instant::now();
        let prompt = work.prompt.to_vec();
        let prompt_s = begin.elapsed().as_secs_f64();
        let layout = self.layout(variant, ctx)?;
        let key = (variant.name.clone(), ctx);
        if let Some(peak) = self.peaks.get(&key).filter(|_| self.shared) {
            reserve_memory(&self.device, *peak);
        }
        begin_peak(&self.device);
        let chunk = match work.budget {
            None => Ok(work.chunk),
            Some(b) => MemoryNeeds::of(&self.weights, &layout).and_then(|n| n.chunk_within(b, work.chunk)),
        };
        let made = chunk.and_then(|chunk| {
            let run = Run::with_layout(&self.weights, layout.clone())?;
            Ok((chunk, attempt(run, &prompt, new, chunk, on_tokens)?))
        });
        // The last token is generated but not read.
        let positions = prompt.len()..prompt.len() + new.saturating_sub(1).max(1);
        let read = || ReadBytes::of(&layout, positions, self.weights.bytes_per_token(), self.weights.dtype());
        let outcome = match made {
            Ok((chunk, (made, wall, kv))) => {
                let peak = peak(&self.device);
                self.peaks.insert(key, peak);
                let sample = timed_run(&made, wall, peak, prompt_s);
                Ok(Outcome::Ran(
                    Box::new(sample),
                    RunSizes { chunk, kv: Some(kv), kv_bytes: None, read_per_token: Some(read()?) },
                ))
            }
            Err(e) if is_out_of_memory(&e) => Ok(Outcome::Failed(out_of_memory(&e))),
            Err(e) => Err(e.within(format!("{} at {ctx}", variant.name))),
        };
        if self.shared || !matches!(outcome, Ok(Outcome::Ran(..))) {
            release_memory(&self.device);
        }
        outcome
    }
}

/// Returns the `status` of a run that failed with the out-of-memory error `e`.
pub fn out_of_memory(e: &Error) -> String {
    format!("out of memory: {}", one_line(&e.to_string()))
}

/// Returns the `status` of a run whose `peak` exceeds `budget` (both in bytes); `None` for a run within its budget.
pub fn past_budget(peak: u64, budget: u64) -> Option<String> {
    let (took, allowed) = (human_bytes(peak), human_bytes(budget));
    (peak > budget).then(|| format!("out of memory: the run took {took}, {allowed} were allowed"))
}

fn attempt(
    mut run: Run,
    prompt: &[u32],
    new: usize,
    chunk: usize,
    on_tokens: &mut dyn FnMut(usize),
) -> Result<(Generation, Duration, KvBytes)> {
    // Allocation is asynchronous and may not have finished.
    run.device().synchronize()?;
    let request = Request { prompt, max_new_tokens: new, chunk, stop: &[], logits_last: 1, phase: Phase::Prefill };
    let mut sampler = Sampler::new(Sampling::GREEDY)?;
    let begin = Instant::now();
    let made = run.generate(&request, &mut sampler, &mut watch(on_tokens), &mut watch(|_| ()))?;
    Ok((made, begin.elapsed(), KvBytes::of(run.cache())))
}

/// Builds the record of a generation whose wall-clock time is `wall`.
fn timed_run(made: &Generation, wall: Duration, peak_device_bytes: u64, prompt_s: f64) -> TimedRun {
    let timing = &made.timing;
    let mean = |batch: &[Duration]| batch.iter().sum::<Duration>().as_secs_f64() / batch.len() as f64;
    TimedRun {
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

/// Returns whether `e` means out of memory: the cache was refused before its allocation, or an allocator failed.
fn is_out_of_memory(e: &Error) -> bool {
    let text = e.to_string().to_lowercase();
    matches!(e.kind(), ErrorKind::Context | ErrorKind::Memory)
        || ["out of memory", "out_of_memory", "alloc_failed"].iter().any(|w| text.contains(w))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_out_of_memory_is_an_outcome() {
        let backend = |m: &str| Error::new(ErrorKind::Backend, "candle", m);
        assert!(is_out_of_memory(&backend("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")")));
        assert!(is_out_of_memory(&backend("CublasError(CUBLAS_STATUS_ALLOC_FAILED)")));
        assert!(is_out_of_memory(&Error::new(
            ErrorKind::Context,
            "--ctx",
            "a cache for 8 tokens takes 1 GiB; this machine has 0.5"
        )));
        assert!(!is_out_of_memory(&backend("DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access\")")));
    }
}
