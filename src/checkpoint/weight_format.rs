//! How weights are encoded in memory: the meaning of `--dtype`.

use crate::error::{Error, Result};
use crate::storage::{Ggml, Storage};
use candle_core::DType;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Mutex;

/// The value of `--dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightDtype {
    /// Quantised matrices as stored. Dense ones on a CPU in f32, or in q8_0 where f32 takes more than half the machine's memory;
    /// on a GPU in bf16.
    #[default]
    Auto,
    /// Every matrix as stored.
    Native,
    /// Every matrix in this encoding.
    As(Storage),
}

impl WeightDtype {
    /// The names that [`WeightDtype::from_str`] takes.
    pub const NAMES: &'static [&'static str] = &["auto", "f32", "f16", "bf16", "q8_0", "q4_0", "native"];
}

impl FromStr for WeightDtype {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        Ok(match s {
            "auto" => Self::Auto,
            "native" => Self::Native,
            name if Self::NAMES.contains(&name) => Self::As(name.parse()?),
            other => {
                return Err(Error::usage("--dtype", format!("`{other}` is not one of {}", Self::NAMES.join(", "))))
            }
        })
    }
}

impl fmt::Display for WeightDtype {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Native => f.write_str("native"),
            Self::As(t) => f.write_str(t.name()),
        }
    }
}

/// A resolved [`WeightDtype`], which also counts the bytes loaded.
pub struct WeightFormat {
    request: WeightDtype,
    /// Type of activations, keys and values.
    compute: DType,
    /// Encoding of dense matrices under `auto`.
    fallback: Storage,
    bytes: Mutex<BTreeMap<String, u64>>,
}

impl WeightFormat {
    /// Resolves `request` for a checkpoint of `f32_bytes`, on a machine with `memory` bytes (if known).
    pub fn new(request: WeightDtype, f32_bytes: u64, memory: Option<u64>) -> Self {
        let fits = memory.is_none_or(|m| f32_bytes <= m / 2);
        let fallback = if fits { Storage::F32 } else { Storage::Ggml(Ggml::Q8_0) };
        Self { request, compute: DType::F32, fallback, bytes: Mutex::default() }
    }

    /// Resolves `request` for a GPU: quantised matrices as stored unless `request` names an encoding, dense ones in the type of the
    /// activations, which is bf16 unless `request` is f32 or f16.
    pub fn for_gpu(request: WeightDtype) -> Self {
        let (compute, fallback) = match request {
            WeightDtype::As(Storage::F32) => (DType::F32, Storage::F32),
            WeightDtype::As(Storage::F16) => (DType::F16, Storage::F16),
            _ => (DType::BF16, Storage::BF16),
        };
        Self { request, compute, fallback, bytes: Mutex::default() }
    }

    /// Type of activations, keys and values.
    pub fn compute(&self) -> DType {
        self.compute
    }

    /// The encoding in memory of a matrix of `cols` columns that the file has in `stored`.
    pub fn resolve(&self, stored: Storage, cols: usize) -> Storage {
        let wanted = match (self.request, stored) {
            (WeightDtype::Native, _) | (WeightDtype::Auto, Storage::Ggml(_) | Storage::Affine(_)) => stored,
            (WeightDtype::Auto, Storage::Dense(_)) => self.fallback,
            (WeightDtype::As(t), _) => t,
        };
        // On a GPU dense products need both factors in one type.
        let on_gpu_dense = self.compute != DType::F32 && wanted.dense().is_some();
        let wanted = if on_gpu_dense { self.fallback } else { wanted };
        match wanted.fits(cols) {
            true => wanted,
            false if self.compute == DType::F32 => Storage::F32,
            false => self.fallback,
        }
    }

    pub(super) fn count(&self, loaded: Storage, bytes: usize) {
        if let Ok(mut map) = self.bytes.lock() {
            *map.entry(loaded.to_string()).or_default() += bytes as u64;
        }
    }

    /// Bytes loaded so far, by encoding.
    pub fn bytes_by_type(&self) -> BTreeMap<String, u64> {
        self.bytes.lock().map(|m| m.clone()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Affine, Float};

    #[test]
    fn auto_keeps_quantised_matrices_and_loads_dense_ones_in_f32() {
        let format = WeightFormat::new(WeightDtype::Auto, 1000, Some(1 << 20));
        for storage in [Storage::Ggml(Ggml::Q4K), Storage::Ggml(Ggml::Q2K), Storage::Ggml(Ggml::Q4_1)] {
            assert_eq!(format.resolve(storage, 256), storage);
        }
        assert_eq!(format.resolve(Storage::BF16, 64), Storage::F32);
    }

    #[test]
    fn a_gpu_keeps_quantised_matrices_and_holds_dense_ones_in_16_bits() {
        let affine = Storage::Affine(Affine { bits: 4, group: 64, scale: Float::BF16 });
        for request in [WeightDtype::Auto, WeightDtype::Native] {
            let format = WeightFormat::for_gpu(request);
            for storage in [Storage::Ggml(Ggml::Q4K), affine] {
                assert_eq!(format.resolve(storage, 256), storage);
            }
            assert_eq!(format.resolve(Storage::F32, 64), Storage::BF16);
        }
        assert_eq!(WeightFormat::for_gpu(WeightDtype::As(Storage::F16)).resolve(affine, 256), Storage::F16);
    }

    #[test]
    fn every_name_is_read_and_written_alike() {
        for name in WeightDtype::NAMES {
            assert_eq!(name.parse::<WeightDtype>().unwrap().to_string(), *name);
        }
        assert!("q4_k".parse::<WeightDtype>().is_err(), "nothing quantises to it");
    }

    #[test]
    fn auto_falls_back_to_q8_0_where_f32_takes_more_than_half_the_memory() {
        let format = WeightFormat::new(WeightDtype::Auto, 1000, Some(1500));
        assert_eq!(format.resolve(Storage::BF16, 64), Storage::Ggml(Ggml::Q8_0));
        assert_eq!(format.resolve(Storage::BF16, 48), Storage::F32, "48 columns hold no whole block of 32");
    }
}
