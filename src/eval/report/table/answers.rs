//! Tables of answers: scores by task, or by the depth of a needle.

use super::{columns, extrapolated};
use crate::cli::short_count;
use crate::eval::report::{means, Answers, Cell, Estimate};
use std::collections::BTreeSet;

/// Returns the lengths of all cells, rising.
fn lengths(answers: &Answers) -> BTreeSet<usize> {
    answers.cells.iter().map(|c| c.length).collect()
}

/// Returns the distinct values of `f` in order of first occurrence.
fn distinct<'a, T: PartialEq>(cells: &[&'a Cell], f: impl Fn(&'a Cell) -> T) -> Vec<T> {
    let mut found = vec![];
    for value in cells.iter().map(|c| f(c)) {
        if !found.contains(&value) {
            found.push(value);
        }
    }
    found
}

/// Renders `answers`: for each length one row per variant, with the mean score of every task in percent and the means
/// over tasks ([`means`]).
pub fn answers_table(answers: &Answers) -> String {
    let mut out = String::new();
    for length in lengths(answers) {
        let cells: Vec<&Cell> = answers.cells.iter().filter(|c| c.length == length).collect();
        let tasks = distinct(&cells, |c| c.task.as_str());
        let mut head = vec![short_count(length), "variant".into(), "KV of dense".into(), "samples".into()];
        head.extend(tasks.iter().map(|t| t.trim_start_matches("niah_").to_string()));
        let means = means(&tasks);
        head.extend(means.iter().map(|(name, _)| name.clone()));
        let mut rows = vec![head];
        for variant in distinct(&cells, |c| c.record.variant.as_str()) {
            let own: Vec<&Cell> = cells.iter().copied().filter(|c| c.record.variant == variant).collect();
            let samples = own.iter().map(|c| c.answers.len());
            let mut row = vec![
                String::new(),
                variant.into(),
                format!("{:.4}x", own[0].record.share_of_dense()),
                samples.clone().sum::<usize>().to_string(),
            ];
            let of = |task: &str| own.iter().find(|c| c.task == task).and_then(|c| c.score());
            row.extend(tasks.iter().map(|t| of(t).map_or("-".into(), |e| format!("{:.1}", e.mean))));
            row.extend(means.iter().map(|(_, of)| mean_score(&own, of).map_or("-".into(), |e| e.show(1))));
            rows.push(row);
        }
        out += &columns(&rows);
    }
    out + "scores in percent; means over tasks with 95% intervals; KV is the peak of the cache's allocated bytes\n"
        + &extrapolated(&answers.header, lengths(answers))
}

/// Estimates the mean over those of `tasks` that `cells` contain, each with the same weight; samples are resampled
/// within their task.
fn mean_score(cells: &[&Cell], tasks: &[&str]) -> Option<Estimate> {
    let of = cells.iter().filter(|c| tasks.contains(&c.task.as_str()));
    let groups: Vec<Vec<f64>> = of.map(|c| c.independent()).collect();
    Estimate::of_groups(&groups)
}

/// Renders `answers` of a depth grid: one row per length and variant, one column per depth.
pub fn grid_table(answers: &Answers) -> String {
    let mut out = String::new();
    for length in lengths(answers) {
        let cells: Vec<&Cell> = answers.cells.iter().filter(|c| c.length == length).collect();
        let mut depths: Vec<f64> = cells.iter().flat_map(|c| c.answers.iter().filter_map(|a| a.depth)).collect();
        depths.sort_by(f64::total_cmp);
        depths.dedup();
        let mut head = vec![short_count(length), "variant".into(), "KV of dense".into()];
        head.extend(depths.iter().map(|d| format!("{:.0}%", 100.0 * d)));
        head.push("mean".into());
        let mut rows = vec![head];
        for cell in &cells {
            let mut row =
                vec![String::new(), cell.record.variant.clone(), format!("{:.4}x", cell.record.share_of_dense())];
            let at = |depth: &f64| {
                let own = cell.answers.iter().filter(|a| a.depth == Some(*depth));
                Estimate::of(&own.map(|a| 100.0 * a.score).collect::<Vec<_>>())
            };
            row.extend(depths.iter().map(|d| at(d).map_or("-".into(), |e| format!("{:.0}", e.mean))));
            row.push(cell.score().map_or("-".into(), |e| e.show(1)));
            rows.push(row);
        }
        out += &columns(&rows);
    }
    out + "scores in percent by depth of the needle (0% is the start of the context); mean over needles with 95% interval\n"
        + &extrapolated(&answers.header, lengths(answers))
}
