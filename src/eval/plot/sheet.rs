//! What the figures of a ladder have in common: head, legend, notes.

use super::axis::tokens;
use super::page::Key;
use super::series::{ran, Line, Runs};
use super::target::target;
use super::theme::Ink;
use crate::eval::report::{Ladder, LadderRun};
use std::collections::BTreeSet;

/// A ladder with its runs in order.
pub struct Sheet<'a> {
    /// As read.
    pub ladder: &'a Ladder,
    /// Its runs.
    pub runs: Runs<'a>,
}

impl Sheet<'_> {
    /// `title`, with a warning where the weights are random.
    pub fn title(&self, title: &str) -> String {
        match self.ladder.header.random_weights {
            Some(_) => format!("{title} (random weights: speed and memory only)"),
            None => title.into(),
        }
    }

    /// Model, types, device, chunk.
    pub fn subtitle(&self) -> String {
        let chunks: BTreeSet<usize> = self.ladder.runs.iter().map(|r| r.prefill_chunk).collect();
        let chunks: Vec<String> = chunks.into_iter().map(tokens).collect();
        format!(
            "{} · prefill chunk {} · {} new tokens",
            target(&self.ladder.header),
            chunks.join(" / "),
            self.ladder.decode_tokens
        )
    }

    /// Keys of `lines` and of everything else that a panel with them shows.
    pub fn keys(&self, lines: &[Line], extra: &[Key]) -> Vec<Key> {
        let mut keys: Vec<Key> = lines.iter().map(|l| Key::Series(l.style, l.label.clone())).collect();
        keys.extend_from_slice(extra);
        if lines.iter().any(|l| !l.missed.is_empty()) {
            keys.push(Key::Missed("did not fit".into()));
        }
        let trained = self.ladder.header.trained_positions;
        if self.runs.contexts().iter().any(|c| *c > trained) {
            let text = format!("beyond the trained length ({}): speed and memory only", tokens(trained));
            keys.push(Key::Patch(Ink::Shade, text));
        }
        keys
    }

    /// One line with every run that gave no samples, and why; contexts of one reason together.
    pub fn missed(&self) -> Vec<String> {
        let why = |r: &LadderRun| -> String { r.status.lines().next().unwrap_or_default().chars().take(80).collect() };
        let mut groups: Vec<(String, String, Vec<String>)> = vec![];
        for (engine, variant) in &self.runs.keys {
            for run in self.runs.runs_of(engine, variant).filter(|r| !ran(r)) {
                let (name, why) = (format!("{engine} {variant}"), why(run));
                match groups.iter_mut().find(|g| g.0 == name && g.1 == why) {
                    Some(group) => group.2.push(tokens(run.ctx)),
                    None => groups.push((name, why, vec![tokens(run.ctx)])),
                }
            }
        }
        for (engine, variant) in self.runs.keys.iter().filter(|(e, v)| self.runs.given_up(e, v)) {
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
