//! The JSON that measurements are written as and figures are drawn from: plain data, every sample kept.
//!
//! Three kinds of file exist, told apart by their `kind`. All carry a `schema_version`; a reader refuses another one. Peers in
//! other languages (integrations/) hand in [`Sample`]s of the same form.

use crate::checkpoint::Identity;
use crate::error::{At, Error, Result};
use crate::eviction::EvictionPlan;
use crate::retrofit::RetrofitPlan;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

/// The form that this build writes and reads.
pub const SCHEMA_VERSION: u32 = 1;
/// `kind` of a ladder: end-to-end runs over rising contexts.
pub const LADDER: &str = "bfly-ladder";
/// `kind` of a kernel report: kernels against the machine's own ceilings.
pub const KERNELS: &str = "bfly-kernels";
/// `kind` of a fit: the largest contexts within memory budgets.
pub const FIT: &str = "bfly-fit";

/// Where it ran.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// The device's name as its driver gives it, or the processor's.
    pub device: String,
    /// Version of the driver; null on a CPU.
    pub driver: Option<String>,
    /// Compute capability, `9.0`; null on a CPU.
    pub compute_capability: Option<String>,
    /// Memory of the device.
    pub memory_bytes: u64,
}

/// What the machine itself reaches, measured in the same process: every rate is judged against these.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Seconds of each device-to-device copy of `copy_bytes`.
    pub copy_s: Vec<f64>,
    /// Bytes of the copied buffer; a copy moves twice as many.
    pub copy_bytes: u64,
    /// Bytes read and written per second at the median, in GB/s (10⁹).
    pub copy_gb_s: f64,
    /// Seconds of each square matrix product on random data.
    pub matmul_s: Vec<f64>,
    /// Rows and columns of the factors.
    pub matmul_size: usize,
    /// Their type.
    pub matmul_dtype: String,
    /// At the median, in TFLOP/s (10¹²).
    pub matmul_tflop_s: f64,
}

/// What a file is, what was run, how it was held, and where: the fields that all results of a model share, at their top level.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Header {
    /// What the file holds, such as [`LADDER`].
    pub kind: String,
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Commit of the build.
    pub git_sha: String,
    /// When it began, RFC 3339 in UTC.
    pub started: String,
    /// The command.
    pub command: Vec<String>,
    /// Where.
    pub machine: Machine,
    /// The checkpoint; null with random weights.
    pub model: Option<Identity>,
    /// The model's name for people.
    pub name: String,
    /// Seed of random weights: speed and memory only; null for real ones.
    pub random_weights: Option<u64>,
    /// Parameters.
    pub parameters: u64,
    /// Positions that the model was trained for: beyond, speed and memory only.
    pub trained_positions: usize,
    /// How weights were held (`bf16`, `f32`, `q4_k`, ...): the type of most bytes.
    pub dtype: String,
    /// Bytes of matrices by the type they were held in.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub held: BTreeMap<String, u64>,
    /// How keys and values were held.
    pub kv_dtype: String,
    /// When it was taken up again, each time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub resumed: Vec<String>,
}

/// A ladder: each variant at each context, interleaved.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ladder {
    /// Of kind [`LADDER`].
    #[serde(flatten)]
    pub header: Header,
    /// What the machine reaches.
    pub ceilings: Option<Ceilings>,
    /// New tokens per run.
    pub decode_tokens: usize,
    /// Tokens to a prefill chunk as asked; runs tell what they took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_chunk: Option<usize>,
    /// Bytes that a run was allowed to take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_budget: Option<u64>,
    /// Where the prompts come from, with the hash of their token ids.
    pub prompt: Prompt,
    /// One entry per engine, variant and context.
    pub runs: Vec<Run>,
}

/// The text of prompts: the first tokens of one stream of documents.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Prompt {
    /// Names of the documents in order, or `random ids` where there is no tokenizer.
    pub documents: Vec<String>,
    /// Tokens in the stream.
    pub tokens: usize,
    /// SHA-256 of the ids as little-endian u32.
    pub sha256: String,
    /// Seconds for making the stream, once and before the first run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokenise_s: Option<f64>,
}

/// One engine and variant at one context.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Run {
    /// `bfly`, or a peer's name (`transformers`).
    pub engine: String,
    /// `stock`, `retrofit`, `retrofit:KEY=VALUE,..`, or a rule that evicts (`keydiff:budget=1k`); for a peer what it ran (`sdpa`).
    pub variant: String,
    /// The plan; null for stock, evictions and peers.
    pub plan: Option<RetrofitPlan>,
    /// What a run that evicts kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eviction: Option<EvictionPlan>,
    /// Provisioned positions: prompt and new tokens together.
    pub ctx: usize,
    /// Tokens read.
    pub prompt_tokens: usize,
    /// Tokens to a prefill chunk.
    pub prefill_chunk: usize,
    /// Version of the engine, for peers.
    pub version: Option<String>,
    /// Bytes of weights as held.
    pub weights_bytes: Option<u64>,
    /// The cache by pool; peers report none.
    pub kv: Option<Kv>,
    /// What a peer's cache held in the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_bytes: Option<u64>,
    /// What each new token reads; peers do not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_per_token: Option<ReadBytes>,
    /// `ok`, or why there are no samples (out of memory, say).
    pub status: String,
    /// Untimed runs at this context; none where the next smaller one took this engine several seconds.
    pub warmups: usize,
    /// Whether all samples gave the same tokens; null before there are two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deterministic: Option<bool>,
    /// Every timed run.
    pub samples: Vec<Sample>,
    /// Medians and derived rates; null without samples.
    pub summary: Option<Summary>,
}

/// Bytes read for one new token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ReadBytes {
    /// Every matrix once, but not an embedding table that is not the head too.
    pub weights: u64,
    /// Keys and values that the token's queries may see, each once; the mean over the new tokens.
    pub kv: f64,
}

/// KV bytes, allocated.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Kv {
    /// Raw positions.
    pub local_bytes: u64,
    /// Summaries and running sums.
    pub summary_bytes: u64,
    /// Sinks.
    pub sink_bytes: u64,
    /// All of them.
    pub total_bytes: u64,
    /// What the stock model allocates for the same context and element type.
    pub dense_bytes: u64,
    /// The most that was allocated at once, where that is more than in the end: a rule that evicts once holds the whole context
    /// before it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
}

/// One timed run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Seconds from ids to the last position's logits.
    pub prefill_s: f64,
    /// Seconds from ids to the first new token's id on the host.
    pub ttft_s: f64,
    /// Seconds from ids to the last new token's id on the host.
    pub end_to_end_s: f64,
    /// Seconds between the tokens after the first, as far as they were told apart: one entry per fetched batch of
    /// `fetched_tokens`, divided by it.
    pub inter_token_s: Vec<f64>,
    /// New tokens fetched at once.
    pub fetched_tokens: usize,
    /// Highest allocation of the device's allocator during the run; on a CPU the process's highest resident memory.
    pub peak_device_bytes: u64,
    /// Seconds spent on making the prompt, outside the times above.
    pub prompt_s: f64,
    /// Hash of the new tokens: runs of one variant must agree.
    pub tokens_sha256: String,
}

/// Medians over samples, and what follows from them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Median seconds.
    pub prefill_s: f64,
    /// Median seconds.
    pub ttft_s: f64,
    /// Median seconds.
    pub end_to_end_s: f64,
    /// Median seconds between tokens, over all samples' entries.
    pub inter_token_p50_s: f64,
    /// 95th percentile.
    pub inter_token_p95_s: f64,
    /// Prompt tokens per second.
    pub prefill_tok_s: f64,
    /// New tokens per second at the median distance.
    pub decode_tok_s: f64,
    /// Weights and KV bytes read per new token, times tokens per second, in GB/s; null where the engine does not tell.
    pub decode_gb_s: Option<f64>,
    /// Highest of all samples.
    pub peak_device_bytes: u64,
}

/// A fit: the largest context of each variant within each memory budget, found by arithmetic and verified by a run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fit {
    /// Of kind [`FIT`].
    #[serde(flatten)]
    pub header: Header,
    /// New tokens per run.
    pub decode_tokens: usize,
    /// Tokens to a prefill chunk as asked; runs tell what they took.
    pub prefill_chunk: usize,
    /// Largest context that was considered.
    pub most_tokens: usize,
    /// Where the prompts come from, with the hash of their token ids; `tokens` is the most that a run was to read.
    pub prompt: Prompt,
    /// One entry per budget and variant.
    pub runs: Vec<FitRun>,
}

/// One variant in one budget.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FitRun {
    /// `stock`, `retrofit`, `retrofit:KEY=VALUE,..`, or a rule that evicts.
    pub variant: String,
    /// The plan; null for stock and evictions.
    pub plan: Option<RetrofitPlan>,
    /// What a run that evicts kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eviction: Option<EvictionPlan>,
    /// Bytes that the run was allowed to take.
    pub memory_budget: u64,
    /// The largest context, in whole multiples of 1024 tokens, that fits by arithmetic, for which the cache was provisioned; null
    /// where none fits.
    pub ctx: Option<usize>,
    /// Whether `ctx` is only the largest that was considered: then the largest that fits is at least that.
    pub at_most: bool,
    /// What arithmetic says that a run at `ctx` takes: weights, cache, buffers, and the activations of a chunk.
    pub needed_bytes: Option<u64>,
    /// Bytes of weights as held.
    pub weights_bytes: u64,
    /// The cache by pool; null where it was not allocated.
    pub kv: Option<Kv>,
    /// Tokens to a prefill chunk: as asked, or fewer to fit the budget, or because fewer are read.
    pub prefill_chunk: Option<usize>,
    /// Tokens that the run reads: fewer than are provisioned, since what these caches take does not depend on it.
    pub read_tokens: Option<usize>,
    /// `ok`, or why `within` is false.
    pub status: String,
    /// Whether a run at `ctx` was made and its peak stayed within the budget.
    pub within: bool,
    /// The run: its peak and its seconds, nothing warmed up before it; null where it found no memory.
    pub sample: Option<Sample>,
}

/// Kernels against ceilings.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kernels {
    /// [`KERNELS`].
    pub kind: String,
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Commit of the build.
    pub git_sha: String,
    /// When it began, RFC 3339 in UTC.
    pub started: String,
    /// The command.
    pub command: Vec<String>,
    /// Where.
    pub machine: Machine,
    /// What the machine reaches.
    pub ceilings: Ceilings,
    /// One entry per kernel and shape.
    pub kernels: Vec<KernelRun>,
}

/// One kernel on one shape.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KernelRun {
    /// Its name (`attention_prefill`).
    pub kernel: String,
    /// The case in a few words (`dense causal`, `window 2048`).
    pub case: String,
    /// Element type.
    pub dtype: String,
    /// Sizes by letter: T, H, G, D, keys, ...
    pub shape: BTreeMap<String, usize>,
    /// Useful floating-point operations: what the definition asks for, masked positions not counted.
    pub flop: f64,
    /// Fewest bytes that must be moved: each input read once, each output written once.
    pub bytes: f64,
    /// Seconds of each launch.
    pub samples_s: Vec<f64>,
    /// `flop` over the median, in TFLOP/s.
    pub tflop_s: f64,
    /// `bytes` over the median, in GB/s.
    pub gb_s: f64,
}

/// Reads a file of `kind`.
///
/// # Errors
/// A file that is not JSON (a half-written one), of another kind, or of another schema version: each named.
pub fn read<T: DeserializeOwned>(path: &Path, kind: &str) -> Result<T> {
    let value: serde_json::Value = parse(path)?;
    let found = value.get("kind").and_then(|k| k.as_str()).unwrap_or("none");
    if found != kind {
        return Err(Error::format(path.display(), format!("is of kind `{found}`; `{kind}` is wanted")));
    }
    let version = value.get("schema_version").and_then(|v| v.as_u64());
    if version != Some(SCHEMA_VERSION.into()) {
        let found = version.map_or("none".into(), |v| v.to_string());
        let message = format!("has schema version {found}; this build reads {SCHEMA_VERSION}");
        return Err(Error::format(path.display(), message));
    }
    serde_json::from_value(value).map_err(|e| Error::format(path.display(), e))
}

/// What the file says it is. Everything else about it is judged by [`read`].
///
/// # Errors
/// A file that cannot be read or is no JSON.
pub fn kind_of(path: &Path) -> Result<String> {
    #[derive(serde::Deserialize)]
    struct Head {
        #[serde(default)]
        kind: serde_json::Value,
    }
    let head: Head = parse(path)?;
    Ok(head.kind.as_str().unwrap_or("none").into())
}

fn parse<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read_to_string(path).at(path.display())?;
    serde_json::from_str(&text).map_err(|e| Error::format(path.display(), format!("is not a whole JSON file: {e}")))
}
