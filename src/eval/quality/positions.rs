//! `positions`: the loss on the next token by position, within and beyond the trained length.

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
use crate::eval::variant::recalls;
use crate::run::Run;
use clap::Args;
use std::path::PathBuf;

/// Default of `--bucket` in positions.
const BUCKET: usize = 2 << 10;

/// Flags of `positions`.
#[derive(Debug, Args)]
pub struct PositionsArgs {
    /// Tokens to read of each document.
    #[arg(long, value_name = "TOKENS", default_value = "8k", value_parser = parse_size)]
    pub ctx: usize,
    /// Maximum number of documents; those with fewer than --ctx tokens are skipped [default: all]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub documents: Option<usize>,
    /// Distance in tokens between the positions whose loss is measured.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    pub stride: usize,
    /// Bucket size in positions; losses are averaged per bucket [default: 2k, or --ctx where that is smaller]
    #[arg(long, value_name = "TOKENS", value_parser = parse_size)]
    pub bucket: Option<usize>,
    /// Write the results to FILE.json with every document, gzip-compressed where the name ends in .gz; an earlier file
    /// of the same kind is replaced.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// Model, variants and texts.
    // Last, since clap puts all flags after a group under that group's help heading.
    #[command(flatten)]
    pub eval: EvalArgs,
}

/// Reads the documents with every variant and prints a table.
///
/// # Errors
/// Invalid flags or files; documents that are too short; a variant that cannot be run.
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
    let runner = Runner::new(target.load(recalls(&variants), &progress)?);
    let mut results =
        LossByPosition { header: target.header(POSITIONS), ctx: args.ctx, stride: args.stride, bucket, runs: vec![] };
    let total = args.ctx * texts.len() * variants.len();
    let mut done = 0;
    for variant in &variants {
        let mut documents = vec![];
        let mut cache = None;
        for text in &texts {
            let read = runner.run(variant, args.ctx, |run| {
                let on_tokens = &mut |n: usize| bars.show("positions", (done + n) as u64, total as u64);
                by_bucket(run, text, (args, bucket), on_tokens)
            })?;
            done += args.ctx;
            cache = Some(read.1);
            documents.push(PositionLosses {
                document: text.document.clone(),
                offset: text.offset,
                sha256: hash(&text.ids),
                losses: read.0,
            });
        }
        if let Some(kv) = cache {
            results.runs.push(PositionRun { record: VariantRecord::of(&variant.name, &variant.method, kv), documents });
        }
        args.out.as_deref().map(|out| save(out, &results)).transpose()?;
    }
    bars.show("positions", total as u64, total as u64);
    print(positions_table(&results))
}

/// Returns the mean loss over the measured positions of each bucket, in nats, and the bytes of the cache.
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
