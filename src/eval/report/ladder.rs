//! Ladders: end-to-end runs of every variant and peer over rising contexts.
//!
//! Peers in other languages (integrations/) send [`TimedRun`]s as JSON of the same form.

use super::header::{Ceilings, Header};
use super::prompt::PromptSource;
use super::variant::KvBytes;
use crate::error::Result;
use crate::eviction::EvictionPlan;
use crate::layout::Layout;
use crate::retrofit::RetrofitPlan;
use crate::stats::{median, percentile};
use candle_core::DType;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// `kind` of a ladder.
pub const LADDER: &str = "bfly-ladder";
/// `status` of a run that was timed, or that stayed within its budget.
pub const OK: &str = "ok";

/// Results of a ladder: every variant and peer at every context.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ladder {
    /// Header of kind [`LADDER`].
    #[serde(flatten)]
    pub header: Header,
    /// Ceilings of the machine; null on a CPU.
    pub ceilings: Option<Ceilings>,
    /// New tokens per run.
    pub decode_tokens: usize,
    /// Requested prefill chunk in tokens; each run has the chunk that it used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_chunk: Option<usize>,
    /// Memory limit of a run in bytes; null without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_budget: Option<u64>,
    /// Source of the prompts.
    pub prompt: PromptSource,
    /// One entry per engine, variant and context.
    pub runs: Vec<LadderRun>,
}

/// One engine and variant at one context.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LadderRun {
    /// `bfly`, or the name of a peer such as `transformers`.
    pub engine: String,
    /// Name of the variant, or of a peer's configuration, such as `sdpa`.
    pub variant: String,
    /// Plan of a retrofit; null for stock, evictions and peers.
    pub plan: Option<RetrofitPlan>,
    /// Plan of an eviction rule; null for other methods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eviction: Option<EvictionPlan>,
    /// Positions that the cache is provisioned for: those of the prompt and the new tokens.
    pub ctx: usize,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Prefill chunk in tokens.
    pub prefill_chunk: usize,
    /// Version of a peer; null for bfly, whose build is in the header.
    pub version: Option<String>,
    /// Size of the weights in memory, in bytes.
    pub weights_bytes: Option<u64>,
    /// Cache by pool; null for peers.
    pub kv: Option<KvBytes>,
    /// Size of a peer's cache at the end of the run, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_bytes: Option<u64>,
    /// Bytes that one decode step reads; null for peers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_per_token: Option<ReadBytes>,
    /// [`OK`], or the reason of the failure, such as out of memory.
    pub status: String,
    /// Number of untimed runs at this context; 0 where the next smaller context took bfly several seconds.
    pub warmups: usize,
    /// Whether all timed runs generated the same tokens; null with fewer than two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deterministic: Option<bool>,
    /// One entry per timed run.
    pub samples: Vec<TimedRun>,
    /// Medians and derived rates; null without a timed run.
    pub summary: Option<TimingSummary>,
}

impl LadderRun {
    /// Returns the names of engine and variant.
    pub fn names(&self) -> (&str, &str) {
        (&self.engine, &self.variant)
    }

    /// Returns whether the status is [`OK`].
    pub fn ran(&self) -> bool {
        self.status == OK
    }

    /// Adds a timed run and updates the summary.
    pub fn push(&mut self, sample: TimedRun) {
        self.samples.push(sample);
        self.deterministic = deterministic(&self.samples);
        self.summary = self.summarise();
    }

    /// Computes the summary of the timed runs; `None` without one.
    fn summarise(&self) -> Option<TimingSummary> {
        let of = |f: fn(&TimedRun) -> f64| median(&self.samples.iter().map(f).collect::<Vec<_>>());
        let steps: Vec<f64> = self.samples.iter().flat_map(|s| s.inter_token_s.iter().copied()).collect();
        let (p50, p95) = (median(&steps).unwrap_or(0.0), percentile(&steps, 0.95).unwrap_or(0.0));
        let per = |amount: f64, seconds: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
        let prefill_s = of(|s| s.prefill_s)?;
        Some(TimingSummary {
            prefill_s,
            ttft_s: of(|s| s.ttft_s)?,
            end_to_end_s: of(|s| s.end_to_end_s)?,
            inter_token_p50_s: p50,
            inter_token_p95_s: p95,
            prefill_tok_s: per(self.prompt_tokens as f64, prefill_s),
            decode_tok_s: per(1.0, p50),
            decode_gb_s: self.read_per_token.filter(|_| p50 > 0.0).map(|r| (r.weights as f64 + r.kv) / p50 / 1e9),
            peak_device_bytes: self.samples.iter().map(|s| s.peak_device_bytes).max()?,
        })
    }
}

/// Returns whether all timed runs generated the same tokens; `None` with fewer than two.
fn deterministic(samples: &[TimedRun]) -> Option<bool> {
    let (first, rest) = samples.split_first()?;
    (!rest.is_empty()).then(|| rest.iter().all(|s| s.tokens_sha256 == first.tokens_sha256))
}

/// Bytes that one decode step reads.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ReadBytes {
    /// Bytes of every weight matrix, each once; the embedding table counts only where it is also the head.
    pub weights: u64,
    /// Bytes of the keys and values that the token may attend to, each once per KV head; the mean over the new tokens.
    pub kv: f64,
}

impl ReadBytes {
    /// Computes the mean bytes that the decode steps at `positions` read under `layout`: `weights`, and every key and
    /// value that the step may attend to, once per KV head ([`Layout::bytes_read`]).
    ///
    /// # Errors
    /// As [`Layout::bytes_read`].
    pub fn of(layout: &Layout, positions: Range<usize>, weights: u64, dtype: DType) -> Result<Self> {
        let count = positions.len().max(1) as f64;
        Ok(Self { weights, kv: layout.bytes_read(positions, dtype)? as f64 / count })
    }
}

/// One timed run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TimedRun {
    /// Seconds from the ids on the host to the logits of the last position.
    pub prefill_s: f64,
    /// Seconds from the ids on the host to the first new token's id on the host.
    pub ttft_s: f64,
    /// Seconds from the ids on the host to the last new token's id on the host.
    pub end_to_end_s: f64,
    /// Seconds between the tokens after the first, one entry per host synchronisation: the mean over the
    /// `fetched_tokens` tokens that it fetched.
    pub inter_token_s: Vec<f64>,
    /// New tokens fetched per host synchronisation.
    pub fetched_tokens: usize,
    /// Peak bytes of the device allocator during the run; on a CPU the peak resident memory of the process.
    pub peak_device_bytes: u64,
    /// Seconds to copy the prompt from the stream; not part of the times above.
    pub prompt_s: f64,
    /// Hash of the new tokens, which is the same for all runs of a deterministic variant.
    pub tokens_sha256: String,
}

/// Medians over timed runs, and rates derived from them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TimingSummary {
    /// Median seconds of prefill.
    pub prefill_s: f64,
    /// Median seconds to the first new token.
    pub ttft_s: f64,
    /// Median end-to-end seconds.
    pub end_to_end_s: f64,
    /// Median seconds between tokens, over the entries of all runs.
    pub inter_token_p50_s: f64,
    /// 95th percentile of the seconds between tokens.
    pub inter_token_p95_s: f64,
    /// Prompt tokens per second at the median prefill time.
    pub prefill_tok_s: f64,
    /// New tokens per second at the median time between tokens.
    pub decode_tok_s: f64,
    /// Bytes read per decode step over the median time between tokens, in GB/s (10⁹); null where the engine does not
    /// report them.
    pub decode_gb_s: Option<f64>,
    /// Highest `peak_device_bytes` of all runs.
    pub peak_device_bytes: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::retrofit::Settings;

    #[test]
    fn a_decode_step_reads_its_window_sinks_and_summaries() {
        // Four full layers of 2 KV heads of 8.
        let spec = Checkpoint::random("tests/fixtures/goldens/qwen2", 0).unwrap().spec;
        let row = 2 * 2 * 8 * 4;
        let read = |plan: Option<&RetrofitPlan>, positions| {
            ReadBytes::of(&Layout::new(&spec, plan, 1024).unwrap(), positions, 99, DType::F32).unwrap()
        };
        // Positions 100 and 101 read 101 and 102 keys.
        assert_eq!(read(None, 100..102), ReadBytes { weights: 99, kv: 4.0 * row as f64 * 101.5 });
        let settings = Settings { block: 16, window: 32, sink_tokens: 4, partner: "all".into(), ..Settings::default() };
        let plan = RetrofitPlan::new(&spec, Some(vec![2]), settings).unwrap();
        // Position 100 is the fifth of block 6: window from block 4 on, 37 keys; 4 sinks; blocks 0 to 3, all with a
        // summary.
        let want = row as f64 * (3.0 * 101.0 + (37 + 4 + 4) as f64);
        assert_eq!(read(Some(&plan), 100..101).kv, want);
        // Within the first window there are neither sinks to add nor summaries.
        assert_eq!(read(Some(&plan), 20..21).kv, row as f64 * 4.0 * 21.0);
        // Sinks that fill block 0 leave it without a summary.
        let settings = Settings { sink_tokens: 16, ..plan.settings };
        let plan = RetrofitPlan::new(&spec, Some(vec![2]), settings).unwrap();
        assert_eq!(read(Some(&plan), 100..101).kv, row as f64 * (3.0 * 101.0 + (37 + 16 + 3) as f64));
        // All four layers read what was kept of the 100 before, and the new tokens.
        let plan = EvictionPlan::new("snapkv", 60, &[("window", 8)]).unwrap();
        let layout = Layout::new(&spec, &plan, 1024).unwrap();
        let read = ReadBytes::of(&layout, 100..102, 99, DType::F32).unwrap();
        assert_eq!(read.kv, row as f64 * 4.0 * 61.5);
    }
}
