//! Answers of variants to sets of samples: a cell per task, length and variant, each sample kept, taken up again where it was cut off.

use super::format::VariantRecord;
use super::prompting::{Prompt, Prompting};
use super::runner::{together, Runners};
use super::stats::Estimate;
use super::tasks::{rule, Rule, Sample};
use crate::cli::{short_count, Bars};
use crate::error::{Error, Result};
use crate::eval::bench::file::{another, header_difference, prove_writable, save, Difference};
use crate::eval::bench::format::{read, Header};
use crate::eval::bench::prompt::hash;
use crate::eval::variant::Variant;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

/// `kind` of a file of answers.
pub const ANSWERS: &str = "bfly-answers";

/// Answers to tasks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answers {
    /// Of kind [`ANSWERS`].
    #[serde(flatten)]
    pub header: Header,
    /// What it was joined from, if it was.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub joined: Vec<Joined>,
    /// How samples were made and put.
    pub asked: Asked,
    /// One entry per variant, task and length.
    pub cells: Vec<Cell>,
}

/// A process that answered a part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Joined {
    /// When it began.
    pub started: String,
    /// Its command.
    pub command: Vec<String>,
}

/// How samples were made and put: the same for all of a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    /// Seed of the samples; null where they were read from a file.
    pub seed: Option<u64>,
    /// The file of samples that was read.
    pub from: Option<String>,
    /// Whether prompts went into the model's chat template.
    pub chat: bool,
    /// Whether methods that evict did so before they had read the question.
    pub question_unseen: bool,
    /// Tokens to a prefill chunk.
    pub prefill_chunk: usize,
}

/// A variant on the samples of one task and length.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// What was run, and what it held.
    #[serde(flatten)]
    pub record: VariantRecord,
    /// The task.
    pub task: String,
    /// How its answers are scored.
    pub rule: Rule,
    /// Tokens of a prompt and its answer, at most; also the positions provisioned.
    pub length: usize,
    /// Seconds for all samples, tokens to answers; with --jobs, of all together.
    pub seconds: f64,
    /// Every sample.
    pub answers: Vec<Answer>,
}

/// An answer to a sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    /// Number of the sample.
    pub index: usize,
    /// Hash of the prompt's ids.
    pub sha256: String,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Where the needle lies, in a grid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<f64>,
    /// The answer's text,
    pub answer: String,
    /// its tokens,
    pub tokens: usize,
    /// and its score, 0 to 1.
    pub score: f64,
}

impl Answers {
    /// The first thing in which `other` was measured or asked otherwise: what, here, there.
    pub fn difference(&self, other: &Self) -> Option<Difference> {
        let show = |a: &Asked| serde_json::to_string(a).unwrap_or_default();
        header_difference(&self.header, &other.header)
            .or_else(|| (self.asked != other.asked).then(|| ("way of asking", show(&self.asked), show(&other.asked))))
    }
}

impl Cell {
    /// The mean score in percent, with its interval.
    pub fn score(&self) -> Option<Estimate> {
        Estimate::of(&self.independent())
    }

    /// Scores in percent of what varies independently: samples; of a grid needles, each with its mean over the depths that it lay at.
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

/// Samples of one task and length, ready to be put.
pub struct Set {
    /// The task.
    pub task: String,
    /// Tokens of a prompt and its answer, at most.
    pub length: usize,
    /// The samples with their tokens.
    pub samples: Vec<(Sample, Prompt)>,
}

/// A file of answers and where it is kept.
pub struct AnswersFile {
    path: Option<PathBuf>,
    /// What is in it.
    pub answers: Answers,
}

impl AnswersFile {
    /// Begins, or goes on where an earlier run at `path` stopped.
    ///
    /// # Errors
    /// No way to write there; a file that is none of these, or of something else: what differs.
    pub fn open(path: Option<&Path>, header: Header, asked: Asked) -> Result<Self> {
        let fresh = Answers { header, joined: vec![], asked, cells: vec![] };
        let Some(place) = path else { return Ok(Self { path: None, answers: fresh }) };
        prove_writable(place)?;
        if !place.exists() {
            return Ok(Self { path: path.map(Into::into), answers: fresh });
        }
        let mut answers: Answers = read(place, ANSWERS)?;
        if let Some(differs) = answers.difference(&fresh) {
            return Err(another(place, differs));
        }
        answers.header.resumed.push(fresh.header.started);
        Ok(Self { path: path.map(Into::into), answers })
    }

    /// The cell of a variant, with the answers that it has.
    fn find(&self, variant: &Variant, set: &Set) -> Option<usize> {
        let key = (&variant.name, &set.task, set.length);
        self.answers.cells.iter().position(|c| (&c.record.variant, &c.task, c.length) == key)
    }

    /// Samples of `set` that `variant` has yet to answer.
    ///
    /// # Errors
    /// Answers to other prompts under the same name.
    pub fn missing<'a>(&self, variant: &Variant, set: &'a Set) -> Result<&'a [(Sample, Prompt)]> {
        let Some(at) = self.find(variant, set) else { return Ok(&set.samples) };
        let had = &self.answers.cells[at];
        let same = had.answers.iter().zip(&set.samples).all(|(a, (_, p))| a.sha256 == hash(&p.ids()));
        if !same
            || (had.record.plan.as_ref(), had.record.eviction.as_ref())
                != (variant.method.plan(), variant.method.eviction())
        {
            let message = format!(
                "holds answers of {} to {} at {} with other prompts or another plan; choose another --out",
                variant.name,
                set.task,
                short_count(set.length)
            );
            return Err(Error::usage("--out", message));
        }
        Ok(&set.samples[had.answers.len().min(set.samples.len())..])
    }

    /// Puts what is missing of `set` to `variant`, and saves.
    ///
    /// # Errors
    /// A variant that cannot be run; no way to write.
    pub fn ask(
        &mut self,
        runners: &mut Runners,
        asking: &Prompting,
        (variant, set): (&Variant, &Set),
        on_tokens: &(dyn Fn(usize) + Sync),
    ) -> Result<&Cell> {
        let rule = rule(&set.task)?;
        let missing = self.missing(variant, set)?;
        let begin = Instant::now();
        let done = AtomicUsize::new(0);
        let made = runners.each(missing.len(), |runner, i| {
            let (sample, prompt) = &missing[i];
            let room = sample.max_new_tokens;
            let ctx = set.length.max(prompt.tokens() + room);
            let mut on_own = together(&done, on_tokens);
            let (answer, tokens, kv) = runner.run(variant, ctx, |run| asking.answer(run, prompt, room, &mut on_own))?;
            let answer = Answer {
                index: sample.index,
                sha256: hash(&prompt.ids()),
                prompt_tokens: prompt.tokens(),
                depth: sample.depth,
                score: rule.score(&answer, &sample.outputs),
                answer,
                tokens,
            };
            Ok((answer, kv))
        })?;
        let (made, held): (Vec<_>, Vec<_>) = made.into_iter().unzip();
        let record = held.into_iter().next_back().map(|kv| VariantRecord::of(variant, kv));
        let at = match (self.find(variant, set), record) {
            (Some(at), _) => at,
            (None, Some(record)) => {
                let (task, length) = (set.task.clone(), set.length);
                self.answers.cells.push(Cell { record, task, rule, length, seconds: 0.0, answers: vec![] });
                self.answers.cells.len() - 1
            }
            (None, None) => return Err(Error::usage("--samples", format!("no samples of {}", set.task))),
        };
        let cell = &mut self.answers.cells[at];
        cell.answers.extend(made);
        cell.seconds += begin.elapsed().as_secs_f64();
        if let Some(path) = &self.path {
            save(path, &self.answers)?;
        }
        Ok(&self.answers.cells[at])
    }
}

/// Puts every set to its variants, and says what came of each.
///
/// # Errors
/// As [`AnswersFile::ask`].
pub fn ask_all(
    file: &mut AnswersFile,
    runners: &mut Runners,
    asking: &Prompting,
    variants: &[Vec<Variant>],
    sets: &[Set],
    bars: &Bars,
) -> Result<()> {
    let tokens = |samples: &[(Sample, Prompt)]| samples.iter().map(|(_, p)| p.tokens()).sum::<usize>();
    let mut total = 0;
    for (set, variant) in sets.iter().zip(variants).flat_map(|(s, all)| all.iter().map(move |v| (s, v))) {
        total += tokens(file.missing(variant, set)?);
    }
    let mut done = 0;
    for (set, variants) in sets.iter().zip(variants) {
        for variant in variants {
            let own = tokens(file.missing(variant, set)?);
            let on_tokens = |n: usize| bars.show("ask", (done + n) as u64, total as u64);
            let cell = file.ask(runners, asking, (variant, set), &on_tokens)?;
            let score = cell.score().map_or("-".into(), |s| s.show(1));
            bars.say(&format!("{:>5}  {:<16} {:<40} {score}", short_count(set.length), set.task, variant.name));
            done += own;
        }
    }
    bars.show("ask", total as u64, total as u64);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
            rule: Rule::All,
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
