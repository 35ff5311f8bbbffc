//! `positions`: the loss on the next token by position, to any length: whether a model keeps its loss beyond the length that it was
//! trained for.

use super::documents::{Documents, Part};
use super::eval_args::EvalArgs;
use super::format::VariantRecord;
use super::metrics::{losses, Rows};
use super::runner::Runner;
use super::stats::Estimate;
use crate::cli::{at_least_one, parse_size, short_count, Bars};
use crate::error::{Error, Result};
use crate::eval::bench::file::{prove_replaceable, save};
use crate::eval::bench::format::Header;
use crate::eval::bench::prompt::hash;
use crate::eval::bench::summary::kv;
use crate::eval::bench::table::columns;
use crate::run::Run;
use clap::Args;
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::PathBuf;

/// `kind` of losses by position.
pub const POSITIONS: &str = "bfly-positions";

/// `--bucket` where it is not given.
const BUCKET: usize = 2 << 10;

/// Losses by position.
#[derive(Debug, Args)]
pub struct PositionsArgs {
    /// Positions that are read.
    #[arg(long, value_name = "TOKENS", default_value = "8k", value_parser = parse_size)]
    pub ctx: usize,
    /// Documents at most; those with fewer tokens are left out [default: all]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub documents: Option<usize>,
    /// Every so many positions one is judged.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = at_least_one)]
    pub stride: usize,
    /// Positions to a bucket, whose losses are one mean [default: 2k, or --ctx where that is less]
    #[arg(long, value_name = "TOKENS", value_parser = parse_size)]
    pub bucket: Option<usize>,
    /// The results, as JSON with every document.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// What is judged; last, since the heading of its last group holds for whatever follows.
    #[command(flatten)]
    pub judged: EvalArgs,
}

/// Losses of variants by position.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Positions {
    /// Of kind [`POSITIONS`].
    #[serde(flatten)]
    pub header: Header,
    /// Positions that are read; also those provisioned.
    pub ctx: usize,
    /// Every so many positions one is judged.
    pub stride: usize,
    /// Positions to a bucket.
    pub bucket: usize,
    /// One entry per variant.
    pub runs: Vec<PositionRun>,
}

/// One variant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PositionRun {
    /// What was run, and what it held.
    #[serde(flatten)]
    pub record: VariantRecord,
    /// One entry per document.
    pub documents: Vec<PositionLosses>,
}

/// One document.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PositionLosses {
    /// The document,
    pub document: String,
    /// where in it the text begins,
    pub offset: usize,
    /// and the hash of its ids.
    pub sha256: String,
    /// Mean loss of each bucket's judged positions, in nats.
    pub losses: Vec<f64>,
}

/// Runs it and prints a table.
///
/// # Errors
/// Bad flags or files; documents that are too short; a variant that cannot be run.
pub fn run(args: &PositionsArgs) -> Result<()> {
    let bars = Bars::new(args.judged.quiet);
    let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
    args.out.as_deref().map(|out| prove_replaceable(out, POSITIONS)).transpose()?;
    let bucket = args.bucket.unwrap_or(BUCKET.min(args.ctx));
    if bucket > args.ctx || args.stride > bucket {
        let message = format!("{bucket} is not between --stride {} and --ctx {}", args.stride, args.ctx);
        return Err(Error::usage("--bucket", message));
    }
    let opened = args.judged.open(&progress)?;
    args.judged.check_trained(&opened, &[args.ctx], &bars)?;
    let variants = opened.variants_at(args.ctx)?;
    let (checkpoint, lengths) = (opened.checkpoint(), (args.ctx, args.ctx));
    let parts = Documents::open(checkpoint, &args.judged.texts, args.documents, lengths, &progress)?.parts(args.ctx);
    let runner = Runner::new(opened.load(&progress)?);
    let mut results =
        Positions { header: opened.header(POSITIONS), ctx: args.ctx, stride: args.stride, bucket, runs: vec![] };
    let total = args.ctx * parts.len() * variants.len();
    let mut done = 0;
    for variant in &variants {
        let mut documents = vec![];
        let mut held = None;
        for part in &parts {
            let read = runner.run(variant, args.ctx, |run| {
                let on_tokens = &mut |n: usize| bars.show("positions", (done + n) as u64, total as u64);
                by_bucket(run, part, (args, bucket), on_tokens)
            })?;
            done += args.ctx;
            held = Some(read.1);
            documents.push(PositionLosses {
                document: part.document.clone(),
                offset: part.offset,
                sha256: hash(&part.ids),
                losses: read.0,
            });
        }
        if let Some(kv) = held {
            results.runs.push(PositionRun { record: VariantRecord::of(variant, kv), documents });
        }
        args.out.as_deref().map(|out| save(out, &results)).transpose()?;
    }
    bars.show("positions", total as u64, total as u64);
    let _ = write!(std::io::stdout(), "{}", table(&results));
    Ok(())
}

/// Mean losses of the judged positions of each bucket, and what the cache held.
fn by_bucket(
    run: &mut Run,
    part: &Part,
    (args, bucket): (&PositionsArgs, usize),
    on_tokens: &mut dyn FnMut(usize),
) -> Result<(Vec<f64>, crate::eval::bench::format::Kv)> {
    let buckets = part.ids.len().div_ceil(bucket);
    let (mut sums, mut counts) = (vec![0.0; buckets], vec![0usize; buckets]);
    let mut start = 0;
    // The last position has no next token.
    for chunk in part.ids[..part.ids.len() - 1].chunks(args.judged.prefill_chunk) {
        let want: Vec<usize> = (0..chunk.len()).filter(|i| (start + i + 1).is_multiple_of(args.stride)).collect();
        let logits = run.forward(chunk, &want)?;
        if !want.is_empty() {
            let next: Vec<u32> = want.iter().map(|i| part.ids[start + i + 1]).collect();
            for (i, loss) in want.iter().zip(losses(&Rows::of(&logits)?, &next)?) {
                sums[(start + i) / bucket] += loss;
                counts[(start + i) / bucket] += 1;
            }
        }
        start += chunk.len();
        on_tokens(start);
    }
    let means = sums.iter().zip(&counts).filter(|(_, n)| **n > 0).map(|(sum, n)| sum / *n as f64);
    Ok((means.collect(), kv(run.cache())))
}

/// One row per bucket, a column per variant.
fn table(results: &Positions) -> String {
    let mut rows = vec![vec!["position".to_string(), String::new()]];
    rows[0].extend(results.runs.iter().map(|r| r.record.variant.clone()));
    for bucket in 0..results.ctx.div_ceil(results.bucket) {
        let to = ((bucket + 1) * results.bucket).min(results.ctx);
        let mut row = vec![format!("{}-{}", bucket * results.bucket, to), String::new()];
        for run in &results.runs {
            let values: Vec<f64> = run.documents.iter().filter_map(|d| d.losses.get(bucket).copied()).collect();
            row.push(Estimate::of(&values).map_or("-".into(), |e| e.show(3)));
        }
        rows.push(row);
    }
    let trained = results.header.trained_positions;
    let beyond = if results.ctx > trained { ", beyond it extrapolated" } else { "" };
    let about = format!(
        "loss on the next token in nats, means over {} documents with 95% intervals; trained for {}{beyond}\n",
        results.runs.first().map_or(0, |r| r.documents.len()),
        short_count(trained)
    );
    columns(&rows) + &about
}
