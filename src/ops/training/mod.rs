//! Operators with a backward pass, for training: f32 on a CPU, bf16 with f32 statistics on CUDA (kernels/train.cu).
//!
//! Pair attention, the other operator that is trained, is [`crate::ops::pair`].

mod cross_entropy;
#[cfg(feature = "cuda")]
mod cuda;
mod gated;
mod gradient;
mod norm;

pub use cross_entropy::{cross_entropy, NO_TARGET};
pub use gated::{gated_silu, gated_silu_backward};
pub use gradient::FlatGradient;
pub use norm::{norm, norm_backward, Normed};

/// Symbols of the vocabulary that the kernels take, and [`FlatGradient::add_embedding`].
const SYMBOLS: usize = 256;
