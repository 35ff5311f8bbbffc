//! `layers`: the sensitivity of a model to swapping each layer. Layers are ranked by swapping one at a time, by
//! backward elimination or by retrieval heads; then a curve of scores and cache bytes keeps more and more of the most
//! sensitive layers dense.

mod rounds;
mod study;

use super::eval_args::EvalArgs;
use super::eval_set_args::EvalSetArgs;
use super::runner::Workers;
use crate::cli::{at_least_one, print, Bars, Output};
use crate::error::{At, Error, Result};
use crate::eval::report::resume::earlier_layers;
use crate::eval::report::table::layers_table;
use crate::eval::report::{
    by_sensitivity, check_replaceable, save, CurvePoint, LayerScore, LayerStudy, RankBy, RankMethod, RetrievalHead,
    Score, LAYERS,
};
use crate::retrofit::{ranges, RetrofitPlan, Settings};
use clap::Args;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;
use std::sync::Mutex;
use study::{retrieval_heads, LayerScorer};

/// Flags of `layers`.
#[derive(Debug, Args)]
pub struct LayersArgs {
    /// Ranking method.
    #[arg(long, value_enum, default_value_t = RankMethod::Rounds)]
    pub rank: RankMethod,
    /// Metric of a layer's sensitivity [default: answers, or text with --tasks none]
    #[arg(long)]
    pub rank_by: Option<RankBy>,
    /// Numbers of most sensitive layers to keep dense, comma-separated; each is a point of the curve [default: 0, 1, 2,
    /// 3, 4, 6, 8, 12, 16, ...]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub keep: Vec<usize>,
    /// Scores computed in parallel over one copy of the weights, each with its own cache; more than 1 helps on a GPU.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub jobs: usize,
    /// Write the plan of each point of the curve to DIR/dense-K.json, K layers kept dense, for bfly-retrofit --plan.
    #[arg(long, value_name = "DIR")]
    pub plans: Option<PathBuf>,
    /// Write the results to FILE.json with every document and sample, gzip-compressed where the name ends in .gz.
    /// Scores in an existing file of the same build, model and evaluation set are reused, with any ranking method.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// Evaluation set.
    #[command(flatten)]
    pub eval_set: EvalSetArgs,
    /// Model, texts, and in `--variants` the retrofit whose layers are studied.
    #[command(flatten)]
    pub eval: EvalArgs,
}

/// Sorts `layers` by their best head in `heads`, which are sorted best first; layers without a head keep their order at
/// the end.
fn by_heads(heads: &[RetrievalHead], layers: Vec<usize>) -> Vec<usize> {
    let best = |layer: &usize| heads.iter().position(|h| h.layer == *layer).unwrap_or(heads.len());
    let mut layers = layers;
    layers.sort_by_key(best);
    layers
}

/// Runs the study, writes plans and results, and prints a table.
///
/// # Errors
/// Invalid flags or files; a model without layers to swap.
pub fn run(args: &LayersArgs) -> Result<()> {
    let bars = Bars::new(args.eval.quiet);
    let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
    args.eval_set.check()?;
    args.out.as_deref().map(|out| check_replaceable(out, LAYERS)).transpose()?;
    args.plans.as_deref().map(check_plans).transpose()?;
    let text_alone = args.eval_set.wanted_tasks().is_empty();
    let rank_by = match (args.rank_by, text_alone) {
        (Some(RankBy::Answers), true) => {
            return Err(Error::usage("--rank-by", "`answers` needs tasks; give --tasks, or --rank-by text"))
        }
        (Some(by), _) => by,
        (None, true) => RankBy::Text,
        (None, false) => RankBy::Answers,
    };
    if args.rank == RankMethod::Heads && text_alone {
        return Err(Error::usage("--rank", "`heads` needs answers to observe; give --tasks"));
    }
    let target = args.eval.open(&progress)?;
    args.eval.check_trained(&target, &[args.eval_set.ctx], &bars)?;
    let (_, base) = args.eval.one_retrofit(&target, args.eval_set.ctx)?;
    let keep = counts(&args.keep, base.layers.len())?;
    let probed = args.eval_set.record(&base);
    let eval_set = args.eval_set.eval_set((&target, &base), &args.eval, &bars)?;
    let ranking = eval_set.only(rank_by == RankBy::Text);
    let after = if args.rank == RankMethod::Rounds { rounds::scores_after_first(base.layers.len()) } else { 0 };
    let total = eval_set.tokens() * (1 + base.layers.len() + keep.len()) + ranking.tokens() * after;
    let jobs = args.jobs.min(base.layers.len().max(keep.len()));
    let earlier =
        args.out.as_deref().map(|out| earlier_layers(out, &target.header(LAYERS), &probed)).transpose()?.flatten();
    let mut runners = Workers::load(&target, base.settings.recalls(), jobs, &progress)?;
    let on_tokens = &mut |n| bars.show("layers", n as u64, total as u64);
    let (reference, stock) = eval_set.reference(runners.first(), on_tokens)?;
    let mut results = LayerStudy::begin(target.header(LAYERS), probed, (rank_by, args.rank), stock);
    let known = match (earlier, args.out.as_deref()) {
        (Some(study), Some(out)) => results.take_up(study, out)?,
        _ => vec![],
    };
    let tally = retrieval_heads(&eval_set, runners.first())?;
    (results.heads, results.head_steps) = (tally.heads(), tally.steps());
    let spec = target.checkpoint().spec.clone();
    let plan = |layers: Vec<usize>| {
        let mut settings = Settings::clone(&base.settings);
        settings.butterfly_layers.retain(|l| layers.contains(l));
        RetrofitPlan::new(&spec, Some(layers), settings)
    };
    // Every score is saved as soon as it is computed, so that an interruption loses none.
    let unfinished = Mutex::new(LayerStudy { judged: known.clone(), ..results.clone() });
    let on_score = |score: &Score| {
        let Some(out) = &args.out else { return Ok(()) };
        let mut all = unfinished.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        all.judged.push(score.clone());
        save(out, &*all)
    };
    let done = AtomicUsize::new(eval_set.tokens());
    let mut study = LayerScorer {
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
    let sensitivity = |s: &LayerScore| results.sensitivity_of(s);
    (results.order, results.rounds) = match args.rank {
        RankMethod::Alone => (by_sensitivity(&results.single, sensitivity), vec![]),
        RankMethod::Heads => (by_heads(&results.heads, by_sensitivity(&results.single, sensitivity)), vec![]),
        RankMethod::Rounds => rounds::eliminate(&results.single, sensitivity, |swapped, left| {
            bars.say(&format!("swapped: layers {}; {} layers left", ranges(swapped), left.len()));
            study.on_top(&ranking, swapped, left)
        })?,
    };
    let dense = keep.iter().map(|k| results.order[..*k].to_vec());
    let dense: Vec<Vec<usize>> = dense.map(|mut d| (d.sort_unstable(), d).1).collect();
    let swapped = |dense: &Vec<usize>| base.layers.iter().copied().filter(|l| !dense.contains(l)).collect();
    let scores = study.scores(&eval_set, &dense.iter().map(swapped).collect::<Vec<_>>())?;
    results.curve = dense.into_iter().zip(scores).map(|(dense, score)| CurvePoint { dense, score }).collect();
    let unused = |s: &Score| !results.scores().any(|used| used == s);
    results.judged = study.known.into_iter().filter(unused).collect();
    bars.show("layers", total as u64, total as u64);
    args.out.as_deref().map(|out| save(out, &results)).transpose()?;
    if let Some(dir) = &args.plans {
        write_plans(dir, &results)?;
    }
    print(layers_table(&results))
}

/// Returns the number of layers kept dense at each point of the curve, rising.
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

/// Checks that plans can be written to `dir`, before anything is scored.
fn check_plans(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).at(format!("--plans {}", dir.display()))?;
    let earlier = std::fs::read_dir(dir).at(dir.display())?.filter_map(|e| Some(e.ok()?.path()));
    let named = |p: &PathBuf| p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("dense-"));
    earlier.filter(named).chain([dir.join("dense-0.json")]).try_for_each(|path| reserve_plan(&path).map(drop))
}

/// Opens `path` for a plan; an existing file is replaced only if it is a plan.
fn reserve_plan(path: &Path) -> Result<Output> {
    let fault = |_| Ok(RetrofitPlan::load(path).err().map(|_| "is no plan; only plans are replaced".into()));
    Output::reserve_replacing(path, "--plans", fault)
}

/// Writes one plan per point of the curve that swaps at least one layer.
fn write_plans(dir: &Path, results: &LayerStudy) -> Result<()> {
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
        let head = |layer, score| RetrievalHead { layer, head: 0, score };
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
