//! Groups of MLX's affine quantisation ([`Affine`] has the layout): products and decoding.
//!
//! A group adds `scale Σ q v + bias Σ v` to a product. The sums of `v` are the same for every row and are taken once,
//! and no value is multiplied by its scale.
//!
//! Four values are a *window* of `4 BITS` bits, which fits 32 bits whatever `BITS` is. Sixteen windows are a *chunk*, a
//! vector or several: after one mask its lanes hold the first values of the windows, after another the second ones, and
//! so on. The input is permuted to this order once, which is cheaper than bringing every row's values into order.

use super::half;
use crate::storage::{Affine, Float, Storage};
use pulp::{Simd, WithSimd};

/// Windows of a chunk, in halves, since a group may be half a chunk.
const WINDOWS: usize = 16;
/// Values of a half of a chunk, the smallest group.
const HALF: usize = 2 * WINDOWS;
/// Values of a chunk.
const CHUNK: usize = 4 * WINDOWS;
/// Numbers of a chunk of the input: the sums of the windows, then their first values, their second ones, ...
const INPUT: usize = CHUNK + WINDOWS;
/// Bytes before the values of a half that are read with them: a scale or a bias.
const BEFORE: usize = 4;

/// Where the parts of a group are.
#[derive(Clone, Copy)]
struct Layout {
    scale: Float,
    /// Values and bytes of a group.
    group: usize,
    bytes: usize,
    /// Bytes of scale and bias.
    head: usize,
}

impl Layout {
    fn new(format: Affine) -> Self {
        let (group, bytes) = Storage::Affine(format).block();
        Self { scale: format.scale, group, bytes, head: bytes - format.value_bytes() }
    }

    /// Scale and bias of the group at the start of `b`.
    #[inline(always)]
    fn numbers(&self, b: &[u8]) -> (f32, f32) {
        let upper = |b: &[u8]| f32::from_bits((u16::from_le_bytes([b[0], b[1]]) as u32) << 16);
        match self.scale {
            Float::F32 => (f32::from_bits(word(b)), f32::from_bits(word(&b[4..]))),
            Float::F16 => (half(b), half(&b[2..])),
            Float::BF16 => (upper(b), upper(&b[2..])),
        }
    }
}

#[inline(always)]
fn word(b: &[u8]) -> u32 {
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

/// The eight windows of half a chunk whose values start at `b[BEFORE]`; what is beside a window's bits is left
/// there, and [`lowered`] brings it to the bottom.
#[inline(always)]
fn windows<const BITS: usize>(b: &[u8], out: &mut [u32]) {
    let b = &b[..BEFORE + HALF / 8 * BITS];
    let values = &b[BEFORE..];
    match BITS {
        2 => {
            for (o, b) in out.iter_mut().zip(values) {
                *o = *b as u32;
            }
        }
        4 => {
            for (o, b) in out.iter_mut().zip(values.chunks_exact(2)) {
                *o = u16::from_le_bytes([b[0], b[1]]) as u32;
            }
        }
        8 => {
            for (o, b) in out.iter_mut().zip(values.chunks_exact(4)) {
                *o = word(b);
            }
        }
        // A word that ends with the window is read: one that starts with it might go past the last group.
        _ => {
            for (h, o) in out.iter_mut().enumerate() {
                *o = word(&b[end::<BITS>(h)..]);
            }
        }
    }
}

/// Bytes of values up to the end of window `h`.
const fn end<const BITS: usize>(h: usize) -> usize {
    (BITS * (h + 1)).div_ceil(2)
}

/// How far up in its word each window is.
const fn shifts<const BITS: usize>() -> [u32; WINDOWS] {
    let mut shifts = [0; WINDOWS];
    let mut i = 0;
    while i < WINDOWS && !matches!(BITS, 2 | 4 | 8) {
        let h = i % 8;
        shifts[i] = (32 + 4 * BITS * h - 8 * end::<BITS>(h)) as u32;
        i += 1;
    }
    shifts
}

/// Vector `i` of the windows, each at the bottom of its lane.
#[inline(always)]
fn lowered<const BITS: usize, S: Simd>(simd: S, windows: &[u32; WINDOWS], i: usize) -> S::u32s {
    let windows = S::as_simd_u32s(windows).0[i];
    match BITS {
        2 | 4 | 8 => windows,
        _ => simd.wrapping_dyn_shr_u32s(windows, S::as_simd_u32s(const { &shifts::<BITS>() }).0[i]),
    }
}

/// The rows of the input of products with matrices of one format, in the order of the windows.
pub struct Input {
    format: Affine,
    /// `[rows, chunks, INPUT]`, with zeros after the last value of a row.
    values: Vec<f32>,
    /// Numbers of a row.
    row: usize,
}

impl Input {
    /// Permutes `x [rows, cols]` for products with matrices of `format`.
    pub fn new(format: Affine, x: &[f32], cols: usize) -> Self {
        let row = cols.div_ceil(CHUNK) * INPUT;
        let mut values = vec![0f32; x.len() / cols * row];
        // Every second value of a window stays `BITS` bits up when it is multiplied, so the input is scaled down.
        let down = 1.0 / (1u32 << format.bits) as f32;
        for (x, out) in x.chunks_exact(cols).zip(values.chunks_exact_mut(row)) {
            for (x, out) in x.chunks(CHUNK).zip(out.chunks_exact_mut(INPUT)) {
                for (i, x) in x.chunks_exact(4).enumerate() {
                    out[i] = (x[0] + x[1]) + (x[2] + x[3]);
                    for (k, factor) in [1.0, down, 1.0, down].into_iter().enumerate() {
                        out[WINDOWS * (k + 1) + i] = x[k] * factor;
                    }
                }
            }
        }
        Self { format, values, row }
    }

    /// Whether products with matrices of `format` read this order.
    pub fn is_for(&self, format: Affine) -> bool {
        self.format == format
    }
}

/// `out[r, t] = matrix[r] · x[t]` for all rows of `w`.
pub struct Product<'a, const BITS: usize> {
    /// Whole rows.
    pub w: &'a [u8],
    /// The input rows.
    pub input: &'a Input,
    /// Columns of the matrix.
    pub cols: usize,
    /// `[rows of w, rows of x]`.
    pub out: &'a mut [f32],
}

impl<const BITS: usize> WithSimd for Product<'_, BITS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { w, input: Input { format, values, row: length }, cols, out } = self;
        let (layout, tokens) = (Layout::new(*format), values.len() / length);
        let rows = w.chunks_exact(cols / layout.group * layout.bytes);
        for (row, out) in rows.zip(out.chunks_exact_mut(tokens)) {
            // Four rows of the input share the decoding.
            for (x, out) in values.chunks(4 * length).zip(out.chunks_mut(4)) {
                match out.len() {
                    4 => dot::<BITS, 4, S>(simd, layout, row, x, out),
                    _ => {
                        for (x, out) in x.chunks_exact(*length).zip(out.chunks_exact_mut(1)) {
                            dot::<BITS, 1, S>(simd, layout, row, x, out);
                        }
                    }
                }
            }
        }
    }
}

/// The products of a matrix row with `T` rows of the input.
#[inline(always)]
fn dot<const BITS: usize, const T: usize, S: Simd>(simd: S, layout: Layout, row: &[u8], x: &[f32], out: &mut [f32]) {
    let Layout { group, bytes, head, .. } = layout;
    // The second half of a chunk: the next group, or more of the same one.
    let (step, next, second) = match group < CHUNK {
        true => (2 * bytes, bytes, bytes),
        false => (bytes, 0, HALF / 8 * BITS),
    };
    let length = x.len() / T;
    let mut totals = [[simd.splat_f32s(0.0); WINDOWS]; T];
    let mut at = 0;
    for groups in row.chunks(step) {
        // Where the last half is missing the input is zero, and the first one stands in.
        let (next, second) = if groups.len() < step { (0, 0) } else { (next, second) };
        let (first_numbers, next_numbers) = (layout.numbers(groups), layout.numbers(&groups[next..]));
        let scales = either::<S>(simd, first_numbers.0, next_numbers.0);
        let biases = either::<S>(simd, first_numbers.1, next_numbers.1);
        let mut values = &groups[head - BEFORE..];
        for _ in 0..group.div_ceil(CHUNK) {
            let mut w = [0u32; WINDOWS];
            windows::<BITS>(values, &mut w[..8]);
            windows::<BITS>(&values[second..], &mut w[8..]);
            for (t, total) in totals.iter_mut().enumerate() {
                let x = S::as_simd_f32s(&x[t * length + at..][..INPUT]).0;
                for i in 0..WINDOWS / S::F32_LANES {
                    let q = quarters::<BITS, S>(simd, lowered::<BITS, S>(simd, &w, i));
                    let lanes = WINDOWS / S::F32_LANES;
                    let mut sum = simd.mul_f32s(q[0], x[lanes + i]);
                    for k in 1..4 {
                        sum = simd.mul_add_f32s(q[k], x[(k + 1) * lanes + i], sum);
                    }
                    // One addition to the total, not two fused ones, which the next chunk would wait for.
                    let sum = simd.mul_add_f32s(biases[i], x[i], simd.mul_f32s(scales[i], sum));
                    total[i] = simd.add_f32s(total[i], sum);
                }
            }
            at += INPUT;
            values = values.get(HALF / 4 * BITS..).unwrap_or_default();
        }
    }
    for (out, total) in out.iter_mut().zip(totals) {
        let mut sum = total[0];
        for lanes in &total[1..WINDOWS / S::F32_LANES] {
            sum = simd.add_f32s(sum, *lanes);
        }
        *out = simd.reduce_sum_f32s(sum);
    }
}

/// A chunk's lanes: `first` in the first half, `second` in the second.
#[inline(always)]
fn either<S: Simd>(simd: S, first: f32, second: f32) -> [S::f32s; WINDOWS] {
    const SECOND: [f32; WINDOWS] = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0];
    let (first, second) = (simd.splat_f32s(first), simd.splat_f32s(second));
    let mut lanes = [first; WINDOWS];
    for (lanes, is_second) in lanes.iter_mut().zip(S::as_simd_f32s(&SECOND).0) {
        *lanes = simd.select_f32s(simd.less_than_f32s(*is_second, simd.splat_f32s(0.5)), first, second);
    }
    lanes
}

/// The four values of the windows, every second one times `2^BITS`.
#[inline(always)]
fn quarters<const BITS: usize, S: Simd>(simd: S, windows: S::u32s) -> [S::f32s; 4] {
    // 2²³ with a small integer in its low bits is their sum; this converts where `Simd` has no conversion.
    const MAGIC: f32 = 8_388_608.0;
    let mask = (1u32 << BITS) - 1;
    let upper = simd.wrapping_dyn_shr_u32s(windows, simd.splat_u32s(2 * BITS as u32));
    let mut values = [simd.splat_f32s(0.0); 4];
    for (k, value) in values.iter_mut().enumerate() {
        let windows = if k < 2 { windows } else { upper };
        let bits = simd.and_u32s(windows, simd.splat_u32s(mask << (BITS * (k % 2))));
        let bits = simd.or_u32s(bits, simd.splat_u32s(MAGIC.to_bits()));
        *value = simd.sub_f32s(simd.transmute_f32s_u32s(bits), simd.splat_f32s(MAGIC));
    }
    values
}

/// Decodes whole groups.
pub struct Decode<'a, const BITS: usize> {
    /// The format of the groups.
    pub format: Affine,
    /// The groups.
    pub bytes: &'a [u8],
    /// As many values as the groups have.
    pub out: &'a mut [f32],
}

impl<const BITS: usize> WithSimd for Decode<'_, BITS> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let layout = Layout::new(self.format);
        let groups = self.bytes.chunks_exact(layout.bytes);
        for (b, out) in groups.zip(self.out.chunks_exact_mut(layout.group)) {
            let (scale, bias) = layout.numbers(b);
            let mut values = &b[layout.head - BEFORE..];
            for out in out.chunks_exact_mut(HALF) {
                let mut w = [0u32; WINDOWS];
                windows::<BITS>(values, &mut w[..8]);
                let mut q = [0u8; CHUNK];
                for (i, q) in q.chunks_exact_mut(4 * S::F32_LANES).enumerate() {
                    spread::<BITS, S>(simd, lowered::<BITS, S>(simd, &w, i), q);
                }
                for (o, q) in out.iter_mut().zip(&q) {
                    *o = *q as f32 * scale + bias;
                }
                values = values.get(HALF / 8 * BITS..).unwrap_or_default();
            }
        }
    }
}

/// Gives each of the four values of the windows a byte.
#[inline(always)]
fn spread<const BITS: usize, S: Simd>(simd: S, windows: S::u32s, out: &mut [u8]) {
    let mask = (1u32 << BITS) - 1;
    let mut bytes = simd.and_u32s(windows, simd.splat_u32s(mask));
    for k in 1..4 {
        let value = simd.and_u32s(windows, simd.splat_u32s(mask << (BITS * k)));
        let value = simd.wrapping_dyn_shl_u32s(value, simd.splat_u32s(((8 - BITS) * k) as u32));
        bytes = simd.or_u32s(bytes, value);
    }
    let words = pulp::bytemuck::cast_slice::<_, u32>(std::slice::from_ref(&bytes));
    for (out, word) in out.chunks_exact_mut(4).zip(words) {
        out.copy_from_slice(&word.to_le_bytes());
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use pulp::{Arch, Scalar};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    /// Every format.
    pub(crate) fn formats() -> impl Iterator<Item = Affine> {
        let scales = [Float::F32, Float::F16, Float::BF16];
        let formats = [2, 3, 4, 5, 6, 8].into_iter().flat_map(|bits| [32, 64, 128].map(|group| (bits, group)));
        formats.flat_map(move |(bits, group)| scales.map(|scale| Affine { bits, group, scale }))
    }

    /// Random groups, and their values by the definition, one bit at a time.
    pub(crate) fn random_groups(format: Affine, count: usize, seed: u64) -> (Vec<u8>, Vec<f32>) {
        let mut random = StdRng::seed_from_u64(seed);
        let (mut bytes, mut values) = (vec![], vec![]);
        for _ in 0..count {
            let mut numbers = [0f32; 2];
            for number in &mut numbers {
                let x = random.random_range(-0.1f32..0.1);
                let (stored, b) = match format.scale {
                    Float::F32 => (x, x.to_le_bytes().to_vec()),
                    Float::F16 => (half::f16::from_f32(x).to_f32(), half::f16::from_f32(x).to_le_bytes().to_vec()),
                    Float::BF16 => (half::bf16::from_f32(x).to_f32(), half::bf16::from_f32(x).to_le_bytes().to_vec()),
                };
                *number = stored;
                bytes.extend(b);
            }
            let q: Vec<u8> = (0..format.value_bytes()).map(|_| random.random()).collect();
            let bit = |i: usize| u32::from(q[i / 8] >> (i % 8) & 1);
            let bits = usize::from(format.bits);
            for j in 0..usize::from(format.group) {
                let q: u32 = (0..bits).map(|i| bit(bits * j + i) << i).sum();
                values.push(q as f32 * numbers[0] + numbers[1]);
            }
            bytes.extend(q);
        }
        (bytes, values)
    }

    /// Products and decoded values with the vectors of `simd`.
    struct Both<'a, const BITS: usize>(Product<'a, BITS>, Decode<'a, BITS>);

    impl<const BITS: usize> WithSimd for Both<'_, BITS> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            self.0.with_simd(simd);
            self.1.with_simd(simd);
        }
    }

    fn check<const BITS: usize>(format: Affine, run: impl Fn(Both<BITS>)) {
        let group = usize::from(format.group);
        for (groups, rows, tokens) in [(1, 1, 1), (3, 7, 5), (4, 3, 9), (5, 2, 4)] {
            let cols = groups * group;
            let (bytes, values) = random_groups(format, rows * groups, 1000 * u64::from(format.bits) + groups as u64);
            let mut random = StdRng::seed_from_u64(7);
            let x: Vec<f32> = (0..tokens * cols).map(|_| random.random_range(-1.0..1.0)).collect();
            let (mut out, mut decoded) = (vec![f32::NAN; rows * tokens], vec![f32::NAN; values.len()]);
            let input = Input::new(format, &x, cols);
            let product = Product { w: &bytes, input: &input, cols, out: &mut out };
            run(Both(product, Decode { format, bytes: &bytes, out: &mut decoded }));
            assert_eq!(decoded, values, "{format:?}");
            for (out, w) in out.chunks_exact(tokens).zip(values.chunks_exact(cols)) {
                for (got, x) in out.iter().zip(x.chunks_exact(cols)) {
                    let terms = || w.iter().zip(x).map(|(w, x)| *w as f64 * *x as f64);
                    let (want, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                    // Cancellation between scale and bias is bounded by the largest value.
                    let bound = 4e-6 * (size + cols as f64 * 0.1);
                    assert!((*got as f64 - want).abs() < bound, "{format:?} {cols} {tokens}: {got} for {want}");
                }
            }
        }
    }

    #[test]
    fn every_width_of_vectors_gives_the_values_of_the_definition() {
        fn widths<const BITS: usize>(format: Affine) {
            check::<BITS>(format, |both| Arch::new().dispatch(both));
            check::<BITS>(format, |both| both.with_simd(Scalar));
            #[cfg(target_arch = "x86_64")]
            if let Some(simd) = pulp::x86::V3::try_new() {
                check::<BITS>(format, |both| Simd::vectorize(simd, both));
            }
        }
        for format in formats() {
            match format.bits {
                2 => widths::<2>(format),
                3 => widths::<3>(format),
                4 => widths::<4>(format),
                5 => widths::<5>(format),
                6 => widths::<6>(format),
                _ => widths::<8>(format),
            }
        }
    }
}
