//! Resuming a layer study: a score depends on the set of swapped layers alone, so scores of an earlier study are reused
//! under any ranking method.

use super::{another, header_difference, show};
use crate::error::Result;
use crate::eval::report::{read, EvalSetRecord, Header, LayerStudy, Score, LAYERS};
use std::path::Path;

/// Reads the study at `path`, if there is one, with any ranking method.
///
/// # Errors
/// A file that is not a layer study, or a study of another model, machine, build or evaluation set, with the
/// difference.
pub fn earlier_layers(path: &Path, header: &Header, probed: &EvalSetRecord) -> Result<Option<LayerStudy>> {
    if !path.exists() {
        return Ok(None);
    }
    let study: LayerStudy = read(path, LAYERS)?;
    let eval_set = || (study.probed != *probed).then(|| ("evaluation set", show(&study.probed), show(probed)));
    match header_difference(&study.header, header).or_else(eval_set) {
        Some(differs) => Err(another(path, differs)),
        None => Ok(Some(study)),
    }
}

impl LayerStudy {
    /// Resumes `study`, read from `path`, and returns all of its scores.
    ///
    /// # Errors
    /// A study in which stock has another score, which means other texts or questions.
    pub fn take_up(&mut self, study: Self, path: &Path) -> Result<Vec<Score>> {
        if study.stock != self.stock {
            let show = |s: &Score| {
                let loss: f64 = s.answer_losses().into_iter().chain(s.texts(|t| t.loss)).sum();
                format!("{} texts and {} answers with a total loss of {loss} nats", s.texts.len(), s.answers.len())
            };
            return Err(another(path, ("score of stock", show(&study.stock), show(&self.stock))));
        }
        let known = study.scores().cloned().collect();
        let begun = std::mem::replace(&mut self.header.started, study.header.started);
        self.header.resumed = [study.header.resumed, vec![begun]].concat();
        Ok(known)
    }
}
