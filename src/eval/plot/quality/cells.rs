//! The cells of an answers file, in the order in which figures show them.

use super::variants;
use crate::eval::report::{Answers, Cell, Estimate, VariantRecord};
use std::collections::BTreeSet;

/// Cells that one figure shows.
pub struct Cells<'a> {
    /// Answers as read from their file.
    pub answers: &'a Answers,
    /// Cells that are shown, each with at least one answer.
    pub cells: Vec<&'a Cell>,
}

impl<'a> Cells<'a> {
    /// Returns the lengths in rising order without duplicates.
    pub fn lengths(&self) -> Vec<usize> {
        self.cells.iter().map(|c| c.length).collect::<BTreeSet<_>>().into_iter().collect()
    }

    /// Returns the tasks in order of first occurrence.
    pub fn tasks(&self) -> Vec<&'a str> {
        let mut found: Vec<&str> = vec![];
        for cell in &self.cells {
            if !found.contains(&cell.task.as_str()) {
                found.push(&cell.task);
            }
        }
        found
    }

    /// Returns the variants with their styles, in order of first occurrence.
    pub fn variants(&self) -> Vec<(&'a str, usize)> {
        variants(self.cells.iter().map(|c| &c.record))
    }

    /// Returns the cells of a variant, at one length or at all lengths.
    pub fn of<'s>(&'s self, variant: &'s str, length: Option<usize>) -> impl Iterator<Item = &'a Cell> + Clone + 's {
        let wanted = move |c: &&Cell| c.record.variant == variant && length.is_none_or(|l| l == c.length);
        self.cells.iter().copied().filter(wanted)
    }

    /// Returns the record of a variant at a length.
    pub fn record(&self, variant: &str, length: usize) -> Option<&'a VariantRecord> {
        self.of(variant, Some(length)).map(|c| &c.record).next()
    }

    /// Returns the score of a variant in a task, in percent.
    pub fn score(&self, variant: &str, task: &str, length: usize) -> Option<Estimate> {
        self.of(variant, Some(length)).find(|c| c.task == task).and_then(Cell::score)
    }

    /// Estimates the mean over all tasks, as [`Self::mean_of`].
    pub fn mean(&self, variant: &str, length: usize) -> Option<Estimate> {
        self.mean_of(&self.tasks(), variant, length)
    }

    /// Estimates the mean over `tasks`, each with the same weight, in percent; `None` where the variant lacks a task,
    /// since means over different tasks are not comparable.
    pub fn mean_of(&self, tasks: &[&str], variant: &str, length: usize) -> Option<Estimate> {
        let scores = |task: &&str| -> Option<Vec<f64>> {
            self.of(variant, Some(length)).find(|c| c.task == *task).map(Cell::independent)
        };
        Estimate::of_groups(&tasks.iter().map(scores).collect::<Option<Vec<_>>>()?)
    }

    /// Formats a line with the number of samples and the prompt settings.
    pub fn prompting_line(&self, per: &str, samples: impl IntoIterator<Item = usize>) -> String {
        let prompting = &self.answers.prompting;
        let mut parts = vec![format!("{} per {per}", super::count(samples, "sample"))];
        if prompting.chat {
            parts.push("put in the chat template".into());
        }
        let evicts = self.cells.iter().any(|c| c.record.eviction.is_some());
        parts.extend(evicts.then(|| match prompting.question_unseen {
            true => "methods that evict did so before the question was read".into(),
            false => "methods that evict had read the question".into(),
        }));
        parts.join("; ")
    }
}
