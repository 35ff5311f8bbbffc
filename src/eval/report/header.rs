//! The fields that all results of a model share.

use super::machine::{machine, now};
use crate::checkpoint::Identity;
use candle_core::Device;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The schema version that this build writes and reads.
pub const SCHEMA_VERSION: u32 = 1;

/// The machine that results were measured on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// Name of the device as its driver gives it, or of the processor.
    pub device: String,
    /// Version of the driver; null on a CPU.
    pub driver: Option<String>,
    /// Compute capability such as `9.0`; null on a CPU.
    pub compute_capability: Option<String>,
    /// Bytes of the device's memory.
    pub memory_bytes: u64,
}

/// Copy bandwidth and matmul throughput of the machine, measured in the same process, to which rates are compared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ceilings {
    /// Seconds of each device-to-device copy of `copy_bytes`.
    pub copy_s: Vec<f64>,
    /// Size of the copied buffer in bytes; a copy reads and writes each byte once.
    pub copy_bytes: u64,
    /// Bytes read and written per second at the median time, in GB/s (10⁹).
    pub copy_gb_s: f64,
    /// Seconds of each square matrix product on random data.
    pub matmul_s: Vec<f64>,
    /// Rows and columns of the factors.
    pub matmul_size: usize,
    /// Element type of the factors.
    pub matmul_dtype: String,
    /// Throughput of the product at the median time, in TFLOP/s (10¹²).
    pub matmul_tflop_s: f64,
}

/// Kind of a results file, with its model, weight format, build and machine: the top level of all results of a model.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Header {
    /// Kind of the file, such as `bfly-ladder`.
    pub kind: String,
    /// Schema version, [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Commit of the build.
    pub git_sha: String,
    /// Start of the first process that measured, RFC 3339 in UTC.
    pub started: String,
    /// Command line of the first process.
    pub command: Vec<String>,
    /// Machine of the measurement.
    pub machine: Machine,
    /// Identity of the checkpoint; null with random weights.
    pub model: Option<Identity>,
    /// Display name of the model.
    pub name: String,
    /// Seed of random weights, with which results are valid for speed and memory only; null for real weights.
    pub random_weights: Option<u64>,
    /// Number of parameters.
    pub parameters: u64,
    /// Positions that the model was trained for.
    pub trained_positions: usize,
    /// Storage type of most of the weights' bytes (`bf16`, `f32`, `q4_k`, ...).
    pub dtype: String,
    /// Bytes of the weight matrices in memory, by storage type.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub held: BTreeMap<String, u64>,
    /// Element type of keys and values.
    pub kv_dtype: String,
    /// Start of each process that resumed the file.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub resumed: Vec<String>,
}

impl Header {
    /// Creates the header of this process on `device`, without a model.
    pub fn new(kind: &str, device: &Device) -> Self {
        Self {
            kind: kind.into(),
            schema_version: SCHEMA_VERSION,
            git_sha: env!("BFLY_GIT_SHA").into(),
            started: now(),
            command: std::env::args().collect(),
            machine: machine(device),
            model: None,
            name: String::new(),
            random_weights: None,
            parameters: 0,
            trained_positions: 0,
            dtype: String::new(),
            held: BTreeMap::new(),
            kv_dtype: String::new(),
            resumed: vec![],
        }
    }

    /// Returns whether a context of `ctx` positions exceeds the trained length.
    pub fn extrapolates(&self, ctx: usize) -> bool {
        ctx > self.trained_positions
    }
}
