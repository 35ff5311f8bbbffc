//! Layer studies: the sensitivity of the model to swapping each layer, and the scores with the most sensitive layers
//! kept dense.

use super::eval_set::{EvalSetRecord, Score};
use super::header::Header;
use crate::stats::Estimate;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// `kind` of a layer study.
pub const LAYERS: &str = "bfly-layers";

/// Metric of a layer's sensitivity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum RankBy {
    /// Loss on expected answers that swapping the layer adds.
    Answers,
    /// KL from stock on text with the layer swapped: after prefill, or in decode steps under exact recall.
    Text,
}

/// Method by which layers are ranked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum RankMethod {
    /// By swapping each layer alone, with all others dense. Layers that can compensate for each other rank low.
    #[default] // For files written before there was a choice.
    Alone,
    /// By backward elimination: each round swaps the least sensitive quarter of the remaining layers, about three times
    /// the work of alone.
    Rounds,
    /// By each layer's best retrieval head; layers without one by swapping them alone.
    Heads,
}

/// Results of a layer study.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LayerStudy {
    /// Header of kind [`LAYERS`].
    #[serde(flatten)]
    pub header: Header,
    /// Evaluation set.
    pub probed: EvalSetRecord,
    /// Metric of sensitivity.
    pub rank_by: RankBy,
    /// Ranking method.
    #[serde(default)]
    pub rank: RankMethod,
    /// Score of the stock model.
    pub stock: Score,
    /// Retrieval heads, best first; empty where the evaluation set has no tasks.
    #[serde(default)]
    pub heads: Vec<RetrievalHead>,
    /// Number of answer tokens at which heads were observed.
    #[serde(default)]
    pub head_steps: usize,
    /// Scores with a single layer swapped, in order of layers.
    pub single: Vec<LayerScore>,
    /// Elimination rounds after `single`, with [`RankMethod::Rounds`]; their scores hold only answers or only texts,
    /// according to `rank_by`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rounds: Vec<EliminationRound>,
    /// All layers, most sensitive first.
    pub order: Vec<usize>,
    /// Scores with the first layers of `order` kept dense and the others swapped.
    pub curve: Vec<CurvePoint>,
    /// Scores that the other fields do not hold: all scores of an unfinished study, or those left from another ranking
    /// method.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub judged: Vec<Score>,
}

/// A retrieval head: an attention head that copies the answer from the context.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetrievalHead {
    /// Layer of the head.
    pub layer: usize,
    /// Index of the head among the layer's query heads.
    pub head: usize,
    /// Share of answer tokens at which the head attends most to the context's copy of the next token.
    pub score: f64,
}

/// Score with one layer swapped in addition to a given set of swapped layers, which may be empty.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerScore {
    /// Index of the layer.
    pub layer: usize,
    /// Score of the model with this layer swapped too.
    pub score: Score,
}

/// A round of backward elimination after the first, which is [`LayerStudy::single`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EliminationRound {
    /// Layers swapped in earlier rounds, rising.
    pub swapped: Vec<usize>,
    /// Scores of each remaining layer swapped in addition to them.
    pub tried: Vec<LayerScore>,
}

/// Score with some layers kept dense.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// Layers kept dense, rising.
    pub dense: Vec<usize>,
    /// Score of the model with all others swapped.
    pub score: Score,
}

/// Returns the degradation of `score` against `stock`: loss added on answers, or KL on text, in nats.
pub fn sensitivity(score: &Score, stock: &Score, by: RankBy) -> Option<Estimate> {
    match by {
        RankBy::Answers => Estimate::of_differences(&score.answer_losses(), &stock.answer_losses()),
        RankBy::Text => Estimate::of(&score.texts(|t| t.kl)),
    }
}

/// Returns the layers in order of falling `sensitivity`; equals keep the order of layers.
pub fn by_sensitivity(singles: &[LayerScore], sensitivity: impl Fn(&LayerScore) -> f64) -> Vec<usize> {
    let mut layers: Vec<(f64, usize)> = singles.iter().map(|s| (sensitivity(s), s.layer)).collect();
    layers.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    layers.into_iter().map(|(_, layer)| layer).collect()
}

impl LayerStudy {
    /// Creates a study that has scored nothing but stock.
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

    /// Returns every score with layers swapped.
    pub fn scores(&self) -> impl Iterator<Item = &Score> {
        let single = self.single.iter().chain(self.rounds.iter().flat_map(|r| &r.tried)).map(|s| &s.score);
        single.chain(self.curve.iter().map(|k| &k.score)).chain(&self.judged)
    }

    /// Returns the mean degradation of `single` by this study's metric, in nats.
    pub fn sensitivity_of(&self, single: &LayerScore) -> f64 {
        sensitivity(&single.score, &self.stock, self.rank_by).map_or(0.0, |e| e.mean)
    }
}
