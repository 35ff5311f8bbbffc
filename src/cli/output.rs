//! Files that appear whole or not at all, and replace nothing but earlier outputs.

use super::Temporary;
use crate::error::{At, Error, ErrorKind, Result};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// A file to be written at the end, proven writable at the start.
pub struct Output {
    path: PathBuf,
    flag: &'static str,
    place: Place,
}

/// How an output gets where it belongs.
enum Place {
    /// By way of a temporary file that is renamed to the target.
    Whole(Temporary, PathBuf),
    /// Straight into a pipe or a device.
    Stream(File),
}

/// What a path names.
enum Kind {
    /// A regular file, or none yet; symbolic links are followed.
    File(PathBuf),
    /// A character device, such as `/dev/null`.
    Device,
    /// A pipe, or one of the process's own open files, such as `/dev/stdout`.
    Pipe,
}

impl Output {
    /// Proves that `path` can be written to, so that an unwritable place is refused before any work: creates the temporary file
    /// beside it, or opens the pipe or device that it names, which waits for the reader of a pipe.
    ///
    /// # Errors
    /// A place that cannot be written to.
    pub fn reserve(path: &Path, flag: &'static str) -> Result<Self> {
        let fail = |e: io::Error| error(flag, path, e);
        let place = match kind_of(path).map_err(fail)? {
            Kind::File(target) => {
                let temporary = Temporary::beside(&target).map_err(fail)?;
                std::fs::write(temporary.path(), []).map_err(fail)?;
                Place::Whole(temporary, target)
            }
            // An open file of the process keeps what is in it.
            Kind::Device | Kind::Pipe => Place::Stream(OpenOptions::new().append(true).open(path).map_err(fail)?),
        };
        Ok(Self { path: path.into(), flag, place })
    }

    /// As [`Self::reserve`], where only an earlier output is replaced: a slip of the pen must not cost a checkpoint. `fault` is asked
    /// of what is there, if anything, and told whether it begins as JSON does: a checkpoint is not read to its end to be told
    /// from results. A pipe or device is not read.
    ///
    /// # Errors
    /// A place that cannot be written to, what is there and cannot be read, or the fault of it.
    pub fn reserve_over(
        path: &Path,
        flag: &'static str,
        fault: impl FnOnce(bool) -> Result<Option<String>>,
    ) -> Result<Self> {
        let output = Self::reserve(path, flag)?;
        let Place::Whole(..) = &output.place else { return Ok(output) };
        let fault = begins_as_json(path)?.map(fault).transpose()?.flatten();
        fault.map_or(Ok(output), |message| Err(Error::usage(format!("{flag} {}", path.display()), message)))
    }

    /// Refuses what [`Self::reserve`] refuses, and pipes: for an output that is opened again, and perhaps more than once.
    ///
    /// # Errors
    /// As said.
    pub fn prove(path: &Path, flag: &'static str) -> Result<()> {
        Self::prove_over(path, flag, |_| Ok(None))
    }

    /// Refuses what [`Self::reserve_over`] refuses, and pipes.
    ///
    /// # Errors
    /// As said.
    pub fn prove_over(
        path: &Path,
        flag: &'static str,
        fault: impl FnOnce(bool) -> Result<Option<String>>,
    ) -> Result<()> {
        if matches!(kind_of(path), Ok(Kind::Pipe)) {
            let message = "is a pipe, and this is opened more than once; give a file";
            return Err(Error::usage(format!("{flag} {}", path.display()), message));
        }
        Self::reserve_over(path, flag, fault).map(drop)
    }

    /// Writes the content and puts it in place.
    ///
    /// # Errors
    /// A place that can no longer be written to; nothing is left there then.
    pub fn write(self, content: &[u8]) -> Result<()> {
        let done = match self.place {
            Place::Stream(mut file) => file.write_all(content).and_then(|()| file.flush()),
            Place::Whole(temporary, target) => {
                std::fs::write(temporary.path(), content).and_then(|()| std::fs::rename(temporary.path(), target))
            }
        };
        done.map_err(|e| error(self.flag, &self.path, e))
    }
}

fn error(flag: &str, path: &Path, e: io::Error) -> Error {
    let place = format!("{flag} {}", path.display());
    match e.kind() {
        io::ErrorKind::AlreadyExists | io::ErrorKind::InvalidInput | io::ErrorKind::IsADirectory => {
            Error::usage(place, e)
        }
        _ => Error::new(ErrorKind::Io, place, format!("cannot be written: {e}")),
    }
}

fn kind_of(path: &Path) -> io::Result<Kind> {
    let mut at = path.to_path_buf();
    // As many links as Linux follows.
    for _ in 0..40 {
        if is_open_file(&at) {
            return Ok(Kind::Pipe);
        }
        let about = match std::fs::symlink_metadata(&at) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Kind::File(at)),
            other => other?,
        };
        if about.is_symlink() {
            let to = std::fs::read_link(&at)?;
            at = at.parent().unwrap_or(Path::new("")).join(to);
            continue;
        }
        if about.is_dir() {
            return Err(io::Error::new(io::ErrorKind::IsADirectory, "is a directory"));
        }
        return if about.is_file() { Ok(Kind::File(at)) } else { special(&about) };
    }
    Err(io::Error::other("too many symbolic links"))
}

/// Whether `path` names a file that the process has open, as `/dev/stdout` and `/dev/fd/3` do.
fn is_open_file(path: &Path) -> bool {
    let folder = path.parent().and_then(|p| p.canonicalize().ok());
    folder.is_some_and(|f| f.starts_with("/proc") || f == Path::new("/dev/fd"))
}

#[cfg(unix)]
fn special(about: &std::fs::Metadata) -> io::Result<Kind> {
    use std::os::unix::fs::FileTypeExt;
    let kind = about.file_type();
    match (kind.is_char_device(), kind.is_fifo()) {
        (true, _) => Ok(Kind::Device),
        (_, true) => Ok(Kind::Pipe),
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "is a disk or a socket, not a file")),
    }
}

#[cfg(not(unix))]
fn special(_: &std::fs::Metadata) -> io::Result<Kind> {
    Ok(Kind::Pipe)
}

/// Whether what is at `path` begins as JSON does; nothing where there is no file or an empty one.
fn begins_as_json(path: &Path) -> Result<Option<bool>> {
    if !path.exists() {
        return Ok(None);
    }
    let mut first = vec![];
    File::open(path).and_then(|f| f.take(1).read_to_end(&mut first)).at(path.display())?;
    Ok(first.first().map(|byte| *byte == b'{'))
}

/// The fault of a file that is no JSON of `kind`; `what` names an output of that kind.
///
/// # Errors
/// A file that cannot be read.
pub fn not_of_kind(path: &Path, json: bool, kind: &str, what: &str) -> Result<Option<String>> {
    #[derive(serde::Deserialize)]
    struct Head {
        kind: Option<String>,
    }
    if !json {
        return Ok(Some(format!("is no JSON; only {what} is replaced")));
    }
    let file = io::BufReader::new(File::open(path).at(path.display())?);
    let found = serde_json::from_reader::<_, Head>(file).ok().and_then(|h| h.kind);
    Ok((found.as_deref() != Some(kind))
        .then(|| format!("is other JSON (no `kind` of `{kind}`); only {what} is replaced")))
}

/// The fault of a safetensors file that holds anything but `names`; `what` names an output that holds these.
///
/// # Errors
/// A file that cannot be read.
pub fn not_of_tensors(path: &Path, names: &[&str], what: &str) -> Result<Option<String>> {
    let own = || -> io::Result<bool> {
        let mut file = File::open(path)?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        // The header of a few tensors; that of a checkpoint is not read.
        let mut header = vec![0; u64::from_le_bytes(length).min(4096) as usize];
        file.read_exact(&mut header)?;
        let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&header)?;
        let mut found: Vec<_> = header.keys().map(String::as_str).filter(|k| *k != "__metadata__").collect();
        found.sort_unstable();
        Ok(found == names)
    };
    match own() {
        Ok(true) => Ok(None),
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => Err(e).at(path.display()),
        _ => Ok(Some(format!("holds other things than {}; only {what} is replaced", names.join(" and ")))),
    }
}

/// Puts `content` into `dir` as `name`: into a directory that holds an earlier one, beside whatever else is there, or into a new
/// directory, which appears whole.
///
/// # Errors
/// A directory that holds no earlier `name`, `fault` of the earlier one, or a place that cannot be written to.
pub fn write_into(
    dir: &Path,
    flag: &'static str,
    (name, content): (&str, &[u8]),
    fault: impl FnOnce(bool) -> Result<Option<String>>,
) -> Result<()> {
    let fail = |e| error(flag, dir, e);
    let file = dir.join(name);
    if file.exists() {
        return Output::reserve_over(&file, flag, fault)?.write(content);
    }
    if dir.exists() {
        let message = "exists and is not a patch; choose a new directory";
        return Err(Error::usage(format!("{flag} {}", dir.display()), message));
    }
    let temporary = Temporary::beside(dir).map_err(fail)?;
    std::fs::create_dir_all(temporary.path()).map_err(fail)?;
    std::fs::write(temporary.path().join(name), content).map_err(fail)?;
    std::fs::rename(temporary.path(), dir).map_err(fail)
}
