//! Ablations: one setting of a base retrofit changed at a time, everything else equal.

use super::eval_set::{EvalSetRecord, Score};
use super::header::Header;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// `kind` of an ablation.
pub const ABLATION: &str = "bfly-ablation";

/// A setting that an ablation changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum AblationAxis {
    /// Partner rule, at the same allocated bytes.
    Partner,
    /// Size of the exact window.
    Window,
    /// Number of attention sinks.
    Sinks,
    /// Block size, at the same window.
    Block,
    /// Pooling of keys before or after RoPE, and the position of summaries.
    Pool,
    /// Bias β on a summary's logit.
    Bias,
    /// Number of stages read per layer.
    Count,
    /// Tokens that exact recall fetches per decode step and KV head.
    Recall,
    /// Key code that exact recall chooses tokens by.
    Code,
    /// Estimate of the values of tokens that exact recall does not fetch.
    Rest,
    /// What codes of exact recall decode to.
    Fit,
}

impl AblationAxis {
    /// Returns the name of the setting in tables and flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::Partner => "partner",
            Self::Window => "window",
            Self::Sinks => "sinks",
            Self::Block => "block",
            Self::Pool => "pool",
            Self::Bias => "bias",
            Self::Count => "count",
            Self::Recall => "recall",
            Self::Code => "code",
            Self::Rest => "rest",
            Self::Fit => "fit",
        }
    }

    /// Returns the settings that have an effect on a base, with or without exact recall.
    pub fn of_base(recalls: bool) -> &'static [Self] {
        match recalls {
            true => &[Self::Recall, Self::Code, Self::Rest, Self::Fit, Self::Window, Self::Sinks, Self::Block],
            false => &[Self::Partner, Self::Window, Self::Sinks, Self::Block, Self::Pool, Self::Bias, Self::Count],
        }
    }
}

/// Results of an ablation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ablation {
    /// Header of kind [`ABLATION`].
    #[serde(flatten)]
    pub header: Header,
    /// Evaluation set.
    pub probed: EvalSetRecord,
    /// Score of the stock model.
    pub stock: Score,
    /// Score of the base retrofit.
    pub base: Score,
    /// Mean number of summaries that a measured query of the base reads per swapped layer; null under exact recall, and
    /// in files of earlier builds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_summaries_per_query: Option<f64>,
    /// One entry per setting and value.
    pub changes: Vec<AblationChange>,
}

impl Ablation {
    /// Returns whether the base has exact recall, whose queries read no summaries.
    pub fn recalls(&self) -> bool {
        self.base.record.plan.as_ref().is_some_and(|plan| plan.settings.recall > 0)
    }
}

/// One setting of the base, changed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AblationChange {
    /// Setting that is changed.
    pub axis: AblationAxis,
    /// New value of the setting.
    pub value: String,
    /// Mean number of summaries that a measured query reads per swapped layer; 0 under exact recall.
    pub summaries_per_query: f64,
    /// Name of the variant whose measured queries read the same tokens and summaries; the change is then not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same_as: Option<String>,
    /// Score of the changed retrofit; null where the change was not measured.
    pub score: Option<Score>,
}
