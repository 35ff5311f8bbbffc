//! Distributions and greedy text of retrofits against stock, on the same tokens of real text.
//!
//! Each text is read twice or more: by stock, then by every variant, each with a cache of its own. Distributions are compared at the
//! text's last positions, where a retrofit has the most to have lost; greedy text goes on from there through decode.

use super::documents::{Documents, Part};
use super::eval_args::EvalArgs;
use super::format::{DocumentScore, Smoke, SmokeRun, VariantRecord, SMOKE};
use super::gate::{self, Gate};
use super::metrics::{compare, Rows, TOP};
use super::runner::Runner;
use super::table::smoke_table;
use crate::cli::{at_least_one, parse_size, short_count, Bars};
use crate::error::{Error, Result};
use crate::eval::bench::file::{prove_replaceable, save};
use crate::eval::bench::format::Kv;
use crate::eval::bench::prompt::hash;
use crate::eval::bench::summary::kv;
use crate::eval::variant::Variant;
use crate::generate::{watch, Request, Sampler, Sampling};
use crate::run::Run;
use clap::Args;
use std::io::Write;
use std::path::PathBuf;

/// A smoke test.
#[derive(Debug, Args)]
pub struct SmokeArgs {
    /// Contexts, each of a text and the new tokens after it.
    #[arg(long, value_name = "LIST", default_value = "1k,4k,8k", value_delimiter = ',', value_parser = parse_size)]
    pub ctx: Vec<usize>,
    /// Documents at most; those too short for a context are left out there [default: all]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub documents: Option<usize>,
    /// Last positions of each text that distributions are compared at.
    #[arg(long, value_name = "K", default_value_t = 256, value_parser = at_least_one)]
    pub positions: usize,
    /// New tokens of greedy text after each.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one)]
    pub greedy: usize,
    /// Bounds from below; the help names the metrics of [`gate::METRICS`].
    #[arg(long, value_name = "METRIC=VALUE", help = gate::help())]
    pub fail_below: Vec<String>,
    /// The same for a metric above a value, such as kl=0.1.
    #[arg(long, value_name = "METRIC=VALUE")]
    pub fail_above: Vec<String>,
    /// The results, as JSON with every document.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// What is judged; last, since the heading of its last group holds for whatever follows.
    #[command(flatten)]
    pub judged: EvalArgs,
}

impl SmokeArgs {
    /// The contexts, rising.
    ///
    /// # Errors
    /// One that is too short for the positions and the new tokens.
    pub fn contexts(&self) -> Result<Vec<usize>> {
        let mut contexts = self.ctx.clone();
        contexts.sort_unstable();
        contexts.dedup();
        let least = self.positions + self.greedy;
        match contexts.iter().find(|c| **c <= least) {
            None => Ok(contexts),
            Some(c) => {
                let message = format!(
                    "{c} has no room for {} positions and {} new tokens after them",
                    self.positions, self.greedy
                );
                Err(Error::usage("--ctx", message))
            }
        }
    }
}

/// What one reading of a text gives.
struct Reading {
    /// Of the judged positions.
    logits: Rows,
    greedy: Vec<u32>,
    kv: Kv,
}

/// Compares, prints a table, writes the results, and judges them by the gates that were asked for.
///
/// # Errors
/// Bad flags or files, named, before weights are read; a variant that cannot be run; a gate that was missed.
pub fn run(args: &SmokeArgs) -> Result<()> {
    let bars = Bars::new(args.judged.quiet);
    let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
    let gates = Gate::parse(&args.fail_below, &args.fail_above)?;
    args.out.as_deref().map(|out| prove_replaceable(out, SMOKE)).transpose()?;
    let contexts = args.contexts()?;
    let opened = args.judged.open(&progress)?;
    args.judged.check_trained(&opened, &contexts, &bars)?;
    // All of them now: a mistake is told before weights are read.
    let variants = contexts.iter().map(|c| opened.variants_at(*c)).collect::<Result<Vec<_>>>()?;
    let (least, most) = (contexts[0], contexts[contexts.len() - 1]);
    let documents = Documents::open(opened.checkpoint(), &args.judged.texts, args.documents, (least, most), &progress)?;
    let work: Vec<(usize, Vec<Part>)> = contexts.iter().map(|c| (*c, documents.parts(*c))).collect();
    if let Some((ctx, _)) = work.iter().find(|(_, parts)| parts.is_empty()) {
        let message = format!("no document of {} holds {} tokens", args.judged.texts.display(), short_count(*ctx));
        return Err(Error::usage("--ctx", message));
    }
    let runner = Runner::new(opened.load(&progress)?);
    let mut smoke = Smoke {
        header: opened.header(SMOKE),
        positions: args.positions,
        greedy_tokens: args.greedy,
        top: TOP,
        prefill_chunk: args.judged.prefill_chunk,
        runs: vec![],
    };
    let total: usize = work.iter().map(|(ctx, parts)| ctx * parts.len() * (1 + variants[0].len())).sum();
    let mut done = 0;
    for ((ctx, parts), variants) in work.iter().zip(&variants) {
        for part in parts {
            let mut read = |variant: &Variant| {
                let read = runner.run(variant, *ctx, |run| {
                    let on_tokens = &mut |n: usize| bars.show("smoke", (done + n) as u64, total as u64);
                    reading(run, part, args, on_tokens)
                });
                done += ctx;
                read
            };
            let stock = read(&Variant::stock())?;
            for variant in variants {
                let other = read(variant)?;
                let from = part.ids.len() - args.greedy - args.positions;
                let next = &part.ids[from + 1..from + 1 + args.positions];
                let score = DocumentScore {
                    document: part.document.clone(),
                    offset: part.offset,
                    sha256: hash(&part.ids),
                    ..DocumentScore::of(&compare(&stock.logits, &other.logits, next)?, &stock.greedy, &other.greedy)
                };
                entry(&mut smoke, variant, *ctx, other.kv).documents.push(score);
            }
        }
        // What is measured so far is whole.
        args.out.as_deref().map(|out| save(out, &smoke)).transpose()?;
    }
    bars.show("smoke", total as u64, total as u64);
    // A closed pipe does not undo the file.
    let _ = write!(std::io::stdout(), "{}", smoke_table(&smoke));
    Gate::judge(&gates, &smoke)
}

/// Reads all of `part` but the room for greedy text, which is then made.
fn reading(run: &mut Run, part: &Part, args: &SmokeArgs, on_tokens: &mut dyn FnMut(usize)) -> Result<Reading> {
    let request = Request {
        prompt: &part.ids[..part.ids.len() - args.greedy],
        max_new_tokens: args.greedy,
        chunk: args.judged.prefill_chunk,
        stop: &[],
        logits_last: args.positions,
    };
    let made =
        run.generate(&request, &mut Sampler::new(Sampling::GREEDY)?, &mut watch(on_tokens), &mut watch(|_| ()))?;
    Ok(Reading { logits: Rows::of(&made.prompt_logits)?, greedy: made.tokens, kv: kv(run.cache()) })
}

/// The run of `variant` at `ctx`, put there if it is not.
fn entry<'a>(smoke: &'a mut Smoke, variant: &Variant, ctx: usize, kv: Kv) -> &'a mut SmokeRun {
    let same = |r: &SmokeRun| (r.record.variant.as_str(), r.ctx) == (variant.name.as_str(), ctx);
    let at = smoke.runs.iter().position(same).unwrap_or_else(|| {
        smoke.runs.push(SmokeRun { record: VariantRecord::of(variant, kv), ctx, documents: vec![] });
        smoke.runs.len() - 1
    });
    &mut smoke.runs[at]
}
