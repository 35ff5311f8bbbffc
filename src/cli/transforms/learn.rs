//! `bfly-transforms`: learns fast algorithms of linear transforms.

use super::output::{check_into, write_into};
use super::{at_least_one, print, Bars};
use crate::error::{At, Error, ErrorKind, Result};
use crate::transforms::{learn, Learned, Settings, Transform};
use candle_core::{Device, Tensor};
use clap::builder::PossibleValue;
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Learns fast algorithms of linear transforms from their matrices alone.
///
/// The matrix is approximated by a product of butterfly factors and permutations with about 4 N parameters a butterfly,
/// which multiplies a vector in O(N log N) (Dao et al. 2019, arXiv:1903.05895).
#[derive(Debug, Parser)]
#[command(name = "bfly-transforms", version, after_help = EXAMPLES)]
pub struct TransformsCli {
    /// What to do.
    #[command(subcommand)]
    pub command: TransformsCommand,
}

const EXAMPLES: &str = "\
Examples:
  # Find an FFT of 64 points
  bfly-transforms learn --transform dft --n 64 --out dft64

  # Another seed and more starts, for a transform that is harder to find
  bfly-transforms learn --transform dct --n 128 --seed 1 --starts 32 --out dct128";

/// Subcommands of `bfly-transforms`.
#[derive(Debug, Subcommand)]
pub enum TransformsCommand {
    /// Learn a transform.
    Learn(LearnArgs),
}

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
    #[arg(long)]
    pub transform: Transform,
    /// Size, a power of two of at least 2.
    #[arg(long, value_parser = parse_size)]
    pub n: usize,
    /// Directory to write result.json and factors.safetensors to.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Seed of the starts, and of the numbers of `convolution` and `random`.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Starts.
    #[arg(long, default_value = "16", value_parser = at_least_one)]
    pub starts: usize,
    /// Columns of the matrix that each start compares.
    #[arg(long, default_value = "64", value_parser = at_least_one)]
    pub columns: usize,
    /// Rounds of annealing of the permutations.
    #[arg(long, default_value_t = 20)]
    pub rounds: usize,
    /// Modules, left factor first: B is a butterfly, P a permutation [default: by transform]
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

/// The file of a run that says what it was.
const RESULT: &str = "result.json";

/// `result.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Outcome {
    kind: String,
    schema_version: u32,
    transform: String,
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

/// Runs a subcommand.
///
/// # Errors
/// What the subcommand cannot do; [`ErrorKind::Quality`] where nothing was found within the tolerance.
pub fn transforms(command: &TransformsCommand) -> Result<()> {
    match command {
        TransformsCommand::Learn(args) => run(args),
    }
}

fn run(args: &LearnArgs) -> Result<()> {
    let (product, complex) = args.transform.product();
    let settings = Settings {
        tied: !args.untied,
        starts: args.starts,
        columns: args.columns,
        rounds: args.rounds,
        ..Settings::new(args.product.as_deref().unwrap_or(product), complex, args.seed)
    };
    let place = format!("--out {}", args.out.display());
    check_into(&args.out, "--out", RESULT, |json| Ok(fault(json, &args.out, args, &settings)))?;
    let bars = Bars::new(args.quiet);
    let begin = Instant::now();
    let matrix = args.transform.matrix(args.n, args.seed);
    let found = learn(&matrix, &settings, &|p| {
        bars.show_with("steps", p.done as u64, p.total as u64, &format!("error {:.1e}", p.error));
    })?;
    let outcome = Outcome {
        kind: KIND.into(),
        schema_version: 1,
        transform: args.transform.name().into(),
        n: args.n,
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
    let files: [(&str, &[u8]); 2] = [(RESULT, &json), ("factors.safetensors", &factors(&found)?)];
    write_into(&args.out, "--out", &files, |json| Ok(fault(json, &args.out, args, &settings)))?;
    let line = format!(
        "{} of {}: rmse {:.2e}, {} parameters, start {} of {}, {} rounds, {:.1} s\n",
        outcome.transform,
        args.n,
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
fn fault(json: bool, dir: &Path, args: &LearnArgs, settings: &Settings) -> Option<String> {
    let read = |path: PathBuf| serde_json::from_slice::<Outcome>(&std::fs::read(path).ok()?).ok();
    let Some(was) = json.then(|| read(dir.join(RESULT))).flatten().filter(|o| o.kind == KIND) else {
        return Some(format!("has a {RESULT} that is not of bfly-transforms; choose a new directory"));
    };
    let name = args.transform.name();
    if (was.transform.as_str(), was.n) != (name, args.n) {
        return Some(format!("holds {} of {}, not {name} of {}; choose a new directory", was.transform, was.n, args.n));
    }
    (was.settings != *settings).then(|| "was learned with other settings; choose a new directory".into())
}

/// `butterfly.I` f32 and `permutation.I` u32 in the order of application, named by their place in the product.
fn factors(found: &Learned) -> Result<Vec<u8>> {
    let place = "factors.safetensors";
    let mut tensors: HashMap<String, Tensor> = HashMap::new();
    for (i, f) in found.product.factors().iter().enumerate() {
        tensors.insert(format!("butterfly.{i}"), Tensor::from_slice(f, f.len(), &Device::Cpu).at(place)?);
    }
    for (i, p) in found.product.permuted().iter().enumerate() {
        tensors.insert(format!("permutation.{i}"), Tensor::from_slice(p, p.len(), &Device::Cpu).at(place)?);
    }
    safetensors::serialize(tensors, None).map_err(candle_core::Error::wrap).at(place)
}
