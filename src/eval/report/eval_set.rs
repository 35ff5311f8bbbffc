//! What layers and settings are judged by: distributions on text, in prefill and in decode, and the loss on expected
//! answers.

use super::variant::VariantRecord;
use serde::{Deserialize, Serialize};

/// The evaluation set that was read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalSetRecord {
    /// Tokens of texts and of questions; also the positions provisioned.
    pub ctx: usize,
    /// Last positions of each text that were compared after prefill.
    pub positions: usize,
    /// Positions after them that were read one by one, as decode does.
    pub decode: usize,
    /// Tasks whose expected answers were judged.
    pub tasks: Vec<String>,
    /// Samples of each task.
    pub samples: usize,
    /// Seed of the samples.
    pub seed: u64,
    /// Whether questions were rendered with the model's chat template.
    pub chat: bool,
}

/// What a variant is worth on the evaluation set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Variant and its cache.
    #[serde(flatten)]
    pub record: VariantRecord,
    /// One entry per text.
    pub texts: Vec<TextScore>,
    /// One entry per question.
    pub answers: Vec<AnswerScore>,
}

/// A variant against stock on one text; means over positions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextScore {
    /// File name of the document.
    pub document: String,
    /// KL from stock after prefill, in nats.
    pub kl: f64,
    /// KL from stock in decode, in nats.
    pub decode_kl: f64,
    /// Loss on the next token after prefill, in nats.
    pub loss: f64,
    /// Loss on the next token in decode, in nats.
    pub decode_loss: f64,
    /// Share of all positions with stock's likeliest token.
    pub top1: f64,
}

/// A variant on one question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AnswerScore {
    /// Mean loss on the expected answer's tokens, in nats.
    pub loss: f64,
    /// Whether each of these tokens was the likeliest.
    pub right: bool,
}

impl Score {
    /// The figure `f` of every text.
    pub fn texts(&self, f: impl Fn(&TextScore) -> f64) -> Vec<f64> {
        self.texts.iter().map(f).collect()
    }

    /// The loss on every expected answer, in nats.
    pub fn answer_losses(&self) -> Vec<f64> {
        self.answers.iter().map(|a| a.loss).collect()
    }
}
