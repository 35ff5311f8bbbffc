//! Quantised blocks to f32, one format each, written so that the loops vectorise.
//!
//! Layouts: ggml's `block_q*` (<https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>). candle's own widening is scalar
//! and its few-row products round the input to 8 bits and keep a repacked copy of Q4_K weights; these do neither.

use candle_core::quantized::GgmlDType;

/// A format: `ELEMENTS` values in `BYTES` bytes.
pub trait Block {
    /// Values to a block.
    const ELEMENTS: usize;
    /// Bytes to a block.
    const BYTES: usize;

    /// Writes the `ELEMENTS` values of block `b`.
    fn widen(b: &[u8], out: &mut [f32]);
}

/// Something to be done in whichever format it turns out to be.
pub trait InFormat {
    /// What comes of it.
    type Output;

    /// Does it in format `B`.
    fn run<B: Block>(self) -> Self::Output;
}

/// Does `what` in the format of `dtype`; `None` for formats not written here.
pub fn in_format<W: InFormat>(dtype: GgmlDType, what: W) -> Option<W::Output> {
    use GgmlDType::*;
    Some(match dtype {
        F16 => what.run::<HalfBlock>(),
        BF16 => what.run::<BrainBlock>(),
        Q4_0 => what.run::<Q4_0Block>(),
        Q4_1 => what.run::<Q4_1Block>(),
        Q5_0 => what.run::<Q5_0Block>(),
        Q5_1 => what.run::<Q5_1Block>(),
        Q8_0 => what.run::<Q8_0Block>(),
        Q4K => what.run::<Q4KBlock>(),
        Q5K => what.run::<Q5KBlock>(),
        Q6K => what.run::<Q6KBlock>(),
        _ => return None,
    })
}

/// A finite half-precision number, without a call that would not be inlined: the exponent is rebased by one exact product.
#[inline(always)]
fn half(b: &[u8]) -> f32 {
    let bits = u16::from_le_bytes([b[0], b[1]]);
    let magnitude = f32::from_bits(((bits & 0x7fff) as u32) << 13) * f32::from_bits(0x7780_0000);
    f32::from_bits(magnitude.to_bits() | ((bits & 0x8000) as u32) << 16)
}

struct HalfBlock;
impl Block for HalfBlock {
    const ELEMENTS: usize = 16;
    const BYTES: usize = 32;
    #[inline(always)]
    fn widen(b: &[u8], out: &mut [f32]) {
        for (o, b) in out.iter_mut().zip(b.chunks_exact(2)) {
            *o = half(b);
        }
    }
}

struct BrainBlock;
impl Block for BrainBlock {
    const ELEMENTS: usize = 16;
    const BYTES: usize = 32;
    #[inline(always)]
    fn widen(b: &[u8], out: &mut [f32]) {
        for (o, b) in out.iter_mut().zip(b.chunks_exact(2)) {
            *o = f32::from_bits((u16::from_le_bytes([b[0], b[1]]) as u32) << 16);
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
    const ELEMENTS: usize = 32;
    const BYTES: usize = 18;
    #[inline(always)]
    fn widen(b: &[u8], out: &mut [f32]) {
        let d = half(b);
        nibbles(&b[2..18], out, |q, _| (q - 8) as f32 * d);
    }
}

struct Q4_1Block;
impl Block for Q4_1Block {
    const ELEMENTS: usize = 32;
    const BYTES: usize = 20;
    #[inline(always)]
    fn widen(b: &[u8], out: &mut [f32]) {
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
    const ELEMENTS: usize = 32;
    const BYTES: usize = 22;
    #[inline(always)]
    fn widen(b: &[u8], out: &mut [f32]) {
        let (d, bits) = (half(b), u32::from_le_bytes([b[2], b[3], b[4], b[5]]));
        nibbles(&b[6..22], out, |q, j| ((q | fifth(bits, j)) - 16) as f32 * d);
    }
}

struct Q5_1Block;
impl Block for Q5_1Block {
    const ELEMENTS: usize = 32;
    const BYTES: usize = 24;
    #[inline(always)]
    fn widen(b: &[u8], out: &mut [f32]) {
        let (d, m, bits) = (half(b), half(&b[2..]), u32::from_le_bytes([b[4], b[5], b[6], b[7]]));
        nibbles(&b[8..24], out, |q, j| (q | fifth(bits, j)) as f32 * d + m);
    }
}

struct Q8_0Block;
impl Block for Q8_0Block {
    const ELEMENTS: usize = 32;
    const BYTES: usize = 34;
    #[inline(always)]
    fn widen(b: &[u8], out: &mut [f32]) {
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

struct Q4KBlock;
impl Block for Q4KBlock {
    const ELEMENTS: usize = 256;
    const BYTES: usize = 144;
    #[inline(always)]
    fn widen(b: &[u8], out: &mut [f32]) {
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
    const ELEMENTS: usize = 256;
    const BYTES: usize = 176;
    #[inline(always)]
    fn widen(b: &[u8], out: &mut [f32]) {
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
    const ELEMENTS: usize = 256;
    const BYTES: usize = 210;
    #[inline(always)]
    fn widen(b: &[u8], out: &mut [f32]) {
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

    struct Widen<'a>(&'a [u8]);

    impl InFormat for Widen<'_> {
        type Output = Vec<f32>;
        fn run<B: Block>(self) -> Vec<f32> {
            let mut out = vec![0.0; self.0.len() / B::BYTES * B::ELEMENTS];
            for (b, out) in self.0.chunks_exact(B::BYTES).zip(out.chunks_exact_mut(B::ELEMENTS)) {
                B::widen(b, out);
            }
            out
        }
    }

    #[test]
    fn every_format_widens_to_what_candle_gives() -> candle_core::Result<()> {
        use GgmlDType::*;
        let x = Tensor::randn(0f32, 3.0, (7, 512), &Device::Cpu)?;
        for dtype in [F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4K, Q5K, Q6K] {
            let q = QTensor::quantize(&x, dtype)?;
            let want = q.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
            let got = in_format(dtype, Widen(&q.data()?)).unwrap_or_default();
            assert_eq!(got.len(), want.len(), "{dtype:?}");
            let off = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-5, "{dtype:?}: off by {off}");
        }
        assert!(in_format(Q2K, Widen(&[])).is_none());
        Ok(())
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
