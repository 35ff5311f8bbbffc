//! Attention of one token to the far zone of exact recall: the few best tokens exactly, the others by estimate.
//!
//! For query head `h` of KV head `g` and far token `i` with decoded score `ŝ_hi = scale · q_h · k̂_i`:
//!
//! - chosen: the `k` tokens with the largest `Σ_h exp(ŝ_hi - ln(e^{n_h} + e^{f_h}))` over the heads `h` of `g`, where
//!   `n_h` is the log-sum-exp of the near zone and `f_h` that of all `ŝ_h`: each head counts with its share of mass
//!   beyond the near zone; their exact keys and values are read;
//! - rest: all other far tokens at weight `exp(min(ŝ_hi, cap_h))`, `cap_h` the largest exact logit among the chosen,
//!   times an estimate of its value ([`Rest`]).
//!
//! The result merges with the near zone's by log-sum-exp ([`crate::ops::merge_attention`]). With `k` at least the number
//! of far tokens it is exact attention.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod exact;
mod highest;
#[cfg(test)]
mod reference;
mod rest;

pub use cpu::attend_far;
#[cfg(feature = "cuda")]
pub(crate) use cuda::{encode, kind, means, text, Cut, Encode, Recall, Text, BINS, COUNTERS, LISTED, MOST_HEADS};

use crate::recall::{HeadCode, ValueCode};
use std::sync::Arc;

/// Estimate of the values of far tokens that are not chosen.
#[derive(Debug, Clone, Copy)]
pub enum Rest<'a> {
    /// No estimate: tokens that are not chosen have no weight.
    None,
    /// Means of the values of blocks of `block` positions.
    Means {
        /// Positions per block.
        block: usize,
        /// Mean of each block's far positions, `[blocks, D]` per KV head.
        means: &'a [&'a [f32]],
    },
    /// Value codes.
    Codes {
        /// Code of each KV head.
        code: &'a [ValueCode],
        /// Codes of all positions, `[positions, bytes]` per KV head.
        codes: &'a [&'a [u8]],
    },
}

/// Inputs of [`attend_far`], by KV head.
#[derive(Debug, Clone, Copy)]
pub struct FarArgs<'a> {
    /// Rotated queries, `[H, D]`.
    pub q: &'a [f32],
    /// Log-sum-exp of each query head's near zone, `[H]`.
    pub near: &'a [f32],
    /// Factor on dot products.
    pub scale: f32,
    /// Far positions: from the first token that is not a sink to the window's left edge.
    pub far: (usize, usize),
    /// Channels of a head, `D`.
    pub dim: usize,
    /// Tokens to choose per KV head, `k`.
    pub chosen: usize,
    /// Key code of each KV head.
    pub code: &'a [Arc<dyn HeadCode>],
    /// Key codes of all positions, `[positions, bytes]` per KV head.
    pub codes: &'a [&'a [u8]],
    /// Exact keys and values of all positions, `[positions, 2, D]` per KV head.
    pub exact: &'a [&'a [f32]],
    /// Estimate of the other values.
    pub rest: Rest<'a>,
}

/// Result of [`attend_far`].
#[derive(Debug, Clone)]
pub struct FarAttended {
    /// Weighted means of values, `[H, D]`; 0 where there is no far token.
    pub out: Vec<f32>,
    /// Log-sum-exp of the weights, `[H]`; `-∞` where there is no far token.
    pub lse: Vec<f32>,
    /// Chosen positions of each KV head, ascending.
    pub chosen: Vec<Vec<u32>>,
}
