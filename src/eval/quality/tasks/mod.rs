//! RULER's thirteen tasks (Hsieh et al. 2024, <https://arxiv.org/abs/2404.06654>, <https://github.com/NVIDIA/RULER>)
//! and three recall tasks, generated and scored natively.
//!
//! A task generates prompts of any length with a known answer. Templates, counts, answer lengths and scoring of the
//! first thirteen are RULER's:
//!
//! | task | context | question for | score |
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
//! | `recall_turns` | needles only | the numbers of ten keys, one a turn | all, mean over turns |
//! | `recall_needles` | prose | sixteen numbers of one key | all |
//! | `recall_count` | lines with labels | the number of lines with one label | count |
//!
//! `all` is the share of the expected outputs that the answer contains, `part` is 1 where it contains any, `count` is 1
//! where its first number is the expected one ([`ScoringRule`]). A sample of several turns has [`FollowUp`] questions,
//! each read after the answer of the turn before. [`needle`] is one needle at a given depth, for a grid over lengths and depths (Kamradt 2023,
//! <https://github.com/gkamradt/LLMTest_NeedleInAHaystack>).
//!
//! ```text
//! words, hay, qa (files), rng --> niah, vt, cwe, fwe, qa, turns, count (a draft with n units of hay)
//!                                   `--> length_search (the n) --> sample --> JSONL
//! answer, sample --> Rule::score
//! ```
//!
//! A sample depends on task, length, seed and index alone: sample 7 is the same whether 8 or 500 are generated. The
//! needles and the start of the text do not depend on the length, so a longer length gives the same needle in a larger
//! haystack. (Only `cwe` changes its words where its lists run out.)
//!
//! # Lengths
//!
//! `length` is the tokens of the prompt, with the start of the answer, plus the maximum tokens of the answer, over all
//! turns. The caller counts tokens; the length includes a chat template where the counter adds it. Each sample has as much hay as
//! fits, to within a unit of hay or 1/512 of the length. A length that the smallest prompt exceeds is an error.
//!
//! # Start of the question
//!
//! [`Sample::question_at`] splits each prompt into context and question, for methods that must evict before they read
//! the question. The context contains the queried key or value in needles and assignments only. The question of `cwe`
//! and `fwe` is always the same, and the first sentence of the context states it.
//!
//! # Differences from RULER's code
//!
//! - **Prose** comes from the freely licensed texts of `scripts/fetch_texts.py`, a circular text of 1.5 million words,
//!   since Paul Graham's essays may not be redistributed. Each sample starts at its own sentence; RULER starts every
//!   sample at the start of the essays. Sentences end at paragraph ends and at punctuation, by a splitter other than
//!   NLTK's.
//! - **Random choices** come from another generator, so samples differ from RULER's word for word. RULER shuffles
//!   needles, lists and documents in the same way in every sample; here each sample has its own order.
//! - **Keys and values** are all different, and none occurs in the prose by chance. RULER does not check this.
//! - **The amount of hay** is chosen per sample. RULER finds one amount for a task and removes 5 to 500 units at a time
//!   where a sample is longer than the first; its loop does not terminate where nothing fits.
//! - **`vt`**: the example in front is drawn for each sample, with a value other than the queried one; RULER renames
//!   the variables of one example.
//! - **`cwe`**: lists longer than the 8,166 words, which occur beyond about 128k tokens, consist of hyphenated pairs of
//!   an adjective and a noun; RULER's consist of a larger list of English words.
//! - **`fwe`**: texts have at least 74 words, so that the first four frequencies differ, from a vocabulary of at least
//!   five words.
//! - **`qa`**: the user provides the files. Questions are drawn from the whole file by the seed, each at most once;
//!   RULER takes the first ones.
//! - **Scoring** does not replace control characters in the answer first, which cannot change whether the answer
//!   contains an output.
//! - **Files** have the fields `task`, `question_at`, `made_for`, `max_new_tokens`, `depth` and `follow_ups` in addition
//!   to RULER's.
//!   RULER's own files are read too: the question is found by the wording of the task's template ([`question_at`]), the
//!   user states the length that the file was generated for (`--import-length`), and `index` of the needle tasks is the
//!   place of the answer in the text.

mod count;
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
mod turns;
mod vt;
mod words;

pub use crate::eval::report::ScoringRule;
pub use hay::{Haystack, Prose, NOISE};
pub use qa::Questions;
pub use rng::Rng;
pub use sample::{check_replaceable, read, write, FollowUp, Sample, SampleDefaults};
pub use words::WordLists;

use crate::checkpoint::OnProgress;
use crate::error::{Error, Result};
use length_search::{PromptMaker, SampleRequest};
use niah::{NeedleKind, NeedlePlacement, Niah};

/// Counts the tokens of a prompt by turns; a function of a text counts all turns in the same way.
pub trait TokenCounter {
    /// Returns the tokens of a first turn, `text` being its context, its question and the start of its answer.
    ///
    /// # Errors
    /// A tokenizer or chat template that fails.
    fn prompt(&self, text: &str) -> Result<usize>;

    /// Returns the tokens between the answer of one turn and that of the next, `text` being the question and the start
    /// of its answer.
    ///
    /// # Errors
    /// As [`Self::prompt`].
    fn follow_up(&self, text: &str) -> Result<usize> {
        self.prompt(text)
    }
}

impl<F: Fn(&str) -> Result<usize>> TokenCounter for F {
    fn prompt(&self, text: &str) -> Result<usize> {
        self(text)
    }
}

/// Counts the tokens of prompts.
pub type CountTokens<'a> = &'a dyn TokenCounter;

/// Parameters that identify a sample of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SampleKey {
    /// Maximum tokens of the prompt and its answer together.
    pub length: usize,
    /// Seed of all samples.
    pub seed: u64,
    /// Index of the sample, from 0.
    pub index: usize,
}

/// Words, texts and questions that tasks draw from; a task that needs a missing source returns an error.
#[derive(Default)]
pub struct Sources {
    /// Words for keys and lists.
    pub words: Option<WordLists>,
    /// Real text in which needles are hidden.
    pub prose: Option<Prose>,
    /// Questions of `qa_1`.
    pub squad: Option<Questions>,
    /// Questions of `qa_2`.
    pub hotpot: Option<Questions>,
}

impl Sources {
    fn words(&self, task: &str) -> Result<&WordLists> {
        let missing = "needs word lists; fetch them with scripts/fetch_words.py, and give their folder with --words";
        self.words.as_ref().ok_or_else(|| Error::usage(task, missing))
    }

    fn prose(&self, task: &str) -> Result<&Prose> {
        let missing = "needs texts; fetch them with scripts/fetch_texts.py, and give their folder with --texts";
        self.prose.as_ref().ok_or_else(|| Error::usage(task, missing))
    }

    fn squad(&self, task: &str) -> Result<&Questions> {
        self.squad
            .as_ref()
            .ok_or_else(|| Error::usage(task, "needs questions in the format of SQuAD 2.0; give --squad"))
    }

    fn hotpot(&self, task: &str) -> Result<&Questions> {
        self.hotpot
            .as_ref()
            .ok_or_else(|| Error::usage(task, "needs questions in the format of HotpotQA; give --hotpot"))
    }
}

/// A task: RULER's, or one of [`RECALL_TASKS`].
pub struct Task {
    /// Name of the task; in RULER the same.
    pub name: &'static str,
    /// Short description of the task.
    pub about: &'static str,
    /// Maximum tokens of an answer, in each turn.
    pub max_new_tokens: usize,
    /// Scoring rule of an answer.
    pub rule: ScoringRule,
    /// Possible starts of the question in the task's template; a prompt has one of them.
    asks: &'static [&'static str],
    start: for<'a> fn(&SampleRequest<'a>) -> Result<PromptMaker<'a>>,
}

/// Creates a needle task with `counts` of keys, of values per key, and of queried keys.
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

/// Name of the group of [`RECALL_TASKS`] in `--tasks`.
pub const RECALL: &str = "recall";

/// Tasks at which published retrieval of keys and values breaks; not RULER's.
#[rustfmt::skip]
pub static RECALL_TASKS: &[Task] = &[
    Task { name: "recall_turns", about: "ten of many keys, one a turn", max_new_tokens: 24, rule: ScoringRule::All, asks: niah::ASKS,
        start: |c| turns::start(c) },
    Task { name: "recall_needles", about: "sixteen values of one key in prose", max_new_tokens: 256, rule: ScoringRule::All, asks: niah::ASKS,
        start: |c| niah(Haystack::Essay, NeedleKind::Words, NeedleKind::Numbers, (1, 16, 1)).start(c, NeedlePlacement::Drawn) },
    Task { name: "recall_count", about: "the number of lines with one label", max_new_tokens: 32, rule: ScoringRule::Count, asks: &[count::ASK],
        start: |c| count::start(c) },
];

/// Returns all tasks, RULER's first.
fn every() -> impl Iterator<Item = &'static Task> {
    TASKS.iter().chain(RECALL_TASKS)
}

/// Finds a task by name.
///
/// # Errors
/// An unknown name; the message lists all names.
pub fn find(name: &str) -> Result<&'static Task> {
    every().find(|t| t.name == name).ok_or_else(|| {
        let names: Vec<_> = every().map(|t| t.name).collect();
        Error::usage("task", format!("`{name}` is not one of {}", names.join(", ")))
    })
}

/// Returns the tasks that `--tasks` names, those of the group [`RECALL`] in place of its name.
///
/// # Errors
/// An unknown name, or a task named twice, whose samples would count twice.
pub fn named(names: &[String]) -> Result<Vec<&'static Task>> {
    let mut tasks: Vec<&Task> = vec![];
    for name in names {
        match name.as_str() {
            RECALL => tasks.extend(RECALL_TASKS),
            name => tasks.push(find(name).map_err(|e| e.within("--tasks"))?),
        }
    }
    match tasks.iter().enumerate().find(|(i, task)| tasks[..*i].iter().any(|t| t.name == task.name)) {
        Some((_, task)) => Err(Error::usage("--tasks", format!("names `{}` twice", task.name))),
        None => Ok(tasks),
    }
}

/// Returns the scoring rule of a task, [`NEEDLE`] included.
///
/// # Errors
/// An unknown name.
pub fn rule(task: &str) -> Result<ScoringRule> {
    match task {
        NEEDLE => Ok(ScoringRule::All),
        _ => find(task).map(|t| t.rule),
    }
}

/// Returns the byte offset of the question in `input`, a prompt of `task` from RULER's own files: the last occurrence
/// of the template's question. `None` for a task that is not RULER's, or a prompt of another template.
pub fn question_at(task: &str, input: &str) -> Option<usize> {
    let asks = if task == NEEDLE { niah::ASKS } else { find(task).ok()?.asks };
    asks.iter().filter_map(|ask| input.rfind(ask)).max()
}

impl Task {
    /// Generates one sample.
    ///
    /// # Errors
    /// A source that is missing, a length that the smallest prompt exceeds, a tokenizer that fails.
    pub fn sample(&self, sources: &Sources, draw: SampleKey, count: CountTokens) -> Result<Sample> {
        let call = SampleRequest { task: self.name, sources, draw, count };
        finish(&call, &(self.start)(&call)?, self.max_new_tokens)
    }

    /// Generates the first `samples` samples.
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

/// Generates a sample with one number under one key at `depth` of the hay (0 its start, 1 its end), to within half a
/// sentence, for a grid over lengths and depths. The needle is the same at every length and depth of a seed and index.
///
/// # Errors
/// A depth outside 0 to 1; otherwise as [`Task::sample`].
pub fn needle(sources: &Sources, hay: Haystack, depth: f64, draw: SampleKey, count: CountTokens) -> Result<Sample> {
    if !(0.0..=1.0).contains(&depth) {
        return Err(Error::usage(NEEDLE, format!("{depth} is not a depth; give 0 (the start) to 1 (the end)")));
    }
    let call = SampleRequest { task: NEEDLE, sources, draw, count };
    let maker =
        niah(hay, NeedleKind::Words, NeedleKind::Numbers, (1, 1, 1)).start(&call, NeedlePlacement::At(depth))?;
    finish(&call, &maker, 128)
}

/// Returns the largest sample of `maker` that fits, with `room` tokens for the answer of each turn.
fn finish(call: &SampleRequest, maker: &PromptMaker, room: usize) -> Result<Sample> {
    let SampleKey { length, index, .. } = call.draw;
    let (answer, turns) = (room, 1 + (maker.draft)(maker.least)?.follow_ups.len());
    let room = answer * turns;
    let largest = length_search::largest(maker, length.saturating_sub(room), call.count)?;
    let (draft, tokens) = (largest.draft, largest.tokens + room);
    if tokens > length {
        let message =
            format!("{length} tokens are too few: the smallest prompt and {room} tokens of answer take {tokens}");
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
        max_new_tokens: answer,
        depth: draft.depth,
        follow_ups: draft.follow_ups,
    })
}

#[cfg(test)]
mod tests;
