//! The largest contexts within memory budgets.

use super::header::Header;
use super::ladder::TimedRun;
use super::prompt::PromptSource;
use super::variant::KvBytes;
use crate::eviction::EvictionPlan;
use crate::retrofit::RetrofitPlan;
use serde::{Deserialize, Serialize};

/// `kind` of a largest-context file.
pub const MAX_CONTEXT: &str = "bfly-fit";

/// Results of `fit`: the largest context of each variant within each memory budget, computed and verified by a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MaxContexts {
    /// Header of kind [`MAX_CONTEXT`].
    #[serde(flatten)]
    pub header: Header,
    /// New tokens per run.
    pub decode_tokens: usize,
    /// Requested prefill chunk in tokens; each run has the chunk that it used.
    pub prefill_chunk: usize,
    /// Largest context that was considered.
    pub most_tokens: usize,
    /// Source of the prompts, and the tokens of the longest prompt.
    pub prompt: PromptSource,
    /// One entry per budget and variant.
    pub runs: Vec<MaxContextRun>,
}

/// One variant within one budget.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MaxContextRun {
    /// Name of the variant.
    pub variant: String,
    /// Plan of a retrofit; null for stock and evictions.
    pub plan: Option<RetrofitPlan>,
    /// Plan of an eviction rule; null for other methods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eviction: Option<EvictionPlan>,
    /// Memory limit of the run in bytes.
    pub memory_budget: u64,
    /// Largest context that fits by calculation, a multiple of 1024 tokens, for which the cache was provisioned; null
    /// where none fits.
    pub ctx: Option<usize>,
    /// Whether `ctx` is the largest context considered, so that a larger one may fit.
    pub at_most: bool,
    /// Calculated memory of a run at `ctx` in bytes: weights, cache, buffers, and the activations of a chunk.
    pub needed_bytes: Option<u64>,
    /// Size of the weights in memory, in bytes.
    pub weights_bytes: u64,
    /// Cache by pool; null where it was not allocated.
    pub kv: Option<KvBytes>,
    /// Prefill chunk in tokens: the requested one, or a smaller one for the budget or for a shorter prompt.
    pub prefill_chunk: Option<usize>,
    /// Prompt tokens of the run; they may be fewer than are provisioned, since the cache's size does not depend on
    /// them.
    pub read_tokens: Option<usize>,
    /// `ok`, or the reason for which `within` is false.
    pub status: String,
    /// Whether a run at `ctx` was made and its peak stayed within the budget.
    pub within: bool,
    /// Timings of the run, which has no warm-up; null where it was out of memory.
    pub sample: Option<TimedRun>,
}
