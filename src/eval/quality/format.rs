//! The JSON of quality measurements: plain data, every document and every sample kept; means and intervals are made from them
//! wherever they are shown.

use super::metrics::Position;
use crate::eval::bench::format::{Header, Kv};
use crate::eval::variant::Variant;
use crate::eviction::EvictionPlan;
use crate::retrofit::RetrofitPlan;
use serde::{Deserialize, Serialize};

/// `kind` of a smoke test: distributions and greedy text against stock.
pub const SMOKE: &str = "bfly-smoke";

/// What a variant is, and what it holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VariantRecord {
    /// `stock`, `retrofit:KEY=VALUE,..`, or a rule that evicts.
    pub variant: String,
    /// The plan; null for stock and evictions.
    pub plan: Option<RetrofitPlan>,
    /// What a method that evicts keeps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eviction: Option<EvictionPlan>,
    /// The cache as allocated.
    pub kv: Kv,
}

impl VariantRecord {
    /// The most that the cache held at once, prefill included, over what a dense one holds.
    pub fn share_of_dense(&self) -> f64 {
        self.kv.peak_bytes.unwrap_or(self.kv.total_bytes) as f64 / self.kv.dense_bytes as f64
    }

    /// Of a variant with the cache that it allocated.
    pub fn of(variant: &Variant, kv: Kv) -> Self {
        let (plan, eviction) = (variant.method.plan().cloned(), variant.method.eviction().cloned());
        Self { variant: variant.name.clone(), plan, eviction, kv }
    }
}

/// A smoke test: variants against stock, on the same tokens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Smoke {
    /// Of kind [`SMOKE`].
    #[serde(flatten)]
    pub header: Header,
    /// Last positions of each text that distributions are compared at.
    pub positions: usize,
    /// New tokens of greedy text after each.
    pub greedy_tokens: usize,
    /// Tokens whose overlap is counted.
    pub top: usize,
    /// Tokens to a prefill chunk.
    pub prefill_chunk: usize,
    /// One entry per variant and context.
    pub runs: Vec<SmokeRun>,
}

/// One variant at one context.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SmokeRun {
    /// What was run.
    #[serde(flatten)]
    pub record: VariantRecord,
    /// Positions provisioned: the text and the new tokens.
    pub ctx: usize,
    /// One entry per document.
    pub documents: Vec<DocumentScore>,
}

/// A variant against stock on one text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DocumentScore {
    /// The document,
    pub document: String,
    /// where in it the text begins,
    pub offset: usize,
    /// and the hash of its ids.
    pub sha256: String,
    /// Mean KL from stock over the positions, in nats.
    pub kl: f64,
    /// Mean KL to stock.
    pub kl_reverse: f64,
    /// Share of positions with the same likeliest token.
    pub top1: f64,
    /// Mean number of tokens among the likeliest `top` of both.
    pub overlap: f64,
    /// Stock's mean loss on the next token, in nats.
    pub stock_loss: f64,
    /// The variant's.
    pub loss: f64,
    /// Greedy tokens that are stock's, from the first on.
    pub greedy_prefix: usize,
    /// Whether all are.
    pub greedy_equal: bool,
}

impl DocumentScore {
    /// Means over `positions`; the text and the greedy tokens are filled in by the caller.
    pub fn of(positions: &[Position], stock: &[u32], greedy: &[u32]) -> Self {
        let n = positions.len().max(1) as f64;
        let mean = |f: &dyn Fn(&Position) -> f64| positions.iter().map(f).sum::<f64>() / n;
        Self {
            document: String::new(),
            offset: 0,
            sha256: String::new(),
            kl: mean(&|p| p.kl),
            kl_reverse: mean(&|p| p.kl_reverse),
            top1: mean(&|p| f64::from(u8::from(p.top1))),
            overlap: mean(&|p| p.overlap as f64),
            stock_loss: mean(&|p| p.reference_loss),
            loss: mean(&|p| p.loss),
            greedy_prefix: stock.iter().zip(greedy).take_while(|(a, b)| a == b).count(),
            greedy_equal: stock == greedy,
        }
    }
}

#[cfg(test)]
impl VariantRecord {
    pub(super) fn test(variant: &str) -> Self {
        let kv =
            Kv { local_bytes: 1, summary_bytes: 0, sink_bytes: 0, total_bytes: 1, dense_bytes: 2, peak_bytes: None };
        Self { variant: variant.into(), plan: None, eviction: None, kv }
    }
}

#[cfg(test)]
impl Smoke {
    pub(super) fn test() -> Self {
        let path = std::path::Path::new("tests/fixtures/bench/ladder.json");
        let ladder: crate::eval::bench::format::Ladder =
            crate::eval::bench::format::read(path, crate::eval::bench::format::LADDER).expect("a fixture");
        Self {
            header: crate::eval::bench::format::Header { kind: SMOKE.into(), ..ladder.header },
            positions: 256,
            greedy_tokens: 64,
            top: super::metrics::TOP,
            prefill_chunk: 4096,
            runs: vec![],
        }
    }
}
