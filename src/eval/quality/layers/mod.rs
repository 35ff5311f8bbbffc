//! `layers`: which layers a model cannot do without. One layer is swapped at a time, or all are, round by round; then
//! the most sensitive ones are kept dense, one more at a time, and each point of that curve has its score and its
//! bytes.

mod rounds;
mod study;

use super::eval_args::EvalArgs;
use super::eval_set_args::EvalSetArgs;
use super::runner::Runners;
use crate::cli::{at_least_one, print, Bars, Output};
use crate::error::{At, Error, Result};
use crate::eval::report::resume::earlier_layers;
use crate::eval::report::table::layers_table;
use crate::eval::report::{
    by_harm, prove_replaceable, save, CurvePoint, Head, Layers, Rank, RankBy, Score, Single, LAYERS,
};
use crate::retrofit::{ranges, RetrofitPlan, Settings};
use clap::Args;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;
use std::sync::Mutex;
use study::{retrieval_heads, Study};

/// The flags of `layers`.
#[derive(Debug, Args)]
pub struct LayersArgs {
    /// How layers are ranked: by what a layer is swapped on top of when its harm is measured, or by retrieval heads.
    #[arg(long, value_enum, default_value_t = Rank::Rounds)]
    pub rank: Rank,
    /// What makes a layer sensitive [default: answers, or text with --tasks none]
    #[arg(long)]
    pub rank_by: Option<RankBy>,
    /// Numbers of layers that are kept dense on the curve, the most sensitive first [default: 0, 1, 2, 3, 4, 6, 8, 12,
    /// 16, ...]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub keep: Vec<usize>,
    /// Scores computed side by side over one copy of the weights.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub jobs: usize,
    /// Write the plan of each point as DIR/dense-K.json, for bfly-retrofit --plan.
    #[arg(long, value_name = "DIR")]
    pub plans: Option<PathBuf>,
    /// Write the results to FILE.json with every document and sample, compressed where the name ends in .gz. Scores
    /// that the same build has left there are taken over, however it ranked layers.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// Evaluation set.
    #[command(flatten)]
    pub eval_set: EvalSetArgs,
    /// Model, texts, and in `--variants` the one retrofit whose layers are studied.
    #[command(flatten)]
    pub eval: EvalArgs,
}

/// `layers` in order of their best head in `heads`, which are sorted with the best first; layers without a head keep
/// their order at the end.
fn by_heads(heads: &[Head], layers: Vec<usize>) -> Vec<usize> {
    let best = |layer: &usize| heads.iter().position(|h| h.layer == *layer).unwrap_or(heads.len());
    let mut layers = layers;
    layers.sort_by_key(best);
    layers
}

/// Runs the study, writes plans and results, and prints a table.
///
/// # Errors
/// Bad flags or files; a model without layers to swap.
pub fn run(args: &LayersArgs) -> Result<()> {
    let bars = Bars::new(args.eval.quiet);
    let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
    args.eval_set.check()?;
    args.out.as_deref().map(|out| prove_replaceable(out, LAYERS)).transpose()?;
    args.plans.as_deref().map(prove_plans).transpose()?;
    let probed = args.eval_set.record();
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
    let target = args.eval.open(&progress)?;
    args.eval.check_trained(&target, &[args.eval_set.ctx], &bars)?;
    let (_, base) = args.eval.one_retrofit(&target, args.eval_set.ctx)?;
    let keep = counts(&args.keep, base.layers.len())?;
    let eval_set = args.eval_set.eval_set(&target, &args.eval, &bars)?;
    let ranking = eval_set.only(rank_by == RankBy::Text);
    let after = if args.rank == Rank::Rounds { rounds::settings(base.layers.len()) } else { 0 };
    let total = eval_set.tokens() * (1 + base.layers.len() + keep.len()) + ranking.tokens() * after;
    let jobs = args.jobs.min(base.layers.len().max(keep.len()));
    let earlier =
        args.out.as_deref().map(|out| earlier_layers(out, &target.header(LAYERS), &probed)).transpose()?.flatten();
    let mut runners = Runners::load(&target, jobs, &progress)?;
    let on_tokens = &mut |n| bars.show("layers", n as u64, total as u64);
    let (reference, stock) = eval_set.reference(runners.first(), on_tokens)?;
    let mut results = Layers::begin(target.header(LAYERS), probed, (rank_by, args.rank), stock);
    let known = match (earlier, args.out.as_deref()) {
        (Some(study), Some(out)) => results.take_up(study, out)?,
        _ => vec![],
    };
    let tally = retrieval_heads(&eval_set, runners.first())?;
    (results.heads, results.head_steps) = (tally.heads(), tally.steps());
    let spec = target.checkpoint().spec.clone();
    let plan = |layers| RetrofitPlan::new(&spec, Some(layers), Settings::clone(&base.settings));
    // Every score is saved at once, so that none is lost.
    let unfinished = Mutex::new(Layers { judged: known.clone(), ..results.clone() });
    let on_score = |score: &Score| {
        let Some(out) = &args.out else { return Ok(()) };
        let mut all = unfinished.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        all.judged.push(score.clone());
        save(out, &*all)
    };
    let done = AtomicUsize::new(eval_set.tokens());
    let mut study = Study {
        runners: &mut runners,
        reference: &reference,
        plan: &plan,
        bars: &bars,
        done,
        total,
        known,
        on_score: &on_score,
    };
    results.single = study.on_top(&eval_set, &[], &base.layers)?;
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
    let scores = study.scores(&eval_set, &dense.iter().map(swapped).collect::<Vec<_>>())?;
    results.curve = dense.into_iter().zip(scores).map(|(dense, score)| CurvePoint { dense, score }).collect();
    let unused = |s: &Score| !results.scores().any(|told| told == s);
    results.judged = study.known.into_iter().filter(unused).collect();
    bars.show("layers", total as u64, total as u64);
    args.out.as_deref().map(|out| save(out, &results)).transpose()?;
    if let Some(dir) = &args.plans {
        write_plans(dir, &results)?;
    }
    print(layers_table(&results))
}

/// The number of layers kept at each point of the curve, rising.
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

/// Refuses a directory that plans cannot be written to, before anything is scored.
fn prove_plans(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).at(format!("--plans {}", dir.display()))?;
    let earlier = std::fs::read_dir(dir).at(dir.display())?.filter_map(|e| Some(e.ok()?.path()));
    let named = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("dense-"));
    earlier.filter(named).chain([dir.join("dense-0.json")]).try_for_each(|path| reserve_plan(&path).map(drop))
}

/// Only a plan is replaced by a plan.
fn reserve_plan(path: &Path) -> Result<Output> {
    let fault = |_| Ok(RetrofitPlan::load(path).err().map(|_| "is no plan; only plans are replaced".into()));
    Output::reserve_replacing(path, "--plans", fault)
}

/// Writes one plan per point that swaps anything.
fn write_plans(dir: &Path, results: &Layers) -> Result<()> {
    for point in &results.curve {
        if let Some(plan) = &point.score.record.plan {
            let path = dir.join(format!("dense-{}.json", point.dense.len()));
            let json = serde_json::to_vec_pretty(plan).map_err(|e| Error::format(path.display(), e))?;
            reserve_plan(&path)?.write(&json)?;
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
