//! Weights drawn from a seed, for shapes whose weights are not at hand: speed and memory only.
//!
//! Nothing is stored. Matrices hold values close to `N(0, 0.02²)`, norms 1, biases 0. In host memory element `i` of a matrix is
//! an integer function of the seed, the matrix's name and `i`: the same on every machine, and any part of it can be made alone.
//! On a GPU dense matrices are drawn by the device, seeded by the same two.

use super::{rows, Checkpoint, TensorInfo, WeightFormat};
use crate::error::{At, Error, ErrorKind, Result};
use crate::nn::{Blocks, Weight};
use crate::spec::Config;
use crate::storage::Storage;
use crate::tensors::{Role, Schema, TensorSpec};
use candle_core::{DType, Device, Tensor};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

const STD: f32 = 0.02;
/// Elements drawn at a time on a GPU: 256 MiB of f32.
const CHUNK: usize = 64 << 20;

/// Encoded rows of quantised matrices, by shape and encoding.
type Quantised = HashMap<(usize, usize, Storage), Vec<u8>>;

/// The tensors of a configuration, by name.
pub struct Random {
    seed: u64,
    path: PathBuf,
    entries: BTreeMap<String, TensorInfo>,
    /// Quantising is slow: every matrix of a shape gets a copy of the first.
    quantised: Mutex<Quantised>,
}

impl Random {
    /// For the configuration at `path`, stored as if in the type that it names (bf16 if none).
    pub fn new(path: &Path, config: &Config, schema: &Schema, seed: u64) -> Result<Self> {
        let named = config.opt_str("dtype")?.or(config.opt_str("torch_dtype")?);
        let storage = match named {
            Some("float32") => Storage::F32,
            Some("float16") => Storage::F16,
            _ => Storage::BF16,
        };
        let entry = |t: &TensorSpec| {
            let info = TensorInfo { name: t.name.clone(), shape: t.shape.clone(), storage: Ok(storage) };
            (t.name.clone(), info)
        };
        let entries = schema.iter().map(entry).collect();
        Ok(Self { seed, path: path.into(), entries, quantised: Mutex::default() })
    }

    /// The configuration.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What stands under `name`.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.entries.get(name)
    }

    /// `length` bytes of matrix `name` from `start` on.
    pub fn read(&self, name: &str, start: u64, length: usize) -> Result<Vec<u8>> {
        let info = self.info(name).ok_or_else(|| Error::tensor(name, "missing"))?;
        let key = self.key(name);
        let values = |size: usize| {
            let first = start / size as u64;
            (first..first + (length / size) as u64).map(move |i| STD * normal(key, i))
        };
        Ok(match info.storage {
            Ok(Storage::F32) => values(4).flat_map(f32::to_le_bytes).collect(),
            Ok(Storage::F16) => values(2).flat_map(|v| half::f16::from_f32(v).to_le_bytes()).collect(),
            _ => values(2).flat_map(|v| half::bf16::from_f32(v).to_le_bytes()).collect(),
        })
    }

    /// The values of a vector.
    pub fn vector(&self, tensor: &TensorSpec) -> Vec<f32> {
        vec![if tensor.role == Role::Norm { 1.0 } else { 0.0 }; tensor.shape[0]]
    }

    /// The matrix of `info`, held as `format` says.
    pub fn matrix(
        &self,
        from: &Checkpoint,
        info: &TensorInfo,
        format: &WeightFormat,
        device: &Device,
    ) -> Result<Weight> {
        let (rows, cols) = (info.shape[0], info.shape[1]);
        let target = format.resolve(info.storage.clone().unwrap_or(Storage::F32), cols);
        match target.dense() {
            Some(float) if !device.is_cpu() => {
                format.count(target, rows * target.row_bytes(cols));
                Ok(Weight::Dense(self.draw(&info.name, (rows, cols), float.dtype(), device).at(&info.name)?))
            }
            Some(_) => rows::load_matrix(from, info, None, format, device),
            None => self.copy_of_shape(from, info, target, format, device),
        }
    }

    /// Drawn by the device itself, some rows at a time.
    fn draw(&self, name: &str, shape: (usize, usize), dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        device.set_seed(self.key(name))?;
        let out = Tensor::zeros(shape, dtype, device)?;
        let step = (CHUNK / shape.1).max(1);
        for first in (0..shape.0).step_by(step) {
            let rows = step.min(shape.0 - first);
            let part = Tensor::randn(0f32, STD, (rows, shape.1), device)?.to_dtype(dtype)?;
            out.slice_set(&part, 0, first)?;
        }
        Ok(out)
    }

    /// A copy of the first quantised matrix of this shape, in memory of its own: it is read as often as a real one.
    fn copy_of_shape(
        &self,
        from: &Checkpoint,
        info: &TensorInfo,
        target: Storage,
        format: &WeightFormat,
        device: &Device,
    ) -> Result<Weight> {
        let shape = (info.shape[0], info.shape[1]);
        let key = (shape.0, shape.1, target);
        let poisoned = || Error::new(ErrorKind::Backend, &info.name, "another thread failed while drawing weights");
        let mut quantised = self.quantised.lock().map_err(|_| poisoned())?;
        let data = match quantised.get(&key) {
            Some(data) => {
                format.count(target, data.len());
                data
            }
            None => match rows::load_matrix(from, info, None, format, &Device::Cpu)? {
                Weight::Blocks(first) => quantised.entry(key).or_insert(first.data().to_vec1()?),
                dense => return Ok(dense),
            },
        };
        Ok(Weight::Blocks(Blocks::new(target, shape, data.clone(), device).map_err(|e| e.within(&info.name))?))
    }

    /// Seed of one tensor.
    fn key(&self, name: &str) -> u64 {
        let hash = Sha256::new().chain_update(self.seed.to_le_bytes()).chain_update(name).finalize();
        hash.iter().take(8).fold(0, |key, byte| key << 8 | u64::from(*byte))
    }
}

/// Number `i` of the stream `key` of splitmix64 (Steele et al. 2014, <https://doi.org/10.1145/2660193.2660195>).
pub(crate) fn splitmix(key: u64, i: u64) -> u64 {
    let mut z = key.wrapping_add(i.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// Close to a standard normal number: the sum of twelve uniform ones, 16 bits each, less its mean. Exact in f32.
fn normal(key: u64, i: u64) -> f32 {
    let quarters = |x: u64| (x & 0xffff) + (x >> 16 & 0xffff) + (x >> 32 & 0xffff) + (x >> 48);
    let sum: u64 = (0..3).map(|j| quarters(splitmix(key, 3 * i + j))).sum();
    (sum as i64 - 6 * 0xffff) as f32 / 65536.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_have_the_moments_of_a_normal_distribution_and_depend_on_the_key() {
        let n = 100_000;
        let values: Vec<f64> = (0..n).map(|i| f64::from(normal(7, i))).collect();
        let moment = |k: i32| values.iter().map(|v| v.powi(k)).sum::<f64>() / n as f64;
        assert!(moment(1).abs() < 0.02, "mean {}", moment(1));
        assert!((moment(2) - 1.0).abs() < 0.02, "variance {}", moment(2));
        // 3 for a normal distribution, 2.9 for twelve uniform numbers.
        assert!((moment(4) - 2.9).abs() < 0.1, "fourth moment {}", moment(4));
        assert!((0..8).all(|i| normal(7, i) != normal(8, i)));
    }
}
