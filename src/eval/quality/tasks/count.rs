//! Labelled lines (`recall_count`): lines of random words, each with a label in front, and the question how many lines
//! have one of the labels.

use super::length_search::{Draft, PromptMaker, SampleRequest};
use super::niah::{insert, NeedleKind, UniqueDraws};
use super::rng::Rng;
use crate::error::Result;
use std::collections::HashSet;
use std::ops::Range;

/// Start of the question.
pub(super) const ASK: &str = "Question: How many of the lines above have the label ";
/// Number of lines of a label, the queried one included.
const LINES: Range<usize> = 2..10;
/// Number of words of a line.
const WORDS: usize = 3;

/// Returns the maker of one sample. Every label has 2 to 9 lines, so that nothing distinguishes the queried one before
/// the question.
///
/// # Errors
/// Missing or short word lists.
pub(super) fn start<'a>(call: &SampleRequest<'a>) -> Result<PromptMaker<'a>> {
    let words = call.sources.words(call.task)?;
    // A label occurs in front of its lines only.
    let seen: HashSet<String> = words.all().iter().cloned().collect();
    let mut drawn = UniqueDraws { rng: call.rng("label"), words, prose: None, seen };
    let label = drawn.next(NeedleKind::Words)?;
    let count = drawn.rng.range(LINES);
    let line = |label: &str, rng: &mut Rng| {
        let text: Vec<&str> = (0..WORDS).filter_map(|_| rng.choose(words.all())).map(String::as_str).collect();
        format!("{label}: {}", text.join(" "))
    };
    let queried: Vec<String> = (0..count).map(|_| line(&label, &mut drawn.rng)).collect();
    let (seen, fill, places) = (drawn.seen, call.rng("lines").bits(), call.rng("places").bits());
    let draft = move |n: usize| {
        let mut other = UniqueDraws { rng: Rng::new(fill, &["lines"], 0), words, prose: None, seen: seen.clone() };
        let mut lines: Vec<String> = vec![];
        while lines.len() < n {
            let label = other.next(NeedleKind::Words)?;
            let more = other.rng.range(LINES).min(n - lines.len());
            lines.extend((0..more).map(|_| line(&label, &mut other.rng)));
        }
        let rng = &mut Rng::new(places, &["places"], 0);
        rng.shuffle(&mut lines);
        let mut at = rng.sample(n, queried.len());
        at.sort_unstable();
        Ok(Draft {
            context: format!(
                "Below are lines of words, each with a label in front. Memorize how many lines have each label. I will ask you for the \
                 number of lines of one label.\n{}\n",
                insert(&lines, &queried, &at, "\n")
            ),
            question: format!("{ASK}{label}?"),
            answer_prefix: format!(" Answer: The number of lines with the label {label} is"),
            outputs: vec![count.to_string()],
            depth: None,
            follow_ups: vec![],
        })
    };
    Ok(PromptMaker { least: LINES.end, most: usize::MAX, step: 50, draft: Box::new(draft) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::quality::tasks::fixture::{sources, words};
    use crate::eval::quality::tasks::{find, SampleKey};
    use std::collections::HashMap;

    #[test]
    fn the_answer_is_the_number_of_lines_with_the_label() {
        let mut answers = HashSet::new();
        for (length, index) in (0..24).map(|i| ([400, 1_500, 6_000][i % 3], i)) {
            let draw = SampleKey { length, seed: 1, index };
            let s = find("recall_count").expect("task").sample(&sources(), draw, &words).expect("sample");
            let (context, question) = (s.context().expect("context"), s.question().expect("question"));
            let label = question.strip_prefix(ASK).and_then(|q| q.split_once('?')).expect("a label").0;
            let mut counts: HashMap<&str, usize> = HashMap::new();
            for line in context.lines().skip(1) {
                let (label, text) = line.split_once(": ").expect("a label in front");
                assert_eq!(text.split(' ').count(), WORDS, "{line}");
                *counts.entry(label).or_default() += 1;
            }
            assert_eq!(s.outputs, [counts[label].to_string()], "{label}");
            assert_eq!(context.matches(label).count(), counts[label], "the label is in front of its lines only");
            // The last label drawn may be cut by the length.
            let odd: Vec<_> = counts.iter().filter(|(_, n)| !LINES.contains(n)).collect();
            assert!(counts.len() > 4 && odd.len() <= 1, "no label stands out: {odd:?}");
            assert!(question.ends_with(&format!(" Answer: The number of lines with the label {label} is")));
            answers.insert(s.outputs[0].clone());
        }
        assert!(answers.len() >= 6, "answers differ: {answers:?}");
    }

    #[test]
    fn the_lines_of_a_label_are_spread_over_the_context() {
        let draw = |index| SampleKey { length: 3_000, seed: 1, index };
        let mut places = vec![];
        for index in 0..40 {
            let s = find("recall_count").expect("task").sample(&sources(), draw(index), &words).expect("sample");
            let question = s.question().expect("question");
            let label = question[ASK.len()..].split('?').next().expect("a label");
            let lines: Vec<&str> = s.context().expect("context").lines().skip(1).collect();
            let own = lines.iter().enumerate().filter(|(_, line)| line.starts_with(label));
            places.extend(own.map(|(i, _)| i as f64 / lines.len() as f64));
        }
        let quarters = (0..4).map(|q| places.iter().filter(|p| (**p * 4.0) as usize == q).count());
        let quarters: Vec<usize> = quarters.collect();
        assert!(quarters.iter().all(|n| *n * 7 > places.len()), "{quarters:?} of {}", places.len());
    }
}
