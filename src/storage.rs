//! How a matrix's values are stored: a closed list, each with the geometry of its blocks.

use candle_core::quantized::GgmlDType;
use candle_core::DType;
use std::fmt;
use std::str::FromStr;

/// The encoding of a matrix's values, in a file or in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Storage {
    /// One number after the other.
    Dense(Float),
    /// Blocks of a GGML format.
    Ggml(Ggml),
    /// Groups of MLX's affine quantisation.
    Affine(Affine),
}

/// MLX's affine quantisation: a group of values is its scale, its bias, and the values in a little-endian bit stream; each is
/// `scale · q + bias` (<https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html>).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Affine {
    /// Bits of a value: 2, 3, 4, 5, 6 or 8.
    pub bits: u8,
    /// Values of a group: 32, 64 or 128.
    pub group: u8,
    /// Type of scale and bias.
    pub scale: Float,
}

impl Affine {
    /// Bytes of a group's values.
    pub const fn value_bytes(self) -> usize {
        self.group as usize * self.bits as usize / 8
    }

    const fn name(self) -> &'static str {
        match (self.bits, self.group) {
            (2, 32) => "affine2_g32",
            (2, 64) => "affine2_g64",
            (2, _) => "affine2_g128",
            (3, 32) => "affine3_g32",
            (3, 64) => "affine3_g64",
            (3, _) => "affine3_g128",
            (4, 32) => "affine4_g32",
            (4, 64) => "affine4_g64",
            (4, _) => "affine4_g128",
            (5, 32) => "affine5_g32",
            (5, 64) => "affine5_g64",
            (5, _) => "affine5_g128",
            (6, 32) => "affine6_g32",
            (6, 64) => "affine6_g64",
            (6, _) => "affine6_g128",
            (_, 32) => "affine8_g32",
            (_, 64) => "affine8_g64",
            (_, _) => "affine8_g128",
        }
    }
}

/// An element type of dense matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Float {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// The upper half of an f32.
    BF16,
}

/// A GGML block format of weights (<https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ggml {
    /// 4 bits and a scale, 32 elements.
    Q4_0,
    /// 4 bits, a scale and a minimum, 32 elements.
    Q4_1,
    /// 5 bits and a scale, 32 elements.
    Q5_0,
    /// 5 bits, a scale and a minimum, 32 elements.
    Q5_1,
    /// 8 bits and a scale, 32 elements.
    Q8_0,
    /// 2 bits, 16 scales and minima of 4 bits, 256 elements.
    Q2K,
    /// 3 bits, 16 scales of 6 bits, 256 elements.
    Q3K,
    /// 4 bits, 8 scales and minima of 6 bits, 256 elements.
    Q4K,
    /// 5 bits, 8 scales and minima of 6 bits, 256 elements.
    Q5K,
    /// 6 bits, 16 scales of 8 bits, 256 elements.
    Q6K,
}

impl Storage {
    /// Dense single precision.
    pub const F32: Self = Self::Dense(Float::F32);
    /// Dense half precision.
    pub const F16: Self = Self::Dense(Float::F16);
    /// Dense bfloat16.
    pub const BF16: Self = Self::Dense(Float::BF16);

    /// Every encoding but MLX's, which only files of its own come in, in the order in which messages list them.
    pub const ALL: [Self; 13] = {
        use Ggml::*;
        [
            Self::F32,
            Self::F16,
            Self::BF16,
            Self::Ggml(Q4_0),
            Self::Ggml(Q4_1),
            Self::Ggml(Q5_0),
            Self::Ggml(Q5_1),
            Self::Ggml(Q8_0),
            Self::Ggml(Q2K),
            Self::Ggml(Q3K),
            Self::Ggml(Q4K),
            Self::Ggml(Q5K),
            Self::Ggml(Q6K),
        ]
    };

    /// The name in lower case, as flags and reports spell it: `f16`, `q4_k`.
    pub fn name(self) -> &'static str {
        use Ggml::*;
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Ggml(Q4_0) => "q4_0",
            Self::Ggml(Q4_1) => "q4_1",
            Self::Ggml(Q5_0) => "q5_0",
            Self::Ggml(Q5_1) => "q5_1",
            Self::Ggml(Q8_0) => "q8_0",
            Self::Ggml(Q2K) => "q2_k",
            Self::Ggml(Q3K) => "q3_k",
            Self::Ggml(Q4K) => "q4_k",
            Self::Ggml(Q5K) => "q5_k",
            Self::Ggml(Q6K) => "q6_k",
            Self::Affine(affine) => affine.name(),
        }
    }

    /// Elements and bytes of a block; a dense element is a block of its own.
    pub const fn block(self) -> (usize, usize) {
        use Ggml::*;
        match self {
            Self::Dense(Float::F32) => (1, 4),
            Self::Dense(Float::F16 | Float::BF16) => (1, 2),
            Self::Ggml(Q4_0) => (32, 18),
            Self::Ggml(Q4_1) => (32, 20),
            Self::Ggml(Q5_0) => (32, 22),
            Self::Ggml(Q5_1) => (32, 24),
            Self::Ggml(Q8_0) => (32, 34),
            Self::Ggml(Q2K) => (256, 84),
            Self::Ggml(Q3K) => (256, 110),
            Self::Ggml(Q4K) => (256, 144),
            Self::Ggml(Q5K) => (256, 176),
            Self::Ggml(Q6K) => (256, 210),
            Self::Affine(a) => (a.group as usize, a.value_bytes() + 2 * Self::Dense(a.scale).block().1),
        }
    }

    /// Whether a row of `columns` elements consists of whole blocks.
    pub fn fits(self, columns: usize) -> bool {
        columns.is_multiple_of(self.block().0)
    }

    /// Bytes of a row of `columns` elements, which [`Storage::fits`].
    pub fn row_bytes(self, columns: usize) -> usize {
        let (elements, bytes) = self.block();
        columns / elements * bytes
    }

    /// The element type of a dense matrix.
    pub fn dense(self) -> Option<Float> {
        match self {
            Self::Dense(float) => Some(float),
            Self::Ggml(_) | Self::Affine(_) => None,
        }
    }

    /// The encoding that candle calls `dtype`; none for its formats of activations.
    pub fn from_candle(dtype: GgmlDType) -> Option<Self> {
        Self::ALL.into_iter().find(|s| s.candle() == Some(dtype))
    }

    /// candle's name of the encoding, for its quantiser and its reference decoder; it knows none of MLX's.
    pub fn candle(self) -> Option<GgmlDType> {
        match self {
            Self::F32 => Some(GgmlDType::F32),
            Self::F16 => Some(GgmlDType::F16),
            Self::BF16 => Some(GgmlDType::BF16),
            Self::Ggml(format) => Some(format.candle()),
            Self::Affine(_) => None,
        }
    }

    /// The dense encoding of tensors of `dtype`, if weights come in it.
    pub fn of_tensor(dtype: DType) -> Option<Self> {
        [Self::F32, Self::F16, Self::BF16].into_iter().find(|s| s.dense().map(Float::dtype) == Some(dtype))
    }
}

impl Ggml {
    /// candle's name of the format.
    pub fn candle(self) -> GgmlDType {
        match self {
            Self::Q4_0 => GgmlDType::Q4_0,
            Self::Q4_1 => GgmlDType::Q4_1,
            Self::Q5_0 => GgmlDType::Q5_0,
            Self::Q5_1 => GgmlDType::Q5_1,
            Self::Q8_0 => GgmlDType::Q8_0,
            Self::Q2K => GgmlDType::Q2K,
            Self::Q3K => GgmlDType::Q3K,
            Self::Q4K => GgmlDType::Q4K,
            Self::Q5K => GgmlDType::Q5K,
            Self::Q6K => GgmlDType::Q6K,
        }
    }
}

impl Float {
    /// The type of a tensor of such elements.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
        }
    }
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Storage {
    type Err = crate::Error;

    fn from_str(s: &str) -> crate::Result<Self> {
        let known = || Self::ALL.map(Self::name).join(", ");
        let message = || format!("`{s}` is not one of {}", known());
        Self::ALL.into_iter().find(|t| t.name() == s).ok_or_else(|| crate::Error::usage("storage", message()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_blocks_are_those_of_the_formats() {
        for storage in Storage::ALL {
            assert_eq!(storage.name().parse::<Storage>().unwrap(), storage);
            let candle = storage.candle().unwrap();
            assert_eq!(storage.block(), (candle.block_size(), candle.type_size()), "{storage}");
            assert_eq!(Storage::from_candle(candle), Some(storage));
            if let Some(float) = storage.dense() {
                assert_eq!(Storage::of_tensor(float.dtype()), Some(storage));
            }
        }
        assert_eq!(Storage::from_candle(GgmlDType::Q8_1), None, "a format of activations");
        assert!("q9_9".parse::<Storage>().is_err());
    }

    #[test]
    fn rows_hold_whole_blocks() {
        assert!(Storage::BF16.fits(7) && !Storage::Ggml(Ggml::Q4K).fits(128));
        assert_eq!(Storage::Ggml(Ggml::Q6K).row_bytes(512), 420);
        assert_eq!(Storage::F16.row_bytes(7), 14);
    }
}
