//! Results files: JSON, gzip-compressed where the name ends in `.gz`, written atomically.

use super::header::SCHEMA_VERSION;
use super::training::{is_log, TRAINING};
use crate::cli::Output;
use crate::error::{At, Error, Result};
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use flate2::Compression;
use serde::de::DeserializeOwned;
use serde::Serialize;
use std::io::{Read, Write};
use std::path::Path;

/// Reads a results file of `kind`.
///
/// # Errors
/// A file that is not JSON (such as a truncated one), of another kind, or of another schema version.
pub fn read<T: DeserializeOwned>(path: &Path, kind: &str) -> Result<T> {
    let value: serde_json::Value = from_json(path, &contents(path)?)?;
    let found = value.get("kind").and_then(|k| k.as_str()).unwrap_or("none");
    if found != kind {
        return Err(Error::format(path.display(), format!("is of kind `{found}`; expected `{kind}`")));
    }
    let version = value.get("schema_version").and_then(|v| v.as_u64());
    if version != Some(SCHEMA_VERSION.into()) {
        let found = version.map_or("none".into(), |v| v.to_string());
        let message = format!("has schema version {found}; this build reads {SCHEMA_VERSION}");
        return Err(Error::format(path.display(), message));
    }
    serde_json::from_value(value).map_err(|e| Error::format(path.display(), e))
}

/// Returns the `kind` field of a file, [`TRAINING`] for a training log, or `none`. [`read`] and
/// [`read_log`](super::read_log) check everything else.
///
/// # Errors
/// A file that cannot be read or is not JSON.
pub fn kind_of(path: &Path) -> Result<String> {
    #[derive(serde::Deserialize)]
    struct Head {
        #[serde(default)]
        kind: serde_json::Value,
    }
    let text = contents(path)?;
    if is_log(path, &text) {
        return Ok(TRAINING.into());
    }
    let head: Head = from_json(path, &text)?;
    Ok(head.kind.as_str().unwrap_or("none").into())
}

/// Returns the name of a results file without `.json` and `.gz`.
pub fn stem(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_string_lossy();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    Some(name.rsplit_once('.').map_or(name, |(stem, _)| stem).into())
}

fn is_gz(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "gz")
}

/// Reads a file, decompressed where its name ends in `.gz`.
pub(super) fn contents(path: &Path) -> Result<Vec<u8>> {
    let mut text = vec![];
    let mut file = std::fs::File::open(path).at(path.display())?;
    match is_gz(path) {
        true => MultiGzDecoder::new(file)
            .read_to_end(&mut text)
            .map_err(|e| Error::format(path.display(), format!("is not a whole gzip file: {e}")))?,
        false => file.read_to_end(&mut text).at(path.display())?,
    };
    Ok(text)
}

fn from_json<T: DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T> {
    serde_json::from_slice(text).map_err(|e| Error::format(path.display(), format!("is not a whole JSON file: {e}")))
}

/// Checks that `path` can be written, before anything is measured.
///
/// # Errors
/// A path that cannot be written, with the reason.
pub fn check_writable(path: &Path) -> Result<()> {
    Output::check_writable(path, "--out")
}

/// Checks that `path` can be written, and that it is not an existing file other than earlier results of `kind`.
///
/// # Errors
/// A path that cannot be written or must not be replaced, with the reason.
pub fn check_replaceable(path: &Path, kind: &str) -> Result<()> {
    let fault = |json: bool| {
        let found = if json || is_gz(path) { kind_of(path).ok().filter(|k| k != "none") } else { None };
        let found = found.as_deref().unwrap_or("not a results file");
        Ok((found != kind).then(|| format!("is {found}; only results of kind `{kind}` are replaced")))
    };
    Output::check_replaceable(path, "--out", fault)
}

/// Writes `results` to `path` atomically.
///
/// # Errors
/// A path that cannot be written.
pub fn save(path: &Path, results: &impl Serialize) -> Result<()> {
    let mut bytes = serde_json::to_vec(results).map_err(|e| Error::format(path.display(), e))?;
    bytes.push(b'\n');
    if is_gz(path) {
        let mut gz = GzEncoder::new(vec![], Compression::default());
        bytes = gz.write_all(&bytes).and_then(|()| gz.finish()).at(path.display())?;
    }
    Output::reserve(path, "--out")?.write(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::report::{Ladder, LADDER};

    #[test]
    fn compressed_results_read_back_unchanged() -> Result<()> {
        let dir = tempfile::tempdir().at("temporary folder")?;
        let ladder: Ladder = read(Path::new("tests/fixtures/bench/ladder.json"), LADDER)?;
        let (plain, gz) = (dir.path().join("ladder.json"), dir.path().join("ladder.json.gz"));
        save(&plain, &ladder)?;
        save(&gz, &ladder)?;
        let bytes = |path: &Path| std::fs::read(path).at(path.display());
        assert!(bytes(&gz)?.starts_with(&[0x1f, 0x8b]) && 4 * bytes(&gz)?.len() < bytes(&plain)?.len());
        assert_eq!(kind_of(&gz)?, LADDER);
        let show = |l: &Ladder| serde_json::to_string(l).unwrap_or_default();
        assert_eq!(show(&read(&gz, LADDER)?), show(&ladder));
        assert_eq!((stem(&plain), stem(&gz)), (Some("ladder".into()), Some("ladder".into())));
        assert_eq!(stem(Path::new("a/qwen2.5-7b.json.gz")), Some("qwen2.5-7b".into()));
        check_replaceable(&gz, LADDER)?;
        let refused = check_replaceable(&gz, "bfly-smoke").unwrap_err().to_string();
        assert!(refused.contains("ladder.json.gz: is bfly-ladder"), "{refused}");
        Ok(())
    }

    #[test]
    fn damaged_files_are_named() -> Result<()> {
        let dir = tempfile::tempdir().at("temporary folder")?;
        let gz = dir.path().join("half.json.gz");
        save(&gz, &serde_json::json!({"kind": LADDER, "runs": vec![7; 999]}))?;
        let whole = std::fs::read(&gz).at("file")?;
        let says = |path: &Path, words: &str| {
            let said = kind_of(path).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(said.starts_with(&path.display().to_string()) && said.contains(words), "{said}");
        };
        for damaged in [&whole[..whole.len() / 2], b"{\"kind\": \"bfly-ladder\"}"] {
            std::fs::write(&gz, damaged).at("file")?;
            says(&gz, "is not a whole gzip file");
            assert!(check_replaceable(&gz, LADDER).is_err(), "an unreadable file is not replaced");
        }
        let plain = dir.path().join("half.json");
        std::fs::write(&plain, &whole).at("file")?;
        says(&plain, "is not a whole JSON file");
        Ok(())
    }
}
