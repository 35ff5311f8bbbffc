//! GGML's block formats (<https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h>, `block_q*`).
//!
//! candle's decoders are scalar, and its products of a few rows round the input to 8 bits and keep a repacked copy of
//! Q4_K weights; these do neither.

use super::{half, Block};
use crate::storage::{Ggml, Storage};

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

pub struct Q4_0Block;
impl Block for Q4_0Block {
    const STORAGE: Storage = Storage::Ggml(Ggml::Q4_0);
    #[inline(always)]
    fn decode(b: &[u8], out: &mut [f32]) {
        let d = half(b);
        nibbles(&b[2..18], out, |q, _| (q - 8) as f32 * d);
    }
}

pub struct Q4_1Block;
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

pub struct Q5_0Block;
impl Block for Q5_0Block {
    const STORAGE: Storage = Storage::Ggml(Ggml::Q5_0);
    #[inline(always)]
    fn decode(b: &[u8], out: &mut [f32]) {
        let (d, bits) = (half(b), u32::from_le_bytes([b[2], b[3], b[4], b[5]]));
        nibbles(&b[6..22], out, |q, j| ((q | fifth(bits, j)) - 16) as f32 * d);
    }
}

pub struct Q5_1Block;
impl Block for Q5_1Block {
    const STORAGE: Storage = Storage::Ggml(Ggml::Q5_1);
    #[inline(always)]
    fn decode(b: &[u8], out: &mut [f32]) {
        let (d, m, bits) = (half(b), half(&b[2..]), u32::from_le_bytes([b[4], b[5], b[6], b[7]]));
        nibbles(&b[8..24], out, |q, j| (q | fifth(bits, j)) as f32 * d + m);
    }
}

pub struct Q8_0Block;
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

pub struct Q2KBlock;
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

pub struct Q3KBlock;
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

pub struct Q4KBlock;
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

pub struct Q5KBlock;
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

pub struct Q6KBlock;
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
