//! Common words (`cwe`): a numbered list in which ten words are more frequent than the others, and the question for
//! them.

use super::length_search::{Draft, PromptMaker, SampleRequest};
use super::rng::Rng;
use super::words::WordLists;
use crate::error::Result;

/// Question of the prompt.
pub(super) const ASK: &str = "Question: What are the 10 most common words in the above list?";
/// Number of common words.
const COMMON: usize = 10;
/// Length in tokens below which a prompt has fewer repeats.
const SHORT: usize = 4096;

/// Number of distinct words, and occurrences of each common and of each other word.
#[derive(Clone, Copy)]
struct Counts(usize, usize, usize);

/// Generates a numbered list with `counts`, and returns it with its common words.
fn list(words: &WordLists, counts: Counts, choice: u64) -> (String, Vec<String>) {
    let Counts(n, often, seldom) = counts;
    let rng = &mut Rng::new(choice, &["words"], 0);
    let chosen: Vec<String> = match n <= words.all().len() {
        true => rng.sample(words.all().len(), n).into_iter().map(|i| words.all()[i].clone()).collect(),
        false => rng.sample(words.pairs(), n).into_iter().map(|i| words.pair(i)).collect(),
    };
    let repeats = |(i, word)| std::iter::repeat_n(word, if i < COMMON { often } else { seldom });
    let mut all: Vec<&String> = chosen.iter().enumerate().flat_map(repeats).collect();
    rng.shuffle(&mut all);
    (numbered(&all), chosen[..COMMON.min(n)].to_vec())
}

/// Formats the words as `1. this 2. that`.
fn numbered(words: &[impl AsRef<str>]) -> String {
    let entry = |(i, word): (usize, &_)| format!("{}. {}", i + 1, AsRef::<str>::as_ref(word));
    words.iter().enumerate().map(entry).collect::<Vec<_>>().join(" ")
}

/// Builds RULER's prompt for a list and its common words.
fn draft((list, common): (String, Vec<String>)) -> Draft {
    Draft {
        context: format!(
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that appear \
             most often.\n{list}\n"
        ),
        question: ASK.into(),
        answer_prefix: " Answer: The top 10 words that appear most often in the list are:".into(),
        outputs: common,
        depth: None,
            follow_ups: vec![],
    }
}

/// Returns the maker of one sample: an example with its answer, then the list.
///
/// # Errors
/// Missing word lists.
pub(super) fn start<'a>(call: &SampleRequest<'a>) -> Result<PromptMaker<'a>> {
    let words = call.sources.words(call.task)?;
    let (shown, often, seldom) = match call.draw.length < SHORT {
        true => (Counts(20, 3, 1), 6, 1),
        false => (Counts(40, 10, 3), 30, 3),
    };
    let e = draft(list(words, shown, call.rng("example").bits()));
    let example = format!("{}{}{} {}\n", e.context, e.question, e.answer_prefix, numbered(&e.outputs));
    let choice = call.rng("words").bits();
    let draft = move |n| {
        let plain = draft(list(words, Counts(n, often, seldom), choice));
        Ok(Draft { context: format!("{example}{}", plain.context), ..plain })
    };
    Ok(PromptMaker { least: COMMON + 1, most: words.all().len().max(words.pairs()), step: 100, draft: Box::new(draft) })
}

#[cfg(test)]
mod tests {
    use crate::eval::quality::tasks::fixture::{sources, words};
    use crate::eval::quality::tasks::{find, SampleKey};
    use std::collections::HashMap;

    /// Words of a numbered list, most frequent first, after checking the numbers.
    fn ranked(list: &str) -> Vec<(String, usize)> {
        let mut counts = HashMap::new();
        let entries: Vec<&str> = list.split_whitespace().collect();
        for (i, entry) in entries.chunks(2).enumerate() {
            assert_eq!(entry[0], format!("{}.", i + 1));
            *counts.entry(entry[1].to_string()).or_insert(0) += 1;
        }
        let mut ranked: Vec<_> = counts.into_iter().collect();
        ranked.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        ranked
    }

    #[test]
    fn the_ten_answers_are_the_most_frequent_words() {
        // (length, counts of common and other words, in the example and in the list).
        let cases = [(1_000, (3, 1), (6, 1)), (4_096, (10, 3), (30, 3)), (12_000, (10, 3), (30, 3))];
        for ((length, in_example, in_list), index) in cases.into_iter().flat_map(|c| (0..4).map(move |i| (c, i))) {
            let draw = SampleKey { length, seed: 1, index };
            let s = find("cwe").expect("cwe").sample(&sources(), draw, &words).expect("sample");
            let lines: Vec<&str> = s.context().expect("context").lines().collect();
            assert_eq!(lines.len(), 5, "header, example, its answer, header, list");
            let check = |list: &str, answers: &[String], (often, seldom)| {
                let ranked = ranked(list);
                let mut top: Vec<_> = ranked[..10].iter().map(|(word, _)| word.clone()).collect();
                let mut answers = answers.to_vec();
                top.sort_unstable();
                answers.sort_unstable();
                assert_eq!(top, answers);
                assert!(ranked[..10].iter().all(|(_, n)| *n == often), "{ranked:?}");
                assert!(ranked.len() > 10 && ranked[10..].iter().all(|(_, n)| *n == seldom), "{ranked:?}");
            };
            check(lines[4], &s.outputs, in_list);
            let answer = lines[2].split_once("in the list are: ").expect("answer").1;
            let shown: Vec<_> = ranked(answer).into_iter().map(|(word, _)| word).collect();
            check(lines[1], &shown, in_example);
            // Lists longer than the word lists use hyphenated pairs.
            assert_eq!(s.outputs[0].contains('-'), length == 12_000, "{:?}", s.outputs);
        }
    }
}
