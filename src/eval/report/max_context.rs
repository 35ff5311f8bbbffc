//! The largest contexts within memory budgets.

use super::header::Header;
use super::ladder::TimedRun;
use super::prompt::PromptSource;
use super::variant::KvBytes;
use crate::eviction::EvictionPlan;
use crate::retrofit::RetrofitPlan;
use serde::{Deserialize, Serialize};

/// `kind` of a file of largest contexts.
pub const MAX_CONTEXT: &str = "bfly-fit";

/// The largest context of each variant within each memory budget, found by arithmetic and verified by a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MaxContexts {
    /// Header of kind [`MAX_CONTEXT`].
    #[serde(flatten)]
    pub header: Header,
    /// New tokens per run.
    pub decode_tokens: usize,
    /// Tokens to a prefill chunk as requested; each run tells what it took.
    pub prefill_chunk: usize,
    /// Largest context that was considered.
    pub most_tokens: usize,
    /// Source of the prompts, with the most tokens that a run was to read.
    pub prompt: PromptSource,
    /// One entry per budget and variant.
    pub runs: Vec<MaxContextRun>,
}

/// One variant in one budget.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MaxContextRun {
    /// Name of the variant.
    pub variant: String,
    /// Plan of a retrofit; null for stock and evictions.
    pub plan: Option<RetrofitPlan>,
    /// Plan of a method that evicts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eviction: Option<EvictionPlan>,
    /// Bytes of memory that the run was allowed to take.
    pub memory_budget: u64,
    /// Largest context that fits by arithmetic, in whole multiples of 1024 tokens, for which the cache was provisioned;
    /// null where none fits.
    pub ctx: Option<usize>,
    /// Whether `ctx` is the largest that was considered, so that a larger one may fit.
    pub at_most: bool,
    /// Bytes that a run at `ctx` takes by arithmetic: weights, cache, buffers, and the activations of a chunk.
    pub needed_bytes: Option<u64>,
    /// Bytes of weights as held.
    pub weights_bytes: u64,
    /// Cache by pool; null where it was not allocated.
    pub kv: Option<KvBytes>,
    /// Tokens to a prefill chunk: as requested, or fewer to stay within the budget or because fewer are read.
    pub prefill_chunk: Option<usize>,
    /// Tokens that the run reads: fewer than are provisioned, since the bytes of these caches do not depend on it.
    pub read_tokens: Option<usize>,
    /// `ok`, or why `within` is false.
    pub status: String,
    /// Whether a run at `ctx` was made and its peak stayed within the budget.
    pub within: bool,
    /// The run, without a warm-up; null where it was out of memory.
    pub sample: Option<TimedRun>,
}
