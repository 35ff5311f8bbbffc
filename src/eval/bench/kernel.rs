//! Kernels one by one, against what the machine itself reaches.

use super::cases::{cases, Case, Launch, Place};
use super::file::{prove_replaceable, save};
use super::format::{Ceilings, KernelRun, Kernels, KERNELS, SCHEMA_VERSION};
use super::machine::{ceilings, machine, now, CeilingSizes};
use super::summary::median;
use crate::cli::{at_least_one, open_device, Bars};
use crate::error::{Error, Result};
use candle_core::DType;
use clap::Args;
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

/// What `--kernel` takes.
pub const NAMES: [&str; 8] =
    ["attention_prefill", "attention_decode", "summaries", "select", "add_norm", "gated", "prepare_heads", "quantised"];

/// Bytes that the input sets of a case have together, at least: more than any second-level cache holds.
const ROTATION: f64 = (256 << 20) as f64;
/// Sets that this may take.
const MOST_SETS: usize = 32;

/// Kernels to time.
#[derive(Debug, Args)]
pub struct KernelArgs {
    /// Which [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(NAMES))]
    pub kernel: Vec<String>,
    /// Shapes that a CPU runs in a moment.
    #[arg(long)]
    pub small: bool,
    /// Element type [default: bf16, on a CPU f32]
    #[arg(long, value_name = "TYPE", value_parser = ["bf16", "f16", "f32"])]
    pub dtype: Option<String>,
    /// auto, cpu, cuda or cuda:1.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Samples of each; one is the mean of a few launches.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = at_least_one)]
    pub samples: usize,
    /// Where the results go, as JSON.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// No progress, only the table.
    #[arg(long, short)]
    pub quiet: bool,
}

/// Times the kernels that `args` names, and prints them as a table.
///
/// # Errors
/// A type that the device has no kernels for, no memory for a case, or a place that cannot be written to.
pub fn run(args: &KernelArgs) -> Result<()> {
    let bars = Bars::new(args.quiet);
    let device = open_device(&args.device)?;
    args.out.as_deref().map(|out| prove_replaceable(out, KERNELS)).transpose()?;
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
    let place = Place { device, dtype };
    let wanted = |c: &Case| args.kernel.is_empty() || args.kernel.iter().any(|k| k == c.kernel);
    let cases: Vec<Case> = cases(args.small).into_iter().filter(wanted).collect();
    let started = now();
    let ceilings = ceilings(&place.device, &CeilingSizes::of(&place.device, args.small))?;
    let mut kernels = vec![];
    for (i, case) in cases.iter().enumerate() {
        bars.show("kernel", i as u64, cases.len() as u64);
        let timed = time(case, &place, args.samples);
        kernels.push(timed.map_err(|e| e.within(format!("{}, {}", case.kernel, case.case)))?);
    }
    bars.show("kernel", cases.len() as u64, cases.len() as u64);
    let report = Kernels {
        kind: KERNELS.into(),
        schema_version: SCHEMA_VERSION,
        git_sha: env!("BFLY_GIT_SHA").into(),
        started,
        command: std::env::args().collect(),
        machine: machine(&place.device),
        ceilings,
        kernels,
    };
    if let Some(out) = &args.out {
        save(out, &report)?;
    }
    // A closed pipe does not undo the file.
    let _ = write!(std::io::stdout(), "{}", table(&report));
    Ok(())
}

fn time(case: &Case, place: &Place, samples: usize) -> Result<KernelRun> {
    let bytes = case.elements * place.dtype.size_in_bytes() as f64 + case.tables;
    let sets = ((ROTATION / bytes).ceil() as usize).clamp(1, if place.device.is_cpu() { 2 } else { MOST_SETS });
    let mut launches = (0..sets).map(|_| (case.prepare)(place)).collect::<Result<Vec<Launch>>>()?;
    let mut at = 0;
    let mut batch = |count: usize| -> Result<f64> {
        place.device.synchronize()?;
        let begin = Instant::now();
        for _ in 0..count {
            launches[at]()?;
            at = (at + 1) % sets;
        }
        place.device.synchronize()?;
        Ok(begin.elapsed().as_secs_f64() / count as f64)
    };
    batch(sets)?;
    let once = batch(sets)?;
    let long_enough = if place.device.is_cpu() { 2e-3 } else { 20e-3 };
    let count = ((long_enough / once).ceil() as usize).clamp(1, 10_000);
    let samples_s = (0..samples).map(|_| batch(count)).collect::<Result<Vec<f64>>>()?;
    let seconds = median(&samples_s).unwrap_or(f64::INFINITY);
    Ok(KernelRun {
        kernel: case.kernel.into(),
        case: case.case.clone(),
        dtype: place.dtype.as_str().into(),
        shape: case.shape.clone(),
        flop: case.flop,
        bytes,
        tflop_s: case.flop / seconds / 1e12,
        gb_s: bytes / seconds / 1e9,
        samples_s,
    })
}

fn table(report: &Kernels) -> String {
    let c = &report.ceilings;
    let mut out = format!(
        "{}: copy {:.1} GB/s, matmul {:.3} TFLOP/s ({}, {} square)\n",
        report.machine.device, c.copy_gb_s, c.matmul_tflop_s, c.matmul_dtype, c.matmul_size
    );
    for k in &report.kernels {
        let shape: Vec<_> = k.shape.iter().map(|(name, size)| format!("{name} {size}")).collect();
        let seconds = median(&k.samples_s).unwrap_or(0.0);
        let (share, of) = share(k, c);
        out += &format!(
            "{:<18} {:<18} {:<32} {:>10.4} ms {:>8.3} TFLOP/s {:>8.1} GB/s  {:>3.0}% of {of}\n",
            k.kernel,
            k.case,
            shape.join(" "),
            seconds * 1e3,
            k.tflop_s,
            k.gb_s,
            100.0 * share
        );
    }
    out
}

/// How much of the ceiling that a case meets first it reaches.
fn share(k: &KernelRun, c: &Ceilings) -> (f64, &'static str) {
    match k.flop / k.bytes * c.copy_gb_s / 1e3 < c.matmul_tflop_s {
        true => (k.gb_s / c.copy_gb_s, "copy"),
        false => (k.tflop_s / c.matmul_tflop_s, "matmul"),
    }
}
