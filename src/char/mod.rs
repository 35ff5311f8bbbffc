//! The native character model: a causal butterfly language model over Latin-1.
//!
//! Every layer reads its own chunk and one partner chunk ([`crate::ops::pair`]), yet the last layer depends on the whole
//! text that the stages reach ([`CharConfig::reach`]). Whole sequences run in parallel ([`CharModel`]); a stream costs the
//! same for every character ([`Stream`]) and gives the same logits.

pub mod checkpoint;
mod config;
mod data;
mod evaluate;
#[cfg(feature = "cuda")]
mod gpu_stream;
mod mix;
mod model;
mod projection;
mod recall;
mod stream;
mod text;

pub use config::{CharConfig, MlpForm, Pairing, PartnerForm, MODEL_TYPE, SYMBOLS};
pub use data::{Corpus, Windows};
pub use evaluate::{bits_by_context, bits_by_position, octaves};
#[cfg(feature = "cuda")]
pub use gpu_stream::GpuStream;
pub use mix::Mix;
pub use model::{Batch, CharModel, Rematerialise};
pub use recall::{Asked, RecallTask, Recalled};
pub use stream::{Stream, Streaming};
pub use text::{decode, encode, encode_replacing, END_OF_TEXT, REPLACEMENT};
