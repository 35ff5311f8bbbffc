//! Answers of variants to samples of tasks: one cell per task, length and variant, with every sample.

use super::header::Header;
use super::resume::{header_difference, Difference};
use super::rule::ScoringRule;
use super::stats::Estimate;
use super::variant::VariantRecord;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `kind` of a file of answers.
pub const ANSWERS: &str = "bfly-answers";

/// Tasks whose questions are in files that the user brings.
pub const FILE_TASKS: [&str; 2] = ["qa_1", "qa_2"];

/// The means to show over `tasks`, each with its name: one over all, and beside it one over those that need no file of
/// questions, where some do and some do not.
pub fn means<'a>(tasks: &[&'a str]) -> Vec<(String, Vec<&'a str>)> {
    let plain: Vec<&str> = tasks.iter().copied().filter(|t| !FILE_TASKS.contains(t)).collect();
    match plain.len() {
        n if n == 0 || n == tasks.len() => vec![("mean".into(), tasks.to_vec())],
        n => vec![(format!("mean of {n}"), plain), (format!("mean of {}", tasks.len()), tasks.to_vec())],
    }
}

/// Answers to tasks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answers {
    /// Header of kind [`ANSWERS`].
    #[serde(flatten)]
    pub header: Header,
    /// Processes whose files were joined into this one, if it was joined.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub joined: Vec<JoinedPart>,
    /// How samples were made and prompted.
    pub asked: PromptSettings,
    /// One entry per variant, task and length.
    pub cells: Vec<Cell>,
}

/// A process that answered a part of a joined file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JoinedPart {
    /// Start of the process, RFC 3339 in UTC.
    pub started: String,
    /// Command line of the process.
    pub command: Vec<String>,
}

/// How samples were made and prompted: the same for all cells of a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptSettings {
    /// Seed of the samples; null where they were read from a file.
    pub seed: Option<u64>,
    /// File that the samples were read from; null where they were made.
    pub from: Option<String>,
    /// Whether prompts were rendered with the model's chat template.
    pub chat: bool,
    /// Whether methods that evict had to do so before they read the question.
    pub question_unseen: bool,
    /// Tokens to a prefill chunk.
    pub prefill_chunk: usize,
}

/// A variant on the samples of one task and length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Variant and its cache.
    #[serde(flatten)]
    pub record: VariantRecord,
    /// Name of the task.
    pub task: String,
    /// Rule by which its answers are scored.
    pub rule: ScoringRule,
    /// Most tokens of a prompt and its answer together; also the positions provisioned.
    pub length: usize,
    /// Seconds from tokens to answers for all samples together, with `--jobs` in wall-clock time.
    pub seconds: f64,
    /// Every answer.
    pub answers: Vec<Answer>,
}

/// The answer to one sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Number of the sample.
    pub index: usize,
    /// Hash of the prompt's ids.
    pub sha256: String,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Depth of the needle in the context, 0 to 1, in a grid of depths.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<f64>,
    /// Text of the answer.
    pub answer: String,
    /// Tokens of the answer.
    pub tokens: usize,
    /// Score of the answer, 0 to 1.
    pub score: f64,
}

impl Answers {
    /// The first thing in which `other` was measured or prompted otherwise.
    pub fn difference(&self, other: &Self) -> Option<Difference> {
        let show = |a: &PromptSettings| serde_json::to_string(a).unwrap_or_default();
        header_difference(&self.header, &other.header)
            .or_else(|| (self.asked != other.asked).then(|| ("way of asking", show(&self.asked), show(&other.asked))))
    }
}

impl Cell {
    /// The mean score in percent, with its interval.
    pub fn score(&self) -> Option<Estimate> {
        Estimate::of(&self.independent())
    }

    /// Scores in percent of what varies independently: of each sample; in a grid of each needle, as its mean over
    /// depths.
    pub fn independent(&self) -> Vec<f64> {
        let mut depths: Vec<f64> = self.answers.iter().filter_map(|a| a.depth).collect();
        depths.sort_by(f64::total_cmp);
        depths.dedup();
        if depths.is_empty() {
            return self.answers.iter().map(|a| 100.0 * a.score).collect();
        }
        // A grid numbers its samples needle by needle.
        let mut needles: BTreeMap<usize, (f64, usize)> = BTreeMap::new();
        for answer in &self.answers {
            let (sum, count) = needles.entry(answer.index / depths.len()).or_default();
            (*sum, *count) = (*sum + 100.0 * answer.score, *count + 1);
        }
        needles.into_values().map(|(sum, count)| sum / count as f64).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_with_questions_stands_beside_the_one_without() {
        assert_eq!(means(&["vt", "cwe"]), [("mean".to_string(), vec!["vt", "cwe"])]);
        assert_eq!(means(&["qa_1"]), [("mean".to_string(), vec!["qa_1"])]);
        let both = [("mean of 2".to_string(), vec!["vt", "cwe"]), ("mean of 3".to_string(), vec!["vt", "qa_2", "cwe"])];
        assert_eq!(means(&["vt", "qa_2", "cwe"]), both);
    }

    #[test]
    fn a_needle_counts_once_whatever_its_depths() {
        let answer = |index: usize, depth: Option<f64>, score: f64| Answer {
            index,
            sha256: String::new(),
            prompt_tokens: 9,
            depth,
            answer: String::new(),
            tokens: 1,
            score,
        };
        let cell = |answers| Cell {
            record: VariantRecord::test("stock"),
            task: "needle".into(),
            rule: ScoringRule::All,
            length: 9,
            seconds: 0.0,
            answers,
        };
        // Two needles at three depths: one always found, one never.
        let grid: Vec<Answer> =
            (0..6).map(|i| answer(i, Some((i % 3) as f64 / 2.0), if i < 3 { 1.0 } else { 0.0 })).collect();
        assert_eq!(cell(grid).independent(), [100.0, 0.0]);
        let plain = (0..3).map(|i| answer(i, None, 0.5)).collect();
        assert_eq!(cell(plain).independent(), [50.0; 3]);
    }
}
