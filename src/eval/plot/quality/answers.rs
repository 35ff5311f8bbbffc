//! The figures of an answers file.

use super::cells::Cells;
use super::{bytes, needle, tasks};
use crate::error::{Error, Result};
use crate::eval::plot::Figure;
use crate::eval::report::{Answers, Cell};
use std::collections::BTreeSet;
use std::path::Path;

/// Draws every figure of the answers read from `path`: needle grids, and tasks with their scores and bytes.
///
/// # Errors
/// A file without answers, or an inconsistent one.
pub fn figures(answers: &Answers, path: &Path) -> Result<Vec<Figure>> {
    let fail = |message: String| Err(Error::format(path.display(), message));
    let all: Vec<&Cell> = answers.cells.iter().filter(|c| !c.answers.is_empty()).collect();
    if all.is_empty() {
        return fail("holds no answers".into());
    }
    let mut seen = BTreeSet::new();
    for cell in &all {
        let what = format!("{} of {} at length {}", cell.task, cell.record.variant, cell.length);
        if cell.length == 0 {
            return fail(format!("has {what}; a length is at least 1"));
        }
        if !seen.insert((&cell.task, &cell.record.variant, cell.length)) {
            return fail(format!("has {what} twice"));
        }
        if let Some(answer) = cell.answers.iter().find(|a| !(0.0..=1.0).contains(&a.score)) {
            return fail(format!("{what} has a score of {}, which is not between 0 and 1", answer.score));
        }
        if let Some(depth) = cell.answers.iter().filter_map(|a| a.depth).find(|d| !(0.0..=1.0).contains(d)) {
            return fail(format!("{what} has a needle at depth {depth}, which is not between 0 and 1"));
        }
    }
    let (needles, others): (Vec<&Cell>, Vec<&Cell>) =
        all.into_iter().partition(|c| c.answers.iter().all(|a| a.depth.is_some()));
    let mut figures = vec![];
    if !needles.is_empty() {
        figures.extend(needle::figures(&Cells { answers, cells: needles }));
    }
    if !others.is_empty() {
        let cells = Cells { answers, cells: others };
        figures.push(tasks::figure(&cells));
        figures.extend(bytes::figure(&cells));
    }
    Ok(figures)
}
