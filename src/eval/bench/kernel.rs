//! `kernel`: single kernels against the machine's ceilings.

use super::cases::{cases, Case, InputSpec, Iteration};
use super::ceilings::{ceilings, CeilingSizes};
use crate::cli::{at_least_one, open_device, print, Bars};
use crate::error::{Error, Result};
use crate::eval::report::table::kernels_table;
use crate::eval::report::{check_replaceable, machine, median, now, save, KernelRun, Kernels, KERNELS, SCHEMA_VERSION};
use candle_core::DType;
use clap::Args;
use std::path::PathBuf;
use std::time::Instant;

/// Names that `--kernel` accepts.
pub const NAMES: [&str; 8] =
    ["attention_prefill", "attention_decode", "summaries", "select", "add_norm", "gated", "prepare_heads", "quantised"];

/// Minimum total size of a case's input sets in bytes: larger than any L2 cache, so that every launch reads device
/// memory.
const MIN_ROTATION: f64 = (256 << 20) as f64;
/// Maximum number of input sets of a case.
const MAX_SETS: usize = 32;

/// The flags of `kernel`.
#[derive(Debug, Args)]
pub struct KernelArgs {
    /// Kernels to time, comma-separated [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(NAMES))]
    pub kernel: Vec<String>,
    /// Time small shapes, with 1/64 of the tokens: for a CPU, or to check that every kernel runs.
    #[arg(long)]
    pub small: bool,
    /// Element type of the inputs [default: bf16 on a GPU; f32 on a CPU, which has no kernels for other types]
    #[arg(long, value_name = "TYPE", value_parser = ["bf16", "f16", "f32"])]
    pub dtype: Option<String>,
    /// Device: auto, cpu, cuda or cuda:1.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Samples per case; a sample is the mean time of a batch of launches, at least 20 ms on a GPU and 2 ms on a CPU.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = at_least_one)]
    pub samples: usize,
    /// Write the results to FILE.json, gzip-compressed where the name ends in .gz; an earlier file of kernel results is
    /// replaced.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// Print no progress, only the table.
    #[arg(long, short)]
    pub quiet: bool,
}

/// Times the kernels that `args` names and prints a table.
///
/// # Errors
/// An element type that the device has no kernels for, out of memory, or an `--out` that cannot be written.
pub fn run(args: &KernelArgs) -> Result<()> {
    let bars = Bars::new(args.quiet);
    let device = open_device(&args.device)?;
    args.out.as_deref().map(|out| check_replaceable(out, KERNELS)).transpose()?;
    let dtype = match args.dtype.as_deref() {
        Some("bf16") => DType::BF16,
        Some("f16") => DType::F16,
        Some(_) => DType::F32,
        None if device.is_cpu() => DType::F32,
        None => DType::BF16,
    };
    if device.is_cpu() && dtype != DType::F32 {
        return Err(Error::unsupported("--dtype", format!("{} has no kernels on a CPU; use f32", dtype.as_str())));
    }
    let inputs = InputSpec { device, dtype };
    let wanted = |c: &Case| args.kernel.is_empty() || args.kernel.iter().any(|k| k == c.kernel);
    let cases: Vec<Case> = cases(args.small).into_iter().filter(wanted).collect();
    let started = now();
    let ceilings = ceilings(&inputs.device, &CeilingSizes::of(&inputs.device, args.small))?;
    let mut kernels = vec![];
    for (i, case) in cases.iter().enumerate() {
        bars.show("kernel", i as u64, cases.len() as u64);
        let timed = time(case, &inputs, args.samples);
        kernels.push(timed.map_err(|e| e.within(format!("{}, {}", case.kernel, case.case)))?);
    }
    bars.show("kernel", cases.len() as u64, cases.len() as u64);
    let report = Kernels {
        kind: KERNELS.into(),
        schema_version: SCHEMA_VERSION,
        git_sha: env!("BFLY_GIT_SHA").into(),
        started,
        command: std::env::args().collect(),
        machine: machine(&inputs.device),
        ceilings,
        kernels,
    };
    if let Some(out) = &args.out {
        save(out, &report)?;
    }
    print(kernels_table(&report))
}

/// Times `case` in `samples` batches of launches.
fn time(case: &Case, inputs: &InputSpec, samples: usize) -> Result<KernelRun> {
    let bytes = case.elements * inputs.dtype.size_in_bytes() as f64 + case.tables;
    let sets = ((MIN_ROTATION / bytes).ceil() as usize).clamp(1, if inputs.device.is_cpu() { 2 } else { MAX_SETS });
    let mut iterations = (0..sets).map(|_| (case.prepare)(inputs)).collect::<Result<Vec<Iteration>>>()?;
    let mut at = 0;
    let mut batch = |count: usize| -> Result<f64> {
        inputs.device.synchronize()?;
        let begin = Instant::now();
        for _ in 0..count {
            iterations[at]()?;
            at = (at + 1) % sets;
        }
        inputs.device.synchronize()?;
        Ok(begin.elapsed().as_secs_f64() / count as f64)
    };
    batch(sets)?;
    let once = batch(sets)?;
    let long_enough = if inputs.device.is_cpu() { 2e-3 } else { 20e-3 };
    let count = ((long_enough / once).ceil() as usize).clamp(1, 10_000);
    let samples_s = (0..samples).map(|_| batch(count)).collect::<Result<Vec<f64>>>()?;
    let seconds = median(&samples_s).unwrap_or(f64::INFINITY);
    Ok(KernelRun {
        kernel: case.kernel.into(),
        case: case.case.clone(),
        dtype: inputs.dtype.as_str().into(),
        shape: case.shape.clone(),
        flop: case.flop,
        bytes,
        tflop_s: case.flop / seconds / 1e12,
        gb_s: bytes / seconds / 1e9,
        samples_s,
    })
}
