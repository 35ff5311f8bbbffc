//! The kinds of results files that have figures, one line each.

use super::{kernels, ladder, quality, Figure};
use crate::error::{Error, Result};
use crate::eval::report::{kind_of, read, ABLATION, ANSWERS, KERNELS, LADDER, LAYERS, POSITIONS, SMOKE};
use serde::de::DeserializeOwned;
use std::path::Path;

/// Figures, and remarks about those that cannot be drawn.
pub type FiguresAndNotes = (Vec<Figure>, Vec<String>);

/// Name of a kind, and the function that draws a file of this kind.
type Kind = (&'static str, fn(&Path) -> Result<FiguresAndNotes>);

/// All kinds that have figures.
pub static KINDS: &[Kind] = &[
    (LADDER, |path| ladder::figures(&read(path, LADDER)?, path)),
    (KERNELS, |path| whole(path, KERNELS, kernels::figures)),
    (SMOKE, |path| whole(path, SMOKE, quality::smoke)),
    (ANSWERS, |path| whole(path, ANSWERS, quality::answers)),
    (LAYERS, |path| whole(path, LAYERS, quality::layers)),
    (ABLATION, |path| whole(path, ABLATION, quality::ablation)),
    (POSITIONS, |path| whole(path, POSITIONS, quality::positions)),
];

/// Draws a file of a kind whose figures are all drawn or all refused.
fn whole<T: DeserializeOwned>(
    path: &Path,
    kind: &str,
    draw: fn(&T, &Path) -> Result<Vec<Figure>>,
) -> Result<FiguresAndNotes> {
    Ok((draw(&read(path, kind)?, path)?, vec![]))
}

/// Draws the figures of one file, which must be of the kind `wanted` where it is given.
///
/// # Errors
/// A file that cannot be read, is of a kind without figures, or is inconsistent.
pub fn figures_of(path: &Path, wanted: Option<&str>) -> Result<FiguresAndNotes> {
    let found = kind_of(path)?;
    let kind = wanted.unwrap_or(&found);
    match KINDS.iter().find(|(name, _)| *name == kind) {
        Some((_, draw)) => draw(path),
        None => {
            let names: Vec<String> = KINDS.iter().map(|(name, _)| format!("`{name}`")).collect();
            let message = format!("is of kind `{found}`; there are figures for {}", names.join(", "));
            Err(Error::format(path.display(), message))
        }
    }
}
