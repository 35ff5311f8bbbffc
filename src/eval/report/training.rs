//! Log of a training run of the character model: JSON lines, one object a step.

use super::file::contents;
use crate::error::{Error, Result};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Kind of a training log, which has no `kind` key.
pub const TRAINING: &str = "bfly-char-log";

/// One step of a training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingStep {
    /// Number of the step, from 1.
    pub step: u64,
    /// Training loss of the step; null where it was not finite.
    // With a function of its own, a missing key is an error rather than null.
    #[serde(deserialize_with = "Option::deserialize")]
    pub bits_per_character: Option<f64>,
    /// Loss on held-out windows; absent at steps without an evaluation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_out_bits_per_character: Option<f64>,
    /// What the step predicted where it was not text: `recall` for letters to recall.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<String>,
}

/// Returns whether a file is a training log by its first line, or by its name where it is empty.
pub(super) fn is_log(path: &Path, text: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct First {
        kind: Option<IgnoredAny>,
        #[serde(rename = "step")]
        _step: u64,
        #[serde(rename = "bits_per_character", deserialize_with = "Option::deserialize")]
        _bits: Option<f64>,
    }
    if text.trim_ascii().is_empty() {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        return name.strip_suffix(".gz").unwrap_or(&name).ends_with(".jsonl");
    }
    let first = text.split(|byte| *byte == b'\n').next().unwrap_or_default();
    serde_json::from_slice::<First>(first).is_ok_and(|first| first.kind.is_none())
}

/// Reads a training log, compressed where its name ends in `.gz`.
///
/// The last line may be cut off: a run that goes on, or was killed, has written a part of it.
///
/// # Errors
/// A file that cannot be read, is empty, has a line that is not a step, or whose steps do not rise.
pub fn read_log(path: &Path) -> Result<Vec<TrainingStep>> {
    let text = contents(path)?;
    let mut steps: Vec<TrainingStep> = vec![];
    for (number, line) in (1..).zip(text.split_inclusive(|byte| *byte == b'\n')) {
        let step: TrainingStep = match serde_json::from_slice(line) {
            Ok(step) => step,
            Err(_) if line.trim_ascii().is_empty() || !line.ends_with(b"\n") => continue,
            Err(e) => return Err(Error::format(path.display(), format!("line {number} is not a training step: {e}"))),
        };
        if let Some(last) = steps.last().filter(|last| last.step >= step.step) {
            let message = format!("line {number} is of step {}, after step {}", step.step, last.step);
            return Err(Error::format(path.display(), message));
        }
        steps.push(step);
    }
    match steps.is_empty() {
        true => Err(Error::format(path.display(), "is a training log without steps")),
        false => Ok(steps),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::At;
    use crate::eval::report::{kind_of, save};

    const STEP: &str = r#"{"step":1,"bits_per_character":8.5,"gradient_norm":2.0}"#;

    #[test]
    fn a_log_is_known_by_its_first_line() {
        let known = |name: &str, text: &str| is_log(Path::new(name), text.as_bytes());
        assert!(known("log.jsonl", STEP) && known("a.json", &format!("{STEP}\nhalf")));
        assert!(known("log.jsonl", r#"{"step":1,"bits_per_character":null}"#));
        assert!(known("log.jsonl.gz", "\n") && !known("log.json", ""));
        for other in [r#"{"step":1}"#, r#"{"kind":"a","step":1,"bits_per_character":1.0}"#, "{", "[1]"] {
            assert!(!known("log.jsonl", other), "{other}");
        }
    }

    #[test]
    fn lines_that_are_not_steps_are_refused_by_number_and_a_cut_last_line_is_not() -> Result<()> {
        let dir = tempfile::tempdir().at("temporary folder")?;
        let path = dir.path().join("log.jsonl");
        let read = |text: &str| {
            std::fs::write(&path, text).at(path.display())?;
            read_log(&path)
        };
        let second = r#"{"step":2,"bits_per_character":null,"held_out_bits_per_character":4.25}"#;
        let steps = read(&format!("{STEP}\n{second}\n{{\"step\":3,\"bi"))?;
        assert_eq!(steps.iter().map(|s| s.bits_per_character).collect::<Vec<_>>(), [Some(8.5), None]);
        assert_eq!(steps[1].held_out_bits_per_character, Some(4.25));
        for (text, words) in [
            ("", "without steps"),
            (&format!("{STEP}\n{{\"step\":2}}\n"), "line 2 is not a training step: missing field `bits_per_character`"),
            (&format!("{STEP}\n{STEP}\n"), "line 2 is of step 1, after step 1"),
        ] {
            let said = read(text).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(said.starts_with(&path.display().to_string()) && said.contains(words), "{said}");
        }
        assert_eq!(kind_of(&path)?, TRAINING);
        let gz = dir.path().join("log.jsonl.gz");
        save(&gz, &steps[1])?;
        assert_eq!((kind_of(&gz)?.as_str(), read_log(&gz)?.as_slice()), (TRAINING, &steps[1..]));
        Ok(())
    }
}
