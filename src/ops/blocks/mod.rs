//! Decodes encoded elements to f32, one encoding each, written so that the loops vectorise.

pub mod affine;
mod ggml;

use crate::storage::{Affine, Float, Ggml, Storage};
use ggml::*;

/// An encoding whose geometry is known when it is compiled: `ELEMENTS` values in `BYTES` bytes.
pub trait Block {
    /// The encoding, whose geometry [`Storage::block`] has.
    const STORAGE: Storage;
    /// Values decoded at a time: a block of GGML's formats, 16 of a dense encoding, so that the loops vectorise.
    const ELEMENTS: usize = match Self::STORAGE {
        Storage::Dense(_) => 16,
        _ => Self::STORAGE.block().0,
    };
    /// Bytes that encode them.
    const BYTES: usize = Self::ELEMENTS / Self::STORAGE.block().0 * Self::STORAGE.block().1;

    /// Writes the `ELEMENTS` values of block `b`.
    fn decode(b: &[u8], out: &mut [f32]);
}

/// An operation that is generic over the encoding.
pub trait WithBlock {
    /// The result.
    type Output;

    /// Runs with encoding `B`.
    fn run<B: Block>(self) -> Self::Output;

    /// Runs with groups of MLX's affine quantisation, whose values have `BITS` bits; the rest of `format` is not known
    /// when it is compiled, since 54 instances of every operation would take megabytes.
    fn run_affine<const BITS: usize>(self, format: Affine) -> Self::Output;
}

/// Runs `operation` with the encoding that `storage` names.
pub fn with_block<W: WithBlock>(storage: Storage, operation: W) -> W::Output {
    match storage {
        Storage::Dense(Float::F32) => operation.run::<F32Block>(),
        Storage::Dense(Float::F16) => operation.run::<F16Block>(),
        Storage::Dense(Float::BF16) => operation.run::<Bf16Block>(),
        Storage::Ggml(Ggml::Q4_0) => operation.run::<Q4_0Block>(),
        Storage::Ggml(Ggml::Q4_1) => operation.run::<Q4_1Block>(),
        Storage::Ggml(Ggml::Q5_0) => operation.run::<Q5_0Block>(),
        Storage::Ggml(Ggml::Q5_1) => operation.run::<Q5_1Block>(),
        Storage::Ggml(Ggml::Q8_0) => operation.run::<Q8_0Block>(),
        Storage::Ggml(Ggml::Q2K) => operation.run::<Q2KBlock>(),
        Storage::Ggml(Ggml::Q3K) => operation.run::<Q3KBlock>(),
        Storage::Ggml(Ggml::Q4K) => operation.run::<Q4KBlock>(),
        Storage::Ggml(Ggml::Q5K) => operation.run::<Q5KBlock>(),
        Storage::Ggml(Ggml::Q6K) => operation.run::<Q6KBlock>(),
        Storage::Affine(affine) => match affine.bits {
            2 => operation.run_affine::<2>(affine),
            3 => operation.run_affine::<3>(affine),
            4 => operation.run_affine::<4>(affine),
            5 => operation.run_affine::<5>(affine),
            6 => operation.run_affine::<6>(affine),
            _ => operation.run_affine::<8>(affine),
        },
    }
}

/// Decodes whole rows: `out.len()` values from the start of `bytes`.
#[inline(always)]
pub fn decode<B: Block>(bytes: &[u8], out: &mut [f32]) {
    let whole = out.len() / B::ELEMENTS;
    let (blocks, rest) = bytes.split_at(whole * B::BYTES);
    let (values, tail) = out.split_at_mut(whole * B::ELEMENTS);
    for (b, out) in blocks.chunks_exact(B::BYTES).zip(values.chunks_exact_mut(B::ELEMENTS)) {
        B::decode(b, out);
    }
    if !tail.is_empty() {
        let mut last = [0f32; 256];
        decode_tail::<B>(rest, tail.len(), &mut last);
        tail.copy_from_slice(&last[..tail.len()]);
    }
}

/// Decodes the last `count` values of a row of a dense encoding, less than `ELEMENTS`, with zeros after them.
#[inline(always)]
pub fn decode_tail<B: Block>(bytes: &[u8], count: usize, out: &mut [f32; 256]) {
    let mut padded = [0u8; 64];
    let length = count * B::BYTES / B::ELEMENTS;
    padded[..length].copy_from_slice(&bytes[..length]);
    B::decode(&padded[..B::BYTES], &mut out[..B::ELEMENTS]);
}

/// A finite half-precision number, without a call that would not be inlined: the exponent is rebased by one exact
/// product.
#[inline(always)]
fn half(b: &[u8]) -> f32 {
    let bits = u16::from_le_bytes([b[0], b[1]]);
    let magnitude = f32::from_bits(((bits & 0x7fff) as u32) << 13) * f32::from_bits(0x7780_0000);
    f32::from_bits(magnitude.to_bits() | ((bits & 0x8000) as u32) << 16)
}

struct F32Block;
impl Block for F32Block {
    const STORAGE: Storage = Storage::F32;
    #[inline(always)]
    fn decode(b: &[u8], out: &mut [f32]) {
        for (o, b) in out.iter_mut().zip(b.chunks_exact(4)) {
            *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        }
    }
}

struct F16Block;
impl Block for F16Block {
    const STORAGE: Storage = Storage::F16;
    #[inline(always)]
    fn decode(b: &[u8], out: &mut [f32]) {
        for (o, b) in out.iter_mut().zip(b.chunks_exact(2)) {
            *o = half(b);
        }
    }
}

struct Bf16Block;
impl Block for Bf16Block {
    const STORAGE: Storage = Storage::BF16;
    #[inline(always)]
    fn decode(b: &[u8], out: &mut [f32]) {
        for (o, b) in out.iter_mut().zip(b.chunks_exact(2)) {
            *o = f32::from_bits((u16::from_le_bytes([b[0], b[1]]) as u32) << 16);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::quantized::QTensor;
    use candle_core::{Device, Tensor};

    struct Decode<'a>(&'a [u8], usize);

    impl WithBlock for Decode<'_> {
        type Output = Vec<f32>;
        fn run<B: Block>(self) -> Vec<f32> {
            let mut out = vec![0.0; self.1];
            decode::<B>(self.0, &mut out);
            out
        }
        fn run_affine<const BITS: usize>(self, _: Affine) -> Vec<f32> {
            vec![]
        }
    }

    #[test]
    fn every_encoding_decodes_to_what_candle_gives() -> candle_core::Result<()> {
        let x = Tensor::randn(0f32, 3.0, (7, 512), &Device::Cpu)?;
        for storage in Storage::ALL {
            let q = QTensor::quantize(&x, storage.candle().expect("one of candle's"))?;
            let want = q.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
            let got = with_block(storage, Decode(&q.data()?, want.len()));
            let off = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-5, "{storage}: off by {off}");
        }
        Ok(())
    }

    #[test]
    fn dense_rows_of_any_length_decode() {
        for count in [1, 15, 16, 17, 70] {
            let values: Vec<f32> = (0..count).map(|i| i as f32 - 3.5).collect();
            let wide: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            let f16: Vec<u8> = values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
            let bf16: Vec<u8> = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
            for (storage, bytes) in [(Storage::F32, &wide), (Storage::F16, &f16), (Storage::BF16, &bf16)] {
                assert_eq!(with_block(storage, Decode(bytes, count)), values, "{storage}");
            }
        }
    }

    #[test]
    fn half_precision_is_exact() {
        for bits in 0..=u16::MAX {
            let want = half::f16::from_bits(bits).to_f32();
            if want.is_finite() {
                assert_eq!(super::half(&bits.to_le_bytes()).to_bits(), want.to_bits(), "{bits:#x}");
            }
        }
    }
}
