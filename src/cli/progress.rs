//! Progress bars on stderr.

use super::{human_bytes, note};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::sync::Mutex;

/// A progress bar for one stage at a time, and messages printed above it.
pub struct Bars {
    quiet: bool,
    silent: bool,
    bar: Mutex<Option<(String, ProgressBar)>>,
}

impl Bars {
    /// Returns a progress bar that is hidden if `quiet`, or if stderr is not a terminal.
    pub fn new(quiet: bool) -> Self {
        Self { quiet, silent: false, bar: Mutex::new(None) }
    }

    /// Returns a progress bar that shows nothing and prints not even warnings, for processes beside one that does.
    pub fn silent() -> Self {
        Self { quiet: true, silent: true, bar: Mutex::new(None) }
    }

    /// Shows `done` of `total` units of `stage`; the bar disappears when `done` reaches `total`.
    pub fn show(&self, stage: &str, done: u64, total: u64) {
        self.show_with(stage, done, total, "");
    }

    /// [`Self::show`] with a `message` beside the bar of `steps`.
    pub fn show_with(&self, stage: &str, done: u64, total: u64, message: &str) {
        let Ok(mut bar) = self.bar.lock() else { return };
        if self.quiet || total == 0 {
            return;
        }
        if bar.as_ref().is_none_or(|(name, _)| name != stage) {
            let template = match stage {
                "download" | "hash" => "{prefix:>9} {wide_bar} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta} left",
                "load" | "codewords" => "{prefix:>9} {wide_bar} {pos}/{len} layers {eta} left",
                "kernel" => "{prefix:>9} {wide_bar} {pos}/{len} cases {eta} left",
                "steps" => "{prefix:>9} {bar:20} {pos}/{len} {wide_msg} {eta} left",
                "documents" => "{prefix:>9} {wide_bar} {pos}/{len} {eta} left",
                "samples" => "{prefix:>9} {wide_bar} {pos}/{len} sets {eta} left",
                _ => "{prefix:>9} {wide_bar} {pos}/{len} tokens {per_sec} {eta} left",
            };
            let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
            let new = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr()).with_style(style);
            new.set_prefix(stage.to_string());
            *bar = Some((stage.into(), new));
        }
        if let Some((_, b)) = bar.as_ref() {
            b.set_length(total);
            b.set_message(message.to_string());
            b.set_position(done);
            if done >= total {
                b.finish_and_clear();
            }
        }
    }

    /// Prints a line to stderr, unless quiet.
    pub fn say(&self, line: &str) {
        if !self.quiet {
            self.print(line);
        }
    }

    /// Prints a warning to stderr, also when quiet.
    pub fn warn(&self, line: &str) {
        if !self.silent {
            self.print(&format!("warning: {line}"));
        }
    }

    /// Prints a line to stderr, above the bar if one is shown.
    fn print(&self, line: &str) {
        match self.bar.lock().ok().as_ref().and_then(|bar| bar.as_ref()) {
            Some((_, bar)) => bar.suspend(|| note(line)),
            None => note(line),
        }
    }
}

/// Formats a total and its parts by weight type: `541.1 MiB (f32 540.0 MiB, q8_0 1.1 MiB)`.
pub(super) fn bytes_by_type(total: u64, by_type: &std::collections::BTreeMap<String, u64>) -> String {
    let parts: Vec<_> = by_type.iter().map(|(t, b)| format!("{t} {}", human_bytes(*b))).collect();
    format!("{} ({})", human_bytes(total), parts.join(", "))
}
