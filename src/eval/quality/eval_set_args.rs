//! The flags that `layers` and `ablate` share, and the probe that they make.

use super::documents::Documents;
use super::eval_args::EvalArgs;
use super::eval_set::EvalSet;
use super::prompting::Prompting;
use super::tasks::{self, Draw, Prose, Sources, Words};
use crate::cli::{at_least_one, parse_size, Bars};
use crate::error::{Error, Result};
use crate::eval::target::Target;
use clap::Args;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// What is read.
#[derive(Debug, Args)]
pub struct EvalSetArgs {
    /// Tokens of texts and of questions.
    #[arg(long, value_name = "TOKENS", default_value = "4k", value_parser = parse_size)]
    pub ctx: usize,
    /// Documents at most; those too short are left out [default: all]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub documents: Option<usize>,
    /// Last positions of each text that are compared after prefill.
    #[arg(long, value_name = "K", default_value_t = 128, value_parser = at_least_one)]
    pub positions: usize,
    /// Positions after them that are read one by one, as decode does.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = at_least_one)]
    pub decode: usize,
    /// Tasks whose expected answers are judged by their loss; none: text alone.
    #[arg(long, value_name = "none|LIST", default_value = "niah_single_2,niah_multikey_1", value_delimiter = ',')]
    pub tasks: Vec<String>,
    /// Samples of each.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    pub samples: usize,
    /// Seed of the samples: not that of `ruler`, so that no plan is chosen on samples that it is scored on.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Word lists, as scripts/fetch_words.py lays them out.
    #[arg(long, value_name = "DIR", default_value = "words")]
    pub words: PathBuf,
    /// Put questions into the model's own chat template.
    #[arg(long)]
    pub chat: bool,
}

/// What was read: told by the results.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalSetRecord {
    /// Tokens of texts and of questions; also the positions provisioned.
    pub ctx: usize,
    /// Last positions of each text that were compared after prefill.
    pub positions: usize,
    /// Positions after them that were read one by one.
    pub decode: usize,
    /// Tasks whose expected answers were judged.
    pub tasks: Vec<String>,
    /// Samples of each.
    pub samples: usize,
    /// Seed of the samples.
    pub seed: u64,
    /// Whether questions went into the model's chat template.
    pub chat: bool,
}

impl EvalSetArgs {
    /// For results.
    pub fn probed(&self) -> EvalSetRecord {
        EvalSetRecord {
            ctx: self.ctx,
            positions: self.positions,
            decode: self.decode,
            tasks: self.wanted_tasks().to_vec(),
            samples: self.samples,
            seed: self.seed,
            chat: self.chat,
        }
    }

    fn wanted_tasks(&self) -> &[String] {
        match self.tasks.as_slice() {
            [one] if one == "none" => &[],
            all => all,
        }
    }

    /// Refuses what cannot be read, before weights are.
    ///
    /// # Errors
    /// Which flag.
    pub fn check(&self) -> Result<()> {
        if self.positions + self.decode >= self.ctx {
            let message =
                format!("{} has no room for {} positions and {} after them", self.ctx, self.positions, self.decode);
            return Err(Error::usage("--ctx", message));
        }
        tasks::named(self.wanted_tasks()).map(drop)
    }

    /// Everything that is read.
    ///
    /// # Errors
    /// Documents that are too short; questions for a checkpoint without a tokenizer; a task that needs what is not there.
    pub fn probe(&self, opened: &Target, judged: &EvalArgs, bars: &Bars) -> Result<EvalSet> {
        let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
        let lengths = (self.ctx, self.ctx);
        let documents = Documents::open(opened.checkpoint(), &judged.texts, self.documents, lengths, &progress)?;
        let tasks = self.wanted_tasks();
        let mut questions = vec![];
        if !tasks.is_empty() {
            let asking = Prompting::new(opened.checkpoint().text()?, self.chat, false, judged.prefill_chunk)?;
            let sources = Sources {
                words: Some(Words::open(&self.words)?),
                prose: Some(Prose::open(&judged.texts)?),
                ..Sources::default()
            };
            for task in tasks {
                let task = tasks::find(task)?;
                let one = |index| {
                    let draw = Draw { length: self.ctx, seed: self.seed, index };
                    let sample = task.sample(&sources, draw, &|text| asking.count(text))?;
                    let answer = asking.answer_ids(&format!(" {}", sample.outputs.join(", ")))?;
                    Ok((asking.prompt(&sample)?, answer))
                };
                questions.extend((0..self.samples).into_par_iter().map(one).collect::<Result<Vec<_>>>()?);
            }
        }
        Ok(EvalSet {
            parts: documents.parts(self.ctx),
            questions,
            prefill: self.positions,
            decode: self.decode,
            chunk: judged.prefill_chunk,
            ctx: self.ctx,
        })
    }
}
