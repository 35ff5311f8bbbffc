//! Many keys over several turns (`recall_turns`): a context of needles alone, and ten turns that each ask for the value
//! of another key, after the answers of the turns before.

use super::hay::Haystack;
use super::length_search::{Draft, PromptMaker, SampleRequest};
use super::niah::{insert, NeedleKind, Niah, UniqueDraws};
use super::rng::Rng;
use super::sample::FollowUp;
use crate::error::Result;
use std::collections::HashSet;

/// Number of turns.
pub(super) const TURNS: usize = 10;
/// Needles as in `niah_multikey_2`: a word for a key, a number for its value.
const NEEDLES: Niah =
    Niah { hay: Haystack::Needles, keys: NeedleKind::Words, values: NeedleKind::Numbers, counts: (TURNS, 1, 1) };
/// Number of places in each tenth of the context.
const PLACES: usize = 1_000;

/// Returns the line of `n` before which the needle of a tenth is inserted, `place` being its place in the tenth.
fn line(n: usize, (tenth, place): (usize, &usize)) -> usize {
    n * (tenth * PLACES + place) / (TURNS * PLACES)
}

/// Returns the maker of one sample: one queried needle in each tenth of the lines, asked for in random order.
///
/// # Errors
/// Missing or short word lists.
pub(super) fn start<'a>(call: &SampleRequest<'a>) -> Result<PromptMaker<'a>> {
    let words = call.sources.words(call.task)?;
    let draws = |rng, seen| UniqueDraws { rng, words, prose: None, seen };
    let pair = |drawn: &mut UniqueDraws| -> Result<(String, String)> {
        Ok((drawn.next(NEEDLES.keys)?, drawn.next(NEEDLES.values)?))
    };
    let mut drawn = draws(call.rng("needles"), HashSet::new());
    let pairs = (0..TURNS).map(|_| pair(&mut drawn)).collect::<Result<Vec<_>>>()?;
    let needles: Vec<String> = pairs.iter().map(|(key, value)| NEEDLES.needle(key, value)).collect();
    let mut places = call.rng("places");
    let places: Vec<usize> = (0..TURNS).map(|_| places.below(PLACES)).collect();
    let mut turns = drawn.rng.sample(TURNS, TURNS).into_iter().map(|i| {
        let (key, value) = &pairs[i];
        let (question, answer_prefix) = NEEDLES.question(key, true);
        FollowUp { question, answer_prefix, outputs: vec![value.clone()] }
    });
    let first = turns.next();
    let follow_ups: Vec<FollowUp> = turns.collect();
    let (seen, fill) = (drawn.seen, call.rng("hay").bits());
    let draft = move |n: usize| {
        let mut other = draws(Rng::new(fill, &["needles"], 0), seen.clone());
        let hay = (0..n).map(|_| pair(&mut other).map(|(key, value)| NEEDLES.needle(&key, &value)));
        let at: Vec<usize> = places.iter().enumerate().map(|place| line(n, place)).collect();
        let text = insert(&hay.collect::<Result<Vec<_>>>()?, &needles, &at, "\n");
        let FollowUp { question, answer_prefix, outputs } = first.clone().unwrap_or_default();
        let context = NEEDLES.context(&text, false);
        Ok(Draft { context, question, answer_prefix, outputs, depth: None, follow_ups: follow_ups.clone() })
    };
    Ok(PromptMaker { least: 1, most: usize::MAX, step: 25, draft: Box::new(draft) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::quality::tasks::fixture::{sources, words};
    use crate::eval::quality::tasks::{find, Sample, SampleKey};

    fn sample(length: usize, index: usize) -> Sample {
        let draw = SampleKey { length, seed: 1, index };
        find("recall_turns").expect("task").sample(&sources(), draw, &words).expect("sample")
    }

    /// The questions of all turns, each with the value that answers it.
    fn turns(s: &Sample) -> Vec<(String, &str)> {
        let first = std::iter::once(s.question().expect("question"));
        let questions = first.chain(s.follow_ups.iter().map(FollowUp::prompt));
        questions.zip(s.outputs()).map(|(question, outputs)| (question, outputs[0].as_str())).collect()
    }

    #[test]
    fn each_turn_asks_for_another_key_whose_value_is_in_its_own_tenth() {
        for (length, index) in [(700, 0), (2_000, 1), (2_000, 2), (9_000, 3)] {
            let s = sample(length, index);
            let context = s.context().expect("context");
            let lines: Vec<&str> = context.lines().skip(1).collect();
            let turns = turns(&s);
            assert_eq!((turns.len(), s.outputs().filter(|o| o.len() == 1).count()), (TURNS, TURNS));
            let mut tenths = vec![];
            for (question, value) in &turns {
                let asked = question.strip_prefix("What is the special magic number for ").expect("RULER's question");
                let (key, rest) = asked.split_once(" mentioned").expect("a key");
                let start = format!("The special magic number for {key} mentioned in the provided text is");
                assert!(rest.ends_with(&start), "{question}");
                let needle = format!("One of the special magic numbers for {key} is: {value}.");
                let at = lines.iter().position(|line| *line == needle).expect("the needle is a line");
                assert_eq!((context.matches(key).count(), context.matches(value).count()), (1, 1), "{needle}");
                tenths.push(at * TURNS / lines.len());
            }
            // The order of the questions is not that of the text.
            assert!(tenths.windows(2).any(|t| t[0] > t[1]), "{tenths:?}");
            tenths.sort_unstable();
            let close = tenths.iter().enumerate().all(|(i, tenth)| i.abs_diff(*tenth) <= 1);
            assert!(close, "one in each tenth, to within the queried lines themselves: {tenths:?}");
        }
    }

    #[test]
    fn longer_contexts_have_the_same_turns_among_more_lines() {
        let (short, long) = (sample(1_000, 0), sample(4_000, 0));
        assert_eq!(turns(&short), turns(&long));
        let lines = |s: &Sample| s.context().expect("context").lines().count();
        assert!(lines(&long) > 5 * lines(&short));
    }
}
