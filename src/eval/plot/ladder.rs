//! The figures of a ladder, each in a file of its own.

use super::series::Runs;
use super::sheet::Sheet;
use super::{decode, memory, ratio, time, Figure};
use crate::error::Result;
use crate::eval::report::Ladder;
use std::path::Path;

/// Every figure of the ladder read from `path`, and remarks on those that cannot be drawn.
///
/// # Errors
/// A ladder without runs or one that contradicts itself.
pub fn figures(ladder: &Ladder, path: &Path) -> Result<(Vec<Figure>, Vec<String>)> {
    let sheet = Sheet { ladder, runs: Runs::of(ladder, path)? };
    let (mut figures, remarks) = ratio::figures(&sheet);
    figures.extend([time::figure(&sheet), memory::figure(&sheet), decode::figure(&sheet)]);
    Ok((figures, remarks))
}
