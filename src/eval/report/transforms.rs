//! Speed of learned transforms, with dense products and FFTs beside them.

use super::header::Machine;
use crate::stats::median;
use serde::{Deserialize, Serialize};

/// `kind` of a report of the speed of transforms.
pub const TRANSFORM_SPEED: &str = "bfly-transform-speed";

/// Times of single vectors.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TransformSpeed {
    /// Kind of the file, [`TRANSFORM_SPEED`].
    pub kind: String,
    /// Schema version, [`super::SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Commit of the build.
    pub git_sha: String,
    /// Start of the process, RFC 3339 in UTC.
    pub started: String,
    /// Command line of the process.
    pub command: Vec<String>,
    /// Machine of the measurement.
    pub machine: Machine,
    /// Threads of a product.
    pub threads: usize,
    /// Whether factors were drawn at random, on which speed does not depend, rather than learned.
    pub random_factors: bool,
    /// One entry per size, case and method.
    pub timings: Vec<TransformTiming>,
}

/// One method on one case.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TransformTiming {
    /// Size of the vector.
    pub n: usize,
    /// What is computed, such as `DFT`.
    pub case: String,
    /// Modules of the learned product, left factor first.
    pub product: String,
    /// Whether its factors are complex.
    pub complex: bool,
    /// Whether its blocks share weights.
    pub tied: bool,
    /// Whether the vector is complex.
    pub complex_input: bool,
    /// Whether the result is complex.
    pub complex_output: bool,
    /// `plan`; `dense` with the type and order of the matrix; `rustfft` or `realfft`.
    pub method: String,
    /// Products of a sample.
    pub repeats: usize,
    /// Seconds per product, one entry per sample.
    pub samples_s: Vec<f64>,
}

impl TransformTiming {
    /// Median seconds per product.
    pub fn seconds(&self) -> f64 {
        median(&self.samples_s).unwrap_or(f64::INFINITY)
    }
}

impl TransformSpeed {
    /// The sizes and cases, each with its timings, in the order of the measurement.
    pub fn cases(&self) -> Vec<Vec<&TransformTiming>> {
        let mut cases: Vec<Vec<&TransformTiming>> = vec![];
        for timing in &self.timings {
            match cases.iter_mut().find(|c| (c[0].n, &c[0].case) == (timing.n, &timing.case)) {
                Some(case) => case.push(timing),
                None => cases.push(vec![timing]),
            }
        }
        cases
    }
}

/// `kind` of a report of what was learned.
pub const SWEEP: &str = "bfly-transforms-sweep";

/// What was learned of several transforms, sizes and seeds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sweep {
    /// Kind of the file, [`SWEEP`].
    pub kind: String,
    /// Schema version, [`super::SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Commit of the build.
    pub git_sha: String,
    /// Command line of the process.
    pub command: Vec<String>,
    /// Machine of the runs.
    pub machine: Machine,
    /// One entry per transform, size and seed.
    pub runs: Vec<SweepRun>,
}

/// One run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SweepRun {
    /// Name of the transform.
    pub transform: String,
    /// Size.
    pub n: usize,
    /// Seed.
    pub seed: u64,
    /// `cpu` or `cuda`.
    pub device: String,
    /// Root mean square of the error over all entries, on the unitary scale.
    pub rmse: f64,
    /// Error of untied factors in closed form for the permutations that were found, of products of one butterfly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed_form_rmse: Option<f64>,
    /// Parameters of the factors.
    pub parameters: usize,
    /// Seconds of the run with all its starts.
    pub seconds: f64,
    /// Threads of the CPU.
    pub threads: usize,
    /// The start that the product is of.
    pub start: usize,
    /// Rounds of annealing before it was found.
    pub rounds: usize,
    /// Whether the error is below the tolerance.
    pub converged: bool,
    /// All settings.
    pub settings: serde_json::Value,
}
