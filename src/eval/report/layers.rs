//! Studies of layers: what swapping each does, and what keeping the most sensitive ones dense gives.

use super::eval_set::{EvalSetRecord, Score};
use super::header::Header;
use super::stats::Estimate;
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
pub enum RankMethod {
    /// On top of nothing: every other layer stays dense. Layers that can stand in for each other all look harmless.
    #[default] // Of files that were written before there was a choice.
    Alone,
    /// On top of the layers that harm least, a quarter of those left at a time: about three times the work of alone.
    Rounds,
    /// By the best retrieval head of each layer, and layers without one by the harm of swapping them alone.
    Heads,
}

/// What a study found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayerStudy {
    /// Header of kind [`LAYERS`].
    #[serde(flatten)]
    pub header: Header,
    /// Evaluation set that was read.
    pub probed: EvalSetRecord,
    /// What makes a layer sensitive in this study.
    pub rank_by: RankBy,
    /// How layers were ranked.
    #[serde(default)]
    pub rank: RankMethod,
    /// Score of the stock model.
    pub stock: Score,
    /// Retrieval heads, the best first; empty where the evaluation set has no tasks.
    #[serde(default)]
    pub heads: Vec<RetrievalHead>,
    /// Answer tokens at which heads were observed.
    #[serde(default)]
    pub head_steps: usize,
    /// Scores with one layer swapped at a time, in order of layers.
    pub single: Vec<LayerScore>,
    /// Rounds after `single`, with [`RankMethod::Rounds`]; their scores hold answers or texts alone, whichever layers
    /// are ranked by.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rounds: Vec<EliminationRound>,
    /// All layers, the most sensitive first.
    pub order: Vec<usize>,
    /// Scores with the first layers of `order` kept dense and the others swapped.
    pub curve: Vec<CurvePoint>,
    /// Scores that stand nowhere else in the file: all of an unfinished study, later those that an earlier ranking
    /// asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub judged: Vec<Score>,
}

/// A retrieval head: it copies the answer out of the text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetrievalHead {
    /// Layer of the head.
    pub layer: usize,
    /// Index among the layer's query heads.
    pub head: usize,
    /// Share of steps at which the head attends most to the token that comes next.
    pub score: f64,
}

/// The score with one layer swapped on top of others, or of none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerScore {
    /// The layer.
    pub layer: usize,
    /// Score of the model with it swapped.
    pub score: Score,
}

/// One round of backward elimination after the first, which is the table of single layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EliminationRound {
    /// Layers that are swapped already, rising.
    pub swapped: Vec<usize>,
    /// Every layer left, swapped on top of them.
    pub tried: Vec<LayerScore>,
}

/// The score with some layers kept dense.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Layers that are kept dense, rising.
    pub dense: Vec<usize>,
    /// Score of the model with all others swapped.
    pub score: Score,
}

/// The harm that `score` shows against `stock`: loss added on answers, or KL on text.
pub fn sensitivity(score: &Score, stock: &Score, by: RankBy) -> Option<Estimate> {
    match by {
        RankBy::Answers => Estimate::of_differences(&score.answer_losses(), &stock.answer_losses()),
        RankBy::Text => Estimate::of(&score.texts(|t| t.kl)),
    }
}

/// Layers in order of falling `sensitivity`; of equals the earlier first.
pub fn by_sensitivity(singles: &[LayerScore], sensitivity: impl Fn(&LayerScore) -> f64) -> Vec<usize> {
    let mut layers: Vec<(f64, usize)> = singles.iter().map(|s| (sensitivity(s), s.layer)).collect();
    layers.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    layers.into_iter().map(|(_, layer)| layer).collect()
}

impl LayerStudy {
    /// A study that has scored nothing but stock yet.
    pub fn begin(header: Header, probed: EvalSetRecord, (rank_by, rank): (RankBy, RankMethod), stock: Score) -> Self {
        Self {
            header,
            probed,
            rank_by,
            rank,
            stock,
            heads: vec![],
            head_steps: 0,
            single: vec![],
            rounds: vec![],
            order: vec![],
            curve: vec![],
            judged: vec![],
        }
    }

    /// Every score with layers swapped.
    pub fn scores(&self) -> impl Iterator<Item = &Score> {
        let single = self.single.iter().chain(self.rounds.iter().flat_map(|r| &r.tried)).map(|s| &s.score);
        single.chain(self.curve.iter().map(|k| &k.score)).chain(&self.judged)
    }

    /// The harm of swapping a layer, as a mean, by what this study ranks layers by.
    pub fn sensitivity_of(&self, single: &LayerScore) -> f64 {
        sensitivity(&single.score, &self.stock, self.rank_by).map_or(0.0, |e| e.mean)
    }
}
