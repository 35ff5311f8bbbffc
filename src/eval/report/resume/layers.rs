//! A study of layers: its scores are those of layers swapped together, whatever ranking asked for them, and are taken
//! over.

use super::{another, header_difference, show};
use crate::error::Result;
use crate::eval::report::{read, EvalSetRecord, Header, LayerStudy, Score, LAYERS};
use std::path::Path;

/// The study at `path`, if there is one; how it ranked layers does not matter.
///
/// # Errors
/// A file that is no study; one of another model, machine or build, or on another evaluation set: what differs.
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
    /// Goes on from `study`, which lies at `path`, and returns everything that it scored.
    ///
    /// # Errors
    /// A study in which stock has another score, as it has on other texts.
    pub fn take_up(&mut self, study: Self, path: &Path) -> Result<Vec<Score>> {
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
