//! What a study of layers found, as it is written and read.

use super::rounds::Round;
use crate::eval::bench::format::Header;
use crate::eval::quality::eval_set::Score;
use crate::eval::quality::eval_set_args::EvalSetRecord;
use crate::eval::quality::heads::Head;
use crate::eval::quality::stats::Estimate;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// `kind` of a study of layers.
pub const LAYERS: &str = "bfly-layers";

/// What makes a layer sensitive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum RankBy {
    /// The loss that swapping it adds on expected answers.
    Answers,
    /// The KL from stock that swapping it brings on text, after prefill.
    Text,
}

/// How layers are ranked: what a layer is swapped on top of when its harm is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Rank {
    /// Nothing: every other layer stays as it came. Layers that can stand in for each other all look harmless.
    #[default] // Of files that were written before there was a choice.
    Alone,
    /// What harms least is swapped for good, a quarter of the layers left at a time: about three times the work of alone.
    Rounds,
    /// Not at all: layers rank by the head of theirs that copies answers most, the others after them by what swapping them alone does.
    Heads,
}

/// What was found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Layers {
    /// Of kind [`LAYERS`].
    #[serde(flatten)]
    pub header: Header,
    /// What was read.
    pub probed: EvalSetRecord,
    /// What makes a layer sensitive here,
    pub rank_by: RankBy,
    /// and how layers were ranked.
    #[serde(default)]
    pub rank: Rank,
    /// The model as it came.
    pub stock: Score,
    /// Heads that copy the answer out of the text, the best first; empty where no tasks were asked.
    #[serde(default)]
    pub heads: Vec<Head>,
    /// Tokens of answers that heads were looked at for.
    #[serde(default)]
    pub head_steps: usize,
    /// One layer swapped at a time, in order.
    pub single: Vec<Single>,
    /// The rounds after that, where layers were ranked by rounds: answers alone, or texts, whichever they are ranked by.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rounds: Vec<Round>,
    /// All of them, the most sensitive first.
    pub order: Vec<usize>,
    /// The first of them kept dense, the others swapped.
    pub curve: Vec<CurvePoint>,
    /// Everything judged so far, while the study is not over; then what is not told above, since an earlier ranking asked for it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub judged: Vec<Score>,
}

/// One layer alone swapped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Single {
    /// Which.
    pub layer: usize,
    /// What the model is then worth.
    pub score: Score,
}

/// Some layers kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Which, rising.
    pub dense: Vec<usize>,
    /// What the model is then worth.
    pub score: Score,
}

/// What swapping adds to the loss on answers, or brings as KL on text.
pub fn harm(score: &Score, stock: &Score, by: RankBy) -> Option<Estimate> {
    match by {
        RankBy::Answers => Estimate::of_differences(&score.answer_losses(), &stock.answer_losses()),
        RankBy::Text => Estimate::of(&score.texts(|t| t.kl)),
    }
}

impl Layers {
    /// Everything that is told of swapped layers.
    pub(super) fn scores(&self) -> impl Iterator<Item = &Score> {
        let single = self.single.iter().chain(self.rounds.iter().flat_map(|r| &r.tried)).map(|s| &s.score);
        single.chain(self.curve.iter().map(|k| &k.score)).chain(&self.judged)
    }

    /// What swapping a layer did, by what layers are ranked by here.
    pub(super) fn harm_of(&self, single: &Single) -> f64 {
        harm(&single.score, &self.stock, self.rank_by).map_or(0.0, |e| e.mean)
    }
}
