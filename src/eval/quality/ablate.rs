//! `ablate`: one setting of a retrofit changed at a time, everything else equal, with paired differences over texts and
//! questions.
//!
//! Partner rules are compared at the same allocated bytes: a rule that needs less memory for summaries gets a wider
//! window, a rule that needs more a narrower one. A variant whose measured queries read the same tokens and summaries
//! as an earlier one is not measured, since the difference would be noise. Settings of exact recall ([`axes_of`]) are
//! compared at their own bytes.

use super::axes::{axes_of, changes};
use super::eval_args::EvalArgs;
use super::eval_set_args::EvalSetArgs;
use super::reads::ReadSet;
use super::runner::Runner;
use crate::cli::{print, Bars};
use crate::error::{Error, Result};
use crate::eval::report::table::ablation_table;
use crate::eval::report::{check_replaceable, save, Ablation, AblationAxis, AblationChange, ABLATION};
use crate::eval::variant::Variant;
use crate::method::Method;
use crate::recall::KeyCodeChoice;
use crate::retrofit::RetrofitPlan;
use clap::Args;
use std::path::PathBuf;

/// The flags of `ablate`.
#[derive(Debug, Args)]
pub struct AblateArgs {
    /// Settings to change, one at a time, comma-separated [default: partner,window,sinks,block,pool,bias,count, or
    /// recall,code,rest,window,sinks,block with exact recall]
    ///
    /// Exact recall is calibrated anew for each number of sinks.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
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
    let recalls = plan.settings.recall > 0;
    let mut axes = axes_of(&args.axes, recalls)?;
    if recalls && target.brings_calibration() && axes.contains(&AblationAxis::Sinks) {
        let why = format!(
            "`sinks` needs a calibration for each number of sinks, and the patch brings one for {}",
            plan.settings.sink_tokens
        );
        match args.axes.is_empty() {
            true => bars.warn(&format!("axis {why}: left out")),
            false => return Err(Error::usage("--axes", format!("{why}; give the patch's model as --model"))),
        }
        axes.retain(|axis| *axis != AblationAxis::Sinks);
    }
    let (mut changes, left_out) = changes(&axes, &plan, &spec, ctx)?;
    left_out.iter().for_each(|why| bars.warn(why));
    let eval_set = args.eval_set.eval_set((&target, &plan), &args.eval, &bars)?;
    let weights = target.load(plan.settings.recalls(), &progress)?;
    if recalls {
        // A calibration at natural positions does not serve every code.
        let calibration = weights.calibration()?;
        changes.retain(|(axis, value, settings)| {
            let fits = KeyCodeChoice::parse(&settings.key_code).and_then(|code| calibration.check(&code));
            fits.inspect_err(|e| bars.warn(&format!("{} {value} is left out: {e}", axis.name()))).is_ok()
        });
    }
    let (mut runner, mut sinks) = (Runner::new(weights), plan.settings.sink_tokens);
    let measured = ctx - 1 - args.eval_set.positions - args.eval_set.decode..ctx - 1;
    let mut reads = vec![(base.name.clone(), ReadSet::of(&spec, &plan, ctx, measured.clone())?)];
    let total = (eval_set.tokens() * (2 + changes.len())) as u64;
    let (reference, stock) = eval_set.reference(&runner, &mut |n| bars.show("ablate", n as u64, total))?;
    let mut done = eval_set.tokens();
    let mut score = |runner: &Runner, variant: &Variant| {
        let on_tokens = &mut |n| bars.show("ablate", (done + n) as u64, total);
        let score = eval_set.score(runner, variant, &reference, on_tokens);
        done += eval_set.tokens();
        score
    };
    let base = score(&runner, &base)?;
    let mut results = Ablation {
        header: target.header(ABLATION),
        probed: args.eval_set.record(&plan),
        stock,
        base,
        base_summaries_per_query: (!recalls).then(|| reads[0].1.summaries_per_query()),
        changes: vec![],
    };
    for (axis, value, settings) in changes {
        let plan = RetrofitPlan::new(&spec, Some(plan.layers.clone()), settings)?;
        let own = ReadSet::of(&spec, &plan, ctx, measured.clone())?;
        let same_as = reads.iter().find(|(_, r)| *r == own).map(|(name, _)| name.clone());
        let name = format!("{} {value}", axis.name());
        let score = match &same_as {
            Some(_) => None,
            None => {
                if recalls && plan.settings.sink_tokens != sinks {
                    // A calibration is made for one number of sinks.
                    drop(runner);
                    sinks = plan.settings.sink_tokens;
                    runner = Runner::new(target.load(plan.settings.recalls(), &progress)?);
                }
                Some(score(&runner, &Variant::new(name.clone(), Method::Butterfly(plan)))?)
            }
        };
        let summaries_per_query = own.summaries_per_query();
        reads.push((name, own));
        results.changes.push(AblationChange { axis, value, summaries_per_query, same_as, score });
        args.out.as_deref().map(|out| save(out, &results)).transpose()?;
    }
    bars.show("ablate", total, total);
    print(ablation_table(&results))
}
