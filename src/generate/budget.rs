//! `--memory-budget`: chooses the largest prefill chunk that fits; chunk size does not change the output.

use crate::error::{Error, ErrorKind, Result};
use crate::layout::Layout;
use crate::ops::{delta_scratch, human_bytes};
use crate::spec::{AttentionSpec, DeltaSpec};
use crate::weights::Weights;

/// Smallest chunk that a budget reduces to, in tokens.
const LEAST: usize = 128;

/// Upper bounds on a run's memory by use, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeeds {
    /// Bytes of the weights.
    pub weights: u64,
    /// Peak bytes of the KV cache.
    pub cache: u64,
    /// Bytes that do not depend on the chunk: logits, a decode step's buffers, scratch of products and of evictions.
    pub fixed: u64,
    /// Bytes of activations per token of a chunk.
    pub token: u64,
}

impl MemoryNeeds {
    /// Computes the needs of `weights` run with `layout`.
    ///
    /// # Errors
    /// The layout names an unknown eviction rule.
    pub fn of(weights: &Weights, layout: &Layout) -> Result<Self> {
        let spec = weights.spec();
        let size = weights.dtype().size_in_bytes();
        let attention_most =
            |f: &dyn Fn(&AttentionSpec) -> usize| spec.attention().map(|(_, a)| f(a)).max().unwrap_or(0);
        let wide = spec.layers.iter().map(|l| l.feed_forward.width).max().unwrap_or(0);
        // Alive at once in attention: x, its norm, q, k and v (projected and rotated) and the output; in the
        // feed-forward: x, its norm, gate, up and their product. Rotary tables are f32.
        let width = attention_most(&|a| 2 * a.q_width() + 4 * a.kv_width());
        let attention = 4 * spec.hidden + width + attention_most(&|a| a.q_width());
        let feed_forward = 4 * spec.hidden + 3 * wide;
        // Inputs and output of a recurrence.
        let recurrence = |d: &DeltaSpec| 4 * spec.hidden + d.channels() + 2 * d.value_width() + 2 * d.value_heads;
        let recurrence = spec.recurrent().map(recurrence).max().unwrap_or(0);
        let scratch = spec.recurrent().map(|d| delta_scratch(d, weights.dtype(), weights.device()));
        let (fixed, each) = scratch.fold((0, 0), |most, s| (s.0.max(most.0), s.1.max(most.1)));
        // A tile's attention, its f32 sum with that of earlier tiles, and their log-sum-exps.
        let partial = |a: &AttentionSpec| a.q_width() + (4 * a.q_width() + 8 * a.heads) / size;
        let recall = if layout.recall().next().is_some() { attention_most(&partial) } else { 0 };
        let tables = 4 * attention_most(&|a| a.head_dim) * spec.ropes.len();
        // Products with quantised matrices are computed in parts and concatenated.
        let parts = if weights.has_quantised() { size * width.max(wide) } else { 0 };
        let evicting = layout.layers.iter().map(|l| l.scratch(size)).try_fold(0, |most, b| b.map(|b| b.max(most)))?;
        Ok(Self {
            weights: weights.bytes(),
            cache: layout.bytes(weights.dtype()).peak,
            // Logits in two types and a copy; at most this for partial results, routes and vectors of a step; dequantised weights.
            fixed: (spec.vocab * 16) as u64 + (16 << 20) + weights.scratch() + evicting.max(fixed),
            token: (size * (attention + recall).max(feed_forward).max(recurrence) + tables + parts) as u64 + each,
        })
    }

    /// Returns the total for chunks of `chunk` tokens.
    pub fn total(&self, chunk: usize) -> u64 {
        self.weights + self.cache + self.fixed + self.token * chunk as u64
    }

    /// Returns the largest chunk of at most `wanted` tokens that fits in `budget` bytes.
    ///
    /// # Errors
    /// Not even the smallest chunk fits: the message lists what takes how much.
    pub fn chunk_within(&self, budget: u64, wanted: usize) -> Result<usize> {
        let least = LEAST.min(wanted);
        if self.total(least) > budget {
            let message = format!(
                "{} is {} too little: weights take {}, the cache {}, a chunk of {least} tokens {}; use a smaller --ctx, a quantised \
                 --dtype or fewer dense layers",
                human_bytes(budget),
                human_bytes(self.total(least) - budget),
                human_bytes(self.weights),
                human_bytes(self.cache),
                human_bytes(self.fixed + self.token * least as u64),
            );
            return Err(Error::new(ErrorKind::Memory, "--memory-budget", message));
        }
        let fits = ((budget - self.total(0)) / self.token.max(1)) as usize;
        Ok(if fits >= wanted { wanted } else { (fits / LEAST * LEAST).max(least) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDS: MemoryNeeds = MemoryNeeds { weights: 1000, cache: 200, fixed: 50, token: 2 };

    #[test]
    fn the_largest_chunk_that_fits_is_chosen() -> Result<()> {
        assert_eq!(NEEDS.chunk_within(1_000_000, 4096)?, 4096);
        assert_eq!(NEEDS.chunk_within(1250 + 2 * 700, 4096)?, 640, "whole multiples of 128");
        assert_eq!(NEEDS.chunk_within(1250 + 2 * 700, 512)?, 512);
        assert!(NEEDS.total(640) <= 1250 + 2 * 700);
        Ok(())
    }

    #[test]
    fn a_budget_that_is_too_small_says_by_how_much() {
        let error = NEEDS.chunk_within(1500, 4096).unwrap_err().to_string();
        assert!(error.starts_with("--memory-budget: ") && error.contains("6 B too little"), "{error}");
    }
}
