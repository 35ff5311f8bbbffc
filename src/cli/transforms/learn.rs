//! `bfly-transforms learn`: finds a product for a known transform, or for the matrix or pairs of a file.

use super::stored::{Facts, Stored};
use super::target::{Target, TargetFile};
use super::{FACTORS, RESULT};
use crate::cli::output::{check_into, write_into};
use crate::cli::{at_least_one, print, Bars};
use crate::error::{Error, ErrorKind, Result};
use crate::transforms::{learn, Settings, Transform};
use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Instant;

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
    /// Starts.
    #[arg(long, default_value = "16", value_parser = at_least_one)]
    pub starts: usize,
    /// Columns of the matrix, or pairs, that each start compares.
    #[arg(long, default_value = "64", value_parser = at_least_one)]
    pub columns: usize,
    /// Rounds of annealing of the permutations.
    #[arg(long, default_value_t = 20)]
    pub rounds: usize,
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
struct Outcome {
    kind: String,
    schema_version: u32,
    transform: String,
    /// The file that was learned in place of a known transform.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    target: Option<TargetFile>,
    n: usize,
    settings: Settings,
    /// Root mean square of the error over all entries of the matrix, which is on the unitary scale.
    rmse: f64,
    /// Parameters of the factors.
    parameters: usize,
    start: usize,
    rounds: usize,
    seconds: f64,
    threads: usize,
    command: Vec<String>,
}

const KIND: &str = "bfly-transform";

pub(super) fn run(args: &LearnArgs) -> Result<()> {
    let target = match (&args.target, args.transform, args.n) {
        (Some(path), ..) => Target::of_file(path, args.tensor.as_deref())?,
        (None, Some(transform), Some(n)) => Target::known(transform, n, args.seed),
        _ => return Err(Error::usage("--transform", "a transform and its size --n, or a --target")),
    };
    let (product, complex) = target.product;
    let settings = Settings {
        tied: !args.untied,
        starts: args.starts,
        columns: args.columns,
        rounds: args.rounds,
        ..Settings::new(args.product.as_deref().unwrap_or(product), complex, args.seed)
    };
    let place = format!("--out {}", args.out.display());
    check_into(&args.out, "--out", RESULT, |json| Ok(fault(json, &args.out, &target, &settings)))?;
    let bars = Bars::new(args.quiet);
    let begin = Instant::now();
    let mut found = learn(target.examples(), &settings, &|p| {
        bars.show_with("steps", p.done as u64, p.total as u64, &format!("error {:.1e}", p.error));
    })?;
    if let Some(file) = &target.file {
        found.product.scale(file.scale);
    }
    let outcome = Outcome {
        kind: KIND.into(),
        schema_version: 1,
        transform: target.name.clone(),
        target: target.file.clone(),
        n: target.n,
        rmse: found.error,
        parameters: found.product.parameters().0,
        start: found.start,
        rounds: found.rounds,
        seconds: begin.elapsed().as_secs_f64(),
        threads: rayon::current_num_threads(),
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
    write_into(&args.out, "--out", &files, |json| Ok(fault(json, &args.out, &target, &settings)))?;
    let line = format!(
        "{} of {}: rmse {:.2e}, {} parameters, start {} of {}, {} rounds, {:.1} s\n",
        outcome.transform,
        target.n,
        found.error,
        outcome.parameters,
        found.start,
        settings.starts,
        found.rounds,
        outcome.seconds
    );
    print(line)?;
    if found.error < settings.tolerance {
        return Ok(());
    }
    let message = format!(
        "no product within {:.0e}: the best, of start {}, has an rmse of {:.2e}; try --starts, --rounds or another --seed",
        settings.tolerance, found.start, found.error
    );
    Err(Error::new(ErrorKind::Quality, outcome.transform, message))
}

/// Why the result in `dir` is not overwritten, if for a reason.
fn fault(json: bool, dir: &Path, target: &Target, settings: &Settings) -> Option<String> {
    let read = |path: PathBuf| serde_json::from_slice::<Outcome>(&std::fs::read(path).ok()?).ok();
    let Some(was) = json.then(|| read(dir.join(RESULT))).flatten().filter(|o| o.kind == KIND) else {
        return Some(format!("has a {RESULT} that is not of bfly-transforms; choose a new directory"));
    };
    let (name, n) = (&target.name, target.n);
    if (&was.transform, was.n) != (name, n) {
        return Some(format!("holds {} of {}, not {name} of {n}; choose a new directory", was.transform, was.n));
    }
    if was.target != target.file {
        return Some(format!("was learned from another {name}; choose a new directory"));
    }
    (was.settings != *settings).then(|| "was learned with other settings; choose a new directory".into())
}
