//! Title, legend and notes that the figures of a ladder share.

use super::series::{Line, SortedRuns};
use crate::cli::short_count;
use crate::eval::plot::page::{trained_key, LegendEntry};
use crate::eval::plot::target::target;
use crate::eval::report::{Ladder, LadderRun};
use std::collections::BTreeSet;

/// A ladder with its sorted runs.
pub struct LadderView<'a> {
    /// Ladder as read from its file.
    pub ladder: &'a Ladder,
    /// Validated runs of the ladder, sorted by context.
    pub runs: SortedRuns<'a>,
}

impl LadderView<'_> {
    /// Returns `title`, with a warning where the weights are random.
    pub fn title(&self, title: &str) -> String {
        match self.ladder.header.random_weights {
            Some(_) => format!("{title} (random weights: speed and memory only)"),
            None => title.into(),
        }
    }

    /// Formats a line with model, types, device and prefill chunk.
    pub fn subtitle(&self) -> String {
        let chunks: BTreeSet<usize> = self.ladder.runs.iter().map(|r| r.prefill_chunk).collect();
        let chunks: Vec<String> = chunks.into_iter().map(short_count).collect();
        format!(
            "{} · prefill chunk {} · {} new tokens",
            target(&self.ladder.header),
            chunks.join(" / "),
            self.ladder.decode_tokens
        )
    }

    /// Returns the legend of a panel with `lines` and the marks `extra`.
    pub fn keys(&self, lines: &[Line], extra: &[LegendEntry]) -> Vec<LegendEntry> {
        let mut keys: Vec<LegendEntry> = lines.iter().map(|l| LegendEntry::Series(l.style, l.label.clone())).collect();
        keys.extend_from_slice(extra);
        if lines.iter().any(|l| !l.missed.is_empty()) {
            keys.push(LegendEntry::Missed("did not fit".into()));
        }
        let longest = self.runs.contexts().last().map_or(0.0, |c| *c as f64);
        keys.extend(trained_key(&self.ladder.header, longest, "speed and memory only"));
        keys
    }

    /// Returns one note about all failed runs and the reasons, grouped by reason; empty where no run failed.
    pub fn missed(&self) -> Vec<String> {
        let why = |r: &LadderRun| -> String { r.status.lines().next().unwrap_or_default().chars().take(80).collect() };
        let mut groups: Vec<(String, String, Vec<String>)> = vec![];
        for (engine, variant) in &self.runs.names {
            for run in self.runs.runs_of(engine, variant).filter(|r| !r.ran()) {
                let (name, why) = (format!("{engine} {variant}"), why(run));
                match groups.iter_mut().find(|g| g.0 == name && g.1 == why) {
                    Some(group) => group.2.push(short_count(run.ctx)),
                    None => groups.push((name, why, vec![short_count(run.ctx)])),
                }
            }
        }
        for (engine, variant) in self.runs.names.iter().filter(|(e, v)| self.runs.given_up(e, v)) {
            if let Some(group) = groups.iter_mut().rfind(|g| g.0 == format!("{engine} {variant}")) {
                group.1.push_str("; not tried beyond");
            }
        }
        let all: Vec<String> =
            groups.iter().map(|(name, why, at)| format!("{name} at {} ({})", at.join(", "), why.trim())).collect();
        match all.is_empty() {
            true => vec![],
            false => vec![format!("× did not fit: {}.", all.join("; "))],
        }
    }
}
