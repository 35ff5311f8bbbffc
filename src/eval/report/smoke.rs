//! Smoke test: next-token distributions and greedy text of variants against stock, on the same tokens.

use super::header::Header;
use super::variant::VariantRecord;
use serde::{Deserialize, Serialize};

/// `kind` of a smoke test.
pub const SMOKE: &str = "bfly-smoke";

/// Results of a smoke test: variants against stock on real text.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Smoke {
    /// Header of kind [`SMOKE`].
    #[serde(flatten)]
    pub header: Header,
    /// Number of positions at the end of each text at which distributions are compared; 0 where those of answers are.
    pub positions: usize,
    /// Greedy new tokens after each text.
    pub greedy_tokens: usize,
    /// Tasks over whose answers distributions are compared, instead of texts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answers: Option<AnswerSettings>,
    /// Number of likeliest tokens whose overlap is counted.
    pub top: usize,
    /// Prefill chunk in tokens.
    pub prefill_chunk: usize,
    /// One entry per variant and context.
    pub runs: Vec<SmokeRun>,
}

/// Samples over whose answers by the stock model distributions are compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AnswerSettings {
    /// Tasks by name.
    pub tasks: Vec<String>,
    /// Samples per task.
    pub samples: usize,
    /// Seed of the samples.
    pub seed: u64,
    /// Whether prompts are rendered with the chat template.
    pub chat: bool,
}

/// One variant at one context.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SmokeRun {
    /// Variant and its cache.
    #[serde(flatten)]
    pub record: VariantRecord,
    /// Positions that the cache is provisioned for: those of the text and the new tokens.
    pub ctx: usize,
    /// One entry per document.
    pub documents: Vec<DocumentScore>,
}

/// A variant against stock on one text.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct DocumentScore {
    /// File name of the document.
    pub document: String,
    /// Token offset of the text in the document.
    pub offset: usize,
    /// Hash of the text's ids.
    pub sha256: String,
    /// Mean KL(stock ‖ variant) over the positions, in nats.
    pub kl: f64,
    /// Mean KL(variant ‖ stock) over the positions, in nats.
    pub kl_reverse: f64,
    /// Share of positions at which both have the same likeliest token.
    pub top1: f64,
    /// Mean number of tokens among the `top` likeliest of both.
    pub overlap: f64,
    /// Mean loss of stock on the next token, in nats.
    pub stock_loss: f64,
    /// Mean loss of the variant on the next token, in nats.
    pub loss: f64,
    /// Number of greedy tokens before the first that differs from stock's.
    pub greedy_prefix: usize,
    /// Whether all greedy tokens equal stock's.
    pub greedy_equal: bool,
}

/// A metric of a document's score.
pub type DocumentMetric = fn(&DocumentScore) -> f64;

/// Metrics that gates accept and tables show: name, function and decimals.
pub const METRICS: &[(&str, DocumentMetric, usize)] = &[
    ("kl", |d| d.kl, 4),
    ("kl-reverse", |d| d.kl_reverse, 4),
    ("top1", |d| d.top1, 3),
    ("overlap", |d| d.overlap, 1),
    ("loss", |d| d.loss, 3),
    ("loss-added", |d| d.loss - d.stock_loss, 4),
    ("greedy", |d| d.greedy_prefix as f64, 1),
    ("greedy-equal", |d| f64::from(u8::from(d.greedy_equal)), 2),
];

#[cfg(test)]
impl Smoke {
    /// Returns a smoke test without runs.
    pub(crate) fn test() -> Self {
        let header = Header { name: "test".into(), ..Header::new(SMOKE, &candle_core::Device::Cpu) };
        Self { header, positions: 256, greedy_tokens: 64, answers: None, top: 50, prefill_chunk: 4096, runs: vec![] }
    }
}
