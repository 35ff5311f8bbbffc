//! Flags shared by `ruler` and `needle`: generation, prompting and answering of samples.

use super::answers::{answer_all, SampleSet};
use super::eval_args::EvalArgs;
use super::prompting::Prompter;
use super::runner::Workers;
use super::tasks::{self, Prose, Questions, Sample, Sources, WordLists};
use crate::cli::{at_least_one, parse_size, short_count, Bars};
use crate::error::{Error, Result};
use crate::eval::report::resume::AnswersFile;
use crate::eval::report::{check_replaceable, Answers, PromptSettings, ANSWERS};
use crate::eval::variant::recalls;
use clap::Args;
use rayon::prelude::*;
use std::path::PathBuf;

/// Flags for generating, prompting and answering samples.
#[derive(Debug, Args)]
pub struct SampleArgs {
    /// Lengths in tokens, comma-separated: the maximum of a prompt and its answer together. Each task, length and
    /// variant is a cell of the results.
    #[arg(long, value_name = "LIST", default_value = "4k", value_delimiter = ',', value_parser = parse_size)]
    pub ctx: Vec<usize>,
    /// Samples per cell; for needle, per depth of a cell.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = at_least_one)]
    pub samples: usize,
    /// Seed of the samples; the same seed gives the same samples for every model with the same tokenizer.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Folder of word lists, as scripts/fetch_words.py writes it.
    #[arg(long, value_name = "DIR", default_value = "words")]
    pub words: PathBuf,
    /// Render prompts with the model's chat template.
    #[arg(long)]
    pub chat: bool,
    /// Evict after the context and before the question is read, so that eviction rules cannot use the question.
    /// Variants whose prefill is exact (stock, recall) then share one prefill of each sample's context.
    #[arg(long)]
    pub question_unseen: bool,
    /// Samples answered in parallel over one copy of the weights, each with its own caches; more than 1 helps on a GPU,
    /// which is mostly idle while it decodes a single sequence of a small model.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub jobs: usize,
    /// Write the samples to FILE.jsonl, one JSON object per line, for use with other engines.
    #[arg(long, value_name = "FILE.jsonl")]
    pub export: Option<PathBuf>,
    /// Write the samples of --export and exit before weights are read.
    #[arg(long, requires = "export")]
    pub export_only: bool,
    /// Write the results to FILE.json with every answer, gzip-compressed where the name ends in .gz; at the latest ten
    /// seconds after a sample has been answered by all variants. An existing file of the same measurement is resumed.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// Model, variants and texts.
    // Last, since clap puts all flags after a group under that group's help heading.
    #[command(flatten)]
    pub eval: EvalArgs,
}

/// Generates the sample of an index; the second argument counts the tokens of a prompt.
pub type MakeSample<'a> = Box<dyn Fn(usize, tasks::CountTokens) -> Result<Sample> + Sync + 'a>;

/// Specification of a cell's samples.
pub struct CellSpec<'a> {
    /// Name of the task.
    pub task: String,
    /// Maximum tokens of a prompt and its answer together.
    pub length: usize,
    /// Number of samples.
    pub count: usize,
    /// Generates one sample.
    pub make: MakeSample<'a>,
}

/// Samples read from a file.
pub struct ImportedSamples {
    /// File that they were read from.
    pub path: PathBuf,
    /// Samples in the order of the file.
    pub samples: Vec<Sample>,
    /// Length in tokens that the samples were generated for, where the file does not state it.
    pub length: Option<usize>,
}

impl SampleArgs {
    /// Returns the lengths in rising order without duplicates.
    pub fn lengths(&self) -> Vec<usize> {
        let mut lengths = self.ctx.clone();
        lengths.sort_unstable();
        lengths.dedup();
        lengths
    }

    /// Opens the word lists and texts that exist; a task that needs a missing source returns an error when it is run.
    ///
    /// # Errors
    /// A source that exists and cannot be read.
    pub fn sources(&self, squad: Option<&PathBuf>, hotpot: Option<&PathBuf>) -> Result<Sources> {
        let texts = &self.eval.texts;
        Ok(Sources {
            words: self.words.exists().then(|| WordLists::open(&self.words)).transpose()?,
            prose: texts.exists().then(|| Prose::open(texts)).transpose()?,
            squad: squad.map(|f| Questions::squad(f)).transpose()?,
            hotpot: hotpot.map(|f| Questions::hotpot(f)).transpose()?,
        })
    }

    /// Generates the samples of `cells`, or takes those of `imported`, prompts every variant with them, and returns all
    /// answers of the file; `None` with `--export-only`.
    ///
    /// # Errors
    /// Invalid flags or files, before weights are read; a variant that cannot be run.
    pub fn run(&self, cells: &[CellSpec], imported: Option<ImportedSamples>) -> Result<Option<Answers>> {
        let bars = Bars::new(self.eval.quiet);
        let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
        self.out.as_deref().map(|out| check_replaceable(out, ANSWERS)).transpose()?;
        if let Some(export) = &self.export {
            if self.out.as_ref() == Some(export) {
                return Err(Error::usage("--export", "is the file of --out too; samples and answers need two files"));
            }
            tasks::check_replaceable(export, "--export")?;
        }
        let target = self.eval.open(&progress)?;
        // Mistakes are reported before samples are generated, which can take a while.
        let requested = if imported.is_none() { self.lengths() } else { vec![] };
        self.eval.check_trained(&target, &requested, &bars)?;
        requested.into_iter().try_for_each(|length| target.answering_at(length, self.question_unseen).map(drop))?;
        let text = target.checkpoint().tokenizer()?;
        target.warn(&bars);
        let prompting = Prompter::new(text, self.chat, self.question_unseen, self.eval.prefill_chunk)?;
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
        let variants =
            lengths.iter().map(|l| target.answering_at(*l, self.question_unseen)).collect::<Result<Vec<_>>>()?;
        let settings = PromptSettings {
            seed: from.is_none().then_some(self.seed),
            from,
            chat: self.chat,
            question_unseen: self.question_unseen,
            prefill_chunk: self.eval.prefill_chunk,
        };
        let mut file = AnswersFile::open(self.out.as_deref(), target.header(ANSWERS), settings)?;
        // No more workers than samples to answer.
        let most = sets.iter().map(|s| s.samples.len()).max().unwrap_or(1);
        let mut runners = Workers::load(&target, recalls(variants.iter().flatten()), self.jobs.min(most), &progress)?;
        answer_all(&mut file, &mut runners, &prompting, &variants, &sets, &bars)?;
        Ok(Some(file.answers))
    }
}

/// Generates the samples of every cell, those of a cell in parallel.
fn make(cells: &[CellSpec], prompting: &Prompter, bars: &Bars) -> Result<Vec<SampleSet>> {
    let mut sets = vec![];
    for (i, cell) in cells.iter().enumerate() {
        bars.show("samples", i as u64, cells.len() as u64);
        let one = |index: usize| {
            let sample = (cell.make)(index, prompting)?;
            let prompt = prompting.prompt(&sample)?;
            Ok((sample, prompt))
        };
        let samples = (0..cell.count).into_par_iter().map(one).collect::<Result<Vec<_>>>()?;
        sets.push(SampleSet { task: cell.task.clone(), length: cell.length, samples });
    }
    bars.show("samples", cells.len() as u64, cells.len() as u64);
    Ok(sets)
}

/// Multiple to which the tokens of a sample are rounded up, where neither the file nor `--import-length` states its
/// length.
const LENGTH_STEP: usize = 512;

/// Groups imported samples into sets, one per task and length.
///
/// # Errors
/// A sample longer than `--import-length`.
fn given(imported: ImportedSamples, prompting: &Prompter, bars: &Bars) -> Result<Vec<SampleSet>> {
    let mut sets: Vec<SampleSet> = vec![];
    let mut unstated = false;
    for sample in imported.samples {
        let prompt = prompting.prompt(&sample)?;
        let tokens = prompt.tokens() + sample.room();
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
                unstated = true;
                tokens.next_multiple_of(LENGTH_STEP)
            }
        };
        match sets.iter_mut().find(|s| (&s.task, s.length) == (&sample.task, length)) {
            Some(set) => set.samples.push((sample, prompt)),
            None => sets.push(SampleSet { task: sample.task.clone(), length, samples: vec![(sample, prompt)] }),
        }
    }
    if unstated {
        bars.warn(&format!(
            "{} does not state the length of its samples: each is rounded up to a multiple of {LENGTH_STEP} tokens; \
             --import-length puts them in one cell",
            imported.path.display()
        ));
    }
    Ok(sets)
}
