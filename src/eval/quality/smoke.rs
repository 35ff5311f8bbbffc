//! The smoke test: next-token distributions and greedy text of variants against stock, on the same tokens of real text.
//!
//! Each text is read by stock, then by every variant, each with its own cache. Distributions are compared at the text's
//! last positions, where a retrofit reads the smallest share of the context; greedy decoding continues from there.

use super::documents::{Documents, Excerpt};
use super::eval_args::EvalArgs;
use super::gate::{Gate, GateArgs};
use super::metrics::{compare, LogitRows, PositionMetrics, TOP};
use super::runner::Runner;
use crate::cli::{at_least_one, parse_size, print, short_count, Bars};
use crate::error::{Error, Result};
use crate::eval::report::table::smoke_table;
use crate::eval::report::{
    check_replaceable, hash, save, DocumentScore, KvBytes, Smoke, SmokeRun, VariantRecord, SMOKE,
};
use crate::eval::variant::{recalls, Variant};
use crate::generate::{watch, Phase, Request, Sampler, Sampling};
use crate::run::Run;
use clap::Args;
use std::path::PathBuf;

/// Flags of the smoke test.
#[derive(Debug, Args)]
pub struct SmokeArgs {
    /// Contexts to run in tokens, comma-separated; a context is a text and the --greedy new tokens.
    #[arg(long, value_name = "LIST", default_value = "1k,4k,8k", value_delimiter = ',', value_parser = parse_size)]
    pub ctx: Vec<usize>,
    /// Maximum number of documents; those too short for a context are skipped at that context [default: all]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub documents: Option<usize>,
    /// Number of positions at the end of each text at which distributions are compared.
    #[arg(long, value_name = "K", default_value_t = 256, value_parser = at_least_one)]
    pub positions: usize,
    /// Greedy new tokens after each text, compared with stock's.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one)]
    pub greedy: usize,
    /// Bounds of metrics.
    #[command(flatten)]
    pub gates: GateArgs,
    /// Write the results to FILE.json with every document, gzip-compressed where the name ends in .gz; an earlier file
    /// of the same kind is replaced.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// Model, variants and texts.
    // Last, since clap puts all flags after a group under that group's help heading.
    #[command(flatten)]
    pub eval: EvalArgs,
}

impl SmokeArgs {
    /// Returns the contexts in rising order without duplicates.
    ///
    /// # Errors
    /// A context that is too short for the positions and the new tokens.
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

/// Output of a variant on one text.
struct VariantOutput {
    /// Logits at the compared positions.
    logits: LogitRows,
    /// Greedy tokens after the text.
    greedy: Vec<u32>,
    /// Bytes of the cache.
    kv: KvBytes,
}

/// Compares every variant with stock, writes the results, prints a table, and checks the gates.
///
/// # Errors
/// Invalid flags or files, before weights are read; a variant that cannot be run; a missed gate.
pub fn run(args: &SmokeArgs) -> Result<()> {
    let bars = Bars::new(args.eval.quiet);
    let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
    let gates = args.gates.parse()?;
    args.out.as_deref().map(|out| check_replaceable(out, SMOKE)).transpose()?;
    let contexts = args.contexts()?;
    let target = args.eval.open(&progress)?;
    args.eval.check_trained(&target, &contexts, &bars)?;
    // All contexts' variants are parsed first, so that a mistake is reported before weights are read.
    let variants = contexts.iter().map(|c| target.variants_at(*c)).collect::<Result<Vec<_>>>()?;
    let (least, most) = (contexts[0], contexts[contexts.len() - 1]);
    let documents = Documents::open(target.checkpoint(), &args.eval.texts, args.documents, (least, most), &progress)?;
    target.warn(&bars);
    let work: Vec<(usize, Vec<Excerpt>)> = contexts.iter().map(|c| (*c, documents.excerpts(*c))).collect();
    if let Some((ctx, _)) = work.iter().find(|(_, texts)| texts.is_empty()) {
        let message = format!("no document in {} has {} tokens", args.eval.texts.display(), short_count(*ctx));
        return Err(Error::usage("--ctx", message));
    }
    let runner = Runner::new(target.load(recalls(variants.iter().flatten()), &progress)?);
    let mut smoke = Smoke {
        header: target.header(SMOKE),
        positions: args.positions,
        greedy_tokens: args.greedy,
        answers: None,
        top: TOP,
        prefill_chunk: args.eval.prefill_chunk,
        runs: vec![],
    };
    let total: usize = work.iter().map(|(ctx, texts)| ctx * texts.len() * (1 + variants[0].len())).sum();
    let mut done = 0;
    for ((ctx, texts), variants) in work.iter().zip(&variants) {
        for text in texts {
            let mut read = |variant: &Variant| {
                let read = runner.run(variant, *ctx, |run| {
                    let on_tokens = &mut |n: usize| bars.show("smoke", (done + n) as u64, total as u64);
                    reading(run, text, args, on_tokens)
                });
                done += ctx;
                read
            };
            let stock = read(&Variant::stock())?;
            for variant in variants {
                let other = read(variant)?;
                let from = text.ids.len() - args.greedy - args.positions;
                let next = &text.ids[from + 1..from + 1 + args.positions];
                let score = DocumentScore {
                    document: text.document.clone(),
                    offset: text.offset,
                    sha256: hash(&text.ids),
                    ..document_score(&compare(&stock.logits, &other.logits, next)?, &stock.greedy, &other.greedy)
                };
                entry(&mut smoke, variant, *ctx, other.kv).documents.push(score);
            }
        }
        // Saved after every context, so that an interruption loses one context at most.
        args.out.as_deref().map(|out| save(out, &smoke)).transpose()?;
    }
    bars.show("smoke", total as u64, total as u64);
    print(smoke_table(&smoke))?;
    Gate::check(&gates, &smoke)
}

/// Prefills `text` without its last `--greedy` tokens, then generates as many greedily. Under exact recall the compared
/// positions are decode steps, since its prefill is exact.
fn reading(run: &mut Run, text: &Excerpt, args: &SmokeArgs, on_tokens: &mut dyn FnMut(usize)) -> Result<VariantOutput> {
    let mut prompt = &text.ids[..text.ids.len() - args.greedy];
    let recalls = run.layout().recall().next().is_some();
    if recalls {
        let (context, compared) = prompt.split_at(prompt.len() - args.positions);
        run.prefill(context, args.eval.prefill_chunk, 1, &mut watch(&mut *on_tokens))?;
        prompt = compared;
    }
    let request = Request {
        prompt,
        max_new_tokens: args.greedy,
        chunk: args.eval.prefill_chunk,
        stop: &[],
        logits_last: args.positions,
        phase: if recalls { Phase::Decode } else { Phase::Prefill },
    };
    let made =
        run.generate(&request, &mut Sampler::new(Sampling::GREEDY)?, &mut watch(on_tokens), &mut watch(|_| ()))?;
    Ok(VariantOutput { logits: LogitRows::of(&made.prompt_logits)?, greedy: made.tokens, kv: KvBytes::of(run.cache()) })
}

/// Averages `positions` and compares the greedy tokens; the caller fills in the text.
pub(super) fn document_score(positions: &[PositionMetrics], stock: &[u32], greedy: &[u32]) -> DocumentScore {
    let n = positions.len().max(1) as f64;
    let mean = |f: &dyn Fn(&PositionMetrics) -> f64| positions.iter().map(f).sum::<f64>() / n;
    DocumentScore {
        kl: mean(&|p| p.kl),
        kl_reverse: mean(&|p| p.kl_reverse),
        top1: mean(&|p| f64::from(u8::from(p.top1))),
        overlap: mean(&|p| p.overlap as f64),
        stock_loss: mean(&|p| p.reference_loss),
        loss: mean(&|p| p.loss),
        greedy_prefix: stock.iter().zip(greedy).take_while(|(a, b)| a == b).count(),
        greedy_equal: stock == greedy,
        ..DocumentScore::default()
    }
}

/// Returns the run of `variant` at `ctx`, which is added where there is none.
pub(super) fn entry<'a>(smoke: &'a mut Smoke, variant: &Variant, ctx: usize, kv: KvBytes) -> &'a mut SmokeRun {
    let same = |r: &SmokeRun| (r.record.variant.as_str(), r.ctx) == (variant.name.as_str(), ctx);
    let at = smoke.runs.iter().position(same).unwrap_or_else(|| {
        smoke.runs.push(SmokeRun {
            record: VariantRecord::of(&variant.name, &variant.method, kv),
            ctx,
            documents: vec![],
        });
        smoke.runs.len() - 1
    });
    &mut smoke.runs[at]
}
