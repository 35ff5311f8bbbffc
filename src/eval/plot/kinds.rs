//! The kinds of results files that have figures, one line each.

use super::{character, kernels, ladder, quality, transforms, Figure};
use crate::error::{Error, Result};
use crate::eval::report::{
    kind_of, read, stem, ABLATION, ANSWERS, CHAR_EVAL, CHAR_RECALL, KERNELS, LADDER, LAYERS, POSITIONS, SMOKE, SWEEP,
    TRAINING,
};
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

/// Figures, and remarks about those that cannot be drawn.
pub type FiguresAndNotes = (Vec<Figure>, Vec<String>);

/// How the files of a kind are drawn.
enum Draw {
    /// Each file by itself.
    Each(fn(&Path) -> Result<FiguresAndNotes>),
    /// All files in the same figures, named by the function where there is one file, and by the string for several.
    Together(fn(&[&Path]) -> Result<FiguresAndNotes>, fn(&Path) -> String, &'static str),
}

use Draw::{Each, Together};

/// All kinds that have figures, by name.
static KINDS: &[(&str, Draw)] = &[
    (LADDER, Each(|path| ladder::figures(&read(path, LADDER)?, path))),
    (KERNELS, Each(|path| whole(path, KERNELS, kernels::figures))),
    (SMOKE, Each(|path| whole(path, SMOKE, quality::smoke))),
    (ANSWERS, Each(|path| whole(path, ANSWERS, quality::answers))),
    (LAYERS, Each(|path| whole(path, LAYERS, quality::layers))),
    (ABLATION, Each(|path| whole(path, ABLATION, quality::ablation))),
    (POSITIONS, Each(|path| whole(path, POSITIONS, quality::positions))),
    (TRAINING, Together(character::training, character::run_name, "logs")),
    (CHAR_EVAL, Each(|path| character::eval(&read(path, CHAR_EVAL)?, path))),
    (CHAR_RECALL, Each(|path| whole(path, CHAR_RECALL, character::recall))),
    (SWEEP, Together(transforms::figures, transforms::sweep_name, "sweeps")),
];

/// Draws a file of a kind whose figures are all drawn or all refused.
fn whole<T: DeserializeOwned>(
    path: &Path,
    kind: &str,
    draw: fn(&T, &Path) -> Result<Vec<Figure>>,
) -> Result<FiguresAndNotes> {
    Ok((draw(&read(path, kind)?, path)?, vec![]))
}

/// Figures of one file, or of all files of a kind that are drawn together.
pub struct Drawing {
    /// First part of the names of the figures' files.
    pub stem: String,
    /// Drawn figures.
    pub figures: Vec<Figure>,
    /// Remarks about figures that cannot be drawn, each with the file.
    pub notes: Vec<String>,
}

/// Draws the figures of `paths`, which must be of the kind `wanted` where it is given.
///
/// # Errors
/// A file that cannot be read, is of a kind without figures, or is inconsistent; two drawings of one name.
pub fn draw(paths: &[PathBuf], wanted: Option<&str>) -> Result<Vec<Drawing>> {
    let mut groups: Vec<(&'static (&str, Draw), Vec<&Path>)> = vec![];
    for path in paths {
        let kind = kind(path, wanted)?;
        let same = |group: &&mut (&(&str, Draw), Vec<&Path>)| group.0 .0 == kind.0 && matches!(kind.1, Together(..));
        match groups.iter_mut().find(same) {
            Some((_, group)) if group.contains(&path.as_path()) => {
                return Err(Error::usage(path.display(), "is given twice"));
            }
            Some((_, group)) => group.push(path),
            None => groups.push((kind, vec![path])),
        }
    }
    let mut drawn: Vec<Drawing> = vec![];
    for ((_, draw), paths) in groups {
        let Some(path) = paths.first() else { continue };
        let stem = match draw {
            Each(_) => stem(path).unwrap_or_else(|| "figure".into()),
            Together(_, name, _) if paths.len() == 1 => name(path),
            Together(_, _, several) => (*several).into(),
        };
        if drawn.iter().any(|other| other.stem == stem) {
            let message = format!("another file is also called {stem}; draw the two into different --out directories");
            return Err(Error::usage(path.display(), message));
        }
        let (figures, notes) = match draw {
            Each(draw) => draw(path)?,
            Together(draw, ..) => draw(&paths)?,
        };
        let notes = notes.into_iter().map(|note| format!("{}: {note}", path.display())).collect();
        drawn.push(Drawing { stem, figures, notes });
    }
    Ok(drawn)
}

/// Returns the kind of a file, or the kind `wanted`, which the reader then expects.
fn kind(path: &Path, wanted: Option<&str>) -> Result<&'static (&'static str, Draw)> {
    let found = kind_of(path)?;
    let kind = wanted.unwrap_or(&found);
    KINDS.iter().find(|(name, _)| *name == kind).ok_or_else(|| {
        let names: Vec<String> = KINDS.iter().map(|(name, _)| format!("`{name}`")).collect();
        let message = format!("is of kind `{found}`; there are figures for {}", names.join(", "));
        Error::format(path.display(), message)
    })
}
