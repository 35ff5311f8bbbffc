//! `fidelity`: next-token distributions of variants against stock over the stock model's own answers to tasks.
//!
//! Stock reads a sample's context and answers greedily. Every variant then reads question and answer after the same
//! context, token by token, and its distributions are compared with stock's at each token of the answer. A divergence
//! over answers is far more sensitive than a score: every token counts, not only those that change the answer.
//! The variant `stock` reads question and answer as one prefill: its divergence is the rounding error of the model.

use super::eval_args::EvalArgs;
use super::gate::{Gate, GateArgs};
use super::metrics::{compare, LogitRows, TOP};
use super::prompting::{answer_logits, PromptIds, Prompter, Reading};
use super::runner::{shared_progress, Runner, Workers};
use super::smoke::{document_score, entry};
use super::tasks::{self, Prose, Sample, SampleKey, Sources, Task, WordLists};
use crate::cli::{at_least_one, parse_size, print, Bars};
use crate::error::Result;
use crate::eval::report::table::smoke_table;
use crate::eval::report::{check_replaceable, hash, save, AnswerSettings, DocumentScore, KvBytes, Smoke, SMOKE};
use crate::eval::variant::{recalls, Variant};
use crate::generate::Phase;
use crate::method::Method;
use crate::run::Run;
use clap::Args;
use rayon::prelude::*;
use std::path::PathBuf;
use std::sync::atomic::AtomicUsize;

/// Flags of `fidelity`.
#[derive(Debug, Args)]
pub struct FidelityArgs {
    /// Tasks by name, comma-separated; recall is recall_turns, recall_needles and recall_count.
    #[arg(long, value_name = "LIST", default_value = "niah_multivalue,vt,recall", value_delimiter = ',')]
    pub tasks: Vec<String>,
    /// Length in tokens: the maximum of a prompt and its answer together.
    #[arg(long, value_name = "TOKENS", default_value = "8k", value_parser = parse_size)]
    pub ctx: usize,
    /// Samples per task.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = at_least_one)]
    pub samples: usize,
    /// Seed of the samples. Its default differs from that of `ruler`, so that settings are not selected on test samples.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Folder of word lists, as scripts/fetch_words.py writes it.
    #[arg(long, value_name = "DIR", default_value = "words")]
    pub words: PathBuf,
    /// Render prompts with the model's chat template.
    #[arg(long)]
    pub chat: bool,
    /// Samples read in parallel over one copy of the weights, each with its own caches.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub jobs: usize,
    /// Bounds of metrics.
    #[command(flatten)]
    pub gates: GateArgs,
    /// Write the results to FILE.json with every sample, gzip-compressed where the name ends in .gz; an earlier file of
    /// the same kind is replaced.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// Model, variants and texts.
    // Last, since clap puts all flags after a group under that group's help heading.
    #[command(flatten)]
    pub eval: EvalArgs,
}

/// A sample and its prompt.
struct Prompted {
    task: &'static Task,
    sample: Sample,
    prompt: PromptIds,
}

/// Compares every variant with stock over the answers, writes the results, prints a table, and checks the gates.
///
/// # Errors
/// Invalid flags or files, before weights are read; a variant that cannot be run; a missed gate.
pub fn run(args: &FidelityArgs) -> Result<()> {
    let bars = Bars::new(args.eval.quiet);
    let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
    let gates = args.gates.parse()?;
    args.out.as_deref().map(|out| check_replaceable(out, SMOKE)).transpose()?;
    let tasks = tasks::named(&args.tasks)?;
    let target = args.eval.open(&progress)?;
    args.eval.check_trained(&target, &[args.ctx], &bars)?;
    let variants = target.answering_at(args.ctx, true)?;
    let sources = Sources {
        words: args.words.exists().then(|| WordLists::open(&args.words)).transpose()?,
        prose: args.eval.texts.exists().then(|| Prose::open(&args.eval.texts)).transpose()?,
        ..Sources::default()
    };
    let prompting = Prompter::new(target.checkpoint().tokenizer()?, args.chat, true, args.eval.prefill_chunk)?;
    let samples = prompted(args, &tasks, &sources, &prompting)?;
    let settings =
        AnswerSettings { tasks: args.tasks.clone(), samples: args.samples, seed: args.seed, chat: args.chat };
    let mut smoke = Smoke {
        header: target.header(SMOKE),
        positions: 0,
        greedy_tokens: 0,
        answers: Some(settings),
        top: TOP,
        prefill_chunk: args.eval.prefill_chunk,
        runs: vec![],
    };
    let mut workers = Workers::load(&target, recalls(&variants), args.jobs.min(samples.len()), &progress)?;
    let (done, total) = (AtomicUsize::new(0), samples.iter().map(|s| s.prompt.tokens()).sum::<usize>() as u64);
    let show = |n: usize| bars.show("fidelity", n as u64, total);
    let read = |runner: &Runner, i: usize| {
        one(runner, &prompting, &samples[i], &variants, args, &mut shared_progress(&done, show))
    };
    let mut unanswered = 0;
    workers.each_in_order(samples.len(), read, |made| {
        unanswered += usize::from(made.is_empty());
        for (variant, (score, kv)) in variants.iter().zip(made) {
            entry(&mut smoke, variant, args.ctx, kv).documents.push(score);
        }
        Ok(())
    })?;
    bars.show("fidelity", total, total);
    if unanswered > 0 {
        bars.warn(&format!("stock answers {unanswered} of {} samples with no token: left out", samples.len()));
    }
    args.out.as_deref().map(|out| save(out, &smoke)).transpose()?;
    print(smoke_table(&smoke))?;
    Gate::check(&gates, &smoke)
}

/// Generates the samples of all tasks and their prompts.
fn prompted(
    args: &FidelityArgs,
    tasks: &[&'static Task],
    sources: &Sources,
    prompting: &Prompter,
) -> Result<Vec<Prompted>> {
    let all: Vec<(&'static Task, usize)> =
        tasks.iter().flat_map(|task| (0..args.samples).map(move |index| (*task, index))).collect();
    let one = |(task, index): (&'static Task, usize)| {
        let sample = task.sample(sources, SampleKey { length: args.ctx, seed: args.seed, index }, prompting)?;
        let prompt = prompting.prompt(&sample)?;
        Ok(Prompted { task, sample, prompt })
    };
    all.into_par_iter().map(one).collect()
}

/// Scores every variant on one sample; empty where stock's answers have no token.
fn one(
    runner: &Runner,
    prompting: &Prompter,
    Prompted { task, sample, prompt }: &Prompted,
    variants: &[Variant],
    args: &FidelityArgs,
    on_tokens: &mut dyn FnMut(usize),
) -> Result<Vec<(DocumentScore, KvBytes)>> {
    let chunk = args.eval.prefill_chunk;
    let ctx = args.ctx.max(prompt.tokens() + sample.room());
    let stock = runner.stock(ctx, |run| prompting.read_context(run, prompt, on_tokens))?;
    let decode = Reading::Steps(Phase::Decode);
    let quiet = &mut |_: usize| ();
    let answers = runner.branch(&stock, &Variant::stock(), |run| {
        prompting.answer_tokens(run, prompt, (sample.max_new_tokens, Phase::Decode), quiet)
    })?;
    let ids = answers.concat();
    if ids.is_empty() {
        return Ok(vec![]);
    }
    let logits = |run: &mut Run, reading| -> Result<(LogitRows, KvBytes)> {
        let logits = answer_logits(run, (prompt, &answers), (chunk, reading), &mut |_| ())?;
        Ok((LogitRows::of(&logits)?, KvBytes::of(run.cache())))
    };
    let (reference, _) = runner.branch(&stock, &Variant::stock(), |run| logits(run, decode))?;
    let scores = variants.iter().map(|variant| {
        let reading = match variant.method {
            Method::Stock => Reading::AtOnce,
            _ => Reading::Steps(variant.question),
        };
        let (rows, kv) = match runner.forks(variant, ctx)? {
            true => runner.branch(&stock, variant, |run| logits(run, reading))?,
            false => runner.run(variant, ctx, |run| {
                prompting.read_context(run, prompt, &mut |_| ())?;
                logits(run, reading)
            })?,
        };
        let positions = compare(&reference, &rows, &ids)?;
        let same = positions.iter().take_while(|p| p.top1).count();
        let score = DocumentScore {
            document: format!("{}/{}", task.name, sample.index),
            sha256: hash(&[&prompt.ids()[..], &ids].concat()),
            greedy_prefix: same,
            greedy_equal: same == ids.len(),
            ..document_score(&positions, &[], &[])
        };
        Ok((score, kv))
    });
    scores.collect()
}
