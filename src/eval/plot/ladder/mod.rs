//! The figures of a ladder, each in a file of its own.
//!
//! | file | draws |
//! |---|---|
//! | `ratio` | a retrofit's time and memory over the better stock's |
//! | `time`, `memory`, `decode` | what every engine and variant took, by context |
//! | `lines` | the panel that they share: lines over contexts |
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

/// Every figure of the ladder read from `path`, and remarks on those that cannot be drawn.
///
/// # Errors
/// A ladder without runs, or one that contradicts itself.
pub fn figures(ladder: &Ladder, path: &Path) -> Result<(Vec<Figure>, Vec<String>)> {
    let view = LadderView { ladder, runs: SortedRuns::of(ladder, path)? };
    let (mut figures, remarks) = ratio::figures(&view);
    figures.extend([time::figure(&view), memory::figure(&view), decode::figure(&view)]);
    Ok((figures, remarks))
}
