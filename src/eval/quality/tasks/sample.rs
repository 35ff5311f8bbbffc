//! Samples, each a prompt with its expected answer, and their files: one JSON object per line, with RULER's field names
//! and additional fields.

use super::{find, question_at, rule};
use crate::cli::Output;
use crate::error::{At, Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::io::BufRead;
use std::path::Path;

/// A prompt and the strings that its answer should contain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Name of the task.
    #[serde(default)]
    pub task: String,
    /// Index of the sample; in RULER's own files of needle tasks the place of the answer in characters.
    pub index: usize,
    /// Prompt without `answer_prefix`.
    pub input: String,
    /// Byte offset of the question in `input`; everything before it is context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub question_at: Option<usize>,
    /// Start of the answer, which the model continues.
    #[serde(default)]
    pub answer_prefix: String,
    /// Strings that the answer should contain.
    pub outputs: Vec<String>,
    /// Tokens of the prompt, of the follow-up questions and of the longest answers together.
    pub length: usize,
    /// Requested length in tokens, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_for: Option<usize>,
    /// Maximum tokens of the answer, and of the answer to each follow-up question.
    #[serde(default)]
    pub max_new_tokens: usize,
    /// Share of the context before the needle, 0 to 1; null outside depth grids.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<f64>,
    /// Questions asked in later turns, each after the answer of the turn before; empty for a single question.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub follow_ups: Vec<FollowUp>,
}

/// A question asked in a later turn, over the same context and after the earlier answers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct FollowUp {
    /// Question, without the context.
    pub question: String,
    /// Start of the answer, which the model continues.
    #[serde(default)]
    pub answer_prefix: String,
    /// Strings that the answer should contain.
    pub outputs: Vec<String>,
}

impl FollowUp {
    /// Returns the text of the turn: the question and the start of its answer.
    pub fn prompt(&self) -> String {
        format!("{}{}", self.question, self.answer_prefix)
    }
}

/// Values for fields that files written by RULER lack.
#[derive(Debug, Clone, Copy, Default)]
pub struct SampleDefaults<'a> {
    /// Task of samples without one.
    pub task: Option<&'a str>,
    /// Maximum tokens of an answer; `None` takes the task's.
    pub max_new_tokens: Option<usize>,
}

impl Sample {
    /// Returns the whole prompt of the first turn, the start of the answer included.
    pub fn prompt(&self) -> String {
        format!("{}{}", self.input, self.answer_prefix)
    }

    /// Returns the prompt before the question.
    ///
    /// # Errors
    /// A sample without the place of its question.
    pub fn context(&self) -> Result<&str> {
        self.split().map(|(context, _)| context)
    }

    /// Returns the prompt after [`Self::context`]: the question and the start of the answer.
    ///
    /// # Errors
    /// A sample without the place of its question.
    pub fn question(&self) -> Result<String> {
        self.split().map(|(_, question)| format!("{question}{}", self.answer_prefix))
    }

    /// Returns the strings that each turn's answer should contain.
    pub fn outputs(&self) -> impl Iterator<Item = &[String]> {
        std::iter::once(&self.outputs[..]).chain(self.follow_ups.iter().map(|turn| &turn.outputs[..]))
    }

    /// Returns the maximum tokens of all answers together.
    pub fn room(&self) -> usize {
        self.max_new_tokens * (1 + self.follow_ups.len())
    }

    fn split(&self) -> Result<(&str, &str)> {
        self.question_at.and_then(|at| self.input.split_at_checked(at)).ok_or_else(|| {
            let place = format!("sample {} of {}", self.index, self.task);
            let message = "has no `question_at`, and its question does not follow RULER's template";
            Error::format(place, message)
        })
    }

    /// Returns why the sample cannot be scored or split; `None` for a valid sample.
    fn fault(&self) -> Option<String> {
        // The empty string occurs in every answer.
        if self.outputs().any(|outputs| outputs.is_empty() || outputs.iter().any(|o| o.trim().is_empty())) {
            return Some("`outputs` is empty: there is nothing to score an answer by".into());
        }
        let at = self.question_at.filter(|at| !self.input.is_char_boundary(*at))?;
        Some(format!("`question_at` {at} is not the offset of a character of `input` ({} bytes)", self.input.len()))
    }
}

/// Checks that `path` can be written, and that it is not an existing file other than samples.
///
/// # Errors
/// A path that cannot be written or must not be replaced, with the reason.
pub fn check_replaceable(path: &Path, flag: &'static str) -> Result<()> {
    let fault = |json: bool| {
        let mut first = vec![];
        if json {
            let file = std::fs::File::open(path).at(path.display())?;
            std::io::BufReader::new(file).read_until(b'\n', &mut first).at(path.display())?;
        }
        let sample = serde_json::from_slice::<Sample>(&first);
        Ok(sample.is_err().then(|| "holds no samples; only a file of samples is replaced".into()))
    };
    Output::check_replaceable(path, flag, fault)
}

/// Reads a file of samples written by bfly or by RULER.
///
/// # Errors
/// A file that cannot be read or is empty; a line that is not a valid sample, with its number.
pub fn read(path: &Path, missing: SampleDefaults) -> Result<Vec<Sample>> {
    let text = std::fs::read_to_string(path).at(path.display())?;
    let at_line = |i: usize, what: String| Error::format(format!("{}: line {}", path.display(), i + 1), what);
    let parse = |(i, line): (usize, &str)| {
        let wrong = |what| at_line(i, what);
        let mut sample: Sample = serde_json::from_str(line).map_err(|e| wrong(format!("not a sample: {e}")))?;
        if sample.task.is_empty() {
            let task = missing.task.ok_or_else(|| wrong("has no `task`; name one task with --tasks".into()))?;
            sample.task = task.into();
        }
        if sample.max_new_tokens == 0 {
            let own = || find(&sample.task).ok().map(|t| t.max_new_tokens);
            let room = missing.max_new_tokens.or_else(own);
            sample.max_new_tokens =
                room.ok_or_else(|| wrong("has no `max_new_tokens`, the maximum tokens of an answer".into()))?;
        }
        rule(&sample.task).map_err(|e| wrong(e.to_string()))?;
        // RULER's own files do not have it.
        sample.question_at = sample.question_at.or_else(|| question_at(&sample.task, &sample.input));
        sample.fault().map_or(Ok(sample), |what| Err(wrong(what)))
    };
    let samples = text.lines().enumerate().map(parse).collect::<Result<Vec<_>>>()?;
    // A repeated sample would count as two independent ones.
    let mut seen = HashMap::new();
    for (i, sample) in samples.iter().enumerate() {
        if let Some(before) =
            seen.insert((&sample.task, &sample.input, &sample.answer_prefix, &sample.follow_ups), i + 1)
        {
            return Err(at_line(i, format!("repeats the sample of line {before}")));
        }
    }
    match samples.is_empty() {
        true => Err(Error::format(path.display(), "is empty")),
        false => Ok(samples),
    }
}

/// Writes samples to `path`, which `flag` names, atomically.
///
/// # Errors
/// No samples, a sample that could not be read back, or a path that cannot be written.
pub fn write(path: &Path, samples: &[Sample], flag: &'static str) -> Result<()> {
    let output = Output::reserve(path, flag)?;
    let place = || format!("{flag} {}", path.display());
    let mut bytes = vec![];
    for sample in samples {
        if let Some(what) = sample.fault() {
            return Err(Error::format(format!("{}: sample {}", place(), sample.index), what));
        }
        serde_json::to_writer(&mut bytes, sample).map_err(|e| Error::format(place(), e))?;
        bytes.push(b'\n');
    }
    match bytes.is_empty() {
        true => Err(Error::usage(place(), "there are no samples to write")),
        false => output.write(&bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Sample {
        Sample {
            task: "vt".into(),
            index: 3,
            input: "Ein Stück\nText. Wo?".into(),
            question_at: Some(17),
            answer_prefix: " Da:".into(),
            outputs: vec!["é".into()],
            length: 40,
            made_for: None,
            max_new_tokens: 30,
            depth: Some(0.25),
            follow_ups: vec![],
        }
    }

    #[test]
    fn a_prompt_splits_into_context_and_question() -> Result<()> {
        let s = sample();
        assert_eq!((s.context()?, s.question()?.as_str()), ("Ein Stück\nText. ", "Wo? Da:"));
        assert_eq!(s.prompt(), "Ein Stück\nText. Wo? Da:");
        let error = Sample { question_at: None, ..s }.context().expect_err("unknown").to_string();
        assert!(error.contains("sample 3 of vt") && error.contains("question_at"), "{error}");
        Ok(())
    }

    #[test]
    fn follow_up_questions_are_written_only_where_there_are_any() -> Result<()> {
        let dir = tempfile::tempdir().at("temporary folder")?;
        let path = dir.path().join("samples.jsonl");
        let turn = |question: &str, output: &str| FollowUp {
            question: question.into(),
            answer_prefix: " Da:".into(),
            outputs: vec![output.into()],
        };
        let several = Sample { follow_ups: vec![turn("Wann?", "1"), turn("Wie?", "2")], ..sample() };
        // Samples that differ in a later turn alone are two samples.
        let samples = [sample(), several.clone(), Sample { follow_ups: vec![turn("Wann?", "1")], ..sample() }];
        write(&path, &samples, "--out")?;
        let text = std::fs::read_to_string(&path).at("file")?;
        let written: Vec<bool> = text.lines().map(|line| line.contains("follow_ups")).collect();
        assert_eq!(written, [false, true, true], "{text}");
        assert_eq!(read(&path, SampleDefaults::default())?, samples);
        assert_eq!(several.outputs().map(|o| o[0].as_str()).collect::<Vec<_>>(), ["é", "1", "2"]);
        assert_eq!((several.room(), sample().room()), (90, 30));
        let bad = Sample { follow_ups: vec![turn("Wann?", " ")], ..sample() };
        assert!(write(&path, &[bad], "--out").is_err_and(|e| e.to_string().contains("`outputs` is empty")));
        Ok(())
    }

    #[test]
    fn files_read_back_unchanged() -> Result<()> {
        let dir = tempfile::tempdir().at("temporary folder")?;
        let path = dir.path().join("samples.jsonl");
        let samples =
            [sample(), Sample { depth: None, question_at: None, index: 4, input: "Ein Buch.".into(), ..sample() }];
        write(&path, &samples, "--out")?;
        assert_eq!(read(&path, SampleDefaults::default())?, samples);
        // Samples that could not be read back are not written, and no temporary file is left.
        let bad = [sample(), Sample { outputs: vec![], ..sample() }];
        let error = write(&path, &bad, "--out").expect_err("no outputs").to_string();
        assert!(error.contains("--out") && error.contains("`outputs` is empty"), "{error}");
        assert!(write(&path, &[], "--out").is_err());
        assert_eq!(read(&path, SampleDefaults::default())?.len(), 2, "the earlier file stays");
        assert_eq!(std::fs::read_dir(dir.path()).at("temporary folder")?.count(), 1);
        Ok(())
    }

    #[test]
    fn rulers_own_files_are_read() -> Result<()> {
        let dir = tempfile::tempdir().at("temporary folder")?;
        let path = dir.path().join("validation.jsonl");
        let line = r#"{"index": 17, "input": "caf\u00e9?", "outputs": ["1"], "length": 300, "length_w_model_temp": 300, "answer_prefix": " is", "token_position_answer": 9}"#;
        std::fs::write(&path, format!("{line}\n")).at("file")?;
        let error = read(&path, SampleDefaults::default()).expect_err("no task").to_string();
        assert!(error.contains("validation.jsonl: line 1") && error.contains("`task`"), "{error}");
        let known = read(&path, SampleDefaults { task: Some("qa_1"), max_new_tokens: None })?;
        assert_eq!(
            (known[0].task.as_str(), known[0].max_new_tokens, known[0].prompt()),
            ("qa_1", 32, "café? is".into())
        );
        assert_eq!(known[0].question_at, None, "it does not ask as the template does");
        let (before, asks) = (
            "Documents.\n\n",
            "Answer the question based on the given documents. Only give me the answer and do not output \
                              any other words.\n\nQuestion: Who?",
        );
        std::fs::write(
            &path,
            serde_json::json!({"index": 0, "input": format!("{before}{asks}"), "outputs": ["1"], "length": 9})
                .to_string(),
        )
        .at("file")?;
        let found = &read(&path, SampleDefaults { task: Some("qa_1"), max_new_tokens: None })?[0];
        assert_eq!((found.context()?, found.question()?.as_str()), (before, asks));
        std::fs::write(&path, format!("{line}\n")).at("file")?;
        let own = SampleDefaults { task: Some("mine"), max_new_tokens: None };
        assert!(read(&path, own).expect_err("no room").to_string().contains("max_new_tokens"));
        let roomy = |task| read(&path, SampleDefaults { task: Some(task), max_new_tokens: Some(7) });
        assert_eq!(roomy("qa_1")?[0].max_new_tokens, 7);
        let error = roomy("mine").expect_err("no rule to score it by").to_string();
        assert!(error.contains("validation.jsonl: line 1") && error.contains("`mine` is not one of"), "{error}");
        Ok(())
    }

    #[test]
    fn bad_lines_are_named() -> Result<()> {
        let dir = tempfile::tempdir().at("temporary folder")?;
        let path = dir.path().join("samples.jsonl");
        let good = serde_json::to_string(&sample()).expect("JSON");
        let says = |text: String, words: &[&str]| -> Result<()> {
            std::fs::write(&path, text).at("file")?;
            let error = read(&path, SampleDefaults::default()).expect_err(words[0]).to_string();
            assert!(words.iter().all(|w| error.contains(w)), "{error} should say {words:?}");
            Ok(())
        };
        says(String::new(), &["samples.jsonl", "empty"])?;
        says(format!("{good}\n{{\n"), &["samples.jsonl: line 2", "not a sample"])?;
        says(format!("{good}\n\n{good}\n"), &["line 2", "not a sample"])?;
        says(good.replace("\"index\":3", "\"index\":-3"), &["line 1", "-3"])?;
        says(format!("{good}\n{}", good.replace("[\"é\"]", "[]")), &["line 2", "`outputs` is empty"])?;
        says(good.replace("\"question_at\":17", "\"question_at\":7"), &["line 1", "`question_at` 7", "character"])?;
        says(good.replace("\"question_at\":17", "\"question_at\":99"), &["line 1", "`question_at` 99", "20 bytes"])?;
        says(good.replace("\"input\"", "\"in\""), &["line 1", "input"])
    }
}
