//! Single kernels, with the ceilings of the machine.

use super::header::{Ceilings, Machine};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// `kind` of a kernel report.
pub const KERNELS: &str = "bfly-kernels";

/// Results of single kernels.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kernels {
    /// Kind of the file, [`KERNELS`].
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
    /// Ceilings of the machine.
    pub ceilings: Ceilings,
    /// One entry per kernel and shape.
    pub kernels: Vec<KernelRun>,
}

/// One kernel on one shape.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KernelRun {
    /// Name of the kernel, such as `attention_prefill`.
    pub kernel: String,
    /// Short description of the case, such as `dense causal`.
    pub case: String,
    /// Element type.
    pub dtype: String,
    /// Sizes by letter: T, H, G, D, keys, ...
    pub shape: BTreeMap<String, usize>,
    /// Floating-point operations of the definition; masked positions do not count.
    pub flop: f64,
    /// Minimum bytes of memory traffic: each input read once, each output written once.
    pub bytes: f64,
    /// Seconds per launch, one entry per batch of launches.
    pub samples_s: Vec<f64>,
    /// `flop` over the median time, in TFLOP/s (10¹²).
    pub tflop_s: f64,
    /// `bytes` over the median time, in GB/s (10⁹).
    pub gb_s: f64,
}

impl KernelRun {
    /// Returns whether the kernel is memory-bound: its arithmetic intensity lies left of the ridge of the roofline.
    pub fn bound_by_copy(&self, ceilings: &Ceilings) -> bool {
        self.flop / self.bytes * ceilings.copy_gb_s / 1e3 < ceilings.matmul_tflop_s
    }

    /// Returns the share of the binding ceiling that a launch of `seconds` reaches, 0 to 1.
    pub fn share_of_ceiling(&self, ceilings: &Ceilings, seconds: f64) -> f64 {
        match self.bound_by_copy(ceilings) {
            true => self.bytes / seconds / 1e9 / ceilings.copy_gb_s,
            false => self.flop / seconds / 1e12 / ceilings.matmul_tflop_s,
        }
    }
}
