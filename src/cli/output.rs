//! Output files: written atomically, checked for writability before any work, and overwriting only earlier outputs of
//! their kind.

use super::Temporary;
use crate::error::{At, Error, ErrorKind, Result};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// An output file that is checked for writability at the start of a run and written at its end.
pub struct Output {
    path: PathBuf,
    flag: &'static str,
    place: Place,
}

/// How an output is written.
enum Place {
    /// To a temporary file, which is then renamed to the target path.
    Rename(Temporary, PathBuf),
    /// Directly to a pipe or a device.
    Stream(File),
}

/// Kind of file at an output path.
enum Kind {
    /// A regular file, or no file yet; the path after following symbolic links.
    File(PathBuf),
    /// A character device, such as `/dev/null`.
    Device,
    /// A pipe, or one of the process's own open files, such as `/dev/stdout`.
    Pipe,
}

impl Output {
    /// Checks that `path` can be written to: creates the temporary file in its folder, or opens the pipe or device at
    /// `path` (opening a pipe blocks until it has a reader). `flag` names the output in errors.
    ///
    /// # Errors
    /// `path` cannot be written to, or is a directory.
    pub fn reserve(path: &Path, flag: &'static str) -> Result<Self> {
        let fail = |e: io::Error| error(flag, path, e);
        let place = match kind_of(path).map_err(fail)? {
            Kind::File(target) => {
                let temporary = Temporary::beside(&target).map_err(fail)?;
                std::fs::write(temporary.path(), []).map_err(fail)?;
                Place::Rename(temporary, target)
            }
            // Append, so that a redirected stdout (`/dev/stdout`) is not truncated.
            Kind::Device | Kind::Pipe => Place::Stream(OpenOptions::new().append(true).open(path).map_err(fail)?),
        };
        Ok(Self { path: path.into(), flag, place })
    }

    /// Like [`Self::reserve`], but overwrites only earlier outputs, so that a mistyped path does not cost a checkpoint.
    ///
    /// Where a non-empty regular file exists at `path`, `fault` is called with whether the file begins with `{`, and
    /// returns the reason not to overwrite it, if any. The first byte tells a checkpoint from JSON without reading
    /// gigabytes.
    ///
    /// # Errors
    /// `path` cannot be written to; the existing file cannot be read, or `fault` rejects it.
    pub fn reserve_replacing(
        path: &Path,
        flag: &'static str,
        fault: impl FnOnce(bool) -> Result<Option<String>>,
    ) -> Result<Self> {
        let output = Self::reserve(path, flag)?;
        let Place::Rename(..) = &output.place else { return Ok(output) };
        let fault = begins_as_json(path)?.map(fault).transpose()?.flatten();
        fault.map_or(Ok(output), |message| Err(Error::usage(format!("{flag} {}", path.display()), message)))
    }

    /// Checks that `path` can be written to, for an output that is opened again later, perhaps more than once.
    ///
    /// # Errors
    /// Those of [`Self::reserve`]; `path` is a pipe, which cannot be opened twice.
    pub fn check_writable(path: &Path, flag: &'static str) -> Result<()> {
        Self::check_replaceable(path, flag, |_| Ok(None))
    }

    /// Checks like [`Self::reserve_replacing`], for an output that is opened again later, perhaps more than once.
    ///
    /// # Errors
    /// Those of [`Self::reserve_replacing`]; `path` is a pipe, which cannot be opened twice.
    pub fn check_replaceable(
        path: &Path,
        flag: &'static str,
        fault: impl FnOnce(bool) -> Result<Option<String>>,
    ) -> Result<()> {
        if matches!(kind_of(path), Ok(Kind::Pipe)) {
            let message = "is a pipe, but this output is opened more than once; give a file";
            return Err(Error::usage(format!("{flag} {}", path.display()), message));
        }
        Self::reserve_replacing(path, flag, fault).map(drop)
    }

    /// Writes `content`; a regular file is replaced atomically.
    ///
    /// # Errors
    /// The write failed; no partial file is left.
    pub fn write(self, content: &[u8]) -> Result<()> {
        let done = match self.place {
            Place::Stream(mut file) => file.write_all(content).and_then(|()| file.flush()),
            Place::Rename(temporary, target) => {
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
    // Linux follows at most 40 symbolic links (path_resolution(7)).
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
        _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "is a block device or a socket, not a file")),
    }
}

#[cfg(not(unix))]
fn special(_: &std::fs::Metadata) -> io::Result<Kind> {
    Ok(Kind::Pipe)
}

/// Whether the file at `path` begins with `{`; `None` if there is no file or it is empty.
fn begins_as_json(path: &Path) -> Result<Option<bool>> {
    if !path.exists() {
        return Ok(None);
    }
    let mut first = vec![];
    File::open(path).and_then(|f| f.take(1).read_to_end(&mut first)).at(path.display())?;
    Ok(first.first().map(|byte| *byte == b'{'))
}

/// Returns why the file at `path` must not be overwritten: it is not JSON (`json` is false) or its `kind` is not
/// `kind`. `what` names an output of that kind.
///
/// # Errors
/// The file cannot be read.
pub fn not_of_kind(path: &Path, json: bool, kind: &str, what: &str) -> Result<Option<String>> {
    #[derive(serde::Deserialize)]
    struct Head {
        kind: Option<String>,
    }
    if !json {
        return Ok(Some(format!("is not JSON; only {what} is overwritten")));
    }
    let file = io::BufReader::new(File::open(path).at(path.display())?);
    let found = serde_json::from_reader::<_, Head>(file).ok().and_then(|h| h.kind);
    Ok((found.as_deref() != Some(kind))
        .then(|| format!("is JSON without `kind` of `{kind}`; only {what} is overwritten")))
}

/// Returns why the file at `path` must not be overwritten: it is not a safetensors file with exactly the tensors
/// `names` (sorted). `what` names an output with these tensors.
///
/// # Errors
/// The file cannot be read for lack of permission.
pub fn not_of_tensors(path: &Path, names: &[&str], what: &str) -> Result<Option<String>> {
    let own = || -> io::Result<bool> {
        let mut file = File::open(path)?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        // Enough for the header of a few tensors; a checkpoint's longer header then fails to parse.
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
        _ => {
            let tensors = names.join(" and ");
            Ok(Some(format!("is not a safetensors file of {tensors} alone; only {what} is overwritten")))
        }
    }
}

/// Checks that [`write_into`] can write to `dir`, in which `name` is the first file, before any work.
///
/// # Errors
/// Those of [`write_into`].
pub fn check_into(
    dir: &Path,
    flag: &'static str,
    name: &str,
    fault: impl FnOnce(bool) -> Result<Option<String>>,
) -> Result<()> {
    let file = dir.join(name);
    if file.exists() {
        return Output::check_replaceable(&file, flag, fault);
    }
    refuse_other(dir, flag, name)?;
    // The outermost directory that has to be made, whose parent exists.
    let made = |p: &&Path| p.parent().is_some_and(|parent| parent.as_os_str().is_empty() || parent.exists());
    let probe = Temporary::beside(dir.ancestors().find(made).unwrap_or(dir));
    probe.and_then(|probe| std::fs::create_dir(probe.path())).map_err(|e| error(flag, dir, e))
}

/// Refuses a directory that exists without the file `name`.
fn refuse_other(dir: &Path, flag: &'static str, name: &str) -> Result<()> {
    match dir.exists() {
        true => {
            let message = format!("exists and has no {name}; choose a new directory");
            Err(Error::usage(format!("{flag} {}", dir.display()), message))
        }
        false => Ok(()),
    }
}

/// Writes `files`, names with contents, to `dir`: where the first exists, overwrites them and leaves other files alone;
/// otherwise creates `dir` atomically. `flag` names the output in errors; for `fault`, which is asked about the first
/// file, see [`Output::reserve_replacing`].
///
/// # Errors
/// `dir` exists without the first file; `fault` rejects the existing file; `dir` cannot be written to.
pub fn write_into(
    dir: &Path,
    flag: &'static str,
    files: &[(&str, &[u8])],
    fault: impl FnOnce(bool) -> Result<Option<String>>,
) -> Result<()> {
    let fail = |e| error(flag, dir, e);
    let Some(((name, content), others)) = files.split_first() else { return Ok(()) };
    let file = dir.join(name);
    if file.exists() {
        let first = Output::reserve_replacing(&file, flag, fault)?;
        for (name, content) in others {
            Output::reserve(&dir.join(name), flag)?.write(content)?;
        }
        return first.write(content);
    }
    refuse_other(dir, flag, name)?;
    let temporary = Temporary::beside(dir).map_err(fail)?;
    std::fs::create_dir_all(temporary.path()).map_err(fail)?;
    for (name, content) in files {
        std::fs::write(temporary.path().join(name), content).map_err(fail)?;
    }
    std::fs::rename(temporary.path(), dir).map_err(fail)
}
