//! Decodes encoded elements to f32, one encoding each, written so that the loops vectorise.
//!
//! Layouts: GGML's `block_q*` (<https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>). candle's decoders are
//! scalar, and its products of a few rows round the input to 8 bits and keep a repacked copy of Q4_K weights; these do
//! neither.

use crate::storage::{Affine, Float, Ggml, Storage};

/// An encoding: `ELEMENTS` values in `BYTES` bytes.
pub trait Block {
    /// The encoding, whose geometry [`Storage::block`] has.
    const STORAGE: Storage;
    /// Values decoded at a time: a block of GGML's formats, 16 of a dense encoding, so that the loops vectorise.
    const ELEMENTS: usize = match Self::STORAGE {
        Storage::Dense(_) => 16,
        Storage::Ggml(_) | Storage::Affine(_) => Self::STORAGE.block().0,
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
        Storage::Affine(affine) => with_bits(affine, operation),
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

fn with_bits<W: WithBlock>(affine: Affine, operation: W) -> W::Output {
    match affine.bits {
        2 => with_group::<2, W>(affine, operation),
        3 => with_group::<3, W>(affine, operation),
        4 => with_group::<4, W>(affine, operation),
        5 => with_group::<5, W>(affine, operation),
        6 => with_group::<6, W>(affine, operation),
        _ => with_group::<8, W>(affine, operation),
    }
}

fn with_group<const BITS: u8, W: WithBlock>(affine: Affine, operation: W) -> W::Output {
    match affine.group {
        32 => with_scale::<BITS, 32, W>(affine, operation),
        64 => with_scale::<BITS, 64, W>(affine, operation),
        _ => with_scale::<BITS, 128, W>(affine, operation),
    }
}

fn with_scale<const BITS: u8, const GROUP: u8, W: WithBlock>(affine: Affine, operation: W) -> W::Output {
    match affine.scale {
        Float::F32 => operation.run::<AffineBlock<BITS, GROUP, 0>>(),
        Float::F16 => operation.run::<AffineBlock<BITS, GROUP, 1>>(),
        Float::BF16 => operation.run::<AffineBlock<BITS, GROUP, 2>>(),
    }
}

/// A group of MLX's affine quantisation; `SCALE` is the type of scale and bias: f32, f16 or bf16.
struct AffineBlock<const BITS: u8, const GROUP: u8, const SCALE: u8>;
impl<const BITS: u8, const GROUP: u8, const SCALE: u8> Block for AffineBlock<BITS, GROUP, SCALE> {
    const STORAGE: Storage = {
        let scale = match SCALE {
            0 => Float::F32,
            1 => Float::F16,
            _ => Float::BF16,
        };
        Storage::Affine(Affine { bits: BITS, group: GROUP, scale })
    };
    #[inline(always)]
    fn decode(b: &[u8], out: &mut [f32]) {
        let bytes = if SCALE == 0 { 4 } else { 2 };
        let number = |b: &[u8]| match SCALE {
            0 => f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            1 => half(b),
            _ => f32::from_bits((u16::from_le_bytes([b[0], b[1]]) as u32) << 16),
        };
        let (scale, bias) = (number(b), number(&b[bytes..]));
        // Eight values lie in as many bytes as a value has bits.
        for (q, out) in b[2 * bytes..].chunks_exact(BITS as usize).zip(out.chunks_exact_mut(8)) {
            let mut word = [0u8; 8];
            word[..BITS as usize].copy_from_slice(q);
            let word = u64::from_le_bytes(word);
            for (j, o) in out.iter_mut().enumerate() {
                let value = (word >> (BITS as usize * j)) as u32 & ((1u32 << BITS) - 1);
                *o = value as f32 * scale + bias;
            }
        }
    }
}

/// `out[j], out[j + 16] = f(low nibble, j), f(high nibble, j + 16)`.
#[inline(always)]
fn nibbles(q: &[u8], out: &mut [f32], f: impl Fn(i32, usize) -> f32) {
    // Two loops: one over both halves is left scalar.
    let (low, high) = out[..32].split_at_mut(16);
    for j in 0..16 {
        low[j] = f((q[j] & 15) as i32, j);
    }
    for j in 0..16 {
        high[j] = f((q[j] >> 4) as i32, j + 16);
    }
}

struct Q4_0Block;
impl Block for Q4_0Block {
    const STORAGE: Storage = Storage::Ggml(Ggml::Q4_0);
    #[inline(always)]
    fn decode(b: &[u8], out: &mut [f32]) {
        let d = half(b);
        nibbles(&b[2..18], out, |q, _| (q - 8) as f32 * d);
    }
}

struct Q4_1Block;
impl Block for Q4_1Block {
    const STORAGE: Storage = Storage::Ggml(Ggml::Q4_1);
    #[inline(always)]
    fn decode(b: &[u8], out: &mut [f32]) {
        let (d, m) = (half(b), half(&b[2..]));
        nibbles(&b[4..20], out, |q, _| q as f32 * d + m);
    }
}

/// The fifth bit of value `j`, in its place.
#[inline(always)]
fn fifth(bits: u32, j: usize) -> i32 {
    ((bits >> j & 1) << 4) as i32
}

struct Q5_0Block;
impl Block for Q5_0Block {
    const STORAGE: Storage = Storage::Ggml(Ggml::Q5_0);
    #[inline(always)]
    fn decode(b: &[u8], out: &mut [f32]) {
        let (d, bits) = (half(b), u32::from_le_bytes([b[2], b[3], b[4], b[5]]));
        nibbles(&b[6..22], out, |q, j| ((q | fifth(bits, j)) - 16) as f32 * d);
    }
}

struct Q5_1Block;
impl Block for Q5_1Block {
    const STORAGE: Storage = Storage::Ggml(Ggml::Q5_1);
    #[inline(always)]
    fn decode(b: &[u8], out: &mut [f32]) {
        let (d, m, bits) = (half(b), half(&b[2..]), u32::from_le_bytes([b[4], b[5], b[6], b[7]]));
        nibbles(&b[8..24], out, |q, j| (q | fifth(bits, j)) as f32 * d + m);
    }
}

struct Q8_0Block;
impl Block for Q8_0Block {
    const STORAGE: Storage = Storage::Ggml(Ggml::Q8_0);
    #[inline(always)]
    fn decode(b: &[u8], out: &mut [f32]) {
        let d = half(b);
        for (o, q) in out.iter_mut().zip(&b[2..34]) {
            *o = *q as i8 as f32 * d;
        }
    }
}

/// Scale and minimum of sub-block `j`, six bits each, packed in twelve bytes.
#[inline(always)]
fn scale_min(s: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = match j < 4 {
        true => (s[j] & 63, s[j + 4] & 63),
        false => (s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4),
    };
    (scale as f32, min as f32)
}

struct Q2KBlock;
impl Block for Q2KBlock {
    const STORAGE: Storage = Storage::Ggml(Ggml::Q2K);
    #[inline(always)]
    fn decode(b: &[u8], out: &mut [f32]) {
        let (scales, d, dmin) = (&b[..16], half(&b[80..]), half(&b[82..]));
        for (i, out) in out.chunks_exact_mut(16).enumerate() {
            // Sixteen elements share a scale; two bits of a byte belong to each of four quarters of 32 elements.
            let (q, shift) = (&b[16 + 32 * (i / 8) + 16 * (i % 2)..][..16], 2 * (i % 8 / 2));
            let (s, m) = (d * (scales[i] & 15) as f32, dmin * (scales[i] >> 4) as f32);
            for (o, q) in out.iter_mut().zip(q) {
                *o = (q >> shift & 3) as f32 * s - m;
            }
        }
    }
}

struct Q3KBlock;
impl Block for Q3KBlock {
    const STORAGE: Storage = Storage::Ggml(Ggml::Q3K);
    #[inline(always)]
    fn decode(b: &[u8], out: &mut [f32]) {
        let (scales, d) = (&b[96..108], half(&b[108..]));
        for (i, out) in out.chunks_exact_mut(16).enumerate() {
            let q = &b[32 + 32 * (i / 8) + 16 * (i % 2)..][..16];
            let (thirds, shift, bit) = (&b[16 * (i % 2)..][..16], 2 * (i % 8 / 2), i / 2);
            let low = scales[i % 8] >> (4 * (i / 8)) & 15;
            let s = d * ((low | (scales[8 + i % 4] >> (2 * (i / 4)) & 3) << 4) as i32 - 32) as f32;
            for ((o, q), t) in out.iter_mut().zip(q).zip(thirds) {
                *o = ((q >> shift & 3 | (t >> bit & 1) << 2) as i32 - 4) as f32 * s;
            }
        }
    }
}

struct Q4KBlock;
impl Block for Q4KBlock {
    const STORAGE: Storage = Storage::Ggml(Ggml::Q4K);
    #[inline(always)]
    fn decode(b: &[u8], out: &mut [f32]) {
        let (d, dmin) = (half(b), half(&b[2..]));
        for (i, (q, out)) in b[16..144].chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
            let ((s0, m0), (s1, m1)) = (scale_min(&b[4..16], 2 * i), scale_min(&b[4..16], 2 * i + 1));
            let (low, high) = out.split_at_mut(32);
            for l in 0..32 {
                low[l] = (q[l] & 15) as f32 * (d * s0) - dmin * m0;
                high[l] = (q[l] >> 4) as f32 * (d * s1) - dmin * m1;
            }
        }
    }
}

struct Q5KBlock;
impl Block for Q5KBlock {
    const STORAGE: Storage = Storage::Ggml(Ggml::Q5K);
    #[inline(always)]
    fn decode(b: &[u8], out: &mut [f32]) {
        let (d, dmin, fifths) = (half(b), half(&b[2..]), &b[16..48]);
        for (i, (q, out)) in b[48..176].chunks_exact(32).zip(out.chunks_exact_mut(64)).enumerate() {
            let ((s0, m0), (s1, m1)) = (scale_min(&b[4..16], 2 * i), scale_min(&b[4..16], 2 * i + 1));
            let (low, high) = out.split_at_mut(32);
            for l in 0..32 {
                let bits = fifths[l] >> (2 * i);
                low[l] = ((q[l] & 15) | (bits & 1) << 4) as f32 * (d * s0) - dmin * m0;
                high[l] = ((q[l] >> 4) | (bits >> 1 & 1) << 4) as f32 * (d * s1) - dmin * m1;
            }
        }
    }
}

struct Q6KBlock;
impl Block for Q6KBlock {
    const STORAGE: Storage = Storage::Ggml(Ggml::Q6K);
    #[inline(always)]
    fn decode(b: &[u8], out: &mut [f32]) {
        let d = half(&b[208..]);
        for (i, out) in out.chunks_exact_mut(128).enumerate() {
            let (ql, qh, scales) = (&b[64 * i..][..64], &b[128 + 32 * i..][..32], &b[192 + 8 * i..][..8]);
            for quarter in 0..4 {
                for half_row in 0..2 {
                    let s = d * (scales[2 * quarter + half_row] as i8) as f32;
                    for l in 16 * half_row..16 * half_row + 16 {
                        let nibble = ql[32 * (quarter % 2) + l] >> (4 * (quarter / 2)) & 15;
                        let q = nibble | (qh[l] >> (2 * quarter) & 3) << 4;
                        out[32 * quarter + l] = (q as i32 - 32) as f32 * s;
                    }
                }
            }
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
