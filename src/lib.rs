//! bfly: long contexts for pretrained models, in memory that does not grow with the text.
//!
//! A Hugging Face checkpoint is taken as it is; some of its attention layers are swapped for **compressed butterfly
//! attention** (an exact local window, attention sinks and mean-pooled block summaries reached over a deterministic graph)
//! and backed by a **two-pool KV cache of fixed size**. No training.
//!
//! ```text
//! checkpoint --> spec --> model (mixer seam) --> generate --> text, logits, ledger
//!     hub          |          ^      |
//!     safetensors  |          |      v
//!     gguf         +--> retrofit   cache (local ring + summary pool) --> selector --> ops
//!                       (which layers)
//! ```
//!
//! | module | owns |
//! |---|---|
//! | [`checkpoint`] | where weights come from, how they are held, tokenizers |
//! | [`spec`], [`family`] | what a configuration says, per model family |
//! | [`model`], [`nn`] | the decoder and the layers between its mixers |
//! | [`mixer`] | the seam: full, sliding, butterfly and evicting attention |
//! | [`retrofit`], [`selector`] | which layers are swapped, which blocks they read |
//! | [`eviction`] | other methods to compare with: which tokens stay |
//! | [`method`] | stock, retrofit or eviction: the choice that a model is run by |
//! | [`cache`] | fixed allocations, bytes by pool |
//! | [`ops`] | operators, each with a reference |
//! | [`generate`] | prefill, decode, sampling, chat template |
//! | [`cli`] | flags, progress, the memory ledger |
//! | [`mod@bench`] | measurements and their form |
//! | [`quality`] | what a retrofit keeps, against stock and against other methods |
//! | `plot` | figures from measurements (feature `plot`) |
//!
//! # Example
//!
//! Greedy continuation of a few token ids with every full-attention layer swapped:
//!
//! ```
//! use bfly::checkpoint::{Checkpoint, Held, HoldAs, OpenOptions};
//! use bfly::generate::{Request, Sampler, Sampling, Session};
//! use bfly::{model::Model, retrofit::{RetrofitPlan, Settings}};
//!
//! # fn main() -> bfly::Result<()> {
//! let quiet = &|_: &str, _, _| ();
//! let checkpoint = Checkpoint::open("tests/fixtures/goldens/qwen2", &OpenOptions::default(), quiet)?;
//! let plan = RetrofitPlan::new(&checkpoint.spec, None, Settings::default())?;
//! let hold = HoldAs::new(Held::Auto, checkpoint.f32_bytes(), None);
//! let model = Model::load(&checkpoint, Some(&plan), 8192, &hold, &candle_core::Device::Cpu, quiet)?;
//!
//! let prompt: Vec<u32> = (5..300).collect();
//! let request = Request { prompt: &prompt, max_new_tokens: 8, chunk: 128, stop: &[], logits_last: 1 };
//! let mut session = Session::new(&model)?;
//! let made = session.generate(&request, &mut Sampler::new(Sampling::GREEDY)?, &mut |_| (), &mut |_| true)?;
//! assert_eq!(made.tokens.len(), 8);
//! let cache = session.cache();
//! assert!(cache.capacity_bytes().total() < cache.dense_bytes() / 10);
//! # Ok(())
//! # }
//! ```

pub mod bench;
pub mod cache;
pub mod checkpoint;
pub mod cli;
mod error;
pub mod eviction;
pub mod family;
pub mod generate;
pub mod method;
pub mod mixer;
pub mod model;
pub mod nn;
pub mod ops;
#[cfg(feature = "plot")]
pub mod plot;
pub mod quality;
pub mod retrofit;
pub mod selector;
pub mod spec;

pub(crate) use error::plain;
pub use error::{At, Error, ErrorKind, Result};
