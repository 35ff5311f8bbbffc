//! The flags that tasks and needle grids share: how samples are made, prompted and answered.

use super::answers::{answer_all, SampleSet};
use super::eval_args::EvalArgs;
use super::prompting::Prompting;
use super::runner::Runners;
use super::tasks::{self, Prose, Questions, Sample, Sources, Words};
use crate::cli::{at_least_one, parse_size, short_count, Bars};
use crate::error::{Error, Result};
use crate::eval::report::resume::AnswersFile;
use crate::eval::report::{prove_replaceable, Answers, Asked, ANSWERS};
use clap::Args;
use rayon::prelude::*;
use std::path::PathBuf;

/// How samples are made, prompted and answered.
#[derive(Debug, Args)]
pub struct SampleArgs {
    /// Most tokens of a prompt and its answer together; one cell per length.
    #[arg(long, value_name = "LIST", default_value = "4k", value_delimiter = ',', value_parser = parse_size)]
    pub ctx: Vec<usize>,
    /// Samples per cell.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = at_least_one)]
    pub samples: usize,
    /// Seed of the samples.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Folder of word lists, as scripts/fetch_words.py lays them out.
    #[arg(long, value_name = "DIR", default_value = "words")]
    pub words: PathBuf,
    /// Render prompts with the model's chat template.
    #[arg(long)]
    pub chat: bool,
    /// Tell the cache that the context is over before the question is read, so that methods that evict must choose
    /// without knowing it.
    #[arg(long)]
    pub question_unseen: bool,
    /// Samples answered side by side over one copy of the weights: a GPU that decodes one text of a small model is
    /// mostly idle.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub jobs: usize,
    /// Write the samples to FILE.jsonl, one JSON object a line, for any other engine.
    #[arg(long, value_name = "FILE.jsonl")]
    pub export: Option<PathBuf>,
    /// Write the samples of --export and stop before weights are read.
    #[arg(long, requires = "export")]
    pub export_only: bool,
    /// Write the results to FILE.json with every answer, compressed where the name ends in .gz; an earlier file is
    /// taken up where it was cut off.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// Model, variants and texts. (The last field, since the heading of its last group holds for whatever follows.)
    #[command(flatten)]
    pub eval: EvalArgs,
}

/// Makes the sample of a number; the second argument counts the tokens of a prompt.
pub type Make<'a> = Box<dyn Fn(usize, tasks::Count) -> Result<Sample> + Sync + 'a>;

/// How the samples of a cell are made.
pub struct CellSpec<'a> {
    /// Name of the task.
    pub task: String,
    /// Most tokens of a prompt and its answer together.
    pub length: usize,
    /// Number of samples.
    pub count: usize,
    /// Makes one sample.
    pub make: Make<'a>,
}

/// Samples that were read from a file.
pub struct Imported {
    /// File that they were read from.
    pub path: PathBuf,
    /// Samples in the order of the file.
    pub samples: Vec<Sample>,
    /// Length that they were made for, where they do not tell it themselves.
    pub length: Option<usize>,
}

impl SampleArgs {
    /// The lengths, rising, each once.
    pub fn lengths(&self) -> Vec<usize> {
        let mut lengths = self.ctx.clone();
        lengths.sort_unstable();
        lengths.dedup();
        lengths
    }

    /// Word lists and texts as far as they exist; a task that needs missing ones says so.
    ///
    /// # Errors
    /// A source that exists and cannot be read.
    pub fn sources(&self, squad: Option<&PathBuf>, hotpot: Option<&PathBuf>) -> Result<Sources> {
        let texts = &self.eval.texts;
        Ok(Sources {
            words: self.words.exists().then(|| Words::open(&self.words)).transpose()?,
            prose: texts.exists().then(|| Prose::open(texts)).transpose()?,
            squad: squad.map(|f| Questions::squad(f)).transpose()?,
            hotpot: hotpot.map(|f| Questions::hotpot(f)).transpose()?,
        })
    }

    /// Makes the samples of `cells`, or takes those of `imported`, prompts every variant with them, and returns the
    /// whole file of answers; `None` with `--export-only`.
    ///
    /// # Errors
    /// Bad flags or files, named, before weights are read; a variant that cannot be run.
    pub fn run(&self, cells: &[CellSpec], imported: Option<Imported>) -> Result<Option<Answers>> {
        let bars = Bars::new(self.eval.quiet);
        let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
        self.out.as_deref().map(|out| prove_replaceable(out, ANSWERS)).transpose()?;
        if let Some(export) = &self.export {
            if self.out.as_ref() == Some(export) {
                return Err(Error::usage("--export", "is the file of --out too; samples and answers need one each"));
            }
            tasks::prove_replaceable(export, "--export")?;
        }
        let target = self.eval.open(&progress)?;
        // A mistake is told before samples are made, which can take a while.
        let asked_for = if imported.is_none() { self.lengths() } else { vec![] };
        self.eval.check_trained(&target, &asked_for, &bars)?;
        asked_for.into_iter().try_for_each(|length| target.variants_at(length).map(drop))?;
        let text = target.checkpoint().tokenizer()?;
        target.warn(&bars);
        let prompting = Prompting::new(text, self.chat, self.question_unseen, self.eval.prefill_chunk)?;
        let from = imported.as_ref().map(|i| i.path.display().to_string());
        let sets = match imported {
            Some(imported) => given(imported, &prompting, &bars)?,
            None => make(cells, &prompting, &bars)?,
        };
        if let Some(path) = &self.export {
            let all: Vec<Sample> = sets.iter().flat_map(|s| s.samples.iter().map(|(s, _)| s.clone())).collect();
            tasks::write(path, &all, "--export")?;
            if self.export_only {
                return Ok(None);
            }
        }
        let lengths: Vec<usize> = sets.iter().map(|s| s.length).collect();
        if from.is_some() {
            self.eval.check_trained(&target, &lengths, &bars)?;
        }
        let variants = lengths.iter().map(|l| target.variants_at(*l)).collect::<Result<Vec<_>>>()?;
        let asked = Asked {
            seed: from.is_none().then_some(self.seed),
            from,
            chat: self.chat,
            question_unseen: self.question_unseen,
            prefill_chunk: self.eval.prefill_chunk,
        };
        let mut file = AnswersFile::open(self.out.as_deref(), target.header(ANSWERS), asked)?;
        // No more workers than samples to answer.
        let most = sets.iter().map(|s| s.samples.len()).max().unwrap_or(1);
        let mut runners = Runners::load(&target, self.jobs.min(most), &progress)?;
        answer_all(&mut file, &mut runners, &prompting, &variants, &sets, &bars)?;
        Ok(Some(file.answers))
    }
}

/// Makes the samples of every cell, those of a cell in parallel.
fn make(cells: &[CellSpec], prompting: &Prompting, bars: &Bars) -> Result<Vec<SampleSet>> {
    let mut sets = vec![];
    for (i, cell) in cells.iter().enumerate() {
        bars.show("samples", i as u64, cells.len() as u64);
        let one = |index: usize| {
            let sample = (cell.make)(index, &|text| prompting.count(text))?;
            let prompt = prompting.prompt(&sample)?;
            Ok((sample, prompt))
        };
        let samples = (0..cell.count).into_par_iter().map(one).collect::<Result<Vec<_>>>()?;
        sets.push(SampleSet { task: cell.task.clone(), length: cell.length, samples });
    }
    bars.show("samples", cells.len() as u64, cells.len() as u64);
    Ok(sets)
}

/// Tokens of which the length of a cell is a multiple, where neither file nor user tell it.
const UNTOLD: usize = 512;

/// Sets of imported samples: one per task and length.
///
/// # Errors
/// A sample that is longer than the length that is stated for it.
fn given(imported: Imported, prompting: &Prompting, bars: &Bars) -> Result<Vec<SampleSet>> {
    let mut sets: Vec<SampleSet> = vec![];
    let mut untold = false;
    for sample in imported.samples {
        let prompt = prompting.prompt(&sample)?;
        let tokens = prompt.tokens() + sample.max_new_tokens;
        let length = match (sample.made_for.filter(|n| *n >= tokens), imported.length) {
            (Some(length), _) => length,
            (None, Some(length)) if length < tokens => {
                let message = format!(
                    "{} is less than the {tokens} tokens of sample {} of {} and its answer; give {tokens} or more",
                    short_count(length),
                    sample.index,
                    sample.task
                );
                return Err(Error::usage("--import-length", message));
            }
            (None, Some(length)) => length,
            (None, None) => {
                untold = true;
                tokens.next_multiple_of(UNTOLD)
            }
        };
        match sets.iter_mut().find(|s| (&s.task, s.length) == (&sample.task, length)) {
            Some(set) => set.samples.push((sample, prompt)),
            None => sets.push(SampleSet { task: sample.task.clone(), length, samples: vec![(sample, prompt)] }),
        }
    }
    if untold {
        bars.warn(&format!(
            "{} does not tell the length that it was made for: cells are multiples of {UNTOLD} tokens; --import-length makes them one",
            imported.path.display()
        ));
    }
    Ok(sets)
}
