//! `layers`: which layers a model cannot do without. One layer is swapped at a time; then the most sensitive ones are kept, one
//! more at a time, and what that costs in bytes is told with what it gives.

use super::args::JudgedArgs;
use super::heads::{Head, Tally};
use super::probe::{Probe, Score};
use super::probe_args::{ProbeArgs, Probed};
use super::runner::Runner;
use super::stats::Estimate;
use crate::bench::file::{prove_writable, save};
use crate::bench::format::{Header, SCHEMA_VERSION};
use crate::bench::table::columns;
use crate::bench::variant::Variant;
use crate::cli::{Bars, Output};
use crate::error::{At, Error, Result};
use crate::retrofit::{ranges, RetrofitPlan};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use std::io::Write;
use std::path::{Path, PathBuf};

/// `kind` of a study of layers.
pub const LAYERS: &str = "bfly-layers";

/// What makes a layer sensitive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum RankBy {
    /// The loss that swapping it adds on expected answers.
    Answers,
    /// The KL from stock that swapping it brings on text, after prefill.
    Text,
}

/// Heads in the table.
const HEADS: usize = 12;

/// A study of layers.
#[derive(Debug, Args)]
pub struct LayersArgs {
    /// What makes a layer sensitive [default: answers, or text where no tasks are asked]
    #[arg(long)]
    pub rank_by: Option<RankBy>,
    /// Numbers of most sensitive layers that are kept dense on the curve [default: 0, 1, 2, 3, 4, 6, 8, 12, 16, ...]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub keep: Vec<usize>,
    /// Write the plan of each point as DIR/dense-K.json, for bfly-retrofit --plan.
    #[arg(long, value_name = "DIR")]
    pub plans: Option<PathBuf>,
    /// The results, as JSON with every document and sample.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// What is read.
    #[command(flatten)]
    pub probe: ProbeArgs,
    /// What is judged: --variants names the one retrofit whose layers are studied.
    #[command(flatten)]
    pub judged: JudgedArgs,
}

/// What was found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Layers {
    /// [`LAYERS`].
    pub kind: String,
    /// Version of the form.
    pub schema_version: u32,
    /// Model, machine and build.
    #[serde(flatten)]
    pub header: Header,
    /// What was read.
    pub probed: Probed,
    /// What makes a layer sensitive here.
    pub rank_by: RankBy,
    /// The model as it came.
    pub stock: Score,
    /// Heads that copy the answer out of the text, the best first; empty where no tasks were asked.
    #[serde(default)]
    pub heads: Vec<Head>,
    /// Tokens of answers that heads were looked at for.
    #[serde(default)]
    pub head_steps: usize,
    /// One layer swapped at a time, in order.
    pub single: Vec<Single>,
    /// All of them, the most sensitive first.
    pub order: Vec<usize>,
    /// The first of them kept dense, the others swapped.
    pub curve: Vec<Kept>,
}

/// One layer alone swapped.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Single {
    /// Which.
    pub layer: usize,
    /// What the model is then worth.
    pub score: Score,
}

/// Some layers kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    /// Which, rising.
    pub dense: Vec<usize>,
    /// What the model is then worth.
    pub score: Score,
}

/// What swapping adds to the loss on answers, or brings as KL on text.
pub fn harm(score: &Score, stock: &Score, by: RankBy) -> Option<Estimate> {
    match by {
        RankBy::Answers => Estimate::of_differences(&score.answer_losses(), &stock.answer_losses()),
        RankBy::Text => Estimate::of(&score.texts(|t| t.kl)),
    }
}

/// Runs it, writes plans and results, and prints a table.
///
/// # Errors
/// Bad flags or files; a model without layers to swap.
pub fn run(args: &LayersArgs) -> Result<()> {
    let bars = Bars::new(args.judged.quiet);
    let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
    args.probe.check()?;
    args.out.as_deref().map(prove_writable).transpose()?;
    let probed = args.probe.probed();
    let rank_by = match (args.rank_by, probed.tasks.is_empty()) {
        (Some(RankBy::Answers), true) => {
            return Err(Error::usage("--rank-by", "answers needs tasks; give --tasks, or --rank-by text"))
        }
        (Some(by), _) => by,
        (None, true) => RankBy::Text,
        (None, false) => RankBy::Answers,
    };
    let opened = args.judged.open(&progress)?;
    args.judged.check_trained(&opened, &[args.probe.ctx], &bars)?;
    let (_, base) = args.judged.one_retrofit(&opened, args.probe.ctx)?;
    let spec = opened.checkpoint().spec.clone();
    let keep = counts(&args.keep, base.layers.len())?;
    let plan = |layers: Vec<usize>| RetrofitPlan::new(&spec, Some(layers), base.settings.clone());
    let asking = args.probe.asking(&opened, &args.judged)?;
    let probe = args.probe.probe(&opened, &args.judged, &asking, &bars)?;
    let mut runner = Runner::new(opened.load(args.probe.ctx, &progress)?);
    let total = probe.tokens() * (1 + base.layers.len() + keep.len());
    let mut study = Study { probe: &probe, runner: &mut runner, bars: &bars, done: 0, total };
    let (reference, stock) =
        study.probe.reference(study.runner, &mut |n| bars.show("layers", n as u64, total as u64))?;
    study.done = probe.tokens();
    let tally = retrieval_heads(&probe, study.runner)?;
    let mut results = Layers {
        kind: LAYERS.into(),
        schema_version: SCHEMA_VERSION,
        header: opened.header(),
        probed,
        rank_by,
        stock,
        heads: tally.heads(),
        head_steps: tally.steps(),
        single: vec![],
        order: vec![],
        curve: vec![],
    };
    for &layer in &base.layers {
        let variant = Variant { name: format!("layer {layer}"), plan: Some(plan(vec![layer])?), ..Variant::stock() };
        results.single.push(Single { layer, score: study.judge(&variant, &reference)? });
    }
    results.order = order(&results);
    for &k in &keep {
        let mut dense = results.order[..k].to_vec();
        dense.sort_unstable();
        let swapped: Vec<usize> = base.layers.iter().copied().filter(|l| !dense.contains(l)).collect();
        let name = format!("{k} dense");
        let variant = match swapped.is_empty() {
            true => Variant { name, ..Variant::stock() },
            false => Variant { name, plan: Some(plan(swapped)?), ..Variant::stock() },
        };
        let score = study.judge(&variant, &reference)?;
        results.curve.push(Kept { dense, score });
        args.out.as_deref().map(|out| save(out, &results)).transpose()?;
    }
    bars.show("layers", total as u64, total as u64);
    if let Some(dir) = &args.plans {
        write_plans(dir, &results)?;
    }
    let _ = write!(std::io::stdout(), "{}", table(&results));
    Ok(())
}

/// Which heads copy answers, in the model as it came.
fn retrieval_heads(probe: &Probe, runner: &mut Runner) -> Result<Tally> {
    let mut tally = Tally::default();
    for (prompt, wanted) in &probe.questions {
        let answer = probe.asking.answer_ids(wanted)?;
        runner.run(&Variant::stock(), probe.ctx, |model| tally.count(model, prompt, &answer, probe.chunk))?;
    }
    Ok(tally)
}

struct Study<'a> {
    probe: &'a Probe<'a>,
    runner: &'a mut Runner,
    bars: &'a Bars,
    done: usize,
    total: usize,
}

impl Study<'_> {
    fn judge(&mut self, variant: &Variant, reference: &super::probe::Reference) -> Result<Score> {
        let (bars, done, total) = (self.bars, self.done, self.total as u64);
        let on_tokens = &mut |n: usize| bars.show("layers", (done + n) as u64, total);
        let score = self.probe.judge(self.runner, variant, reference, on_tokens)?;
        self.done += self.probe.tokens();
        Ok(score)
    }
}

/// Layers, the one whose swap does most harm first; of equals the earlier.
fn order(results: &Layers) -> Vec<usize> {
    let harm = |s: &Single| harm(&s.score, &results.stock, results.rank_by).map_or(0.0, |e| e.mean);
    let mut layers: Vec<(f64, usize)> = results.single.iter().map(|s| (harm(s), s.layer)).collect();
    layers.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    layers.into_iter().map(|(_, layer)| layer).collect()
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

/// One plan per point that swaps anything.
fn write_plans(dir: &Path, results: &Layers) -> Result<()> {
    std::fs::create_dir_all(dir).at(dir.display())?;
    for point in &results.curve {
        if let Some(plan) = &point.score.subject.plan {
            let path = dir.join(format!("dense-{}.json", point.dense.len()));
            let json = serde_json::to_vec_pretty(plan).map_err(|e| Error::format(path.display(), e))?;
            Output::reserve(&path, "--plans")?.write(&json)?;
        }
    }
    Ok(())
}

/// Layers by harm, then the curve.
fn table(results: &Layers) -> String {
    let cells = |name: String, score: &Score| {
        let right: Vec<f64> = score.answers.iter().map(|a| 100.0 * f64::from(u8::from(a.right))).collect();
        let show = |e: Option<Estimate>, decimals| e.map_or("-".into(), |e| e.show(decimals));
        vec![
            String::new(),
            name,
            format!("{:.4}x", score.subject.share_of_dense()),
            show(harm(score, &results.stock, RankBy::Answers).filter(|_| !score.answers.is_empty()), 3),
            show(Estimate::of(&right), 0),
            show(Estimate::of(&score.texts(|t| t.kl)), 4),
            show(Estimate::of(&score.texts(|t| t.decode_kl)), 4),
            show(Estimate::of(&score.texts(|t| t.top1)), 3),
        ]
    };
    let head = ["", "swapped", "KV of dense", "answer loss added", "right, %", "KL", "KL in decode", "top1"];
    let mut rows = vec![head.map(String::from).to_vec(), cells("none".into(), &results.stock)];
    for layer in &results.order {
        if let Some(single) = results.single.iter().find(|s| s.layer == *layer) {
            rows.push(cells(layer.to_string(), &single.score));
        }
    }
    let mut curve = vec![["", "dense", "KV of dense", "answer loss added", "right, %", "KL", "KL in decode", "top1"]
        .map(String::from)
        .to_vec()];
    for point in &results.curve {
        let name = if point.dense.is_empty() { "none".into() } else { ranges(&point.dense) };
        curve.push(cells(name, &point.score));
    }
    let head = |h: &Head| format!("{}.{} {:.2}", h.layer, h.head, h.score);
    let heads: Vec<String> = results.heads.iter().take(HEADS).map(head).collect();
    let heads = match results.head_steps {
        0 => String::new(),
        n => format!(
            "heads (layer.head, share of {n} answer tokens attended to before they come): {}\n",
            heads.join(", ")
        ),
    };
    columns(&rows) + "\n" + &columns(&curve) + &heads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_curve_goes_from_none_to_all() -> Result<()> {
        assert_eq!(counts(&[], 24)?, [0, 1, 2, 3, 4, 6, 8, 12, 16, 20, 24]);
        assert_eq!(counts(&[], 3)?, [0, 1, 2, 3]);
        assert_eq!(counts(&[5, 0, 5], 7)?, [0, 5]);
        assert!(counts(&[8], 7).unwrap_err().to_string().contains("--keep: 8 is more than the 7"));
        Ok(())
    }
}
