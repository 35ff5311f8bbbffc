//! The figures of a ladder, one per file.
//!
//! | file | draws |
//! |---|---|
//! | `ratio` | time and memory of a retrofit as ratios to the best stock |
//! | `time`, `memory`, `decode` | time, memory and decode of every engine and variant by context |
//! | `lines` | the panel that these figures share: lines over contexts |
//!
//! `series` turns a ladder into lines, and `view` holds the title, legend and notes that its figures share.

mod decode;
mod lines;
mod memory;
mod ratio;
mod series;
mod time;
mod view;

use super::Figure;
use crate::error::Result;
use crate::eval::report::Ladder;
use series::SortedRuns;
use std::path::Path;
use view::LadderView;

/// Draws every figure of the ladder read from `path`, with remarks about those that cannot be drawn.
///
/// # Errors
/// A ladder without runs, or an inconsistent one.
pub fn figures(ladder: &Ladder, path: &Path) -> Result<(Vec<Figure>, Vec<String>)> {
    let view = LadderView { ladder, runs: SortedRuns::of(ladder, path)? };
    let (mut figures, remarks) = ratio::figures(&view);
    figures.extend([time::figure(&view), memory::figure(&view), decode::figure(&view)]);
    Ok((figures, remarks))
}
