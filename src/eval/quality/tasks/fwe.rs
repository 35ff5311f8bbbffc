//! Frequent words (`fwe`): a text of random words whose frequencies follow a zeta distribution, and the question for
//! the three most frequent ones; the most frequent of all, a run of dots, is excluded.

use super::length_search::{Draft, PromptMaker, SampleRequest};
use super::rng::Rng;
use std::f64::consts::PI;

/// `zeta(2)`, which normalises the distribution with exponent 2.
const ZETA: f64 = PI * PI / 6.0;
/// Question of the prompt.
pub(super) const ASK: &str =
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently \
                              appeared words in the above coded text?";
/// Maximum tokens of the answer.
pub(super) const ROOM: usize = 50;
/// Letters of a random word.
const LETTERS: usize = 6;
/// Most frequent word, which the question excludes.
const DOTS: &str = "...";
/// Smallest text, in words, in which the fourth most frequent word is more frequent than the fifth:
/// `1 / (4^-2 - 5^-2) * zeta(2)`.
const LEAST: usize = 74;

/// Returns the occurrences of the word of `rank` (from 1) in a text of about `n` words.
fn times(n: usize, rank: usize) -> usize {
    (n as f64 / (rank * rank) as f64 / ZETA) as usize
}

/// Returns the maker of one sample.
pub(super) fn start<'a>(call: &SampleRequest<'a>) -> PromptMaker<'a> {
    let size = (call.draw.length.saturating_sub(ROOM) / 50).max(5);
    let mut rng = call.rng("vocabulary");
    let mut vocabulary = vec![DOTS.to_string()];
    let mut seen = std::collections::HashSet::new();
    while vocabulary.len() < size {
        let word = rng.letters(b'a', LETTERS);
        if seen.insert(word.clone()) {
            vocabulary.push(word);
        }
    }
    let order = call.rng("order").bits();
    let draft = move |n| {
        let repeats = |(i, word)| std::iter::repeat_n(word, times(n, i + 1));
        let mut words: Vec<&str> = vocabulary.iter().map(String::as_str).enumerate().flat_map(repeats).collect();
        Rng::new(order, &["order"], 0).shuffle(&mut words);
        Ok(Draft {
            context: format!(
                "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared \
                 coded words. {}\n",
                words.join(" ")
            ),
            question: ASK.into(),
            answer_prefix: " Answer: According to the coded text above, the three most frequently appeared words are:".into(),
            outputs: vocabulary[1..4].to_vec(),
            depth: None,
            follow_ups: vec![],
        })
    };
    PromptMaker { least: LEAST, most: usize::MAX, step: 200, draft: Box::new(draft) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::quality::tasks::fixture::{sources, words};
    use crate::eval::quality::tasks::{find, SampleKey};
    use std::collections::HashMap;

    #[test]
    fn the_three_answers_are_the_most_frequent_words_after_the_dots() {
        for (length, index) in [(200, 0), (300, 1), (1_000, 2), (8_192, 3), (8_192, 4)] {
            let draw = SampleKey { length, seed: 1, index };
            let s = find("fwe").expect("fwe").sample(&sources(), draw, &words).expect("sample");
            let context = s.context().expect("context");
            let text = context.split_once("coded words. ").expect("text").1;
            let mut counts = HashMap::new();
            text.split_whitespace().for_each(|w| *counts.entry(w).or_insert(0) += 1);
            let mut ranked: Vec<_> = counts.into_iter().collect();
            ranked.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
            assert_eq!(ranked[0].0, DOTS);
            let top: Vec<_> = ranked[1..4].iter().map(|(word, _)| *word).collect();
            assert_eq!(top, s.outputs, "in order of their frequency");
            assert!(ranked[1..5].windows(2).all(|p| p[0].1 > p[1].1), "no tie: {ranked:?}");
            assert!(ranked[1..].iter().all(|(word, _)| word.len() == 6));
            // 1 / (k^2 zeta(2)) of all.
            let all = text.split_whitespace().count() as f64;
            let share = |rank: usize| ranked[rank - 1].1 as f64 / all;
            assert!(
                length < 8_000 || ((share(1) - 0.608).abs() < 0.02 && (share(2) - 0.152).abs() < 0.01),
                "{ranked:?}"
            );
        }
    }

    #[test]
    fn no_text_of_at_least_the_fewest_words_has_a_tie() {
        assert!((LEAST..5_000).all(|n| (1..5).all(|rank| times(n, rank) > times(n, rank + 1))));
        assert!((1..LEAST).any(|n| times(n, 4) == times(n, 5)));
    }
}
