//! Answers of variants to the samples of tasks: one cell per task, length and variant, with every answer.

use super::header::Header;
use super::resume::{header_difference, Difference};
use super::rule::ScoringRule;
use super::variant::VariantRecord;
use crate::stats::Estimate;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `kind` of an answers file.
pub const ANSWERS: &str = "bfly-answers";

/// Tasks whose questions come from files that the user provides.
pub const FILE_TASKS: [&str; 2] = ["qa_1", "qa_2"];

/// Start of the names of the recall tasks, which are not RULER's.
const RECALL_PREFIX: &str = "recall_";

/// Returns the means to show over `tasks`, each with its name and tasks. It is one mean over all tasks, preceded by the
/// mean over those outside [`FILE_TASKS`] and the recall tasks where `tasks` holds others too, so that it compares with
/// results of RULER's generated tasks alone.
pub fn means<'a>(tasks: &[&'a str]) -> Vec<(String, Vec<&'a str>)> {
    let added = |task: &&str| FILE_TASKS.contains(task) || task.starts_with(RECALL_PREFIX);
    let plain: Vec<&str> = tasks.iter().copied().filter(|t| !added(t)).collect();
    match plain.len() {
        n if n == 0 || n == tasks.len() => vec![("mean".into(), tasks.to_vec())],
        n => vec![(format!("mean of {n}"), plain), (format!("mean of {}", tasks.len()), tasks.to_vec())],
    }
}

/// Results of the tasks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answers {
    /// Header of kind [`ANSWERS`].
    #[serde(flatten)]
    pub header: Header,
    /// Processes whose files were joined into this one; empty for the file of one process.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub joined: Vec<JoinedPart>,
    /// How samples were generated and prompted.
    #[serde(alias = "asked")]
    pub prompting: PromptSettings,
    /// One entry per variant, task and length.
    pub cells: Vec<Cell>,
}

/// A process that produced a part of a joined file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JoinedPart {
    /// Start of the process, RFC 3339 in UTC.
    pub started: String,
    /// Command line of the process.
    pub command: Vec<String>,
}

/// How samples were generated and prompted, the same for all cells of a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptSettings {
    /// Seed of the samples; null for samples read from a file.
    pub seed: Option<u64>,
    /// File that the samples were read from; null for generated samples.
    pub from: Option<String>,
    /// Whether prompts were rendered with the model's chat template.
    pub chat: bool,
    /// Whether eviction took place before the question was read.
    pub question_unseen: bool,
    /// Prefill chunk in tokens.
    pub prefill_chunk: usize,
}

/// Answers of one variant to the samples of one task at one length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Variant and its cache.
    #[serde(flatten)]
    pub record: VariantRecord,
    /// Name of the task.
    pub task: String,
    /// Scoring rule of the task.
    pub rule: ScoringRule,
    /// Maximum tokens of a prompt and its answers together; also the positions provisioned.
    pub length: usize,
    /// Seconds of the variant's own work, summed over samples: from prompt tokens to answers, where the variant has
    /// prefilled the context itself; for the questions and answers alone, with the fork of the stock model's cache,
    /// where variants share one prefill of the context.
    pub seconds: f64,
    /// One entry per sample.
    pub answers: Vec<Answer>,
}

/// The answer to one sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Index of the sample.
    pub index: usize,
    /// Hash of the prompt's ids.
    pub sha256: String,
    /// Tokens of the prompt, the questions of later turns included.
    pub prompt_tokens: usize,
    /// Depth of the needle in the context, 0 to 1; null outside depth grids.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<f64>,
    /// Text of the answer; the answers of several turns are joined by line breaks.
    pub answer: String,
    /// Tokens of the answer, those of all turns together.
    pub tokens: usize,
    /// Score of the answer, 0 to 1; the mean over its turns.
    pub score: f64,
    /// Answer of each turn; empty for a sample with a single question.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub turns: Vec<TurnAnswer>,
}

/// The answer to the question of one turn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TurnAnswer {
    /// Text of the answer.
    pub answer: String,
    /// Tokens of the answer.
    pub tokens: usize,
    /// Score of the answer, 0 to 1.
    pub score: f64,
}

impl Answers {
    /// Returns the first difference between this measurement and `other` that forbids mixing their cells.
    pub fn difference(&self, other: &Self) -> Option<Difference> {
        let show = |a: &PromptSettings| serde_json::to_string(a).unwrap_or_default();
        header_difference(&self.header, &other.header).or_else(|| {
            (self.prompting != other.prompting)
                .then(|| ("set of prompt settings", show(&self.prompting), show(&other.prompting)))
        })
    }
}

impl Cell {
    /// Returns the mean score in percent with its confidence interval; `None` without answers.
    pub fn score(&self) -> Option<Estimate> {
        Estimate::of(&self.independent())
    }

    /// Returns the independent scores in percent: one per sample, or in a depth grid one per needle, its mean over
    /// depths.
    pub fn independent(&self) -> Vec<f64> {
        let mut depths: Vec<f64> = self.answers.iter().filter_map(|a| a.depth).collect();
        depths.sort_by(f64::total_cmp);
        depths.dedup();
        if depths.is_empty() {
            return self.answers.iter().map(|a| 100.0 * a.score).collect();
        }
        // A grid's sample indices run over the depths of one needle, then over those of the next.
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
    fn the_mean_without_file_tasks_comes_before_the_mean_of_all() {
        assert_eq!(means(&["vt", "cwe"]), [("mean".to_string(), vec!["vt", "cwe"])]);
        assert_eq!(means(&["qa_1"]), [("mean".to_string(), vec!["qa_1"])]);
        let both = [("mean of 2".to_string(), vec!["vt", "cwe"]), ("mean of 3".to_string(), vec!["vt", "qa_2", "cwe"])];
        assert_eq!(means(&["vt", "qa_2", "cwe"]), both);
        let tasks = ["vt", "recall_turns", "recall_count"];
        assert_eq!(means(&tasks), [("mean of 1".to_string(), vec!["vt"]), ("mean of 3".to_string(), tasks.to_vec())]);
        assert_eq!(means(&tasks[1..]), [("mean".to_string(), tasks[1..].to_vec())]);
    }

    #[test]
    fn a_needle_counts_once_however_many_depths_it_has() {
        let answer = |index: usize, depth: Option<f64>, score: f64| Answer {
            index,
            sha256: String::new(),
            prompt_tokens: 9,
            depth,
            answer: String::new(),
            tokens: 1,
            score,
            turns: vec![],
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
