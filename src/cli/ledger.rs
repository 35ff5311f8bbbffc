//! The memory ledger: what a run held, what the stock model would have, and how fast it went. Printed and written as JSON.

use super::{human_bytes, progress::held};
use crate::cache::Cache;
use crate::checkpoint::Identity;
use crate::generate::Timing;
use crate::retrofit::{ranges, RetrofitPlan};
use crate::spec::ModelSpec;
use serde::Serialize;
use std::collections::BTreeMap;

/// KV bytes, allocated unless said otherwise.
#[derive(Debug, Clone, Serialize)]
pub struct KvBytes {
    /// Raw positions.
    pub local_bytes: u64,
    /// Summaries and running sums.
    pub summary_bytes: u64,
    /// Sinks.
    pub sink_bytes: u64,
    /// All of them.
    pub total_bytes: u64,
    /// Of them, in use at the end.
    pub used_bytes: u64,
    /// What the stock model allocates for the same context.
    pub dense_bytes: u64,
    /// `total_bytes / dense_bytes`.
    pub ratio: f64,
}

impl KvBytes {
    /// Reads a cache.
    pub fn of(cache: &Cache) -> Self {
        let bytes = cache.capacity_bytes();
        Self {
            local_bytes: bytes.local,
            summary_bytes: bytes.summary,
            sink_bytes: bytes.sink,
            total_bytes: bytes.total(),
            used_bytes: cache.used_bytes().total(),
            dense_bytes: cache.dense_bytes(),
            ratio: bytes.total() as f64 / cache.dense_bytes() as f64,
        }
    }
}

/// A run's report: the ledger's figures and everything needed to repeat the run.
#[derive(Debug, Clone, Serialize)]
pub struct Ledger {
    /// `retrofit`, in every file of this form.
    pub kind: &'static str,
    /// Version of this form.
    pub schema_version: u32,
    /// Commit of the build.
    pub git_sha: &'static str,
    /// The checkpoint.
    pub model: Identity,
    /// What the model was built from.
    pub spec: ModelSpec,
    /// The plan; null for a stock run.
    pub plan: Option<RetrofitPlan>,
    /// Positions provisioned.
    pub ctx: usize,
    /// Where it ran.
    pub device: String,
    /// The request.
    pub dtype: String,
    /// Bytes of matrices by the type they were held in.
    pub held: BTreeMap<String, u64>,
    /// Threads.
    pub threads: usize,
    /// Tokens to a prefill chunk.
    pub prefill_chunk: usize,
    /// Tokens read.
    pub prompt_tokens: usize,
    /// Tokens written.
    pub generated_tokens: usize,
    /// Seconds from prompt to logits.
    pub prefill_s: f64,
    /// Seconds from prompt to first token.
    pub ttft_s: f64,
    /// Seconds for the tokens after the first.
    pub decode_s: f64,
    /// Prompt tokens per second.
    pub prefill_tok_s: f64,
    /// Tokens after the first per second.
    pub decode_tok_s: f64,
    /// Seconds of each decode step.
    pub decode_steps_s: Vec<f64>,
    /// Peak resident memory of the process; null where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
    /// Peak allocation on the GPU; null on a CPU.
    pub peak_device_bytes: Option<u64>,
    /// Weights as held.
    pub weights_bytes: u64,
    /// The cache.
    pub kv: KvBytes,
    /// Share of the earlier blocks that reach the last one through the swapped layers; null for a stock run.
    pub reach: Option<f64>,
    /// The generated text; null where only ids were given.
    pub text: Option<String>,
    /// The generated ids.
    pub token_ids: Vec<u32>,
}

/// What tells reports from other JSON.
pub const LEDGER_KIND: &str = "retrofit";
/// The form that this build writes.
pub const LEDGER_VERSION: u32 = 2;

impl Ledger {
    /// Fills in what a generation took.
    pub fn time(&mut self, timing: &Timing) {
        let rate = |n: usize, s: f64| if s > 0.0 { n as f64 / s } else { 0.0 };
        self.prefill_s = timing.prefill.as_secs_f64();
        self.ttft_s = timing.first_token.as_secs_f64();
        self.decode_s = timing.decode.as_secs_f64();
        self.decode_steps_s = timing.steps.iter().map(|s| s.as_secs_f64()).collect();
        self.prefill_tok_s = rate(self.prompt_tokens, self.prefill_s);
        self.decode_tok_s = rate(timing.steps.len(), self.decode_s);
    }

    /// The ledger as people read it.
    pub fn render(&self) -> String {
        let kv = &self.kv;
        let mut rows: Vec<(&str, String)> = vec![("model", self.model.place())];
        match &self.plan {
            None => rows.push(("attention", "stock".into())),
            Some(p) => {
                let (s, full) = (&p.settings, p.model_layers);
                let what = format!("butterfly in layers {} of {full}", ranges(&p.layers));
                rows.push(("attention", what));
                let far = format!("{} x{}, {}", s.partner, s.partner_count, name_of(&s.pool));
                rows.push((
                    "",
                    format!("window {} in blocks of {}, {} sinks, {far}", s.window, s.block, s.sink_tokens),
                ));
            }
        }
        rows.push(("weights", held(self.weights_bytes, &self.held)));
        if self.plan.is_some() {
            rows.push(("local ring", human_bytes(kv.local_bytes)));
            rows.push(("sinks", human_bytes(kv.sink_bytes)));
            rows.push(("summaries", human_bytes(kv.summary_bytes)));
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
        rows.push((
            "dense KV",
            format!("{} would have been allocated: ratio {:.4}", human_bytes(kv.dense_bytes), kv.ratio),
        ));
        if let Some(reach) = self.reach {
            rows.push(("reach", format!("{:.0}% of earlier blocks through the swapped layers", 100.0 * reach)));
        }
        if let Some(peak) = self.peak_device_bytes {
            rows.push(("GPU memory", format!("{} at the peak", human_bytes(peak))));
        }
        if let Some(peak) = self.peak_memory_bytes {
            rows.push(("peak memory", human_bytes(peak)));
        }
        rows.push(("prefill", format!("{} tokens, {:.1} tokens/s", self.prompt_tokens, self.prefill_tok_s)));
        rows.push(("decode", format!("{} tokens, {:.1} tokens/s", self.generated_tokens, self.decode_tok_s)));
        rows.iter().map(|(name, value)| format!("{name:>12}  {value}\n")).collect()
    }
}

/// The name that a plan, and the flag, has for a setting.
fn name_of(setting: &impl Serialize) -> String {
    serde_json::to_value(setting).ok().and_then(|v| v.as_str().map(String::from)).unwrap_or_default()
}

/// Peak resident memory of this process, where the system tells.
pub fn peak_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find(|l| l.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}
