//! Attention of the character model: a chunk reads itself and one partner chunk, under one softmax, with a backward pass.
//!
//! Query `i` of chunk `c`, positions counted from the chunk's start, `R_p` the rotation by position `p`, `B` the chunk:
//!
//! ```text
//! near:  s_j = (R_i q_i · R_j k_j) / √D        for j ≤ i of chunk c
//! far:   s_j = (R_{i+B} q_i · R_j k_j) / √D    for all j of the partner chunk, or for its mean key
//! o_i = Σ_j e^{s_j} v_j / Σ_j e^{s_j}          over both
//! ```
//!
//! A partner so lies right before the chunk, however far it is in the text: positions never exceed `2 B`. Keys are rotated
//! once, queries once for either part.
//!
//! On CUDA: bf16, chunks of 16 or 128, heads of 64 (kernels/pair.cu).

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod rope;

pub use cpu::decode;
pub(crate) use cpu::mean_row;
pub use rope::PairRope;

use crate::error::{Error, ErrorKind, Result};
use candle_core::Tensor;

/// What a chunk reads besides itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Partner {
    /// Keys and values of the chunk that lies this many chunks before.
    Shift(usize),
    /// Mean key and mean value of the chunk that lies this many chunks before.
    Summary(usize),
    /// Keys and values of the chunk whose number differs in this bit (`c ^ distance`); both chunks are read in full, later
    /// characters included. A model with such layers predicts nothing: it sees the answer.
    Xor(usize),
}

impl Partner {
    /// The partner of chunk `c` of `chunks`, if it has one.
    pub fn of(self, c: usize, chunks: usize) -> Option<usize> {
        match self {
            Partner::Shift(distance) | Partner::Summary(distance) => c.checked_sub(distance),
            Partner::Xor(distance) => Some(c ^ distance).filter(|p| *p < chunks),
        }
    }

    /// Chunks between a chunk and its partner.
    pub fn distance(self) -> usize {
        match self {
            Partner::Shift(distance) | Partner::Summary(distance) | Partner::Xor(distance) => distance,
        }
    }

    fn is_summary(self) -> bool {
        matches!(self, Partner::Summary(_))
    }

    fn is_causal(self) -> bool {
        !matches!(self, Partner::Xor(_))
    }
}

/// Sizes of a batch of sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PairShape {
    /// Sequences, each of `chunks` chunks; no sequence reads another.
    pub batch: usize,
    /// Chunks of a sequence.
    pub chunks: usize,
    /// Characters of a chunk, `B`.
    pub chunk: usize,
    /// Attention heads, `H`.
    pub heads: usize,
    /// Channels of a head, `D`: even.
    pub dim: usize,
}

impl PairShape {
    /// Rows of the batch, `N`.
    pub fn rows(&self) -> usize {
        self.batch * self.chunks * self.chunk
    }

    /// Channels of all heads.
    pub fn width(&self) -> usize {
        self.heads * self.dim
    }

    fn check(&self, tensor: &Tensor, columns: usize, what: &str) -> Result<()> {
        if tensor.dims() == [self.rows(), columns] {
            return Ok(());
        }
        let message = format!("is {:?} where {:?} is expected", tensor.dims(), [self.rows(), columns]);
        Err(Error::new(ErrorKind::Tensor, what, message))
    }
}

/// Pair attention of a batch: the output, and the log-sum-exp of every query, which [`backward`] needs.
///
/// # Shapes
/// `qkv [N, 3 H D]`: queries, keys and values of all heads, not rotated; the output `[N, H D]`; the log-sum-exp f32 `[N, H]`.
///
/// # Errors
/// Another shape or device.
pub fn forward(qkv: &Tensor, shape: PairShape, partner: Partner, rope: &PairRope) -> Result<(Tensor, Tensor)> {
    shape.check(qkv, 3 * shape.width(), "queries, keys and values")?;
    #[cfg(feature = "cuda")]
    if qkv.device().is_cuda() {
        return cuda::forward(qkv, shape, partner, rope);
    }
    cpu::forward(qkv, shape, partner, rope)
}

/// The gradient of `qkv`, given that of the output; probabilities are computed again from `lse`.
///
/// # Shapes
/// As of [`forward`]; the result is that of `qkv`.
///
/// # Errors
/// Another shape or device.
pub fn backward(
    qkv: &Tensor,
    (out, lse): (&Tensor, &Tensor),
    grad: &Tensor,
    shape: PairShape,
    partner: Partner,
    rope: &PairRope,
) -> Result<Tensor> {
    shape.check(qkv, 3 * shape.width(), "queries, keys and values")?;
    shape.check(out, shape.width(), "attention's output")?;
    shape.check(grad, shape.width(), "gradient of attention's output")?;
    shape.check(lse, shape.heads, "log-sum-exp")?;
    #[cfg(feature = "cuda")]
    if qkv.device().is_cuda() {
        return cuda::backward(qkv, (out, lse), grad, shape, partner, rope);
    }
    cpu::backward(qkv, (out, lse), grad, shape, partner, rope)
}
