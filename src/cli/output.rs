//! Files that appear whole or not at all.

use crate::error::{At, Error, Result};
use std::io::Read;
use std::path::{Path, PathBuf};

/// A file to be written at the end, proven writable at the start.
pub struct Output {
    path: PathBuf,
    temporary: PathBuf,
    flag: &'static str,
}

impl Output {
    /// Creates the temporary file beside `path`, so that an unwritable place is refused before any work.
    pub fn reserve(path: &Path, flag: &'static str) -> Result<Self> {
        let name = path.file_name().ok_or_else(|| Error::usage(flag, format!("`{}` names no file", path.display())))?;
        if path.is_dir() {
            return Err(Error::usage(flag, format!("`{}` is a directory", path.display())));
        }
        let temporary = path.with_file_name(format!(".{}.{}.partial", name.to_string_lossy(), std::process::id()));
        let output = Self { path: path.into(), temporary, flag };
        std::fs::write(&output.temporary, []).map_err(|e| output.error(e))?;
        Ok(output)
    }

    /// As [`Self::reserve`], where only an earlier output is replaced: a slip of the pen must not cost a checkpoint. `fault` is asked
    /// of what is there, if anything, and told whether it begins as JSON does: a checkpoint is not read to its end to be told
    /// from results.
    ///
    /// # Errors
    /// A place that cannot be written to, what is there and cannot be read, or the fault of it.
    pub fn reserve_over(
        path: &Path,
        flag: &'static str,
        fault: impl FnOnce(bool) -> Result<Option<String>>,
    ) -> Result<Self> {
        let output = Self::reserve(path, flag)?;
        let fault = begins_as_json(path)?.map(fault).transpose()?.flatten();
        fault.map_or(Ok(output), |message| Err(Error::usage(format!("{flag} {}", path.display()), message)))
    }

    /// Writes the content and puts it in place.
    pub fn write(self, content: &[u8]) -> Result<()> {
        std::fs::write(&self.temporary, content).map_err(|e| self.error(e))?;
        std::fs::rename(&self.temporary, &self.path).map_err(|e| self.error(e))
    }

    fn error(&self, e: std::io::Error) -> Error {
        Error::new(
            crate::ErrorKind::Io,
            format!("{} {}", self.flag, self.path.display()),
            format!("cannot be written: {e}"),
        )
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        // Gone already where `write` renamed it.
        let _ = std::fs::remove_file(&self.temporary);
    }
}

/// Whether what is at `path` begins as JSON does; nothing where there is no file or an empty one.
fn begins_as_json(path: &Path) -> Result<Option<bool>> {
    if !path.exists() {
        return Ok(None);
    }
    let mut first = vec![];
    std::fs::File::open(path).and_then(|f| f.take(1).read_to_end(&mut first)).at(path.display())?;
    Ok(first.first().map(|byte| *byte == b'{'))
}

/// Creates `dir` whole: fills a temporary directory beside it and renames.
pub fn write_dir(dir: &Path, flag: &str, files: &[(&str, Vec<u8>)]) -> Result<()> {
    let place = format!("{flag} {}", dir.display());
    if dir.exists() && !dir.join(super::patch::FILE).exists() {
        return Err(Error::usage(&place, "exists and is not a patch; choose a new directory"));
    }
    let name = dir
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .ok_or_else(|| Error::usage(&place, "names no directory"))?;
    let temporary = dir.with_file_name(format!(".{name}.{}.partial", std::process::id()));
    let fill = || -> std::io::Result<()> {
        std::fs::create_dir_all(&temporary)?;
        for (file, content) in files {
            std::fs::write(temporary.join(file), content)?;
        }
        if dir.exists() {
            std::fs::remove_dir_all(dir)?;
        }
        std::fs::rename(&temporary, dir)
    };
    fill().inspect_err(|_| drop(std::fs::remove_dir_all(&temporary))).at(place)
}
