//! Writing figures to files, atomically.

use super::render::{png, svg};
use super::theme::THEMES;
use super::Figure;
use crate::cli::Temporary;
use crate::error::{Error, Result};
use crate::ErrorKind;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Writes each figure in both themes as SVG and PNG to `dir`, which is created, and returns the paths
/// `PREFIX-NAME-THEME.svg` and `.png`.
///
/// # Errors
/// A directory or file that cannot be written, or a file that is not an earlier figure.
pub fn save(dir: &Path, prefix: &str, figures: &[Figure]) -> Result<Vec<PathBuf>> {
    let unwritable =
        |e| Error::new(ErrorKind::Io, format!("--out {}", dir.display()), format!("cannot be created: {e}"));
    std::fs::create_dir_all(dir).map_err(unwritable)?;
    let mut written = vec![];
    for figure in figures {
        for theme in &THEMES {
            let stem = format!("{prefix}-{}-{}", figure.name, theme.name);
            let scene = &figure.scene;
            let name = format!("{} ({prefix})", figure.name);
            written.push(whole(dir, &stem, "svg", |path| {
                std::fs::write(path, svg(scene, theme, &name)?).map_err(|e| e.to_string())
            })?);
            written.push(whole(dir, &stem, "png", |path| png(scene, theme, path))?);
        }
    }
    Ok(written)
}

/// Calls `write` with a hidden temporary file in `dir`, then renames it to its final name.
fn whole(dir: &Path, stem: &str, kind: &str, write: impl FnOnce(&Path) -> Result<(), String>) -> Result<PathBuf> {
    let path = dir.join(format!("{stem}.{kind}"));
    if path.exists() && !path.is_dir() && !begins_as_figure(&path) {
        return Err(Error::usage(path.display(), "is not a figure; only earlier figures are replaced"));
    }
    let error = |e: String| Error::new(ErrorKind::Io, path.display(), format!("cannot be written: {e}"));
    // The extension is kept, since the encoder chooses the format by it.
    let hidden = dir.join(format!(".{stem}.{}.partial.{kind}", std::process::id()));
    let partial = Temporary::new(hidden).map_err(|e| error(e.to_string()))?;
    let done = write(partial.path()).and_then(|()| std::fs::rename(partial.path(), &path).map_err(|e| e.to_string()));
    done.map_err(error)?;
    Ok(path)
}

/// Returns whether a file starts as a figure does: as PNG or as SVG, or is empty.
fn begins_as_figure(path: &Path) -> bool {
    let mut first = vec![];
    let read = |first: &mut Vec<u8>| std::fs::File::open(path)?.take(4).read_to_end(first);
    path.is_file() && read(&mut first).is_ok() && matches!(first.as_slice(), b"\x89PNG" | b"<svg" | b"")
}
