//! `ablate`: one setting of a retrofit changed at a time, everything else equal, with paired differences over texts and
//! questions.
//!
//! Partner rules are compared at the same allocated bytes: a rule that needs less memory for summaries gets a wider
//! window, a rule that needs more a narrower one. A variant whose measured queries read the same tokens and summaries
//! as an earlier one is not measured, since the difference would be noise.

use super::eval_args::EvalArgs;
use super::eval_set_args::EvalSetArgs;
use super::reads::ReadSet;
use super::runner::Runner;
use crate::cli::{print, Bars};
use crate::error::Result;
use crate::eval::kv_budget::widest_window;
use crate::eval::report::table::ablation_table;
use crate::eval::report::{check_replaceable, save, Ablation, AblationAxis, AblationChange, ABLATION};
use crate::eval::variant::Variant;
use crate::layout::Layout;
use crate::method::Method;
use crate::retrofit::{FarPosition, KeyPooling, RetrofitPlan, Settings};
use crate::selector::SELECTORS;
use crate::spec::ModelSpec;
use candle_core::DType;
use clap::Args;
use std::path::PathBuf;

/// The flags of `ablate`.
#[derive(Debug, Args)]
pub struct AblateArgs {
    /// Settings to change, one at a time, comma-separated.
    #[arg(
        long,
        value_name = "LIST",
        default_value = "partner,window,sinks,block,pool,bias,count",
        value_delimiter = ','
    )]
    pub axes: Vec<AblationAxis>,
    /// Write the results to FILE.json with every document and sample, gzip-compressed where the name ends in .gz; an
    /// earlier file of the same kind is replaced.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// Evaluation set.
    #[command(flatten)]
    pub eval_set: EvalSetArgs,
    /// Model, texts, and in `--variants` the base retrofit.
    #[command(flatten)]
    pub eval: EvalArgs,
}

/// Runs the ablation and prints a table.
///
/// # Errors
/// Invalid flags or files; a variant that cannot be run.
pub fn run(args: &AblateArgs) -> Result<()> {
    let bars = Bars::new(args.eval.quiet);
    let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
    args.eval_set.check()?;
    args.out.as_deref().map(|out| check_replaceable(out, ABLATION)).transpose()?;
    let target = args.eval.open(&progress)?;
    let ctx = args.eval_set.ctx;
    args.eval.check_trained(&target, &[ctx], &bars)?;
    let (base, plan) = args.eval.one_retrofit(&target, ctx)?;
    let spec = target.checkpoint().spec.clone();
    let (changes, left_out) = changes(&args.axes, &plan, &spec, ctx)?;
    for rule in left_out {
        bars.warn(&format!(
            "partner {rule} is left out: its summaries and a window of one block exceed the base's bytes"
        ));
    }
    let eval_set = args.eval_set.eval_set(&target, &args.eval, &bars)?;
    let runner = Runner::new(target.load(plan.settings.recalls(), &progress)?);
    let measured = ctx - 1 - args.eval_set.positions - args.eval_set.decode..ctx - 1;
    let mut reads = vec![(base.name.clone(), ReadSet::of(&spec, &plan, ctx, measured.clone())?)];
    let total = (eval_set.tokens() * (2 + changes.len())) as u64;
    let (reference, stock) = eval_set.reference(&runner, &mut |n| bars.show("ablate", n as u64, total))?;
    let mut done = eval_set.tokens();
    let mut score = |variant: &Variant| {
        let on_tokens = &mut |n| bars.show("ablate", (done + n) as u64, total);
        let score = eval_set.score(&runner, variant, &reference, on_tokens);
        done += eval_set.tokens();
        score
    };
    let base = score(&base)?;
    let mut results = Ablation {
        header: target.header(ABLATION),
        probed: args.eval_set.record(),
        stock,
        base,
        base_summaries_per_query: Some(reads[0].1.summaries_per_query()),
        changes: vec![],
    };
    for (axis, value, settings) in changes {
        let plan = RetrofitPlan::new(&spec, Some(plan.layers.clone()), settings)?;
        let own = ReadSet::of(&spec, &plan, ctx, measured.clone())?;
        let same_as = reads.iter().find(|(_, r)| *r == own).map(|(name, _)| name.clone());
        let name = format!("{} {value}", axis.name());
        let score = match &same_as {
            Some(_) => None,
            None => Some(score(&Variant::new(name.clone(), Method::Butterfly(plan)))?),
        };
        let summaries_per_query = own.summaries_per_query();
        reads.push((name, own));
        results.changes.push(AblationChange { axis, value, summaries_per_query, same_as, score });
        args.out.as_deref().map(|out| save(out, &results)).transpose()?;
    }
    bars.show("ablate", total, total);
    print(ablation_table(&results))
}

/// A changed setting, its new value, and all settings with the change.
type Changed = (AblationAxis, String, Settings);

/// Returns every change of `base` along `axes` to another value, and the partner rules that do not fit into the base's
/// bytes.
fn changes(
    axes: &[AblationAxis],
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
            AblationAxis::Partner => {
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
            AblationAxis::Window => {
                let windows = [s.block, 128, 256, 512, 1024, 2048, 4096];
                let windows = windows.into_iter().filter(|w| w.is_multiple_of(s.block) && *w != s.window && *w < ctx);
                let mut windows: Vec<usize> = windows.collect();
                windows.sort_unstable();
                windows.dedup();
                all.extend(windows.into_iter().map(|w| with(w.to_string(), Settings { window: w, ..s.clone() })));
            }
            AblationAxis::Sinks => {
                let sinks = [0, 1, 4, 16, 64].into_iter().filter(|n| *n != s.sink_tokens);
                all.extend(sinks.map(|n| with(n.to_string(), Settings { sink_tokens: n, ..s.clone() })));
            }
            AblationAxis::Block => {
                let blocks =
                    [16, 32, 64, 128, 256].into_iter().filter(|b| *b != s.block && s.window.is_multiple_of(*b));
                all.extend(blocks.map(|b| with(b.to_string(), Settings { block: b, ..s.clone() })));
            }
            AblationAxis::Pool => {
                let own = (s.pool, s.far_position);
                for (name, pool, far) in [
                    ("post-rope", KeyPooling::PostRope, FarPosition::True),
                    ("pre-rope", KeyPooling::PreRope, FarPosition::True),
                    ("pre-rope, clamp", KeyPooling::PreRope, FarPosition::Clamp),
                ] {
                    if (pool, far) != own {
                        all.push(with(name.into(), Settings { pool, far_position: far, ..s.clone() }));
                    }
                }
            }
            AblationAxis::Bias => {
                let biases = [0.0, 0.5, 1.0].into_iter().filter(|b| *b != s.summary_bias);
                all.extend(biases.map(|b| with(b.to_string(), Settings { summary_bias: b, ..s.clone() })));
            }
            AblationAxis::Count => {
                let counts = [1, 2, 4].into_iter().filter(|n| *n != s.partner_count);
                all.extend(counts.map(|n| with(n.to_string(), Settings { partner_count: n, ..s.clone() })));
            }
        }
    }
    Ok((all, left_out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;

    #[test]
    fn rules_are_compared_at_the_same_bytes_and_no_change_equals_the_base() -> Result<()> {
        let spec = Checkpoint::random("tests/fixtures/shapes/qwen2.5-0.5b", 0)?.spec;
        let settings = Settings { block: 16, window: 512, partner_count: 2, ..Settings::default() };
        let base = RetrofitPlan::new(&spec, None, settings)?;
        let ctx = 8192;
        let bytes = |s: &Settings| -> Result<u64> {
            let plan = RetrofitPlan::new(&spec, None, s.clone())?;
            Ok(Layout::new(&spec, &plan, ctx)?.bytes(DType::BF16).peak)
        };
        let target = bytes(&base.settings)?;
        let (partners, left_out) = changes(&[AblationAxis::Partner], &base, &spec, ctx)?;
        assert_eq!(left_out, Vec::<&str>::new());
        assert_eq!(partners.len(), SELECTORS.len() - 1, "every rule but the base's");
        for (_, value, settings) in &partners {
            let took = bytes(settings)?;
            // Less by at most one block of every layer.
            let block = 2 * 2 * 24 * 16 * 2 * 64;
            assert!(took <= target && took + block > target, "{value}: {took} of {target}");
        }
        let all = [
            AblationAxis::Window,
            AblationAxis::Sinks,
            AblationAxis::Block,
            AblationAxis::Pool,
            AblationAxis::Bias,
            AblationAxis::Count,
        ];
        for (_, value, settings) in changes(&all, &base, &spec, ctx)?.0 {
            assert_ne!(settings, base.settings, "{value}");
            settings.validate()?;
        }
        // A summary of every 16 tokens takes more than a window of one block leaves.
        let small = RetrofitPlan::new(&spec, None, Settings { window: 16, ..base.settings })?;
        assert!(changes(&[AblationAxis::Partner], &small, &spec, ctx)?.1.contains(&"all"));
        Ok(())
    }
}
