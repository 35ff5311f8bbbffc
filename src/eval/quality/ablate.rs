//! `ablate`: one thing changed at a time, everything else equal, differences paired text by text and question by question.
//!
//! Partner rules are compared at the same allocated bytes: what a rule does not use widens its window, and one that needs more has a
//! narrower one. Two variants whose measured queries read the same are not compared: their difference would be noise taken for a
//! finding.

use super::eval_args::EvalArgs;
use super::eval_set::Score;
use super::eval_set_args::{EvalSetArgs, EvalSetRecord};
use super::graph::Graph;
use super::runner::Runner;
use super::stats::Estimate;
use super::table::extrapolated;
use crate::cli::{short_count, Bars};
use crate::error::Result;
use crate::eval::bench::file::{prove_replaceable, save};
use crate::eval::bench::format::Header;
use crate::eval::bench::table::columns;
use crate::eval::kv_budget::widest_window;
use crate::eval::variant::Variant;
use crate::layout::Layout;
use crate::method::Method;
use crate::retrofit::{FarPosition, Pool, RetrofitPlan, Settings};
use crate::selector::SELECTORS;
use crate::spec::ModelSpec;
use candle_core::DType;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::PathBuf;

/// `kind` of an ablation.
pub const ABLATION: &str = "bfly-ablation";

/// What is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// The partner rule, at the same allocated bytes.
    Partner,
    /// The exact window.
    Window,
    /// Sinks.
    Sinks,
    /// The block size, at the same window.
    Block,
    /// How keys are pooled, and at what distance summaries are scored.
    Pool,
    /// β, the bias on a summary's logit.
    Bias,
    /// Stages read at once.
    Count,
}

/// An ablation.
#[derive(Debug, Args)]
pub struct AblateArgs {
    /// What is changed, one at a time.
    #[arg(
        long,
        value_name = "LIST",
        default_value = "partner,window,sinks,block,pool,bias,count",
        value_delimiter = ','
    )]
    pub axes: Vec<Axis>,
    /// The results, as JSON with every document and sample.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// What is read.
    #[command(flatten)]
    pub probe: EvalSetArgs,
    /// What is judged: --variants names the one retrofit that everything is changed from.
    #[command(flatten)]
    pub judged: EvalArgs,
}

/// What was found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ablation {
    /// Of kind [`ABLATION`].
    #[serde(flatten)]
    pub header: Header,
    /// What was read.
    pub probed: EvalSetRecord,
    /// The model as it came.
    pub stock: Score,
    /// What everything is changed from.
    pub base: Score,
    /// Summaries that a measured query of it reads in a swapped layer, as a mean; not told by files of earlier builds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_summaries_per_query: Option<f64>,
    /// Everything that was changed.
    pub changes: Vec<Change>,
}

/// One change.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Change {
    /// What is changed,
    pub axis: Axis,
    /// and to what.
    pub value: String,
    /// Summaries that a measured query reads in a swapped layer, as a mean.
    pub summaries_per_query: f64,
    /// The variant that reads the same at the measured positions: then nothing was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub same_as: Option<String>,
    /// What it is worth; null where it was not measured.
    pub score: Option<Score>,
}

/// Runs it and prints a table.
///
/// # Errors
/// Bad flags or files; a variant that cannot be run.
pub fn run(args: &AblateArgs) -> Result<()> {
    let bars = Bars::new(args.judged.quiet);
    let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
    args.probe.check()?;
    args.out.as_deref().map(|out| prove_replaceable(out, ABLATION)).transpose()?;
    let opened = args.judged.open(&progress)?;
    let ctx = args.probe.ctx;
    args.judged.check_trained(&opened, &[ctx], &bars)?;
    let (base, plan) = args.judged.one_retrofit(&opened, ctx)?;
    let spec = opened.checkpoint().spec.clone();
    let (changes, left_out) = changes(&args.axes, &plan, &spec, ctx)?;
    for rule in left_out {
        bars.warn(&format!(
            "partner {rule}: not even one block of window fits the base's bytes beside its summaries; left out"
        ));
    }
    let probe = args.probe.probe(&opened, &args.judged, &bars)?;
    let runner = Runner::new(opened.load(&progress)?);
    let measured = ctx - 1 - args.probe.positions - args.probe.decode..ctx - 1;
    let mut graphs = vec![(base.name.clone(), Graph::of(&spec, &plan, ctx, measured.clone())?)];
    let total = (probe.tokens() * (2 + changes.len())) as u64;
    let (reference, stock) = probe.reference(&runner, &mut |n| bars.show("ablate", n as u64, total))?;
    let mut done = probe.tokens();
    let mut judge = |runner: &Runner, variant: &Variant| {
        let score = probe.judge(runner, variant, &reference, &mut |n| bars.show("ablate", (done + n) as u64, total));
        done += probe.tokens();
        score
    };
    let base = judge(&runner, &base)?;
    let mut results = Ablation {
        header: opened.header(ABLATION),
        probed: args.probe.probed(),
        stock,
        base,
        base_summaries_per_query: Some(graphs[0].1.summaries_per_query()),
        changes: vec![],
    };
    for (axis, value, settings) in changes {
        let plan = RetrofitPlan::new(&spec, Some(plan.layers.clone()), settings)?;
        let graph = Graph::of(&spec, &plan, ctx, measured.clone())?;
        let same_as = graphs.iter().find(|(_, g)| *g == graph).map(|(name, _)| name.clone());
        let name = format!("{} {value}", name(axis));
        let score = match &same_as {
            Some(_) => None,
            None => Some(judge(&runner, &Variant { name: name.clone(), method: Method::Butterfly(plan) })?),
        };
        let summaries_per_query = graph.summaries_per_query();
        graphs.push((name, graph));
        results.changes.push(Change { axis, value, summaries_per_query, same_as, score });
        args.out.as_deref().map(|out| save(out, &results)).transpose()?;
    }
    bars.show("ablate", total, total);
    let _ = write!(std::io::stdout(), "{}", table(&results));
    Ok(())
}

fn name(axis: Axis) -> &'static str {
    match axis {
        Axis::Partner => "partner",
        Axis::Window => "window",
        Axis::Sinks => "sinks",
        Axis::Block => "block",
        Axis::Pool => "pool",
        Axis::Bias => "bias",
        Axis::Count => "count",
    }
}

/// A setting, its value, and all settings with it.
type Changed = (Axis, String, Settings);

/// Every change of `base` along `axes`, but the values that it has; and the partner rules that do not fit its bytes.
fn changes(
    axes: &[Axis],
    base: &RetrofitPlan,
    spec: &ModelSpec,
    ctx: usize,
) -> Result<(Vec<Changed>, Vec<&'static str>)> {
    let s = &base.settings;
    let bytes = |settings: &Settings| -> Result<u64> {
        let plan = RetrofitPlan::new(spec, Some(base.layers.clone()), settings.clone())?;
        Ok(Layout::new(spec, &plan, ctx)?.bytes(DType::BF16).peak)
    };
    let target = bytes(s)?;
    let (mut all, mut left_out) = (vec![], vec![]);
    for &axis in axes {
        let with = |value: String, settings: Settings| (axis, value, settings);
        match axis {
            Axis::Partner => {
                for rule in SELECTORS.iter().filter(|r| r.name() != s.partner) {
                    let other = Settings { partner: rule.name().into(), ..s.clone() };
                    match widest_window(&other, target, ctx, bytes)? {
                        Some(settings) => {
                            all.push(with(format!("{}, window {}", rule.name(), settings.window), settings));
                        }
                        None => left_out.push(rule.name()),
                    }
                }
            }
            Axis::Window => {
                let windows = [s.block, 128, 256, 512, 1024, 2048, 4096];
                let windows = windows.into_iter().filter(|w| w.is_multiple_of(s.block) && *w != s.window && *w < ctx);
                let mut windows: Vec<usize> = windows.collect();
                windows.sort_unstable();
                windows.dedup();
                all.extend(windows.into_iter().map(|w| with(w.to_string(), Settings { window: w, ..s.clone() })));
            }
            Axis::Sinks => {
                let sinks = [0, 1, 4, 16, 64].into_iter().filter(|n| *n != s.sink_tokens);
                all.extend(sinks.map(|n| with(n.to_string(), Settings { sink_tokens: n, ..s.clone() })));
            }
            Axis::Block => {
                let blocks =
                    [16, 32, 64, 128, 256].into_iter().filter(|b| *b != s.block && s.window.is_multiple_of(*b));
                all.extend(blocks.map(|b| with(b.to_string(), Settings { block: b, ..s.clone() })));
            }
            Axis::Pool => {
                let own = (s.pool, s.far_position);
                for (name, pool, far) in [
                    ("post-rope", Pool::PostRope, FarPosition::True),
                    ("pre-rope", Pool::PreRope, FarPosition::True),
                    ("pre-rope, clamp", Pool::PreRope, FarPosition::Clamp),
                ] {
                    if (pool, far) != own {
                        all.push(with(name.into(), Settings { pool, far_position: far, ..s.clone() }));
                    }
                }
            }
            Axis::Bias => {
                let biases = [0.0, 0.5, 1.0].into_iter().filter(|b| *b != s.summary_bias);
                all.extend(biases.map(|b| with(b.to_string(), Settings { summary_bias: b, ..s.clone() })));
            }
            Axis::Count => {
                let counts = [1, 2, 4].into_iter().filter(|n| *n != s.partner_count);
                all.extend(counts.map(|n| with(n.to_string(), Settings { partner_count: n, ..s.clone() })));
            }
        }
    }
    Ok((all, left_out))
}

/// One row per change: its bytes, and its paired differences from the base.
fn table(results: &Ablation) -> String {
    let show = |e: Option<Estimate>, decimals| match e {
        Some(e) => e.show(decimals) + if e.differs() { " *" } else { "" },
        None => "-".into(),
    };
    let head = ["", "change", "KV of dense", "summaries", "KL", "KL changes by", "in decode by", "answer loss by"];
    let mut rows = vec![head.map(String::from).to_vec()];
    let kv = |score: &Score| format!("{:.4}x", score.record.share_of_dense());
    let base = &results.base;
    let kl = |score: &Score| Estimate::of(&score.texts(|t| t.kl)).map_or("-".into(), |e| e.show(4));
    let summaries = results.base_summaries_per_query.map_or("-".into(), |n| format!("{n:.2}"));
    let mut first = vec![String::new(), base.record.variant.clone(), kv(base), summaries, kl(base)];
    first.extend(["", "", ""].map(String::from));
    rows.push(first);
    for change in &results.changes {
        let name = format!("{} {}", name(change.axis), change.value);
        let mut row = vec![String::new(), name];
        match &change.score {
            None => {
                let why = change.same_as.as_deref().unwrap_or_default();
                row.extend(["-".into(), format!("{:.2}", change.summaries_per_query)]);
                row.extend([
                    format!("reads what `{why}` reads: not compared"),
                    String::new(),
                    String::new(),
                    String::new(),
                ]);
            }
            Some(score) => {
                let by = |f: fn(&super::eval_set::TextScore) -> f64| {
                    Estimate::of_differences(&score.texts(f), &base.texts(f))
                };
                row.extend([kv(score), format!("{:.2}", change.summaries_per_query), kl(score)]);
                row.push(show(by(|t| t.kl), 4));
                row.push(show(by(|t| t.decode_kl), 4));
                row.push(show(Estimate::of_differences(&score.answer_losses(), &base.answer_losses()), 3));
            }
        }
        rows.push(row);
    }
    columns(&rows)
        + &format!(
            "differences from {} at {}, paired over {} texts and {} questions, with 95% intervals; * where they exclude 0\n",
            base.record.variant,
            short_count(results.probed.ctx),
            base.texts.len(),
            base.answers.len()
        )
        + &extrapolated(&results.header, [results.probed.ctx])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;

    #[test]
    fn rules_are_compared_at_the_same_bytes_and_nothing_is_compared_with_itself() -> Result<()> {
        let spec = Checkpoint::random("tests/fixtures/shapes/qwen2.5-0.5b", 0)?.spec;
        let settings = Settings { block: 16, window: 512, partner_count: 2, ..Settings::default() };
        let base = RetrofitPlan::new(&spec, None, settings)?;
        let ctx = 8192;
        let bytes = |s: &Settings| -> Result<u64> {
            let plan = RetrofitPlan::new(&spec, None, s.clone())?;
            Ok(Layout::new(&spec, &plan, ctx)?.bytes(DType::BF16).peak)
        };
        let target = bytes(&base.settings)?;
        let (partners, left_out) = changes(&[Axis::Partner], &base, &spec, ctx)?;
        assert_eq!(left_out, Vec::<&str>::new());
        assert_eq!(partners.len(), SELECTORS.len() - 1, "every rule but the base's");
        for (_, value, settings) in &partners {
            let took = bytes(settings)?;
            // Less by at most one block of every layer.
            let block = 2 * 2 * 24 * 16 * 2 * 64;
            assert!(took <= target && took + block > target, "{value}: {took} of {target}");
        }
        let all = [Axis::Window, Axis::Sinks, Axis::Block, Axis::Pool, Axis::Bias, Axis::Count];
        for (_, value, settings) in changes(&all, &base, &spec, ctx)?.0 {
            assert_ne!(settings, base.settings, "{value}");
            settings.validate()?;
        }
        // A summary of every 16 tokens takes more than a window of one block leaves.
        let small = RetrofitPlan::new(&spec, None, Settings { window: 16, ..base.settings })?;
        assert!(changes(&[Axis::Partner], &small, &spec, ctx)?.1.contains(&"all"));
        Ok(())
    }
}
