//! Scores on the evaluation set, by which layers and settings are compared: KL and loss on text, after prefill and in
//! decode, and the loss on expected answers.

use super::variant::VariantRecord;
use serde::{Deserialize, Serialize};

/// Evaluation set of a study or an ablation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalSetRecord {
    /// Tokens of each text and of each question; also the positions provisioned.
    pub ctx: usize,
    /// Number of prefilled positions of each text at which distributions were compared, just before the decode
    /// positions.
    pub positions: usize,
    /// Number of positions at the end of each text that were read one by one, in decode steps.
    pub decode: usize,
    /// Tasks whose expected answers were scored by their loss.
    pub tasks: Vec<String>,
    /// Samples of each task.
    pub samples: usize,
    /// Seed of the samples.
    pub seed: u64,
    /// Whether questions were rendered with the model's chat template.
    pub chat: bool,
    /// Whether the prefilled positions were read in decode steps too, by every variant and by stock: prefill under
    /// exact recall is the stock model's, and tells nothing.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stepwise: bool,
}

/// Score of a variant on the evaluation set.
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

/// A variant against stock on one text, as means over positions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TextScore {
    /// File name of the document.
    pub document: String,
    /// KL from stock at the prefilled positions, in nats; read in decode steps under [`EvalSetRecord::stepwise`].
    pub kl: f64,
    /// KL from stock at the decode positions, in nats.
    pub decode_kl: f64,
    /// Loss on the next token at the positions of `kl`, in nats.
    pub loss: f64,
    /// Loss on the next token at the decode positions, in nats.
    pub decode_loss: f64,
    /// Share of all positions at which the likeliest token is stock's.
    pub top1: f64,
}

/// A variant on one question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AnswerScore {
    /// Mean loss on the tokens of the expected answer, in nats.
    pub loss: f64,
    /// Whether each of these tokens was the likeliest at its position.
    pub right: bool,
}

impl Score {
    /// Returns the metric `f` of every text.
    pub fn texts(&self, f: impl Fn(&TextScore) -> f64) -> Vec<f64> {
        self.texts.iter().map(f).collect()
    }

    /// Returns the loss on every expected answer, in nats.
    pub fn answer_losses(&self) -> Vec<f64> {
        self.answers.iter().map(|a| a.loss).collect()
    }
}
