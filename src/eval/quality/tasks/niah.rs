//! Needles in a haystack (`niah`): sentences that assign a value to a key, hidden in hay, and a question for the values
//! of some keys.

use super::hay::{Haystack, Prose, NOISE};
use super::length_search::{Draft, PromptMaker, SampleRequest};
use super::rng::Rng;
use super::words::WordLists;
use crate::error::{Error, Result};
use std::collections::HashSet;

/// Kind of a key or a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NeedleKind {
    /// Numbers of seven digits.
    Numbers,
    /// Hyphenated pairs of an adjective and a noun.
    Words,
    /// UUIDs of version 4.
    Uuids,
}

/// Placement of needles in the hay.
#[derive(Debug, Clone, Copy)]
pub(super) enum NeedlePlacement {
    /// Random places, as in RULER.
    Drawn,
    /// All needles at this share of the hay, 0 to 1.
    At(f64),
}

/// A needle task.
#[derive(Debug, Clone, Copy)]
pub(super) struct Niah {
    /// Text in which needles are hidden.
    pub hay: Haystack,
    /// Kind of the keys.
    pub keys: NeedleKind,
    /// Kind of the values.
    pub values: NeedleKind,
    /// Numbers of keys, of values per key, and of keys in the question.
    pub counts: (usize, usize, usize),
}

/// Starts of the question, for one value and for several.
pub(super) const ASKS: &[&str] = &["What is the special magic ", "What are all the special magic "];

/// Returns the `i`-th of the 40 depths, in percent, at which RULER hides needles in prose.
fn depth(i: usize) -> usize {
    (200 * i + 39) / 78 // i · 100 / 39, rounded
}
/// Number of these depths.
const DEPTHS: usize = 40;

impl NeedleKind {
    fn name(self) -> &'static str {
        match self {
            Self::Numbers => "numbers",
            Self::Words => "words",
            Self::Uuids => "uuids",
        }
    }

    fn draw(self, rng: &mut Rng, words: &WordLists) -> String {
        match self {
            Self::Numbers => rng.range(1_000_000..10_000_000).to_string(),
            Self::Words => words.pair(rng.below(words.pairs())),
            Self::Uuids => rng.uuid(),
        }
    }
}

/// Words of RULER's template that depend on the number of values in question.
struct Wording {
    some: &'static str,
    name: &'static str,
    are: &'static str,
    ask: &'static str,
}

/// Draws the keys and values of one sample, all different and none of them in the prose.
pub(super) struct UniqueDraws<'a> {
    /// Random stream of the draws.
    pub rng: Rng,
    /// Word lists that keys are drawn from.
    pub words: &'a WordLists,
    /// Prose in which nothing drawn may occur.
    pub prose: Option<&'a Prose>,
    /// Texts drawn so far, and others that are not to be drawn.
    pub seen: HashSet<String>,
}

/// Number of failed draws after which the word lists are considered exhausted.
const TRIES: usize = 1_000;

impl UniqueDraws<'_> {
    /// Draws a text that is neither in `seen` nor in the prose, and adds it to `seen`.
    ///
    /// # Errors
    /// Word lists that have no further text.
    pub(super) fn next(&mut self, kind: NeedleKind) -> Result<String> {
        for _ in 0..TRIES {
            let new = kind.draw(&mut self.rng, self.words);
            if !self.seen.contains(&new) && self.prose.is_none_or(|p| !p.contains(&new)) {
                self.seen.insert(new.clone());
                return Ok(new);
            }
        }
        let message = format!("too few {} that are neither used nor in the texts; give longer word lists", kind.name());
        Err(Error::usage("needles", message))
    }
}

impl Niah {
    /// Returns the sentence that assigns `value` to `key`.
    pub(super) fn needle(&self, key: &str, value: &str) -> String {
        format!("One of the special magic {} for {key} is: {value}.", self.values.name())
    }

    /// Returns the maker of one sample.
    ///
    /// # Errors
    /// Missing word lists, or missing prose for a task in prose.
    pub(super) fn start<'a>(self, call: &SampleRequest<'a>, place: NeedlePlacement) -> Result<PromptMaker<'a>> {
        let words = call.sources.words(call.task)?;
        let prose = (self.hay == Haystack::Essay).then(|| call.sources.prose(call.task)).transpose()?;
        let (keys, values, queries) = self.counts;
        let mut drawn = UniqueDraws { rng: call.rng("needles"), words, prose, seen: HashSet::new() };
        let mut pairs: Vec<(String, Vec<String>)> = vec![];
        for _ in 0..keys {
            let key = drawn.next(self.keys)?;
            pairs.push((key, (0..values).map(|_| drawn.next(self.values)).collect::<Result<_>>()?));
        }
        let mut needles: Vec<String> =
            pairs.iter().flat_map(|(key, values)| values.iter().map(|v| self.needle(key, v))).collect();
        drawn.rng.shuffle(&mut needles);
        let asked = drawn.rng.sample(keys, queries);
        let outputs: Vec<String> = asked.iter().flat_map(|i| pairs[*i].1.clone()).collect();
        let query = list(&asked.iter().map(|i| pairs[*i].0.as_str()).collect::<Vec<_>>());

        let first = prose.map(|p| call.rng("hay").below(p.sentences())).unwrap_or_default();
        let (seen, places, fill) = (drawn.seen, call.rng("places").bits(), call.rng("hay").bits());
        let count = needles.len();
        let lines = move |n: usize| -> Result<Vec<String>> {
            let mut more = UniqueDraws { rng: Rng::new(fill, &["needles"], 0), words, prose: None, seen: seen.clone() };
            let other = |_| {
                let key = more.next(self.keys)?;
                Ok(self.needle(&key, &more.next(self.values)?))
            };
            match self.hay {
                Haystack::Needles => (0..n).map(other).collect(),
                _ => Ok(vec![NOISE.to_string(); n]),
            }
        };
        let draft = move |n: usize| {
            let rng = &mut Rng::new(places, &["places"], 0);
            let hay = match prose {
                Some(prose) => {
                    let sentences = prose.stretch(first, n);
                    insert(&sentences, &needles, &in_prose(&sentences, count, place, rng), " ")
                }
                None => {
                    let lines = lines(n)?;
                    insert(&lines, &needles, &in_lines(n, count, place, rng), "\n")
                }
            };
            Ok(self.draft(&hay, &query, &outputs, place))
        };
        let (least, step) = if prose.is_some() { (1, 500) } else { (count, 25) };
        Ok(PromptMaker { least, most: usize::MAX, step, draft: Box::new(draft) })
    }

    /// Builds RULER's prompt, in the singular where the question is for one value.
    fn draft(&self, hay: &str, query: &str, outputs: &[String], place: NeedlePlacement) -> Draft {
        let one = outputs.len() == 1;
        let (question, answer_prefix) = self.question(query, one);
        Draft {
            context: self.context(hay, one),
            question,
            answer_prefix,
            outputs: outputs.to_vec(),
            depth: if let NeedlePlacement::At(share) = place { Some(share) } else { None },
            follow_ups: vec![],
        }
    }

    /// Returns the text before the question, in the singular with `one`.
    pub(super) fn context(&self, hay: &str, one: bool) -> String {
        let Wording { some, name, are, .. } = self.wording(one);
        format!(
            "{some} special magic {name} {are} hidden within the following text. Make sure to memorize it. I will quiz you about \
             the {name} afterwards.\n{hay}\n"
        )
    }

    /// Returns the question for the values of `query` and the start of its answer, in the singular with `one`.
    pub(super) fn question(&self, query: &str, one: bool) -> (String, String) {
        let Wording { name, are, ask, .. } = self.wording(one);
        (
            format!("{ask}{name} for {query} mentioned in the provided text?"),
            format!(" The special magic {name} for {query} mentioned in the provided text {are}"),
        )
    }

    fn wording(&self, one: bool) -> Wording {
        let name = self.values.name();
        match one {
            true => Wording { some: "A", name: &name[..name.len() - 1], are: "is", ask: ASKS[0] },
            false => Wording { some: "Some", name, are: "are", ask: ASKS[1] },
        }
    }
}

/// Formats names as `a`, or `a, b, and c`.
fn list(names: &[&str]) -> String {
    match names.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{}, and {last}", rest.join(", ")),
        _ => names.concat(),
    }
}

/// Returns the sentences before which `count` needles are inserted, rising; a share is measured in words.
fn in_prose(sentences: &[&str], count: usize, place: NeedlePlacement, rng: &mut Rng) -> Vec<usize> {
    let mut at: Vec<usize> = match place {
        NeedlePlacement::Drawn => {
            rng.sample(DEPTHS, count).into_iter().map(|i| sentences.len() * depth(i) / 100).collect()
        }
        NeedlePlacement::At(share) => {
            let words = sentences.iter().map(|s| s.split(' ').count());
            let ends: Vec<usize> = std::iter::once(0)
                .chain(words.scan(0, |n, w| {
                    *n += w;
                    Some(*n)
                }))
                .collect();
            let goal = share * ends[sentences.len()] as f64;
            let distance = |i: &usize| (ends[*i] as f64 - goal).abs();
            let nearest = (0..ends.len()).min_by(|a, b| distance(a).total_cmp(&distance(b)));
            vec![nearest.unwrap_or_default(); count]
        }
    };
    at.sort_unstable();
    at
}

/// Returns the lines of `n` before which `count` needles are inserted, rising; random lines are all different.
fn in_lines(n: usize, count: usize, place: NeedlePlacement, rng: &mut Rng) -> Vec<usize> {
    let mut at = match place {
        NeedlePlacement::Drawn => rng.sample(n, count),
        NeedlePlacement::At(share) => vec![(share * n as f64).round() as usize; count],
    };
    at.sort_unstable();
    at
}

/// Inserts `extra[i]` before part `at[i]` of `parts`, and joins all of them with `between`.
pub(super) fn insert<P: AsRef<str>>(parts: &[P], extra: &[String], at: &[usize], between: &str) -> String {
    let mut all: Vec<&str> = Vec::with_capacity(parts.len() + extra.len());
    let mut rest = at.iter().zip(extra).peekable();
    for i in 0..=parts.len() {
        while let Some((_, needle)) = rest.next_if(|(at, _)| **at <= i) {
            all.push(needle);
        }
        all.extend(parts.get(i).map(AsRef::as_ref));
    }
    all.join(between)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::quality::tasks::fixture::{self, sources, words};
    use crate::eval::quality::tasks::{find, needle, Sample, SampleKey, Sources, TASKS};

    fn sample(task: &str, length: usize, index: usize) -> Sample {
        find(task).expect(task).sample(&sources(), SampleKey { length, seed: 1, index }, &words).expect(task)
    }

    fn needles(s: &Sample) -> Vec<(&str, &str)> {
        let parts = s.context().expect("context").split("One of the special magic ").skip(1);
        parts.filter_map(|p| p.split_once(" for ")?.1.split_once('.')?.0.split_once(" is: ")).collect()
    }

    #[test]
    fn answers_are_the_values_of_the_queried_keys_and_occur_once() {
        // (task, needles with the queried keys, keys without distractors).
        let tasks = [
            ("niah_single_1", 1, 1),
            ("niah_single_2", 1, 1),
            ("niah_single_3", 1, 1),
            ("niah_multikey_1", 1, 4),
            ("niah_multikey_2", 1, 1),
            ("niah_multikey_3", 1, 1),
            ("niah_multivalue", 4, 1),
            ("niah_multiquery", 4, 4),
            ("recall_needles", 16, 1),
        ];
        assert_eq!(tasks.len(), TASKS.iter().filter(|t| t.name.starts_with("niah")).count() + 1);
        for ((task, answers, keys), index) in tasks.into_iter().flat_map(|t| (0..6).map(move |i| (t, i))) {
            let s = sample(task, 1_500, index);
            let (context, question) = (s.context().expect("context"), s.question().expect("question"));
            let asked: Vec<_> = needles(&s).into_iter().filter(|(key, _)| question.contains(key)).collect();
            let mut values: Vec<_> = asked.iter().map(|(_, value)| value.to_string()).collect();
            let mut outputs = s.outputs.clone();
            values.sort_unstable();
            outputs.sort_unstable();
            assert_eq!((values.len(), &values), (answers, &outputs), "{task}");
            assert!(outputs.iter().all(|o| context.matches(o.as_str()).count() == 1), "{task}");
            for (key, _) in &asked {
                let of_key = asked.iter().filter(|(other, _)| other == key).count();
                assert_eq!(context.matches(key).count(), of_key, "{task}: {key} only in needles");
            }
            match task {
                "niah_multikey_2" | "niah_multikey_3" => assert!(needles(&s).len() > 60, "{task}"),
                _ => assert_eq!(needles(&s).len(), if keys == 4 { 4 } else { answers }, "{task}"),
            }
        }
    }

    #[test]
    fn the_question_for_one_value_is_in_the_singular() {
        let s = sample("niah_single_3", 800, 0);
        let needles = needles(&s);
        let key = needles[0].0;
        assert!(s.input.starts_with("A special magic uuid is hidden within the following text. Make sure"));
        assert!(s.input.contains("I will quiz you about the uuid afterwards.\n"));
        assert!(s.input.contains("One of the special magic uuids for "), "needles stay in the plural");
        let question = format!("What is the special magic uuid for {key} mentioned in the provided text?");
        assert!(s.input.ends_with(&question), "{}", s.question().expect("question"));
        assert_eq!(s.answer_prefix, format!(" The special magic uuid for {key} mentioned in the provided text is"));
        let many = sample("niah_multiquery", 800, 0);
        let question = many.question().expect("question");
        assert!(many.input.starts_with("Some special magic numbers are hidden"));
        assert!(question.starts_with("What are all the special magic numbers for "), "{question}");
        assert!(question.matches(", ").count() == 6 && question.matches(", and ").count() == 2, "{question}");
        assert!(many.answer_prefix.ends_with(" mentioned in the provided text are"));
    }

    #[test]
    fn prose_is_broken_only_between_sentences() {
        let all = sources();
        let prose = all.prose.as_ref().expect("prose");
        for index in 0..8 {
            let s = sample("niah_multikey_1", 3_000, index);
            let context = s.context().expect("context");
            let hay = context.split('\n').nth(1).expect("hay");
            let mut rest = hay.to_string();
            for (key, value) in needles(&s) {
                let needle = format!("One of the special magic numbers for {key} is: {value}.");
                rest = rest.replace(&format!("{needle} "), "").replace(&format!(" {needle}"), "");
            }
            let words = rest.split(' ').count();
            let found = (0..prose.sentences()).find(|first| prose.stretch(*first, words).join(" ") == rest);
            let first = found.unwrap_or_else(|| panic!("sample {index} is not a stretch of the text"));
            // Every needle has a whole sentence's end or nothing before it.
            let ends: HashSet<&str> = prose.stretch(first, words).into_iter().collect();
            for before in hay.split("One of the special magic numbers").map(str::trim_end) {
                let after_sentence = before.ends_with('.') || ends.iter().any(|s| before.ends_with(s));
                assert!(before.is_empty() || after_sentence, "…{before:?}");
            }
        }
        let starts: HashSet<String> = (0..8)
            .map(|i| sample("niah_single_2", 500, i).input.split('\n').nth(1).expect("hay")[..40].to_string())
            .collect();
        assert!(starts.len() > 5, "each sample begins at its own place: {starts:?}");
    }

    #[test]
    fn keys_that_occur_in_the_prose_are_not_used() {
        let names = |names: &[&str]| names.iter().map(|n| n.to_string()).collect();
        let words = WordLists::new(names(&["tree", "lake", "fox"]), names(&["red"]), names(&["run"]));
        let prose = Prose::new(["Under the red-tree, by the red-lake. Nothing happened."]);
        let few = Sources { words: Some(words), prose, ..Sources::default() };
        let task = find("niah_single_2").expect("task");
        for index in 0..20 {
            let s = task.sample(&few, SampleKey { length: 400, seed: 1, index }, &fixture::words).expect("sample");
            assert!(s.question().expect("question").contains("for red-fox mentioned"), "{}", s.input);
        }
    }

    #[test]
    fn depths_are_rulers_forty() {
        let all: Vec<usize> = (0..DEPTHS).map(depth).collect();
        assert_eq!(all[..6], [0, 3, 5, 8, 10, 13]);
        assert_eq!(all[34..], [87, 90, 92, 95, 97, 100]);
        assert!(all.windows(2).all(|p| p[0] < p[1]));
    }

    #[test]
    fn a_needle_lies_at_the_requested_depth() {
        let all = sources();
        for hay in [Haystack::Essay, Haystack::Noise, Haystack::Needles] {
            let mut keys = HashSet::new();
            for depth in [0.0, 0.1, 0.5, 0.77, 1.0] {
                let draw = SampleKey { length: 2_000, seed: 1, index: 0 };
                let s = needle(&all, hay, depth, draw, &words).expect("needle");
                assert_eq!((s.task.as_str(), s.depth), ("needle", Some(depth)));
                let context = s.context().expect("context").split_once('\n').expect("hay").1;
                let at = context.find(&s.outputs[0]).expect("answer") as f64 / context.len() as f64;
                assert!((at - depth).abs() < 0.05, "{hay:?}: at {at}, not {depth}");
                keys.insert(s.question().expect("question"));
            }
            assert_eq!(keys.len(), 1, "one needle at every depth");
        }
        let bad = needle(&all, Haystack::Noise, 1.5, SampleKey { length: 500, seed: 1, index: 0 }, &words);
        assert!(bad.expect_err("depth").to_string().contains("1.5"));
    }
}
