//! bfly: long contexts for pretrained language models, with a KV cache of fixed size.
//!
//! Loads an unmodified Hugging Face or GGUF checkpoint and replaces some of its attention layers by **compressed
//! butterfly attention** (exact local window, attention sinks, and mean-pooled block summaries reached over a
//! deterministic graph) with a **two-pool KV cache of fixed size**. No training.
//!
//! ```text
//! checkpoint --> spec --+--> layout (mixer, state and bytes per layer, resolved once)
//! hub, safetensors,     |       |
//! gguf                  +--> weights (immutable, shared) --> run = layout + weights + cache + stream
//!                               |                              |
//!                               v                              v
//!                      mixer --> selector | eviction --> ops --> kernels/*.cu
//!                                                              |
//!                     generate (prefill, decode) --------------+--> eval: bench, quality --> JSON --> plot
//! ```
//!
//! | module | contents |
//! |---|---|
//! | [`checkpoint`] | loading of checkpoints, weight types, tokenizers |
//! | [`spec`], [`family`] | configuration and model specification, per model family |
//! | [`tensors`] | tensor names and shapes |
//! | [`method`], [`retrofit`], [`eviction`] | methods (stock, retrofit, eviction) and their plans |
//! | [`selector`] | rules that choose which earlier blocks a block reads |
//! | [`layout`] | kind, cache size and rows read of every layer under a method |
//! | [`weights`], [`run`] | shared immutable weights; a run with its cache and stream |
//! | [`mixer`], [`nn`], [`ops`] | attention variants; linear, norm, RoPE and MLP layers; operators |
//! | [`cache`] | KV caches of fixed size, bytes by pool |
//! | [`char`](mod@char), [`train`] | the native character model; training |
//! | [`generate`] | prefill, decode, sampling, chat template |
//! | [`stats`] | means with bootstrap intervals, medians, percentiles |
//! | `eval` (feature) | benchmarks, quality evaluation, figures |
//! | `cli` (feature) | flags, progress bars, the memory ledger |
//!
//! # Example
//!
//! Greedy decoding of a few tokens with every full-attention layer swapped:
//!
//! ```
//! use bfly::checkpoint::{Checkpoint, OpenOptions, WeightDtype, WeightFormat};
//! use bfly::generate::{watch, Phase, Request, Sampler, Sampling};
//! use bfly::{retrofit::{RetrofitPlan, Settings}, run::Run, weights::Weights};
//!
//! # fn main() -> bfly::Result<()> {
//! let quiet = &|_: &str, _, _| ();
//! let checkpoint = Checkpoint::open("tests/fixtures/goldens/qwen2", &OpenOptions::default(), quiet)?;
//! let format = WeightFormat::new(WeightDtype::Auto, checkpoint.f32_bytes(), None);
//! let weights = Weights::load(&checkpoint, &format, &candle_core::Device::Cpu, quiet)?;
//!
//! let plan = RetrofitPlan::new(&checkpoint.spec, None, Settings::default())?;
//! let mut run = Run::new(&weights, &plan, 8192)?;
//! let prompt: Vec<u32> = (5..300).collect();
//! let request = Request { prompt: &prompt, max_new_tokens: 8, chunk: 128, stop: &[], logits_last: 1, phase: Phase::Prefill };
//! let greedy = &mut Sampler::new(Sampling::GREEDY)?;
//! let made = run.generate(&request, greedy, &mut watch(|_| ()), &mut watch(|_| ()))?;
//! assert_eq!(made.tokens.len(), 8);
//! assert!(run.cache().capacity_bytes().total() < run.cache().dense_bytes() / 10);
//! # Ok(())
//! # }
//! ```

pub mod cache;
pub mod char;
pub mod checkpoint;
#[cfg(feature = "cli")]
pub mod cli;
mod error;
#[cfg(feature = "eval")]
pub mod eval;
pub mod eviction;
pub mod family;
pub mod generate;
pub mod layout;
pub mod method;
pub mod mixer;
pub mod nn;
pub mod ops;
mod panics;
pub mod recall;
pub mod retrofit;
pub mod run;
pub mod selector;
pub mod spec;
pub mod stats;
pub mod storage;
pub mod tensors;
pub mod train;
pub mod transforms;
pub mod weights;

pub(crate) use error::plain;
pub use error::{At, Error, ErrorKind, Result};
