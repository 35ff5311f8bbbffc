//! Temporary files and folders, removed when dropped or when a signal ends the process.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Paths of all temporaries that exist, for removal in a signal handler.
static LIVE: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// A temporary file or folder, removed when dropped and when SIGINT or SIGTERM ends the process.
pub struct Temporary(PathBuf);

impl Temporary {
    /// Reserves `path` without creating it.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] if another `Temporary` has the same path.
    pub fn new(path: PathBuf) -> io::Result<Self> {
        match live().insert(path.clone()) {
            true => Ok(Self(path)),
            false => Err(io::Error::new(io::ErrorKind::AlreadyExists, "another output of this run has the same path")),
        }
    }

    /// Path of the file or folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Reserves a hidden file name in the same folder as `path`, for content that is renamed to `path` when complete.
    ///
    /// # Errors
    /// `path` names no file; another `Temporary` for the same `path` exists.
    pub fn beside(path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "names no file"))?;
        let hidden = format!(".{}.{}.partial", name.to_string_lossy(), std::process::id());
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // Canonical, so that two spellings of one path collide.
        Self::new(folder.canonicalize().unwrap_or_else(|_| folder.into()).join(hidden))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let mut live = live();
        remove(&self.0);
        live.remove(&self.0);
    }
}

/// Removes all temporaries and ends the process; the lock is kept, so that no other thread creates one meanwhile.
pub fn end_process(code: i32) -> ! {
    let live = live();
    live.iter().for_each(|path| remove(path));
    leave(code)
}

/// Ends the process without exit handlers: other threads still compute, and CUDA's handler takes the driver from under them.
#[cfg(unix)]
fn leave(code: i32) -> ! {
    signal_hook::low_level::exit(code)
}

#[cfg(not(unix))]
fn leave(code: i32) -> ! {
    std::process::exit(code)
}

fn live() -> std::sync::MutexGuard<'static, BTreeSet<PathBuf>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes the file or folder at `path`, if it is still there: a finished output has been renamed.
fn remove(path: &Path) {
    let _ = match path.is_dir() {
        true => std::fs::remove_dir_all(path),
        false => std::fs::remove_file(path),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temporary_has_one_owner_and_is_removed_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.json");
        let first = Temporary::beside(&path).unwrap();
        std::fs::write(first.path(), "half").unwrap();
        assert!(Temporary::beside(&path).is_err());
        drop(first);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let again = Temporary::beside(&path).unwrap();
        std::fs::create_dir(again.path()).unwrap();
        drop(again);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
