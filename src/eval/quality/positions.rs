//! `positions`: the loss on the next token by its position, also beyond the length that the model was trained for.

use super::documents::{Documents, Excerpt};
use super::eval_args::EvalArgs;
use super::metrics::{losses, LogitRows};
use super::runner::Runner;
use crate::cli::{at_least_one, parse_size, print, Bars};
use crate::error::{Error, Result};
use crate::eval::report::table::positions_table;
use crate::eval::report::{
    check_replaceable, hash, save, KvBytes, LossByPosition, PositionLosses, PositionRun, VariantRecord, POSITIONS,
};
use crate::run::Run;
use clap::Args;
use std::path::PathBuf;

/// Default of `--bucket` in positions.
const BUCKET: usize = 2 << 10;

/// The flags of `positions`.
#[derive(Debug, Args)]
pub struct PositionsArgs {
    /// Positions to read of each document.
    #[arg(long, value_name = "TOKENS", default_value = "8k", value_parser = parse_size)]
    pub ctx: usize,
    /// Most documents to read; those with fewer tokens are left out [default: all]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub documents: Option<usize>,
    /// Distance between judged positions.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    pub stride: usize,
    /// Positions to a bucket, whose losses are one mean [default: 2k, or --ctx where that is less]
    #[arg(long, value_name = "TOKENS", value_parser = parse_size)]
    pub bucket: Option<usize>,
    /// Write the results to FILE.json with every document, compressed where the name ends in .gz.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// Model, variants and texts. (The last field, since the heading of its last group holds for whatever follows.)
    #[command(flatten)]
    pub eval: EvalArgs,
}

/// Reads the documents as every variant, and prints a table.
///
/// # Errors
/// Bad flags or files; documents that are too short; a variant that cannot be run.
pub fn run(args: &PositionsArgs) -> Result<()> {
    let bars = Bars::new(args.eval.quiet);
    let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
    args.out.as_deref().map(|out| check_replaceable(out, POSITIONS)).transpose()?;
    let bucket = args.bucket.unwrap_or(BUCKET.min(args.ctx));
    if bucket > args.ctx || args.stride > bucket {
        let message = format!("{bucket} is not between --stride {} and --ctx {}", args.stride, args.ctx);
        return Err(Error::usage("--bucket", message));
    }
    let target = args.eval.open(&progress)?;
    args.eval.check_trained(&target, &[args.ctx], &bars)?;
    let variants = target.variants_at(args.ctx)?;
    let (checkpoint, lengths) = (target.checkpoint(), (args.ctx, args.ctx));
    let texts = Documents::open(checkpoint, &args.eval.texts, args.documents, lengths, &progress)?.excerpts(args.ctx);
    target.warn(&bars);
    let runner = Runner::new(target.load(&progress)?);
    let mut results =
        LossByPosition { header: target.header(POSITIONS), ctx: args.ctx, stride: args.stride, bucket, runs: vec![] };
    let total = args.ctx * texts.len() * variants.len();
    let mut done = 0;
    for variant in &variants {
        let mut documents = vec![];
        let mut held = None;
        for text in &texts {
            let read = runner.run(variant, args.ctx, |run| {
                let on_tokens = &mut |n: usize| bars.show("positions", (done + n) as u64, total as u64);
                by_bucket(run, text, (args, bucket), on_tokens)
            })?;
            done += args.ctx;
            held = Some(read.1);
            documents.push(PositionLosses {
                document: text.document.clone(),
                offset: text.offset,
                sha256: hash(&text.ids),
                losses: read.0,
            });
        }
        if let Some(kv) = held {
            results.runs.push(PositionRun { record: VariantRecord::of(&variant.name, &variant.method, kv), documents });
        }
        args.out.as_deref().map(|out| save(out, &results)).transpose()?;
    }
    bars.show("positions", total as u64, total as u64);
    print(positions_table(&results))
}

/// The mean loss of the judged positions of each bucket, and the bytes of the cache.
fn by_bucket(
    run: &mut Run,
    text: &Excerpt,
    (args, bucket): (&PositionsArgs, usize),
    on_tokens: &mut dyn FnMut(usize),
) -> Result<(Vec<f64>, KvBytes)> {
    let buckets = text.ids.len().div_ceil(bucket);
    let (mut sums, mut counts) = (vec![0.0; buckets], vec![0usize; buckets]);
    let mut start = 0;
    // The last position has no next token.
    for chunk in text.ids[..text.ids.len() - 1].chunks(args.eval.prefill_chunk) {
        let want: Vec<usize> = (0..chunk.len()).filter(|i| (start + i + 1).is_multiple_of(args.stride)).collect();
        let logits = run.forward(chunk, &want)?;
        if !want.is_empty() {
            let next: Vec<u32> = want.iter().map(|i| text.ids[start + i + 1]).collect();
            for (i, loss) in want.iter().zip(losses(&LogitRows::of(&logits)?, &next)?) {
                sums[(start + i) / bucket] += loss;
                counts[(start + i) / bucket] += 1;
            }
        }
        start += chunk.len();
        on_tokens(start);
    }
    let means = sums.iter().zip(&counts).filter(|(_, n)| **n > 0).map(|(sum, n)| sum / *n as f64);
    Ok((means.collect(), KvBytes::of(run.cache())))
}
