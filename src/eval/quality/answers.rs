//! Answers of variants to sets of samples, resumable.

use super::prompting::{PromptIds, Prompter};
use super::runner::{shared_progress, Workers};
use super::tasks::{rule, Sample};
use crate::cli::{short_count, Bars};
use crate::error::{Error, Result};
use crate::eval::report::resume::AnswersFile;
use crate::eval::report::{hash, Answer, Cell, VariantRecord};
use crate::eval::variant::Variant;
use std::sync::atomic::AtomicUsize;
use std::time::Instant;

/// Samples of one task at one length, with their prompts.
pub struct SampleSet {
    /// Name of the task.
    pub task: String,
    /// Maximum tokens of a prompt and its answer together.
    pub length: usize,
    /// Samples and their prompts.
    pub samples: Vec<(Sample, PromptIds)>,
}

/// Returns the samples of `set` that `variant` has not answered.
///
/// # Errors
/// Answers in `file` of a variant of this name to other prompts, or with another plan.
fn missing<'a>(file: &AnswersFile, variant: &Variant, set: &'a SampleSet) -> Result<&'a [(Sample, PromptIds)]> {
    let hashes = set.samples.iter().map(|(_, p)| hash(&p.ids()));
    let answered = file.answered((&variant.name, &variant.method), (&set.task, set.length), hashes)?;
    Ok(&set.samples[answered.min(set.samples.len())..])
}

/// Prompts `variant` with the samples of `set` that it has not answered, and saves the answers.
fn answer<'f>(
    file: &'f mut AnswersFile,
    runners: &mut Workers,
    prompting: &Prompter,
    (variant, set): (&Variant, &SampleSet),
    on_tokens: &(dyn Fn(usize) + Sync),
) -> Result<Option<&'f Cell>> {
    let rule = rule(&set.task)?;
    let missing = missing(file, variant, set)?;
    let begin = Instant::now();
    let done = AtomicUsize::new(0);
    let made = runners.each(missing.len(), |runner, i| {
        let (sample, prompt) = &missing[i];
        let room = sample.max_new_tokens;
        let ctx = set.length.max(prompt.tokens() + room);
        let mut on_own = shared_progress(&done, on_tokens);
        let (answer, tokens, kv) = runner.run(variant, ctx, |run| prompting.answer(run, prompt, room, &mut on_own))?;
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
    let (answers, kv): (Vec<_>, Vec<_>) = made.into_iter().unzip();
    let Some(kv) = kv.last() else { return Ok(file.cell(&variant.name, &set.task, set.length)) };
    let record = VariantRecord::of(&variant.name, &variant.method, *kv);
    let (task, length, seconds) = (set.task.clone(), set.length, begin.elapsed().as_secs_f64());
    file.add(Cell { record, task, rule, length, seconds, answers }).map(Some)
}

/// Prompts the variants `variants[i]` with the set `sets[i]` for every `i`, and prints the score of each.
///
/// # Errors
/// A variant that cannot be run; answers of a variant of this name to other prompts; a file that cannot be written.
pub fn answer_all(
    file: &mut AnswersFile,
    runners: &mut Workers,
    prompting: &Prompter,
    variants: &[Vec<Variant>],
    sets: &[SampleSet],
    bars: &Bars,
) -> Result<()> {
    let tokens = |samples: &[(Sample, PromptIds)]| samples.iter().map(|(_, p)| p.tokens()).sum::<usize>();
    let mut total = 0;
    for (set, variant) in sets.iter().zip(variants).flat_map(|(s, all)| all.iter().map(move |v| (s, v))) {
        total += tokens(missing(file, variant, set)?);
    }
    let mut done = 0;
    for (set, variants) in sets.iter().zip(variants) {
        for variant in variants {
            let own = tokens(missing(file, variant, set)?);
            let on_tokens = |n: usize| bars.show("ask", (done + n) as u64, total as u64);
            let cell = answer(file, runners, prompting, (variant, set), &on_tokens)?;
            let cell = cell.ok_or_else(|| Error::usage("--samples", format!("no samples of {}", set.task)))?;
            let score = cell.score().map_or("-".into(), |s| s.show(1));
            bars.say(&format!("{:>5}  {:<16} {:<40} {score}", short_count(set.length), set.task, variant.name));
            done += own;
        }
    }
    bars.show("ask", total as u64, total as u64);
    Ok(())
}
