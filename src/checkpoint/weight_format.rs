//! In what form weights are held in memory: the meaning of `--dtype`.

use crate::error::{Error, Result};
use candle_core::quantized::GgmlDType;
use candle_core::DType;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Mutex;

/// The request: `--dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightDtype {
    /// On a CPU: quantised types with vectorised products as stored, the rest f32, or q8_0 where f32 would not fit in half
    /// the machine's memory.
    #[default]
    Auto,
    /// Everything as stored.
    Native,
    /// Everything in this type.
    As(GgmlDType),
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
            "f32" => Self::As(GgmlDType::F32),
            "f16" => Self::As(GgmlDType::F16),
            "bf16" => Self::As(GgmlDType::BF16),
            "q8_0" => Self::As(GgmlDType::Q8_0),
            "q4_0" => Self::As(GgmlDType::Q4_0),
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
            Self::As(t) => f.write_str(&type_name(*t)),
        }
    }
}

/// A resolved request, which also keeps count of what was held.
pub struct WeightFormat {
    request: WeightDtype,
    /// Type of activations, keys and values.
    compute: DType,
    /// What `auto` falls back to.
    fallback: GgmlDType,
    bytes: Mutex<BTreeMap<String, u64>>,
}

impl WeightFormat {
    /// Resolves `request` for a checkpoint of `f32_bytes`, on a machine with `memory` bytes (if known).
    pub fn new(request: WeightDtype, f32_bytes: u64, memory: Option<u64>) -> Self {
        let fits = memory.is_none_or(|m| f32_bytes <= m / 2);
        let fallback = if fits { GgmlDType::F32 } else { GgmlDType::Q8_0 };
        Self { request, compute: DType::F32, fallback, bytes: Mutex::default() }
    }

    /// Resolves `request` for a GPU: quantised types as stored unless asked otherwise, all others in the type of the
    /// activations, which is bf16 unless f32 or f16 is asked for.
    pub fn for_gpu(request: WeightDtype) -> Self {
        let (compute, fallback) = match request {
            WeightDtype::As(GgmlDType::F32) => (DType::F32, GgmlDType::F32),
            WeightDtype::As(GgmlDType::F16) => (DType::F16, GgmlDType::F16),
            _ => (DType::BF16, GgmlDType::BF16),
        };
        Self { request, compute, fallback, bytes: Mutex::default() }
    }

    /// Type of activations, keys and values.
    pub fn compute(&self) -> DType {
        self.compute
    }

    /// The type in which a matrix of `cols` columns stored as `stored` is held.
    pub fn resolve(&self, stored: GgmlDType, cols: usize) -> GgmlDType {
        let wanted = match self.request {
            WeightDtype::Native => stored,
            WeightDtype::Auto if has_fast_products(stored) => stored,
            WeightDtype::Auto => self.fallback,
            WeightDtype::As(t) => t,
        };
        // On a GPU dense products need both factors in one type.
        let dense = |t| matches!(t, GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16);
        let wanted = if self.compute != DType::F32 && dense(wanted) { self.fallback } else { wanted };
        // A row must hold whole quantisation blocks.
        if cols.is_multiple_of(wanted.block_size()) {
            wanted
        } else if self.compute == DType::F32 {
            GgmlDType::F32
        } else {
            self.fallback
        }
    }

    pub(super) fn count(&self, held: GgmlDType, bytes: usize) {
        if let Ok(mut map) = self.bytes.lock() {
            *map.entry(type_name(held)).or_default() += bytes as u64;
        }
    }

    /// Bytes held so far, by type.
    pub fn bytes_by_type(&self) -> BTreeMap<String, u64> {
        self.bytes.lock().map(|m| m.clone()).unwrap_or_default()
    }
}

/// Quantised types whose products are vectorised: ours (`ops::blocks`), and candle's for Q2_K and Q3_K.
fn has_fast_products(t: GgmlDType) -> bool {
    use GgmlDType::*;
    matches!(t, Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q2K | Q3K | Q4K | Q5K | Q6K)
}

/// A type's name in lower case, as flags and reports spell it.
pub(super) fn type_name(t: GgmlDType) -> String {
    let name = format!("{t:?}").to_lowercase();
    match name.strip_suffix('k') {
        Some(base) => format!("{base}_k"),
        None => name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_keeps_quantised_types_and_widens_the_rest() {
        let hold = WeightFormat::new(WeightDtype::Auto, 1000, Some(1 << 20));
        assert_eq!(hold.resolve(GgmlDType::Q4K, 256), GgmlDType::Q4K);
        assert_eq!(hold.resolve(GgmlDType::Q4_1, 64), GgmlDType::Q4_1);
        assert_eq!(hold.resolve(GgmlDType::BF16, 64), GgmlDType::F32);
    }

    #[test]
    fn auto_falls_back_to_q8_0_where_f32_takes_more_than_half_the_memory() {
        let hold = WeightFormat::new(WeightDtype::Auto, 1000, Some(1500));
        assert_eq!(hold.resolve(GgmlDType::BF16, 64), GgmlDType::Q8_0);
        assert_eq!(hold.resolve(GgmlDType::BF16, 48), GgmlDType::F32, "48 columns hold no whole block of 32");
    }
}
