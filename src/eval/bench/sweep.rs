//! `bfly-transforms sweep`: several transforms, sizes and seeds, one after the other.

use super::transforms::Sizes;
use crate::cli::{at_least_one, finished, learned, open_device, print, with_setting, Bars, Target, TransformRun};
use crate::error::{Error, Result};
use crate::eval::report::table::sweep_table;
use crate::eval::report::{check_replaceable, machine, save, Sweep, SweepRun, SCHEMA_VERSION, SWEEP};
use crate::transforms::{Settings, Transform};
use clap::Args;
use std::path::PathBuf;

/// Flags of `bfly-transforms sweep`.
#[derive(Debug, Args)]
pub struct SweepArgs {
    /// Transforms.
    #[arg(long, value_delimiter = ',', default_value = "dft,dct,dst,hadamard,hartley,convolution")]
    pub transforms: Vec<Transform>,
    /// Sizes: a power of two, or all from one to another.
    #[arg(long, value_name = "N|N..N", default_value = "8..64", value_parser = super::transforms::parse_sizes)]
    pub n: Sizes,
    /// Seeds, from 0 on.
    #[arg(long, default_value = "1", value_parser = at_least_one)]
    pub seeds: usize,
    /// auto (the first GPU, else the CPU), cpu, cuda or cuda:INDEX.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// A setting of result.json for all runs, such as change_steps=300; may be repeated.
    #[arg(long = "set", value_name = "NAME=VALUE")]
    pub set: Vec<String>,
    /// Directory of the runs, as `learn` writes them, and of sweep.json; runs that are there already are kept.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// No progress.
    #[arg(short, long)]
    pub quiet: bool,
}

fn entry(run: &TransformRun, seed: u64) -> Result<SweepRun> {
    Ok(SweepRun {
        transform: run.transform.clone(),
        n: run.n,
        seed,
        device: run.device.clone(),
        rmse: run.rmse,
        closed_form_rmse: run.closed_form_rmse,
        parameters: run.parameters,
        seconds: run.seconds,
        threads: run.threads,
        start: run.start,
        rounds: run.rounds,
        converged: run.converged(),
        settings: serde_json::to_value(&run.settings).map_err(|e| Error::format("settings of a transform", e))?,
    })
}

/// Learns them all and prints what was found of each.
///
/// # Errors
/// A directory with other results; a run that fails other than by finding nothing within the tolerance.
pub fn run(args: &SweepArgs) -> Result<()> {
    let (device, bars) = (open_device(&args.device)?, Bars::new(args.quiet));
    let file = args.out.join("sweep.json");
    if file.exists() {
        check_replaceable(&file, SWEEP)?;
    }
    let mut sweep = Sweep {
        kind: SWEEP.into(),
        schema_version: SCHEMA_VERSION,
        git_sha: env!("BFLY_GIT_SHA").into(),
        command: std::env::args().collect(),
        machine: machine(&device),
        runs: vec![],
    };
    for n in args.n.all() {
        for transform in &args.transforms {
            for seed in 0..args.seeds as u64 {
                let target = Target::known(*transform, *n, seed);
                let (product, complex) = transform.product();
                let settings = Settings::new(product, complex, seed, !device.is_cpu());
                let settings = args.set.iter().try_fold(settings, |s, set| with_setting(&s, set))?;
                let out = args.out.join(format!("{}-{n}-{seed}", transform.name()));
                let run = match finished(&out, &target, &settings) {
                    Some(run) => run,
                    None => {
                        let run = learned(&target, &settings, &device, &out, &bars)?;
                        bars.say(run.line().trim_end());
                        run
                    }
                };
                sweep.runs.push(entry(&run, seed)?);
                save(&file, &sweep)?;
            }
        }
    }
    print(sweep_table(&sweep))
}
