//! `layers`: which layers a model cannot do without. One layer is swapped at a time, or all are, round by round; then those that
//! are missed most are kept, one more at a time, and what that costs in bytes is told with what it gives.

mod earlier;
mod results;
mod rounds;
mod study;
mod table;

pub use results::{harm, CurvePoint, Layers, Rank, RankBy, Single, LAYERS};

use super::eval_args::EvalArgs;
use super::eval_set::Score;
use super::eval_set_args::EvalSetArgs;
use super::heads::Head;
use super::runner::Runners;
use crate::cli::{at_least_one, Bars, Output};
use crate::error::{At, Error, Result};
use crate::eval::bench::file::{prove_replaceable, save};
use crate::retrofit::{ranges, RetrofitPlan, Settings};
use clap::Args;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;
use std::sync::Mutex;
use study::{retrieval_heads, Study};

/// A study of layers.
#[derive(Debug, Args)]
pub struct LayersArgs {
    /// How layers are ranked: what a layer is swapped on top of when its harm is measured, or by its heads.
    #[arg(long, value_enum, default_value_t = Rank::Rounds)]
    pub rank: Rank,
    /// What makes a layer sensitive [default: answers, or text where no tasks are asked]
    #[arg(long)]
    pub rank_by: Option<RankBy>,
    /// Numbers of most sensitive layers that are kept dense on the curve [default: 0, 1, 2, 3, 4, 6, 8, 12, 16, ...]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub keep: Vec<usize>,
    /// Settings judged side by side, each by a copy of the weights of its own.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub jobs: usize,
    /// Write the plan of each point as DIR/dense-K.json, for bfly-retrofit --plan.
    #[arg(long, value_name = "DIR")]
    pub plans: Option<PathBuf>,
    /// The results, as JSON with every document and sample; what the same build has judged there, however it ranked, is taken up.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// What is read.
    #[command(flatten)]
    pub probe: EvalSetArgs,
    /// What is judged: --variants names the one retrofit whose layers are studied.
    #[command(flatten)]
    pub judged: EvalArgs,
}

/// Layers, the one whose swap does most harm first; of equals the earlier.
fn by_harm(singles: &[Single], harm: impl Fn(&Single) -> f64) -> Vec<usize> {
    let mut layers: Vec<(f64, usize)> = singles.iter().map(|s| (harm(s), s.layer)).collect();
    layers.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    layers.into_iter().map(|(_, layer)| layer).collect()
}

/// `layers` in order of the best of their `heads`, which come the best first; those without one stay as they were, at the end.
fn by_heads(heads: &[Head], layers: Vec<usize>) -> Vec<usize> {
    let best = |layer: &usize| heads.iter().position(|h| h.layer == *layer).unwrap_or(heads.len());
    let mut layers = layers;
    layers.sort_by_key(best);
    layers
}

/// Runs it, writes plans and results, and prints a table.
///
/// # Errors
/// Bad flags or files; a model without layers to swap.
pub fn run(args: &LayersArgs) -> Result<()> {
    let bars = Bars::new(args.judged.quiet);
    let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
    args.probe.check()?;
    args.out.as_deref().map(|out| prove_replaceable(out, LAYERS)).transpose()?;
    args.plans.as_deref().map(prove_plans).transpose()?;
    let probed = args.probe.probed();
    let rank_by = match (args.rank_by, probed.tasks.is_empty()) {
        (Some(RankBy::Answers), true) => {
            return Err(Error::usage("--rank-by", "answers needs tasks; give --tasks, or --rank-by text"))
        }
        (Some(by), _) => by,
        (None, true) => RankBy::Text,
        (None, false) => RankBy::Answers,
    };
    if args.rank == Rank::Heads && probed.tasks.is_empty() {
        return Err(Error::usage("--rank", "heads are told by answers; give --tasks"));
    }
    let opened = args.judged.open(&progress)?;
    args.judged.check_trained(&opened, &[args.probe.ctx], &bars)?;
    let (_, base) = args.judged.one_retrofit(&opened, args.probe.ctx)?;
    let keep = counts(&args.keep, base.layers.len())?;
    let probe = args.probe.probe(&opened, &args.judged, &bars)?;
    let ranking = probe.only(rank_by == RankBy::Text);
    let after = if args.rank == Rank::Rounds { rounds::settings(base.layers.len()) } else { 0 };
    let total = probe.tokens() * (1 + base.layers.len() + keep.len()) + ranking.tokens() * after;
    let jobs = args.jobs.min(base.layers.len().max(keep.len()));
    let earlier =
        args.out.as_deref().map(|out| earlier::earlier(out, &opened.header(LAYERS), &probed)).transpose()?.flatten();
    let mut runners = Runners::load(&opened, jobs, &progress)?;
    let on_tokens = &mut |n| bars.show("layers", n as u64, total as u64);
    let (reference, stock) = probe.reference(runners.first(), on_tokens)?;
    let mut results = Layers::begun(opened.header(LAYERS), probed, (rank_by, args.rank), stock);
    let known = match (earlier, args.out.as_deref()) {
        (Some(study), Some(out)) => results.take_up(study, out)?,
        _ => vec![],
    };
    let tally = retrieval_heads(&probe, runners.first())?;
    (results.heads, results.head_steps) = (tally.heads(), tally.steps());
    let spec = opened.checkpoint().spec.clone();
    let plan = |layers| RetrofitPlan::new(&spec, Some(layers), Settings::clone(&base.settings));
    // What is judged is never lost.
    let unfinished = Mutex::new(Layers { judged: known.clone(), ..results.clone() });
    let on_judged = |score: &Score| {
        let Some(out) = &args.out else { return Ok(()) };
        let mut all = unfinished.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        all.judged.push(score.clone());
        save(out, &*all)
    };
    let done = AtomicUsize::new(probe.tokens());
    let mut study = Study {
        runners: &mut runners,
        reference: &reference,
        plan: &plan,
        bars: &bars,
        done,
        total,
        known,
        on_judged: &on_judged,
    };
    results.single = study.on_top(&probe, &[], &base.layers)?;
    let harm = |s: &Single| results.harm_of(s);
    (results.order, results.rounds) = match args.rank {
        Rank::Alone => (by_harm(&results.single, harm), vec![]),
        Rank::Heads => (by_heads(&results.heads, by_harm(&results.single, harm)), vec![]),
        Rank::Rounds => rounds::eliminate(&results.single, harm, |swapped, left| {
            bars.say(&format!("swapped for good: {}; {} layers left", ranges(swapped), left.len()));
            study.on_top(&ranking, swapped, left)
        })?,
    };
    let dense = keep.iter().map(|k| results.order[..*k].to_vec());
    let dense: Vec<Vec<usize>> = dense.map(|mut d| (d.sort_unstable(), d).1).collect();
    let swapped = |dense: &Vec<usize>| base.layers.iter().copied().filter(|l| !dense.contains(l)).collect();
    let scores = study.judge(&probe, &dense.iter().map(swapped).collect::<Vec<_>>())?;
    results.curve = dense.into_iter().zip(scores).map(|(dense, score)| CurvePoint { dense, score }).collect();
    let unused = |s: &Score| !results.scores().any(|told| told == s);
    results.judged = study.known.into_iter().filter(unused).collect();
    bars.show("layers", total as u64, total as u64);
    args.out.as_deref().map(|out| save(out, &results)).transpose()?;
    if let Some(dir) = &args.plans {
        write_plans(dir, &results)?;
    }
    let _ = write!(std::io::stdout(), "{}", table::table(&results));
    Ok(())
}

/// How many layers are kept at each point of the curve, rising.
fn counts(given: &[usize], layers: usize) -> Result<Vec<usize>> {
    if let Some(k) = given.iter().find(|k| **k > layers) {
        return Err(Error::usage("--keep", format!("{k} is more than the {layers} layers that can be swapped")));
    }
    let mut keep = match given.is_empty() {
        true => (0..=layers).filter(|k| *k < 5 || k.is_multiple_of(4) || *k == 6 || *k == layers).collect(),
        false => given.to_vec(),
    };
    keep.sort_unstable();
    keep.dedup();
    Ok(keep)
}

/// Refuses a directory that plans cannot be written to, before anything is judged.
fn prove_plans(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).at(format!("--plans {}", dir.display()))?;
    Output::reserve(&dir.join("dense-0.json"), "--plans").map(drop)
}

/// One plan per point that swaps anything.
fn write_plans(dir: &Path, results: &Layers) -> Result<()> {
    for point in &results.curve {
        if let Some(plan) = &point.score.record.plan {
            let path = dir.join(format!("dense-{}.json", point.dense.len()));
            let json = serde_json::to_vec_pretty(plan).map_err(|e| Error::format(path.display(), e))?;
            Output::reserve(&path, "--plans")?.write(&json)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_whose_heads_copy_come_first() {
        let head = |layer, score| Head { layer, head: 0, score };
        let heads = [head(7, 0.9), head(2, 0.8), head(7, 0.7), head(5, 0.1)];
        assert_eq!(by_heads(&heads, vec![0, 5, 2, 9, 7]), [7, 2, 5, 0, 9]);
    }

    #[test]
    fn the_curve_goes_from_none_to_all() -> Result<()> {
        assert_eq!(counts(&[], 24)?, [0, 1, 2, 3, 4, 6, 8, 12, 16, 20, 24]);
        assert_eq!(counts(&[], 3)?, [0, 1, 2, 3]);
        assert_eq!(counts(&[5, 0, 5], 7)?, [0, 5]);
        assert!(counts(&[8], 7).unwrap_err().to_string().contains("--keep: 8 is more than the 7"));
        Ok(())
    }
}
