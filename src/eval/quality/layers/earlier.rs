//! A study that is begun, or taken up where it was cut off: what an earlier one judged is not judged again.

use super::{Layers, Rank, RankBy, LAYERS};
use crate::error::Result;
use crate::eval::bench::file::{another, header_difference};
use crate::eval::bench::format::{read, Header};
use crate::eval::quality::eval_set::Score;
use crate::eval::quality::eval_set_args::EvalSetRecord;
use std::path::Path;

/// The study at `path`, if there is one. How it ranked layers does not matter: a score is one of layers swapped together, whatever
/// asked for it.
///
/// # Errors
/// A file that is no study; one of another model, machine or build, or of other questions: what differs.
pub(super) fn earlier(path: &Path, header: &Header, probed: &EvalSetRecord) -> Result<Option<Layers>> {
    if !path.exists() {
        return Ok(None);
    }
    let study: Layers = read(path, LAYERS)?;
    let show = |p: &EvalSetRecord| serde_json::to_string(p).unwrap_or_default();
    let asked = || (study.probed != *probed).then(|| ("probe", show(&study.probed), show(probed)));
    match header_difference(&study.header, header).or_else(asked) {
        Some(differs) => Err(another(path, differs)),
        None => Ok(Some(study)),
    }
}

impl Layers {
    /// Of a model on questions, nothing but stock judged yet.
    pub(super) fn begun(header: Header, probed: EvalSetRecord, rank: (RankBy, Rank), stock: Score) -> Self {
        Self {
            header,
            probed,
            rank_by: rank.0,
            rank: rank.1,
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

    /// Goes on from `study`, which lies at `path`: everything that it judged.
    ///
    /// # Errors
    /// Stock did otherwise there, as it does on other texts.
    pub(super) fn take_up(&mut self, study: Self, path: &Path) -> Result<Vec<Score>> {
        if study.stock != self.stock {
            let show = |s: &Score| {
                let loss: f64 = s.answer_losses().into_iter().chain(s.texts(|t| t.loss)).sum();
                format!("{} texts and {} answers at {loss} nats in all", s.texts.len(), s.answers.len())
            };
            return Err(another(path, ("outcome of stock", show(&study.stock), show(&self.stock))));
        }
        let known = study.scores().cloned().collect();
        let begun = std::mem::replace(&mut self.header.started, study.header.started);
        self.header.resumed = [study.header.resumed, vec![begun]].concat();
        Ok(known)
    }
}
