//! bfly: long contexts for pretrained models, in memory that does not grow with the text.
//!
//! A Hugging Face checkpoint is taken as it is; some of its attention layers are swapped for **compressed butterfly
//! attention** (an exact local window, attention sinks and mean-pooled block summaries reached over a deterministic graph)
//! and backed by a **two-pool KV cache of fixed size**. No training.
//!
//! ```text
//! checkpoint --> spec --+--> layout (which mixer, which state, which bytes: decided once)
//! hub, safetensors,     |       |
//! gguf                  +--> weights (immutable, shared) --> run = layout + weights + cache + stream
//!                               |                              |
//!                               v                              v
//!                      mixer --> selector | eviction --> ops --> kernels/*.cu
//!                                                              |
//!                     generate (prefill, decode) --------------+--> eval: bench, quality --> JSON --> plot
//! ```
//!
//! | module | owns |
//! |---|---|
//! | [`checkpoint`] | where weights come from, in what form they are held, tokenizers |
//! | [`spec`], [`family`] | what a configuration says, per model family |
//! | [`tensors`] | the one schema of tensor names |
//! | [`method`], [`retrofit`], [`eviction`] | stock, retrofit or eviction: the plans a model is run by |
//! | [`selector`] | which blocks a block reads |
//! | [`layout`] | what each layer becomes under a method: mixer, state, bytes, rows read |
//! | [`weights`], [`run`] | immutable weights, shared; one text read by one method, with cache and stream |
//! | [`mixer`], [`nn`], [`ops`] | attention per layer kind; the layers between; operators, each with a reference |
//! | [`cache`] | fixed allocations, bytes by pool |
//! | [`generate`] | prefill, decode, sampling, chat template |
//! | `eval` (feature) | benchmarks, quality, figures |
//! | `cli` (feature) | flags, progress, the memory ledger |
//!
//! # Example
//!
//! Greedy continuation of a few token ids with every full-attention layer swapped:
//!
//! ```
//! use bfly::checkpoint::{Checkpoint, OpenOptions, WeightDtype, WeightFormat};
//! use bfly::generate::{watch, Request, Sampler, Sampling};
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
//! let request = Request { prompt: &prompt, max_new_tokens: 8, chunk: 128, stop: &[], logits_last: 1 };
//! let greedy = &mut Sampler::new(Sampling::GREEDY)?;
//! let made = run.generate(&request, greedy, &mut watch(|_| ()), &mut watch(|_| ()))?;
//! assert_eq!(made.tokens.len(), 8);
//! assert!(run.cache().capacity_bytes().total() < run.cache().dense_bytes() / 10);
//! # Ok(())
//! # }
//! ```

pub mod cache;
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
pub mod retrofit;
pub mod run;
pub mod selector;
pub mod spec;
pub mod storage;
pub mod tensors;
pub mod weights;

pub(crate) use error::plain;
pub use error::{At, Error, ErrorKind, Result};
