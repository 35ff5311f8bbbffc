//! Answers of variants to sets of samples, resumable.

use super::prompting::{PromptIds, Prompter};
use super::runner::{shared_progress, Workers};
use super::tasks::{rule, Sample};
use crate::cli::{short_count, Bars};
use crate::error::{Error, Result};
use crate::eval::report::resume::AnswersFile;
use crate::eval::report::{hash, Answer, Cell, ScoringRule, TurnAnswer, VariantRecord};
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
        let ctx = set.length.max(prompt.tokens() + sample.room());
        let room = sample.max_new_tokens;
        let mut on_own = shared_progress(&done, on_tokens);
        let (answers, kv) = runner.run(variant, ctx, |run| prompting.answer(run, prompt, room, &mut on_own))?;
        Ok((record(sample, prompt, rule, &answers), kv))
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
