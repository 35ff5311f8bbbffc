//! `fit`: the largest context within a memory budget, computed and then verified by a run.

use super::engine::{out_of_memory, past_budget, BflyEngine, Outcome, Workload};
use crate::cli::{at_least_one, human_bytes, open_device, parse_bytes, parse_size, print, short_count, Bars};
use crate::error::{Error, Result};
use crate::eval::kv_budget::bisect;
use crate::eval::report::table::max_context_table;
use crate::eval::report::{check_replaceable, save, MaxContextRun, MaxContexts, MAX_CONTEXT, OK};
use crate::eval::target::{Target, TargetArgs};
use crate::eval::variant::{recalls, Variant};
use clap::Args;
use std::path::PathBuf;

/// Granularity of the search in tokens: contexts are multiples of it.
pub const STEP: usize = 1 << 10;

/// Default of `--read` in tokens.
const DEFAULT_READ: usize = 64 << 10;

/// The flags of `fit`.
#[derive(Debug, Args)]
pub struct MaxContextArgs {
    /// Memory budgets for weights, cache and activations, such as 10G,24G (GiB; 10GB is 10^9 bytes).
    #[arg(long, value_name = "LIST", required = true, value_delimiter = ',', value_parser = parse_bytes)]
    pub memory_budget: Vec<u64>,
    /// Largest context to consider in tokens; contexts are multiples of 1k.
    #[arg(long, value_name = "TOKENS", default_value = "1M", value_parser = parse_size)]
    pub most: usize,
    /// Prompt tokens of the verifying run, or fewer where the context found is smaller. The cache is allocated for the
    /// whole context at any prompt length [default: 64k, or --most less --decode where that is smaller]
    #[arg(long, value_name = "TOKENS", value_parser = parse_size)]
    pub read: Option<usize>,
    /// New tokens that the verifying run generates.
    #[arg(long, value_name = "TOKENS", default_value_t = 8, value_parser = at_least_one)]
    pub decode: usize,
    /// Largest prefill chunk in tokens; the chunk is smaller where the budget requires it, down to 128.
    #[arg(long, value_name = "TOKENS", default_value = "4096", value_parser = parse_size)]
    pub prefill_chunk: usize,
    /// Write the results to FILE.json after every run, gzip-compressed where the name ends in .gz; an earlier file of
    /// the same kind is replaced.
    #[arg(long, value_name = "FILE.json")]
    pub out: PathBuf,
    /// Print no progress, only warnings and the table.
    #[arg(long, short)]
    pub quiet: bool,
    /// Model, variants and prompt.
    // Last, since clap puts all flags after a group under that group's help heading.
    #[command(flatten)]
    pub target: TargetArgs,
}

impl MaxContextArgs {
    /// Returns the budgets in bytes, in rising order without duplicates.
    pub fn budgets(&self) -> Vec<u64> {
        let mut budgets = self.memory_budget.clone();
        budgets.sort_unstable();
        budgets.dedup();
        budgets
    }

    /// Returns the largest context to consider and the prompt length of the verifying runs, in tokens.
    ///
    /// # Errors
    /// Flags that leave no context to consider, or no room for the prompt.
    pub fn limits(&self) -> Result<(usize, usize)> {
        let (least, most) = (short_count(STEP), self.most / STEP * STEP);
        if most == 0 {
            let message = format!("{} is less than {least}, the smallest context considered", self.most);
            return Err(Error::usage("--most", message));
        }
        if self.decode >= STEP {
            let message = format!(
                "{} tokens leave no room for a prompt in {least}, the smallest context considered",
                self.decode
            );
            return Err(Error::usage("--decode", message));
        }
        let room = most - self.decode;
        match self.read.filter(|read| *read > room) {
            None => Ok((most, self.read.unwrap_or(room.min(DEFAULT_READ)))),
            Some(read) => {
                let (decode, most) = (self.decode, short_count(most));
                Err(Error::usage(
                    "--read",
                    format!("{read} tokens and the {decode} of --decode are more than --most {most}"),
                ))
            }
        }
    }
}

/// Finds and verifies the largest context of every variant in every budget, and prints a table. All flags and files are
/// checked before weights are read.
///
/// # Errors
/// Invalid flags or files. A variant that fits at no context and a run that exceeds its budget are recorded.
pub fn run(args: &MaxContextArgs) -> Result<()> {
    let bars = Bars::new(args.quiet);
    let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
    args.target.model.set_threads()?;
    let (most, read) = args.limits()?;
    let device = open_device(&args.target.model.device)?;
    check_replaceable(&args.out, MAX_CONTEXT)?;
    let target = Target::open(&args.target, device, &progress)?;
    let variants = target.variants()?;
    target.refuse_too_large()?;
    let stream = target.stream(read, &progress)?;
    target.warn(&bars);
    let mut results = MaxContexts {
        header: target.header(MAX_CONTEXT),
        decode_tokens: args.decode,
        prefill_chunk: args.prefill_chunk,
        most_tokens: most,
        prompt: stream.describe(read),
        runs: vec![],
    };
    // Each run starts with the weights alone in memory, as in a process of its own.
    let mut engine = BflyEngine::new(target.load(recalls(&variants), &progress)?, true);
    let mut found = vec![];
    for budget in args.budgets() {
        for variant in &variants {
            let limits = Limits { budget, most, read, decode: args.decode, chunk: args.prefill_chunk };
            found.push((variant, search(&engine, variant, &limits)?));
        }
    }
    let mut contexts: Vec<usize> = found.iter().filter_map(|(_, run)| run.ctx).collect();
    contexts.sort_unstable();
    contexts.dedup();
    target.warn_beyond_trained(&bars, &contexts);
    let total: u64 = found.iter().filter_map(|(_, run)| run.read_tokens).sum::<usize>() as u64;
    let mut done = 0;
    for (variant, mut run) in found {
        let mut on_tokens = |n: usize| bars.show("fit", done + n as u64, total);
        verify(&mut engine, variant, &mut run, &stream.ids, args.decode, &mut on_tokens)?;
        done += run.read_tokens.unwrap_or(0) as u64;
        bars.say(&line(&run));
        results.runs.push(run);
        save(&args.out, &results)?;
    }
    print(max_context_table(&results))
}

/// Limits of a search.
struct Limits {
    /// Memory budget in bytes.
    budget: u64,
    /// Largest context to consider.
    most: usize,
    /// Prompt tokens of the verifying run, at most.
    read: usize,
    /// New tokens that the verifying run generates.
    decode: usize,
    /// Largest prefill chunk in tokens.
    chunk: usize,
}

/// Computes the largest context of `variant` and returns it as the record of the verifying run, without its outcome.
///
/// # Errors
/// A variant that does not fit the model.
fn search(engine: &BflyEngine, variant: &Variant, limits: &Limits) -> Result<MaxContextRun> {
    let fits = |ctx| Ok(engine.needs(variant, ctx)?.chunk_within(limits.budget, limits.chunk).is_ok());
    let ctx = largest(limits.most, fits)?;
    let needs = engine.needs(variant, ctx.unwrap_or(STEP))?;
    let read = ctx.map(|ctx| limits.read.min(ctx - limits.decode));
    // The run verifies a full chunk only, so the chunk is no longer than the prompt.
    let wanted = read.map_or(limits.chunk, |read| read.min(limits.chunk));
    let chunk = needs.chunk_within(limits.budget, wanted);
    Ok(MaxContextRun {
        variant: variant.name.clone(),
        plan: variant.method.plan().cloned(),
        eviction: variant.method.eviction().cloned(),
        memory_budget: limits.budget,
        ctx,
        at_most: ctx == Some(limits.most),
        needed_bytes: chunk.as_ref().ok().map(|chunk| needs.total(*chunk)),
        weights_bytes: needs.weights,
        kv: None,
        prefill_chunk: chunk.as_ref().ok().copied(),
        read_tokens: read,
        status: chunk.map_or_else(|e| out_of_memory(&e), |_| OK.into()),
        within: false,
        sample: None,
    })
}

/// Returns the largest multiple of [`STEP`] up to `most` for which the monotone `fits` holds; `None` without one.
fn largest(most: usize, fits: impl Fn(usize) -> Result<bool>) -> Result<Option<usize>> {
    Ok(bisect(most / STEP, |k| fits(k * STEP))?.map(|k| k * STEP))
}

/// Runs what `run` describes once, and records the outcome in it.
///
/// # Errors
/// Any failure of the engine but out of memory.
fn verify(
    engine: &mut BflyEngine,
    variant: &Variant,
    run: &mut MaxContextRun,
    stream: &[u32],
    new: usize,
    on_tokens: &mut dyn FnMut(usize),
) -> Result<()> {
    let (Some(ctx), Some(read), Some(chunk)) = (run.ctx, run.read_tokens, run.prefill_chunk) else { return Ok(()) };
    let work = Workload { ctx, prompt: &stream[..read], new, chunk, budget: Some(run.memory_budget) };
    match engine.run(variant, &work, on_tokens)? {
        Outcome::Failed(why) => run.status = why,
        Outcome::Ran(sample, facts) => {
            let past = past_budget(sample.peak_device_bytes, run.memory_budget);
            run.within = past.is_none();
            run.status = past.unwrap_or_else(|| OK.into());
            (run.kv, run.sample) = (facts.kv, Some(*sample));
        }
    }
    Ok(())
}

/// Formats the line on stderr for a finished run.
fn line(run: &MaxContextRun) -> String {
    let what = format!("{:>10}  {}", human_bytes(run.memory_budget), run.variant);
    match (run.ctx, &run.sample) {
        (Some(ctx), Some(s)) if run.within => {
            format!("{what}  {}  {:.3} s  {}", short_count(ctx), s.end_to_end_s, human_bytes(s.peak_device_bytes))
        }
        (Some(ctx), _) => format!("{what}  {}  {}", short_count(ctx), run.status),
        (None, _) => format!("{what}  {}", run.status),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::eviction::EvictionPlan;
    use crate::layout::Layout;
    use crate::retrofit::{RetrofitPlan, Settings};
    use crate::selector::SELECTORS;
    use candle_core::DType;

    #[test]
    fn bisection_finds_the_last_that_fits() -> Result<()> {
        for (most, limit, want) in [
            (1 << 20, 0, None),
            (1 << 20, 1023, None),
            (1 << 20, 1024, Some(1024)),
            (1 << 20, 700_000, Some(700_000 / STEP * STEP)),
            (1 << 20, 1 << 20, Some(1 << 20)),
            (1 << 20, usize::MAX, Some(1 << 20)),
            (1024, usize::MAX, Some(1024)),
            (5000, usize::MAX, Some(4096)),
        ] {
            assert_eq!(largest(most, |ctx| Ok(ctx <= limit))?, want, "{limit} of {most}");
        }
        Ok(())
    }

    #[test]
    fn no_cache_that_evicts_shrinks_as_its_context_grows() -> Result<()> {
        let spec = Checkpoint::random("tests/fixtures/shapes/qwen2.5-0.5b", 0)?.spec;
        for rule in crate::eviction::RULES {
            let plan = EvictionPlan::new(rule.name(), 4096, &[])?;
            let bytes = |k: usize| Layout::new(&spec, &plan, k * STEP).map(|l| l.bytes(DType::BF16).peak);
            for k in 1..256 {
                assert!(bytes(k)? <= bytes(k + 1)?, "{}: {k}k", rule.name());
            }
        }
        Ok(())
    }

    #[test]
    fn no_cache_shrinks_as_its_context_grows() -> Result<()> {
        // Bisection needs monotone bytes, also where an additional stage changes the stages of all layers.
        for shape in ["qwen2.5-0.5b", "qwen2.5-7b", "qwen3-4b"] {
            let spec = Checkpoint::random(&format!("tests/fixtures/shapes/{shape}"), 0)?.spec;
            for rule in SELECTORS {
                for (window, partner_count) in [(512, 1), (0, 1), (512, 3)] {
                    let settings =
                        Settings { window, partner_count, partner: rule.name().into(), ..Settings::default() };
                    let plan = RetrofitPlan::new(&spec, None, settings)?;
                    let bytes = |ctx| Layout::new(&spec, &plan, ctx).map(|l| l.bytes(DType::BF16).peak);
                    let mut before = 0;
                    for ctx in (1..=1024).map(|k| k * STEP) {
                        let now = bytes(ctx)?;
                        assert!(now >= before, "{shape}, {} by {partner_count}, window {window}: {ctx}", rule.name());
                        before = now;
                    }
                }
            }
        }
        Ok(())
    }
}
