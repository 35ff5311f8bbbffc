//! Files and folders that go away with their owner, or with the process where a signal ends it.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Every temporary that exists.
static HELD: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// A temporary file or folder, removed when dropped and when SIGINT or SIGTERM ends the process.
pub struct Temporary(PathBuf);

impl Temporary {
    /// Owns `path`, which is yet to be made.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] where another owner has it.
    pub fn new(path: PathBuf) -> io::Result<Self> {
        match held().insert(path.clone()) {
            true => Ok(Self(path)),
            false => Err(io::Error::new(io::ErrorKind::AlreadyExists, "another output of this run goes there too")),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The hidden name beside `path` under which it is filled.
    pub fn beside(path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "names no file"))?;
        let hidden = format!(".{}.{}.partial", name.to_string_lossy(), std::process::id());
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // One file has one name here, however it is spelt.
        Self::new(folder.canonicalize().unwrap_or_else(|_| folder.into()).join(hidden))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let mut held = held();
        remove(&self.0);
        held.remove(&self.0);
    }
}

/// Removes all that exist and ends the process; nobody makes another meanwhile.
pub fn end_process(code: i32) -> ! {
    let held = held();
    held.iter().for_each(|path| remove(path));
    std::process::exit(code)
}

fn held() -> std::sync::MutexGuard<'static, BTreeSet<PathBuf>> {
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Nothing is there any more where it was renamed.
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
    fn a_temporary_has_one_owner_and_goes_with_it() {
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
