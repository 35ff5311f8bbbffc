//! The memory ledger: allocated bytes of a run and of the stock model, with timings; printed as text and written as
//! JSON.

use super::{human_bytes, progress::bytes_by_type};
use crate::cache::Cache;
use crate::checkpoint::Identity;
use crate::generate::Timing;
use crate::retrofit::{ranges, RetrofitPlan, WindowAlign};
use crate::spec::ModelSpec;
use serde::Serialize;
use std::collections::BTreeMap;

/// KV cache sizes in bytes.
#[derive(Debug, Clone, Serialize)]
pub struct KvBytes {
    /// Bytes allocated for raw keys and values: local rings and dense layers.
    pub local_bytes: u64,
    /// Bytes allocated for block summaries and their running sums.
    pub summary_bytes: u64,
    /// Bytes allocated for attention sinks.
    pub sink_bytes: u64,
    /// Bytes allocated for key codes of exact recall.
    pub key_code_bytes: u64,
    /// Bytes allocated for value codes or block means of exact recall.
    pub value_bytes: u64,
    /// Bytes of the tables that the codes are read with.
    pub table_bytes: u64,
    /// Bytes of exact keys and values in host memory, not in `total_bytes`.
    pub host_bytes: u64,
    /// Bytes of the states of recurrent layers, which do not depend on the context, not in `total_bytes`.
    pub recurrent_bytes: u64,
    /// Bytes allocated for keys and values in all pools on the device.
    pub total_bytes: u64,
    /// Bytes of `total_bytes` in use at the end of the run.
    pub used_bytes: u64,
    /// Bytes that the stock model allocates for the same context.
    pub dense_bytes: u64,
    /// `total_bytes / dense_bytes`.
    pub ratio: f64,
}

/// Rows of exact keys and values that decode steps fetch from host memory.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct FetchedRows {
    /// Bytes per decode step; on a GPU they cross the host link.
    pub bytes_per_step: f64,
    /// Share of the rows that the step before had fetched too.
    pub repeated: f64,
}

impl KvBytes {
    /// Reads the sizes from `cache`.
    pub fn of(cache: &Cache) -> Self {
        let bytes = cache.capacity_bytes();
        Self {
            local_bytes: bytes.local,
            summary_bytes: bytes.summary,
            sink_bytes: bytes.sink,
            key_code_bytes: bytes.key_codes,
            value_bytes: bytes.values,
            table_bytes: bytes.tables,
            host_bytes: bytes.host,
            recurrent_bytes: bytes.recurrent,
            total_bytes: bytes.total(),
            used_bytes: cache.used_bytes().total(),
            dense_bytes: cache.dense_bytes(),
            ratio: bytes.total() as f64 / cache.dense_bytes() as f64,
        }
    }
}

/// The report of a run: the ledger's figures and everything needed to repeat the run.
#[derive(Debug, Clone, Serialize)]
pub struct Ledger {
    /// Kind of this file: always `retrofit`.
    pub kind: &'static str,
    /// Schema version of this file.
    pub schema_version: u32,
    /// Git commit of the build.
    pub git_sha: &'static str,
    /// Origin of the checkpoint.
    pub model: Identity,
    /// Model specification.
    pub spec: ModelSpec,
    /// Retrofit plan; null for a stock run.
    pub plan: Option<RetrofitPlan>,
    /// Context length the cache is allocated for, in tokens.
    pub ctx: usize,
    /// Device name.
    pub device: String,
    /// Requested weight type (`--dtype`).
    pub dtype: String,
    /// Bytes of weight matrices by type in memory.
    pub held: BTreeMap<String, u64>,
    /// CPU threads.
    pub threads: usize,
    /// Tokens per prefill chunk.
    pub prefill_chunk: usize,
    /// Tokens in the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub generated_tokens: usize,
    /// Seconds from the start of prefill to the last position's logits.
    pub prefill_s: f64,
    /// Seconds from the start of prefill to the first token.
    pub ttft_s: f64,
    /// Seconds for all tokens after the first.
    pub decode_s: f64,
    /// Prefill speed, tokens per second.
    pub prefill_tok_s: f64,
    /// Decode speed over the tokens after the first, tokens per second.
    pub decode_tok_s: f64,
    /// Seconds of each decode step.
    pub decode_steps_s: Vec<f64>,
    /// Peak resident memory of the process, bytes; null where the system does not report it.
    pub peak_memory_bytes: Option<u64>,
    /// Peak GPU allocation of the process (weights, caches, activations), bytes; null on a CPU.
    pub peak_device_bytes: Option<u64>,
    /// Size of the weights in memory, bytes.
    pub weights_bytes: u64,
    /// KV cache sizes.
    pub kv: KvBytes,
    /// Rows that decode steps fetch from host memory; null without exact recall.
    pub fetched: Option<FetchedRows>,
    /// Share of the earlier blocks whose state reaches the last block through the swapped layers; null for a stock run.
    pub reach: Option<f64>,
    /// Generated text; null without a tokenizer.
    pub text: Option<String>,
    /// Generated token ids.
    pub token_ids: Vec<u32>,
}

/// Value of `kind` in a report of `bfly-retrofit`.
pub const LEDGER_KIND: &str = "retrofit";
/// Schema version that this build writes.
pub const LEDGER_VERSION: u32 = 2;

impl Ledger {
    /// Fills in times and rates from a generation's `timing`.
    pub fn time(&mut self, timing: &Timing) {
        let rate = |n: usize, s: f64| if s > 0.0 { n as f64 / s } else { 0.0 };
        self.prefill_s = timing.prefill.as_secs_f64();
        self.ttft_s = timing.first_token.as_secs_f64();
        self.decode_s = timing.decode.as_secs_f64();
        self.decode_steps_s = timing.steps.iter().map(|s| s.as_secs_f64()).collect();
        self.prefill_tok_s = rate(self.prompt_tokens, self.prefill_s);
        self.decode_tok_s = rate(timing.steps.len(), self.decode_s);
    }

    /// Formats the ledger as text, one row per line.
    pub fn render(&self) -> String {
        let kv = &self.kv;
        let mut rows: Vec<(&str, String)> = vec![("model", self.model.place())];
        match &self.plan {
            None => rows.push(("attention", "stock".into())),
            Some(p) => {
                let (s, full) = (&p.settings, p.model_layers);
                let kind = match (s.recall, kv.host_bytes) {
                    (0, _) => "butterfly",
                    (_, 0) => "exact recall (dense: this context needs no more)",
                    _ => "exact recall",
                };
                let what = format!("{kind} in layers {} of {full}", ranges(&p.layers));
                rows.push(("attention", what));
                let far = match s.recall {
                    0 => format!("{} x{}, {}", s.partner, s.partner_count, name_of(&s.pool)),
                    k => format!("{k} tokens fetched by {}, rest by {}", s.key_code, name_of(&s.rest)),
                };
                let window = match s.window_align {
                    WindowAlign::Block => format!("window {} in blocks of {}", s.window, s.block),
                    WindowAlign::Token => format!("window {}", s.window),
                };
                rows.push(("", format!("{window}, {} sinks, {far}", s.sink_tokens)));
            }
        }
        rows.push(("weights", bytes_by_type(self.weights_bytes, &self.held)));
        if self.plan.is_some() {
            rows.push(("local ring", human_bytes(kv.local_bytes)));
            rows.push(("sinks", human_bytes(kv.sink_bytes)));
            match kv.host_bytes {
                0 => rows.push(("summaries", human_bytes(kv.summary_bytes))),
                _ => {
                    rows.push(("key codes", human_bytes(kv.key_code_bytes)));
                    rows.push(("values", human_bytes(kv.value_bytes)));
                    rows.push(("tables", human_bytes(kv.table_bytes)));
                }
            }
        }
        rows.push((
            "KV cache",
            format!(
                "{} allocated for {} tokens, {} used",
                human_bytes(kv.total_bytes),
                self.ctx,
                human_bytes(kv.used_bytes)
            ),
        ));
        rows.push(("dense KV", format!("{} for the stock model, ratio {:.4}", human_bytes(kv.dense_bytes), kv.ratio)));
        if kv.recurrent_bytes > 0 {
            rows.push(("recurrent", format!("{} of states of recurrent layers", human_bytes(kv.recurrent_bytes))));
        }
        if kv.host_bytes > 0 {
            rows.push(("host KV", format!("{} of exact keys and values", human_bytes(kv.host_bytes))));
        }
        if let Some(fetched) = &self.fetched {
            let (bytes, share) = (human_bytes(fetched.bytes_per_step as u64), 100.0 * fetched.repeated);
            rows.push(("fetched", format!("{bytes} per token, {share:.0}% of the rows as in the step before")));
        }
        if let Some(reach) = self.reach {
            rows.push(("reach", format!("{:.0}% of earlier blocks, through the swapped layers", 100.0 * reach)));
        }
        if let Some(peak) = self.peak_device_bytes {
            rows.push(("GPU memory", format!("{} peak", human_bytes(peak))));
        }
        if let Some(peak) = self.peak_memory_bytes {
            rows.push(("peak memory", human_bytes(peak)));
        }
        rows.push(("prefill", format!("{} tokens, {:.1} tokens/s", self.prompt_tokens, self.prefill_tok_s)));
        rows.push(("decode", format!("{} tokens, {:.1} tokens/s", self.generated_tokens, self.decode_tok_s)));
        rows.iter().map(|(name, value)| format!("{name:>12}  {value}\n")).collect()
    }
}

/// Returns a setting's value as plans and flags spell it.
fn name_of(setting: &impl Serialize) -> String {
    serde_json::to_value(setting).ok().and_then(|v| v.as_str().map(String::from)).unwrap_or_default()
}

/// Returns the peak resident memory of this process in bytes; `None` where the system does not report it.
pub fn peak_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}
