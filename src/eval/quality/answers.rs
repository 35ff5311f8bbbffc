//! Answers of variants to sets of samples, resumable.
//!
//! Keys and values of a context are the same under every method with an exact prefill, so the stock model reads each
//! sample's context once and such variants answer in forks of its run ([`Run::fork`](crate::run::Run::fork)).

use super::prompting::{PromptIds, Prompter};
use super::runner::{shared_progress, Runner, Workers};
use super::tasks::{rule, Sample};
use crate::cli::{short_count, Bars};
use crate::error::{Error, Result};
use crate::eval::report::resume::AnswersFile;
use crate::eval::report::{hash, Answer, Cell, KvBytes, ScoringRule, TurnAnswer, VariantRecord};
use crate::eval::variant::Variant;
use crate::method::Method;
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

/// A set with the variants that answer it.
struct Work<'a> {
    set: &'a SampleSet,
    variants: &'a [Variant],
    /// Number of samples that each variant has answered.
    answered: Vec<usize>,
    /// Whether each variant answers in a fork of one run of the stock model that has read the context.
    forks: Vec<bool>,
}

/// The answer of a variant to a sample.
struct Answered {
    /// Index of the variant.
    variant: usize,
    answer: Answer,
    kv: KvBytes,
    /// Seconds of the variant's own work.
    seconds: f64,
}

impl<'a> Work<'a> {
    /// Looks up the answers in `file`.
    ///
    /// # Errors
    /// Answers in `file` of a variant of this name to other prompts, or with another plan; a variant that does not fit
    /// the model.
    fn new(file: &AnswersFile, runner: &Runner, set: &'a SampleSet, variants: &'a [Variant]) -> Result<Self> {
        let answered = |v: &Variant| {
            let hashes = set.samples.iter().map(|(_, p)| hash(&p.ids()));
            file.answered((&v.name, &v.method), (&set.task, set.length), hashes)
        };
        let answered = variants.iter().map(answered).collect::<Result<_>>()?;
        let mut forks = variants.iter().map(|v| runner.forks(v, set.length)).collect::<Result<Vec<_>>>()?;
        // A variant by itself prefills with its own cache, which is smaller than the stock model's. Whether it is by
        // itself does not depend on what is missing: a resumed file is that of one process.
        if forks.iter().filter(|f| **f).count() < 2 {
            forks.fill(false);
        }
        Ok(Self { set, variants, answered, forks })
    }

    /// Returns the index of the first sample that a variant has not answered.
    fn first(&self) -> usize {
        self.answered.iter().copied().min().unwrap_or(0).min(self.set.samples.len())
    }

    /// Returns the variants that have not answered sample `i`: those that answer in a fork, and those that prefill.
    fn missing(&self, i: usize) -> (Vec<usize>, Vec<usize>) {
        let missing = (0..self.variants.len()).filter(|v| self.answered[*v] <= i);
        let shared = !self.set.samples[i].1.context.is_empty();
        missing.partition(|v| shared && self.forks[*v])
    }

    /// Returns the number of tokens to read for sample `i`, answers not counted.
    fn tokens(&self, i: usize) -> usize {
        let (prompt, (forked, own)) = (&self.set.samples[i].1, self.missing(i));
        let context = if forked.is_empty() { 0 } else { prompt.context.len() };
        context + forked.len() * (prompt.tokens() - prompt.context.len()) + own.len() * prompt.tokens()
    }

    /// Prompts the variants that have not answered sample `i` with it. The context is read once for all that can answer
    /// in a fork; the other variants read it themselves.
    fn answer(&self, i: usize, runner: &Runner, prompting: &Prompter, progress: Progress) -> Result<Vec<Answered>> {
        let (sample, prompt) = &self.set.samples[i];
        let (rule, room) = (rule(&self.set.task)?, sample.max_new_tokens);
        let ctx = self.set.length.max(prompt.tokens() + sample.room());
        let (mut forked, own) = self.missing(i);
        let answered = |variant: usize, begin: Instant, (answers, kv): (Vec<(String, usize)>, KvBytes)| {
            let answer = record(sample, prompt, rule, &answers);
            Answered { variant, answer, kv, seconds: begin.elapsed().as_secs_f64() }
        };
        let mut made = vec![];
        for v in own {
            let (variant, begin, mut on_tokens) = (&self.variants[v], Instant::now(), progress.of_text());
            let answers = runner.run(variant, ctx, |run| {
                let before = prompting.read_context(run, prompt, &mut on_tokens)?;
                prompting.answer(run, prompt, (room, variant.question), &mut |n| on_tokens(before + n))
            });
            made.push(answered(v, begin, answers?));
        }
        if forked.is_empty() {
            return Ok(made);
        }
        let mut stock = runner.stock(ctx, |run| prompting.read_context(run, prompt, &mut progress.of_text()))?;
        // The stock model comes last: it answers in the run that the others are forked from.
        forked.sort_by_key(|v| self.variants[*v].method == Method::Stock);
        for v in forked {
            let (variant, begin) = (&self.variants[v], Instant::now());
            let answers = runner.fork(&mut stock, variant, |run| {
                prompting.answer(run, prompt, (room, variant.question), &mut progress.of_text())
            });
            made.push(answered(v, begin, answers?));
        }
        made.sort_by_key(|answered| answered.variant);
        Ok(made)
    }

    /// Adds `answered` to the cells of `file`.
    fn add(&self, file: &mut AnswersFile, answered: Vec<Answered>) -> Result<()> {
        for Answered { variant, answer, kv, seconds } in answered {
            let Variant { name, method, .. } = &self.variants[variant];
            file.add(Cell {
                record: VariantRecord::of(name, method, kv),
                task: self.set.task.clone(),
                rule: rule(&self.set.task)?,
                length: self.set.length,
                seconds,
                answers: vec![answer],
            })?;
        }
        Ok(())
    }
}

/// Tokens read so far by all workers, and where they are shown.
#[derive(Clone, Copy)]
struct Progress<'a> {
    done: &'a AtomicUsize,
    show: &'a (dyn Fn(usize) + Sync),
}

impl<'a> Progress<'a> {
    /// Returns the callback for one text, which takes the tokens read of it.
    fn of_text(self) -> impl FnMut(usize) + 'a {
        shared_progress(self.done, self.show)
    }
}

/// Scores the answers of a sample's turns.
fn record(sample: &Sample, prompt: &PromptIds, rule: ScoringRule, answers: &[(String, usize)]) -> Answer {
    let score = |((answer, tokens), outputs): (&(String, usize), &[String])| TurnAnswer {
        answer: answer.clone(),
        tokens: *tokens,
        score: rule.score(answer, outputs),
    };
    let turns: Vec<TurnAnswer> = answers.iter().zip(sample.outputs()).map(score).collect();
    Answer {
        index: sample.index,
        sha256: hash(&prompt.ids()),
        prompt_tokens: prompt.tokens(),
        depth: sample.depth,
        answer: turns.iter().map(|t| t.answer.as_str()).collect::<Vec<_>>().join("\n"),
        tokens: turns.iter().map(|t| t.tokens).sum(),
        score: turns.iter().map(|t| t.score).sum::<f64>() / turns.len().max(1) as f64,
        turns: if sample.follow_ups.is_empty() { vec![] } else { turns },
    }
}

/// Prompts the variants `variants[i]` with the set `sets[i]` for every `i`, sample by sample, and prints the score of
/// each. Answers are saved in the order of samples; after an error, those before the first missing sample.
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
    let work = sets.iter().zip(variants).map(|(set, variants)| Work::new(file, runners.first(), set, variants));
    let work = work.collect::<Result<Vec<_>>>()?;
    let tokens = |w: &Work| (w.first()..w.set.samples.len()).map(|i| w.tokens(i)).sum::<usize>();
    let total = work.iter().map(tokens).sum::<usize>() as u64;
    let (done, show) = (AtomicUsize::new(0), |n: usize| bars.show("ask", n as u64, total));
    let progress = Progress { done: &done, show: &show };
    for work in &work {
        let (set, first) = (work.set, work.first());
        let answer = |runner: &Runner, i: usize| work.answer(first + i, runner, prompting, progress);
        let answered = runners.each_in_order(set.samples.len() - first, answer, |made| work.add(file, made));
        file.save()?;
        answered?;
        for variant in work.variants {
            let cell = file.cell(&variant.name, &set.task, set.length);
            let cell = cell.ok_or_else(|| Error::usage("--samples", format!("no samples of {}", set.task)))?;
            let score = cell.score().map_or("-".into(), |s| s.show(1));
            bars.say(&format!("{:>5}  {:<16} {:<40} {score}", short_count(set.length), set.task, variant.name));
        }
    }
    bars.show("ask", total, total);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::quality::tasks::FollowUp;

    fn sample(task: &str, turns: &[&[&str]]) -> Sample {
        let outputs = |turn: &[&str]| turn.iter().map(|o| o.to_string()).collect::<Vec<_>>();
        let turn = |o: &&[&str]| FollowUp { outputs: outputs(o), ..FollowUp::default() };
        Sample {
            task: task.into(),
            index: 4,
            input: "Text. What?".into(),
            question_at: Some(6),
            answer_prefix: String::new(),
            outputs: outputs(turns[0]),
            length: 9,
            made_for: None,
            max_new_tokens: 3,
            depth: None,
            follow_ups: turns[1..].iter().map(turn).collect(),
        }
    }

    fn scored(task: &str, turns: &[&[&str]], answers: &[&str]) -> Answer {
        let answers: Vec<_> = answers.iter().map(|a| (a.to_string(), 2)).collect();
        let prompt = PromptIds { context: vec![1, 2], rest: vec![3], follow_ups: vec![vec![4]; turns.len() - 1] };
        record(&sample(task, turns), &prompt, rule(task).expect("rule"), &answers)
    }

    #[test]
    fn turns_are_scored_one_by_one() {
        let turns: [&[&str]; 4] = [&["1234567"], &["7654321"], &["1111111"], &["2222222"]];
        let right = scored("recall_turns", &turns, &[" 1234567.", "7654321", "It is 1111111", "**2222222**"]);
        assert_eq!((right.score, right.tokens, right.prompt_tokens, right.turns.len()), (1.0, 8, 6, 4));
        assert_eq!(right.answer, " 1234567.\n7654321\nIt is 1111111\n**2222222**");
        let partly = scored("recall_turns", &turns, &["1234567", "7654320", "", "2222222"]);
        assert_eq!(partly.score, 0.5);
        assert_eq!(partly.turns.iter().map(|t| t.score).collect::<Vec<_>>(), [1.0, 0.0, 0.0, 1.0]);
        // The right values in other turns are wrong answers.
        let order = scored("recall_turns", &turns, &["7654321", "1234567", "2222222", "1111111"]);
        assert_eq!(order.score, 0.0);
    }

    #[test]
    fn several_values_score_their_share_in_any_order() {
        let values: Vec<String> = (0..16).map(|i| (1_000_000 + i).to_string()).collect();
        let outputs: Vec<&str> = values.iter().map(String::as_str).collect();
        let score = |answer: &[&str]| scored("recall_needles", &[&outputs], &[&answer.join(", ")]).score;
        let backwards: Vec<&str> = outputs.iter().rev().copied().collect();
        assert_eq!((score(&outputs), score(&backwards), score(&outputs[4..])), (1.0, 1.0, 0.75));
        assert_eq!((score(&[outputs[3]; 16]), score(&["999"])), (1.0 / 16.0, 0.0), "a repeated value counts once");
    }

    #[test]
    fn a_count_is_right_or_wrong() {
        let score = |answer: &str| scored("recall_count", &[&["5"]], &[answer]).score;
        assert_eq!((score(" 5."), score(" 15."), score(" 4"), score("five lines")), (1.0, 0.0, 0.0, 1.0));
    }

    #[test]
    fn a_single_question_has_the_record_of_before() {
        let answer = scored("niah_multivalue", &[&["1", "2"]], &["only 2"]);
        let json = serde_json::to_value(&answer).expect("JSON");
        let keys: Vec<&str> = json.as_object().expect("object").keys().map(String::as_str).collect();
        assert_eq!(keys, ["index", "sha256", "prompt_tokens", "answer", "tokens", "score"]);
        assert_eq!((answer.score, answer.answer.as_str(), answer.tokens), (0.5, "only 2", 2));
    }
}
