//! Ablations: one setting changed at a time from a base, everything else equal.

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
    /// The partner rule, at the same allocated bytes.
    Partner,
    /// The exact window.
    Window,
    /// The number of attention sinks.
    Sinks,
    /// The block size, at the same window.
    Block,
    /// How keys are pooled, and at what distance summaries are scored.
    Pool,
    /// β, the bias on a summary's logit.
    Bias,
    /// The number of stages read at once.
    Count,
}

impl AblationAxis {
    /// Its name in tables and flags.
    pub fn name(self) -> &'static str {
        match self {
            Self::Partner => "partner",
            Self::Window => "window",
            Self::Sinks => "sinks",
            Self::Block => "block",
            Self::Pool => "pool",
            Self::Bias => "bias",
            Self::Count => "count",
        }
    }
}

/// What an ablation found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ablation {
    /// Header of kind [`ABLATION`].
    #[serde(flatten)]
    pub header: Header,
    /// Evaluation set that was read.
    pub probed: EvalSetRecord,
    /// Score of the stock model.
    pub stock: Score,
    /// Score of the retrofit that everything is changed from.
    pub base: Score,
    /// Summaries that a measured query of the base reads in a swapped layer, as a mean; null in files of earlier
    /// builds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_summaries_per_query: Option<f64>,
    /// One entry per changed setting and value.
    pub changes: Vec<AblationChange>,
}

/// One change from the base.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AblationChange {
    /// Setting that is changed.
    pub axis: AblationAxis,
    /// Value that it is changed to.
    pub value: String,
    /// Summaries that a measured query reads in a swapped layer, as a mean.
    pub summaries_per_query: f64,
    /// Name of the variant that reads the same at the measured positions, in which case nothing was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same_as: Option<String>,
    /// Score of the changed retrofit; null where it was not measured.
    pub score: Option<Score>,
}
