//! Flags shared by `layers` and `ablate`, and the evaluation set that they define.

use super::documents::Documents;
use super::eval_args::EvalArgs;
use super::eval_set::EvalSet;
use super::prompting::Prompter;
use super::tasks::{self, Prose, SampleKey, Sources, WordLists};
use crate::cli::{at_least_one, parse_size, Bars};
use crate::error::{Error, Result};
use crate::eval::report::EvalSetRecord;
use crate::eval::target::Target;
use crate::retrofit::RetrofitPlan;
use clap::Args;
use rayon::prelude::*;
use std::path::PathBuf;

/// Flags of an evaluation set.
#[derive(Debug, Args)]
pub struct EvalSetArgs {
    /// Tokens of each text, and of each question with its answer.
    #[arg(long, value_name = "TOKENS", default_value = "4k", value_parser = parse_size)]
    pub ctx: usize,
    /// Maximum number of documents; those with fewer than --ctx tokens are skipped [default: all]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub documents: Option<usize>,
    /// Prefilled positions of each text to compare, just before those of --decode; under exact recall, whose prefill is
    /// the stock model's, they are read in decode steps too.
    #[arg(long, value_name = "K", default_value_t = 128, value_parser = at_least_one)]
    pub positions: usize,
    /// Positions at the end of each text to read one by one, in decode steps.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = at_least_one)]
    pub decode: usize,
    /// Tasks whose expected answers are scored by their loss, comma-separated; recall is the three recall tasks, none
    /// is text alone.
    #[arg(long, value_name = "none|LIST", default_value = "niah_single_2,niah_multikey_1", value_delimiter = ',')]
    pub tasks: Vec<String>,
    /// Samples per task.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    pub samples: usize,
    /// Seed of the samples. Its default differs from that of `ruler`, so that plans are not selected on test samples.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Folder of word lists, as scripts/fetch_words.py writes it.
    #[arg(long, value_name = "DIR", default_value = "words")]
    pub words: PathBuf,
    /// Render questions with the model's chat template.
    #[arg(long)]
    pub chat: bool,
}

impl EvalSetArgs {
    /// Returns the record of the evaluation set with variants of `base`, for results.
    pub fn record(&self, base: &RetrofitPlan) -> EvalSetRecord {
        EvalSetRecord {
            ctx: self.ctx,
            positions: self.positions,
            decode: self.decode,
            tasks: self.wanted_tasks().to_vec(),
            samples: self.samples,
            seed: self.seed,
            chat: self.chat,
            stepwise: base.settings.recall > 0,
        }
    }

    /// Returns the names of the tasks; empty for `none`.
    pub fn wanted_tasks(&self) -> &[String] {
        match self.tasks.as_slice() {
            [one] if one == "none" => &[],
            all => all,
        }
    }

    /// Checks the flags against each other, before weights are read.
    ///
    /// # Errors
    /// A context too small for its positions; an unknown or repeated task.
    pub fn check(&self) -> Result<()> {
        if self.positions + self.decode >= self.ctx {
            let message =
                format!("{} has no room for {} positions and {} after them", self.ctx, self.positions, self.decode);
            return Err(Error::usage("--ctx", message));
        }
        tasks::named(self.wanted_tasks()).map(drop)
    }

    /// Builds the evaluation set for variants of the plan `base` on `target`.
    ///
    /// # Errors
    /// Documents that are too short; questions for a checkpoint without a tokenizer; a task whose sources are missing.
    pub fn eval_set(&self, (target, base): (&Target, &RetrofitPlan), eval: &EvalArgs, bars: &Bars) -> Result<EvalSet> {
        let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
        let lengths = (self.ctx, self.ctx);
        let documents = Documents::open(target.checkpoint(), &eval.texts, self.documents, lengths, &progress)?;
        target.warn(bars);
        let tasks = self.wanted_tasks();
        let mut questions = vec![];
        if !tasks.is_empty() {
            let prompting = Prompter::new(target.checkpoint().tokenizer()?, self.chat, false, eval.prefill_chunk)?;
            let sources = Sources {
                words: Some(WordLists::open(&self.words)?),
                prose: Some(Prose::open(&eval.texts)?),
                ..Sources::default()
            };
            for task in tasks::named(tasks)? {
                let one = |index| {
                    let draw = SampleKey { length: self.ctx, seed: self.seed, index };
                    let sample = task.sample(&sources, draw, &prompting)?;
                    let answers = sample.outputs().map(|o| prompting.answer_ids(&format!(" {}", o.join(", "))));
                    Ok((prompting.prompt(&sample)?, answers.collect::<Result<Vec<_>>>()?))
                };
                questions.extend((0..self.samples).into_par_iter().map(one).collect::<Result<Vec<_>>>()?);
            }
        }
        Ok(EvalSet {
            texts: documents.excerpts(self.ctx),
            questions,
            prefill: self.positions,
            decode: self.decode,
            stepwise: base.settings.recall > 0,
            chunk: eval.prefill_chunk,
            ctx: self.ctx,
        })
    }
}
