//! The flags that tasks and needle grids share, and what follows from them.

use super::answers::{ask_all, Answers, AnswersFile, Asked, Set, ANSWERS};
use super::eval_args::EvalArgs;
use super::prompting::Prompting;
use super::runner::Runners;
use super::tasks::{self, Prose, Questions, Sample, Sources, Words};
use crate::cli::{at_least_one, parse_size, Bars};
use crate::error::{Error, Result};
use crate::eval::bench::file::prove_replaceable;
use clap::Args;
use rayon::prelude::*;
use std::path::PathBuf;

/// How samples are made and put.
#[derive(Debug, Args)]
pub struct SampleArgs {
    /// Lengths: tokens of a prompt and its answer, at most.
    #[arg(long, value_name = "LIST", default_value = "4k", value_delimiter = ',', value_parser = parse_size)]
    pub ctx: Vec<usize>,
    /// Samples per cell.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = at_least_one)]
    pub samples: usize,
    /// Seed of the samples.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Word lists, as scripts/fetch_words.py lays them out.
    #[arg(long, value_name = "DIR", default_value = "words")]
    pub words: PathBuf,
    /// Put prompts into the model's own chat template.
    #[arg(long)]
    pub chat: bool,
    /// Read the context, tell the cache that it is over, and only then read the question: methods that evict must choose without
    /// knowing what will be asked.
    #[arg(long)]
    pub question_unseen: bool,
    /// Samples put side by side, each to a copy of the weights of its own: a GPU that decodes one text of a small model is mostly idle.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub jobs: usize,
    /// Write the samples, one JSON object a line, for any other engine.
    #[arg(long, value_name = "FILE.jsonl")]
    pub export: Option<PathBuf>,
    /// Only write them (with --export): no weights are read.
    #[arg(long, requires = "export")]
    pub export_only: bool,
    /// The results, as JSON with every answer; an earlier file of the same is taken up where it was cut off.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// What is judged; last, since the heading of its last group holds for whatever follows.
    #[command(flatten)]
    pub judged: EvalArgs,
}

/// Makes a sample by its number.
pub type Make<'a> = Box<dyn Fn(usize, tasks::Count) -> Result<Sample> + Sync + 'a>;

/// What makes the samples of a cell.
pub struct Wanted<'a> {
    /// The task.
    pub task: String,
    /// Tokens of a prompt and its answer, at most.
    pub length: usize,
    /// Samples.
    pub count: usize,
    /// Makes one of them.
    pub make: Make<'a>,
}

impl SampleArgs {
    /// The lengths, rising.
    pub fn lengths(&self) -> Vec<usize> {
        let mut lengths = self.ctx.clone();
        lengths.sort_unstable();
        lengths.dedup();
        lengths
    }

    /// Words and texts where they are there: a task that needs what is not says so.
    ///
    /// # Errors
    /// What is there and cannot be read.
    pub fn sources(&self, squad: Option<&PathBuf>, hotpot: Option<&PathBuf>) -> Result<Sources> {
        let texts = &self.judged.texts;
        Ok(Sources {
            words: self.words.exists().then(|| Words::open(&self.words)).transpose()?,
            prose: texts.exists().then(|| Prose::open(texts)).transpose()?,
            squad: squad.map(|f| Questions::squad(f)).transpose()?,
            hotpot: hotpot.map(|f| Questions::hotpot(f)).transpose()?,
        })
    }

    /// Makes samples, or takes those of `read`; puts them to every variant; hands back all that is known.
    ///
    /// # Errors
    /// Bad flags or files, named, before weights are read; a variant that cannot be run. `None` where samples were only written.
    pub fn run(&self, wanted: &[Wanted], read: Option<(&PathBuf, Vec<Sample>)>) -> Result<Option<Answers>> {
        let bars = Bars::new(self.judged.quiet);
        let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
        self.out.as_deref().map(|out| prove_replaceable(out, ANSWERS)).transpose()?;
        if let Some(export) = &self.export {
            if self.out.as_ref() == Some(export) {
                return Err(Error::usage("--export", "is the file of --out too; samples and answers need one each"));
            }
            tasks::prove_replaceable(export, "--export")?;
        }
        let opened = self.judged.open(&progress)?;
        // A mistake is told before samples are made, which can take a while.
        let asked_for = if read.is_none() { self.lengths() } else { vec![] };
        self.judged.check_trained(&opened, &asked_for, &bars)?;
        asked_for.into_iter().try_for_each(|length| opened.variants_at(length).map(drop))?;
        let text = opened.checkpoint().text()?;
        let asking = Prompting::new(text, self.chat, self.question_unseen, self.judged.prefill_chunk)?;
        let from = read.as_ref().map(|(path, _)| path.display().to_string());
        let sets = match read {
            Some((_, samples)) => given(samples, &asking)?,
            None => make(wanted, &asking, &bars)?,
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
            self.judged.check_trained(&opened, &lengths, &bars)?;
        }
        let variants = lengths.iter().map(|l| opened.variants_at(*l)).collect::<Result<Vec<_>>>()?;
        let asked = Asked {
            seed: from.is_none().then_some(self.seed),
            from,
            chat: self.chat,
            question_unseen: self.question_unseen,
            prefill_chunk: self.judged.prefill_chunk,
        };
        let mut file = AnswersFile::open(self.out.as_deref(), opened.header(ANSWERS), asked)?;
        // No more copies than samples to put side by side.
        let most = sets.iter().map(|s| s.samples.len()).max().unwrap_or(1);
        let mut runners = Runners::load(&opened, self.jobs.min(most), &progress)?;
        ask_all(&mut file, &mut runners, &asking, &variants, &sets, &bars)?;
        Ok(Some(file.answers))
    }
}

/// Makes every set; samples of a set in parallel.
fn make(wanted: &[Wanted], asking: &Prompting, bars: &Bars) -> Result<Vec<Set>> {
    let mut sets = vec![];
    for (i, w) in wanted.iter().enumerate() {
        bars.show("samples", i as u64, wanted.len() as u64);
        let one = |index: usize| {
            let sample = (w.make)(index, &|text| asking.count(text))?;
            let prompt = asking.prompt(&sample)?;
            Ok((sample, prompt))
        };
        let samples = (0..w.count).into_par_iter().map(one).collect::<Result<Vec<_>>>()?;
        sets.push(Set { task: w.task.clone(), length: w.length, samples });
    }
    bars.show("samples", wanted.len() as u64, wanted.len() as u64);
    Ok(sets)
}

/// Sets of samples that were read: those of a task whose prompts are about as long belong together.
fn given(samples: Vec<Sample>, asking: &Prompting) -> Result<Vec<Set>> {
    let mut sets: Vec<Set> = vec![];
    for sample in samples {
        let prompt = asking.prompt(&sample)?;
        let tokens = prompt.tokens() + sample.max_new_tokens;
        // RULER's own files do not tell it; samples fill their length nearly, which is a multiple of 512 as a rule.
        let length = sample.made_for.filter(|n| *n >= tokens).unwrap_or(tokens.next_multiple_of(512));
        match sets.iter_mut().find(|s| (&s.task, s.length) == (&sample.task, length)) {
            Some(set) => set.samples.push((sample, prompt)),
            None => sets.push(Set { task: sample.task.clone(), length, samples: vec![(sample, prompt)] }),
        }
    }
    match sets.is_empty() {
        true => Err(Error::usage("--import", "holds no samples")),
        false => Ok(sets),
    }
}
