//! `bfly-transforms learn`: finds a product for a known transform, or for the matrix or pairs of a file.

use super::stored::{Facts, Stored};
use super::target::{Target, TargetFile};
use super::{FACTORS, RESULT};
use crate::cli::output::{check_into, write_into, Output};
use crate::cli::{at_least_one, open_device, print, Bars};
use crate::error::{At, Error, ErrorKind, Result};
use crate::transforms::{closed_form, Learned, Run, Settings, Transform};
use candle_core::Device;
use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

impl ValueEnum for Transform {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

/// Flags of `bfly-transforms learn`.
#[derive(Debug, Args)]
pub struct LearnArgs {
    /// The transform.
    #[arg(long, requires = "n", required_unless_present = "target")]
    pub transform: Option<Transform>,
    /// A file in place of a transform: a matrix [N, N], or tensors `input` and `output` [pairs, N]; .npy, .npz or
    /// .safetensors.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["transform", "n"])]
    pub target: Option<PathBuf>,
    /// Name of the target's matrix, if its file has several tensors.
    #[arg(long, value_name = "NAME", requires = "target")]
    pub tensor: Option<String>,
    /// Size of the transform, a power of two of at least 2.
    #[arg(long, value_parser = parse_size)]
    pub n: Option<usize>,
    /// Directory to write result.json and factors.safetensors to.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Seed of the starts, and of the numbers of `convolution` and `random`.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// auto (the first GPU, else the CPU), cpu, cuda or cuda:INDEX; on a GPU N is at most 1024.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Starts with relaxed permutations, after those with drawn ones [default: by product and device]
    #[arg(long, value_parser = at_least_one)]
    pub starts: Option<usize>,
    /// Columns of the matrix, or pairs, that each start compares [default: by device]
    #[arg(long, value_parser = at_least_one)]
    pub columns: Option<usize>,
    /// Rounds of annealing of the permutations [default: by product and device]
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Any other setting of result.json, such as change_steps=300; may be repeated.
    #[arg(long = "set", value_name = "NAME=VALUE")]
    pub set: Vec<String>,
    /// Modules, left factor first: B is a butterfly, P a permutation [default: by transform; BPBP of a target]
    #[arg(long)]
    pub product: Option<String>,
    /// Give each block of a factor weights of its own: 2 N log2 N of them instead of 4 N.
    #[arg(long)]
    pub untied: bool,
    /// No progress.
    #[arg(short, long)]
    pub quiet: bool,
}

fn parse_size(text: &str) -> std::result::Result<usize, String> {
    match text.parse::<usize>() {
        Ok(n) if n.is_power_of_two() && n >= 2 => Ok(n),
        _ => Err("the size is a power of two of at least 2".into()),
    }
}

/// `result.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Outcome {
    kind: String,
    schema_version: u32,
    pub transform: String,
    /// The file that was learned in place of a known transform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    target: Option<TargetFile>,
    pub n: usize,
    pub settings: Settings,
    /// Root mean square of the error over all entries of the matrix, which is on the unitary scale.
    pub rmse: f64,
    /// The error of untied factors in closed form, for the permutations that were found; of products of one butterfly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed_form_rmse: Option<f64>,
    /// Parameters of the factors.
    pub parameters: usize,
    pub start: usize,
    pub rounds: usize,
    pub seconds: f64,
    pub threads: usize,
    pub device: String,
    command: Vec<String>,
}

const KIND: &str = "bfly-transform";

impl LearnArgs {
    /// The settings for products of `target`.
    fn settings(&self, target: &Target, device: &Device) -> Result<Settings> {
        let (product, complex) = target.product;
        let defaults = Settings::new(self.product.as_deref().unwrap_or(product), complex, self.seed, !device.is_cpu());
        let settings = Settings {
            tied: !self.untied,
            starts: self.starts.unwrap_or(defaults.starts),
            columns: self.columns.unwrap_or(defaults.columns),
            rounds: self.rounds.unwrap_or(defaults.rounds),
            ..defaults
        };
        self.set.iter().try_fold(settings, |settings, set| with_setting(&settings, set))
    }
}

pub(super) fn run(args: &LearnArgs) -> Result<()> {
    let target = match (&args.target, args.transform, args.n) {
        (Some(path), ..) => Target::of_file(path, args.tensor.as_deref())?,
        (None, Some(transform), Some(n)) => Target::known(transform, n, args.seed),
        _ => return Err(Error::usage("--transform", "a transform and its size --n, or a --target")),
    };
    let device = open_device(&args.device)?;
    let settings = args.settings(&target, &device)?;
    let outcome = learned(&target, &settings, &device, &args.out, &Bars::new(args.quiet))?;
    print(outcome.line())?;
    if outcome.converged() {
        return Ok(());
    }
    let message = format!(
        "no product within {:.0e}: the best, of start {}, has an rmse of {:.2e}; try --starts, --rounds or another --seed",
        settings.tolerance, outcome.start, outcome.rmse
    );
    Err(Error::new(ErrorKind::Quality, outcome.transform, message))
}

/// Learns `target` and writes what was found into the directory `out`. An interrupted run resumes from its last round,
/// which is kept beside the directory until the run has ended.
pub(crate) fn learned(
    target: &Target,
    settings: &Settings,
    device: &Device,
    out: &Path,
    bars: &Bars,
) -> Result<Outcome> {
    let place = format!("--out {}", out.display());
    check_into(out, "--out", RESULT, |json| Ok(fault(json, out, target, settings)))?;
    let began = Instant::now();
    let (found, before) = resumed(target, settings, device, out, bars)?;
    let outcome = Outcome {
        kind: KIND.into(),
        schema_version: 1,
        transform: target.name.clone(),
        target: target.file.clone(),
        n: target.n,
        rmse: found.error,
        closed_form_rmse: target.matrix().and_then(|m| closed_form(m, &found.product)).map(|(_, error)| error),
        parameters: found.product.parameters().0,
        start: found.start,
        rounds: found.rounds,
        seconds: before + began.elapsed().as_secs_f64(),
        threads: rayon::current_num_threads(),
        device: kind_of(device).into(),
        command: std::env::args().collect(),
        settings: settings.clone(),
    };
    let json = serde_json::to_vec_pretty(&outcome).map_err(|e| Error::format(&place, e))?;
    let facts = Facts {
        transform: target.name.clone(),
        n: target.n,
        product: found.product.modules(),
        complex: settings.complex,
        tied: settings.tied,
        complex_target: target.examples().complex(),
    };
    let factors = Stored::of(facts, &found.product).bytes()?;
    let files: [(&str, &[u8]); 2] = [(RESULT, &json), (FACTORS, &factors)];
    write_into(out, "--out", &files, |json| Ok(fault(json, out, target, settings)))?;
    // What is left of it does no harm: it is of this run.
    let _ = std::fs::remove_file(state_file(out));
    Ok(outcome)
}

/// Where an interrupted run is kept.
fn state_file(out: &Path) -> PathBuf {
    let mut name = out.file_name().unwrap_or_default().to_os_string();
    name.push(".unfinished");
    out.with_file_name(name)
}

/// `cpu` or `cuda`.
fn kind_of(device: &Device) -> &'static str {
    if device.is_cpu() {
        "cpu"
    } else {
        "cuda"
    }
}

/// Writes an interrupted run's state, beside a directory that may have no parent before the end of the run.
fn keep(path: &Path, state: &[u8]) -> Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).at(format!("--out {}", parent.display()))?;
    }
    Output::reserve(path, "--out")?.write(state)
}

/// Time between two saved rounds, at least.
const APART: Duration = Duration::from_secs(10);

/// Runs to the end; returns what was found, and the seconds of the run before it was interrupted.
fn resumed(target: &Target, settings: &Settings, device: &Device, out: &Path, bars: &Bars) -> Result<(Learned, f64)> {
    let (path, began) = (state_file(out), Instant::now());
    let mut run = Run::new(target.examples(), settings, device)?;
    let hash = target.file.as_ref().map_or("", |f| &f.sha256);
    let of = format!("{} of {} {hash} on {}", target.name, target.n, kind_of(device));
    let (mut before, mut ended) = (0.0, false);
    if let Ok(bytes) = std::fs::read(&path) {
        let wrong = |e: Error| Error::usage(path.display(), format!("{e}; remove it to begin anew"));
        let (rounds, seconds) = run.restore(&bytes, &of).map_err(wrong)?;
        bars.say(&format!("{} resumes after round {rounds} of {}", target.name, settings.rounds));
        (before, ended) = (seconds, rounds >= settings.rounds);
    }
    let mut saved = Instant::now();
    while !ended {
        ended = run.advance(&|p| {
            bars.show_with("steps", p.done as u64, p.total as u64, &format!("error {:.1e}", p.error));
        })?;
        if !ended && saved.elapsed() > APART {
            if let Some(bytes) = run.save(&of, before + began.elapsed().as_secs_f64())? {
                keep(&path, &bytes)?;
            }
            saved = Instant::now();
        }
    }
    let found = run.into_best().ok_or_else(|| Error::usage("transform", "no start"))?;
    Ok((found.scaled(target.file.as_ref().map(|f| f.scale)), before))
}

impl Outcome {
    /// Whether the error is below the tolerance.
    pub fn converged(&self) -> bool {
        self.rmse < self.settings.tolerance
    }

    /// One line for people.
    pub fn line(&self) -> String {
        format!(
            "{} of {}: rmse {:.2e}, {} parameters, start {} of {}, {} rounds, {:.1} s\n",
            self.transform,
            self.n,
            self.rmse,
            self.parameters,
            self.start,
            self.settings.drawn + self.settings.starts,
            self.rounds,
            self.seconds
        )
    }
}

/// The settings with one of them changed, as `NAME=VALUE` says.
pub(crate) fn with_setting(settings: &Settings, set: &str) -> Result<Settings> {
    let place = format!("--set {set}");
    let wrong = |e: &dyn std::fmt::Display| Error::usage(&place, e.to_string());
    let (name, value) = set.split_once('=').ok_or_else(|| wrong(&"is not NAME=VALUE"))?;
    let mut json = serde_json::to_value(settings).map_err(|e| wrong(&e))?;
    json[name] = serde_json::from_str(value).map_err(|e| wrong(&e))?;
    serde_json::from_value(json).map_err(|e| wrong(&e))
}

/// What an earlier run has found of `target` with these settings.
#[cfg(feature = "eval")]
pub(crate) fn finished(dir: &Path, target: &Target, settings: &Settings) -> Option<Outcome> {
    outcome_of(dir).filter(|was| differs(was, target, settings).is_none())
}

/// The result.json of a run in `dir`, if there is one.
fn outcome_of(dir: &Path) -> Option<Outcome> {
    let outcome: Outcome = serde_json::from_slice(&std::fs::read(dir.join(RESULT)).ok()?).ok()?;
    (outcome.kind == KIND).then_some(outcome)
}

/// Why the result in `dir` is not overwritten, if for a reason.
fn fault(json: bool, dir: &Path, target: &Target, settings: &Settings) -> Option<String> {
    match json.then(|| outcome_of(dir)).flatten() {
        Some(was) => differs(&was, target, settings),
        None => Some(format!("has a {RESULT} that is not of bfly-transforms; choose a new directory")),
    }
}

/// How an earlier run differs from one of `target` with `settings`, if it does.
fn differs(was: &Outcome, target: &Target, settings: &Settings) -> Option<String> {
    let (name, n) = (&target.name, target.n);
    if (&was.transform, was.n) != (name, n) {
        return Some(format!("holds {} of {}, not {name} of {n}; choose a new directory", was.transform, was.n));
    }
    if was.target != target.file {
        return Some(format!("was learned from another {name}; choose a new directory"));
    }
    (was.settings != *settings).then(|| "was learned with other settings; choose a new directory".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unfinished_run_is_kept_where_its_directory_has_no_parent_yet() -> Result<()> {
        let dir = tempfile::tempdir().at("temporary folder")?;
        let path = state_file(&dir.path().join("a/b/run"));
        for state in [&b"first"[..], b"second"] {
            keep(&path, state)?;
            assert_eq!(std::fs::read(dir.path().join("a/b/run.unfinished")).at("state")?, state);
        }
        Ok(())
    }
}
