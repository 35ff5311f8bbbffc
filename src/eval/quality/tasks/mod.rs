//! RULER's thirteen tasks (Hsieh et al. 2024, <https://arxiv.org/abs/2404.06654>, <https://github.com/NVIDIA/RULER>),
//! made and scored natively.
//!
//! A task makes prompts of any length whose answer is known. Templates, counts, tokens of the answer and scoring are
//! RULER's:
//!
//! | task | context | asks for | score |
//! |---|---|---|---|
//! | `niah_single_1` | noise | the number of one key | all |
//! | `niah_single_2` | prose | the number of one key | all |
//! | `niah_single_3` | prose | the UUID of one key | all |
//! | `niah_multikey_1` | prose, four keys | the number of one of them | all |
//! | `niah_multikey_2` | needles only | the number of one key | all |
//! | `niah_multikey_3` | needles only, keys are UUIDs | the UUID of one key | all |
//! | `niah_multivalue` | prose | four numbers of one key | all |
//! | `niah_multiquery` | prose | the numbers of four keys | all |
//! | `vt` | noise with a chain of five assignments | the five variables with one value | all |
//! | `cwe` | a numbered list, ten of its words 30 times each, the others 3 times | the ten words | all |
//! | `fwe` | coded words with zeta-distributed frequencies | the three most frequent ones | all |
//! | `qa_1` | documents, SQuAD | the answer to a question about one | part |
//! | `qa_2` | documents, HotpotQA | the answer to a question about two | part |
//!
//! `all` is the share of the expected outputs that the answer contains, `part` whether it contains any
//! ([`ScoringRule`]). [`needle`] is one needle at a chosen depth, for a grid over lengths and depths (Kamradt 2023,
//! <https://github.com/gkamradt/LLMTest_NeedleInAHaystack>).
//!
//! ```text
//! words, hay, qa (files), rng --> niah, vt, cwe, fwe, qa (a draft with n units of hay)
//!                                   `--> length_search (the n) --> sample --> JSONL
//! answer, sample --> Rule::score
//! ```
//!
//! A sample depends on task, length, seed and index alone: sample 7 is the same whether 8 or 500 are made. What is
//! hidden, and where a text begins, does not depend on the length either: it is the same needle in a larger haystack.
//! (Only `cwe` changes its words where its lists run out.)
//!
//! # Lengths
//!
//! `length` counts the prompt with the beginning of the answer, and the tokens that the answer may have. The caller
//! counts tokens; a chat template is part of the length if the counter adds it. Each sample has as much hay as fits, to
//! within a unit of hay or 1/512 of the length. A length that the smallest prompt exceeds is an error.
//!
//! # Where the question begins
//!
//! [`Sample::question_at`] splits each prompt into context and question, for methods that must evict before they read
//! the question. The context holds the queried key or value in needles and assignments only. The question of `cwe` and
//! `fwe` never changes, and the context's first sentence states it.
//!
//! # What differs from RULER's own code
//!
//! - **The prose** is not Paul Graham's essays, which may not be passed on, but the freely licensed texts of
//!   `scripts/fetch_texts.py`, a ring of 1.5 million words. Each sample begins at its own sentence; RULER takes the
//!   same beginning of the essays for every sample. Paragraphs end a sentence besides punctuation; the splitter is
//!   ours, not NLTK's.
//! - **Random choices** come from another generator, so samples differ from RULER's word for word. RULER shuffles
//!   needles, lists and documents in the same way in every sample; here each sample has its own order.
//! - **Keys and values** are all different, and none occurs in the prose by chance. RULER does not check.
//! - **Each sample has its own amount of hay.** RULER finds one amount for a task and removes 5 to 500 units at a time
//!   where a sample is longer than the first. Its loop does not end where nothing fits.
//! - **`vt`**: the example in front is drawn for each sample, with a value other than the queried one; RULER renames
//!   the variables of one example.
//! - **`cwe`**: lists longer than the 8,166 words consist of hyphenated pairs of an adjective and a noun; RULER's then
//!   consist of a larger list of English words. That happens beyond some 128k tokens.
//! - **`fwe`**: at least 74 words, from which on the first four frequencies differ; a vocabulary of five at least.
//! - **`qa`**: the user brings the files. Questions are drawn from the whole file by the seed, each at most once; RULER
//!   takes the first ones.
//! - **Scoring** does not replace control characters in the answer first: that cannot change whether it contains an
//!   output.
//! - **Files** hold `task`, `question_at`, `made_for`, `max_new_tokens` and `depth` in addition to RULER's fields.
//!   RULER's own files are read as well: the question is found by the words of the task's template ([`question_at`]),
//!   the length that the file was made for is the user's to state (`--import-length`), and `index` of the needle tasks
//!   is the place of the answer in the text.

mod cwe;
#[cfg(test)]
mod fixture;
mod fwe;
mod hay;
mod length_search;
mod niah;
mod qa;
mod rng;
mod sample;
mod vt;
mod words;

pub use crate::eval::report::ScoringRule;
pub use hay::{Haystack, Prose, NOISE};
pub use qa::Questions;
pub use rng::Rng;
pub use sample::{check_replaceable, read, write, Sample, SampleDefaults};
pub use words::WordLists;

use crate::checkpoint::OnProgress;
use crate::error::{Error, Result};
use length_search::{PromptMaker, SampleRequest};
use niah::{NeedleKind, NeedlePlacement, Niah};

/// Counts the tokens of a text.
pub type CountTokens<'a> = &'a dyn Fn(&str) -> Result<usize>;

/// A sample of a task by what it depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleKey {
    /// Most tokens of the prompt and its answer together.
    pub length: usize,
    /// Seed of all samples.
    pub seed: u64,
    /// Number of the sample, from 0.
    pub index: usize,
}

/// Words, texts and questions that tasks draw from; a task that needs a missing source says so.
#[derive(Default)]
pub struct Sources {
    /// Words for keys and lists.
    pub words: Option<WordLists>,
    /// Real text to hide needles in.
    pub prose: Option<Prose>,
    /// Questions of `qa_1`.
    pub squad: Option<Questions>,
    /// Questions of `qa_2`.
    pub hotpot: Option<Questions>,
}

impl Sources {
    fn words(&self, task: &str) -> Result<&WordLists> {
        let missing = "needs lists of words (a folder that scripts/fetch_words.py fills)";
        self.words.as_ref().ok_or_else(|| Error::usage(task, missing))
    }

    fn prose(&self, task: &str) -> Result<&Prose> {
        let missing = "needs texts to hide needles in (a folder that scripts/fetch_texts.py fills)";
        self.prose.as_ref().ok_or_else(|| Error::usage(task, missing))
    }

    fn squad(&self, task: &str) -> Result<&Questions> {
        self.squad.as_ref().ok_or_else(|| Error::usage(task, "needs a file of questions in the form of SQuAD 2.0"))
    }

    fn hotpot(&self, task: &str) -> Result<&Questions> {
        self.hotpot.as_ref().ok_or_else(|| Error::usage(task, "needs a file of questions in the form of HotpotQA"))
    }
}

/// A task.
pub struct Task {
    /// Name of the task in RULER.
    pub name: &'static str,
    /// The task in a few words.
    pub about: &'static str,
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// Rule by which an answer is scored.
    pub rule: ScoringRule,
    /// Beginnings of the question in RULER's template, of which a prompt has one.
    asks: &'static [&'static str],
    start: for<'a> fn(&SampleRequest<'a>) -> Result<PromptMaker<'a>>,
}

/// A needle task with `counts` of keys, values per key, and queries.
const fn niah(hay: Haystack, keys: NeedleKind, values: NeedleKind, counts: (usize, usize, usize)) -> Niah {
    Niah { hay, keys, values, counts }
}

/// Task name of [`needle`].
pub const NEEDLE: &str = "needle";

/// RULER's tasks, in its order.
#[rustfmt::skip]
pub static TASKS: &[Task] = &[
    Task { name: "niah_single_1", about: "one number in noise", max_new_tokens: 128, rule: ScoringRule::All, asks: niah::ASKS,
        start: |c| niah(Haystack::Noise, NeedleKind::Words, NeedleKind::Numbers, (1, 1, 1)).start(c, NeedlePlacement::Drawn) },
    Task { name: "niah_single_2", about: "one number in prose", max_new_tokens: 128, rule: ScoringRule::All, asks: niah::ASKS,
        start: |c| niah(Haystack::Essay, NeedleKind::Words, NeedleKind::Numbers, (1, 1, 1)).start(c, NeedlePlacement::Drawn) },
    Task { name: "niah_single_3", about: "one UUID in prose", max_new_tokens: 128, rule: ScoringRule::All, asks: niah::ASKS,
        start: |c| niah(Haystack::Essay, NeedleKind::Words, NeedleKind::Uuids, (1, 1, 1)).start(c, NeedlePlacement::Drawn) },
    Task { name: "niah_multikey_1", about: "one of four keys in prose", max_new_tokens: 128, rule: ScoringRule::All, asks: niah::ASKS,
        start: |c| niah(Haystack::Essay, NeedleKind::Words, NeedleKind::Numbers, (4, 1, 1)).start(c, NeedlePlacement::Drawn) },
    Task { name: "niah_multikey_2", about: "one of only needles", max_new_tokens: 128, rule: ScoringRule::All, asks: niah::ASKS,
        start: |c| niah(Haystack::Needles, NeedleKind::Words, NeedleKind::Numbers, (1, 1, 1)).start(c, NeedlePlacement::Drawn) },
    Task { name: "niah_multikey_3", about: "one of only needles, all UUIDs", max_new_tokens: 128, rule: ScoringRule::All, asks: niah::ASKS,
        start: |c| niah(Haystack::Needles, NeedleKind::Uuids, NeedleKind::Uuids, (1, 1, 1)).start(c, NeedlePlacement::Drawn) },
    Task { name: "niah_multivalue", about: "four values of one key in prose", max_new_tokens: 128, rule: ScoringRule::All, asks: niah::ASKS,
        start: |c| niah(Haystack::Essay, NeedleKind::Words, NeedleKind::Numbers, (1, 4, 1)).start(c, NeedlePlacement::Drawn) },
    Task { name: "niah_multiquery", about: "the values of four keys in prose", max_new_tokens: 128, rule: ScoringRule::All, asks: niah::ASKS,
        start: |c| niah(Haystack::Essay, NeedleKind::Words, NeedleKind::Numbers, (4, 1, 4)).start(c, NeedlePlacement::Drawn) },
    Task { name: "vt", about: "a chain of five variables in noise", max_new_tokens: 30, rule: ScoringRule::All, asks: &[vt::ASK],
        start: |c| vt::start(c) },
    Task { name: "cwe", about: "the ten most common words of a list", max_new_tokens: 120, rule: ScoringRule::All, asks: &[cwe::ASK],
        start: |c| cwe::start(c) },
    Task { name: "fwe", about: "the three most frequent coded words", max_new_tokens: fwe::ROOM, rule: ScoringRule::All, asks: &[fwe::ASK],
        start: |c| Ok(fwe::start(c)) },
    Task { name: "qa_1", about: "a SQuAD question among documents", max_new_tokens: 32, rule: ScoringRule::Part, asks: &[qa::ASK],
        start: |c| qa::start(c, c.sources.squad(c.task)?) },
    Task { name: "qa_2", about: "a HotpotQA question among documents", max_new_tokens: 32, rule: ScoringRule::Part, asks: &[qa::ASK],
        start: |c| qa::start(c, c.sources.hotpot(c.task)?) },
];

/// Finds a task by name.
///
/// # Errors
/// An unknown name: all names.
pub fn find(name: &str) -> Result<&'static Task> {
    TASKS.iter().find(|t| t.name == name).ok_or_else(|| {
        let names: Vec<_> = TASKS.iter().map(|t| t.name).collect();
        Error::usage("task", format!("`{name}` is not one of {}", names.join(", ")))
    })
}

/// The tasks that `--tasks` names.
///
/// # Errors
/// An unknown name, or one given twice, since its samples would count twice.
pub fn named(names: &[String]) -> Result<Vec<&'static Task>> {
    if let Some((_, name)) = names.iter().enumerate().find(|(i, name)| names[..*i].contains(name)) {
        return Err(Error::usage("--tasks", format!("names `{name}` twice")));
    }
    names.iter().map(|name| find(name).map_err(|e| e.within("--tasks"))).collect()
}

/// The rule by which answers of a task are scored, [`NEEDLE`] included.
///
/// # Errors
/// An unknown name.
pub fn rule(task: &str) -> Result<ScoringRule> {
    match task {
        NEEDLE => Ok(ScoringRule::All),
        _ => find(task).map(|t| t.rule),
    }
}

/// The byte of `input`, a prompt of `task` as RULER's own files hold it, at which the question begins: where the
/// template's question comes last. `None` for a task that is none of RULER's, or a prompt of another template.
pub fn question_at(task: &str, input: &str) -> Option<usize> {
    let asks = if task == NEEDLE { niah::ASKS } else { find(task).ok()?.asks };
    asks.iter().filter_map(|ask| input.rfind(ask)).max()
}

impl Task {
    /// Makes one sample.
    ///
    /// # Errors
    /// A source that is missing, a length that the smallest prompt exceeds, a tokenizer that fails.
    pub fn sample(&self, sources: &Sources, draw: SampleKey, count: CountTokens) -> Result<Sample> {
        let call = SampleRequest { task: self.name, sources, draw, count };
        finish(&call, &(self.start)(&call)?, self.max_new_tokens)
    }

    /// Makes the first `samples` samples.
    ///
    /// # Errors
    /// As [`Self::sample`].
    pub fn samples(
        &self,
        sources: &Sources,
        (length, seed): (usize, u64),
        samples: usize,
        count: CountTokens,
        progress: OnProgress,
    ) -> Result<Vec<Sample>> {
        let made = (0..samples).map(|index| {
            progress(self.name, index as u64, samples as u64);
            self.sample(sources, SampleKey { length, seed, index }, count)
        });
        let made = made.collect::<Result<_>>()?;
        progress(self.name, samples as u64, samples as u64);
        Ok(made)
    }
}

/// Makes a sample of one number under one key at `depth` of the hay (0 its beginning, 1 its end), to within half a
/// sentence, for a grid over lengths and depths. The needle is the same at every length and depth of a seed and index.
///
/// # Errors
/// A depth outside 0 to 1; otherwise as [`Task::sample`].
pub fn needle(sources: &Sources, hay: Haystack, depth: f64, draw: SampleKey, count: CountTokens) -> Result<Sample> {
    if !(0.0..=1.0).contains(&depth) {
        return Err(Error::usage(NEEDLE, format!("{depth} is not a depth; give 0 (the beginning) to 1 (the end)")));
    }
    let call = SampleRequest { task: NEEDLE, sources, draw, count };
    let maker =
        niah(hay, NeedleKind::Words, NeedleKind::Numbers, (1, 1, 1)).start(&call, NeedlePlacement::At(depth))?;
    finish(&call, &maker, 128)
}

/// The largest sample of `maker` that fits.
fn finish(call: &SampleRequest, maker: &PromptMaker, room: usize) -> Result<Sample> {
    let SampleKey { length, index, .. } = call.draw;
    let largest = length_search::largest(maker, length.saturating_sub(room), call.count)?;
    let (draft, tokens) = (largest.draft, largest.tokens + room);
    if tokens > length {
        let message =
            format!("{length} tokens are too few: its smallest prompt and {room} for the answer take {tokens}");
        return Err(Error::usage(call.task, message));
    }
    Ok(Sample {
        task: call.task.into(),
        index,
        question_at: Some(draft.context.len()),
        input: draft.context + &draft.question,
        answer_prefix: draft.answer_prefix,
        outputs: draft.outputs,
        length: tokens,
        made_for: Some(length),
        max_new_tokens: room,
        depth: draft.depth,
    })
}

#[cfg(test)]
mod tests;
