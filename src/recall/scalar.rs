//! Scalar codes: each channel has its own number of bits, a Lloyd-Max quantiser and one scale, packed into whole bytes.

use super::lloyd::{levels, MOST_BITS};
use pulp::{Arch, Simd, WithSimd};

/// Most queries scored at a time.
const LANES: usize = 8;
/// Tokens scored at a time.
const TILE: usize = 512;

/// Where a channel's level number lies in a token's code.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Field {
    /// Channel of the head, `0..D`.
    pub channel: usize,
    /// Byte of the code.
    pub byte: usize,
    /// Lowest bit within the byte.
    pub shift: usize,
    /// Number of bits, 1 to 8.
    pub bits: usize,
}

/// The code of one KV head: `k̂_c = mean_c + scale_c · level(bits_c, field_c)`; a channel without bits decodes to its
/// mean.
#[derive(Debug, Clone, PartialEq)]
pub struct ScalarCode {
    /// Bytes per token.
    pub bytes: usize,
    /// Mean of each channel, `[D]`.
    pub mean: Vec<f32>,
    /// Standard deviation of each channel, `[D]`.
    pub scale: Vec<f32>,
    /// Fields, by byte and then by shift.
    pub fields: Vec<Field>,
}

impl ScalarCode {
    /// Gives at most `8 · bytes` bits to `units` of channels so that `Σ_c weight_c · distortion(bits_c)` is small: greedily
    /// to the unit with the largest gain per bit, as many to each channel of a unit.
    ///
    /// # Shapes
    /// `mean`, `scale`, `weight` `[D]`; `units` names every channel once.
    pub fn fit(bytes: usize, units: &[Vec<usize>], mean: &[f32], scale: &[f32], weight: &[f32]) -> Self {
        let power: Vec<f64> = units.iter().map(|u| u.iter().map(|c| f64::from(weight[*c])).sum()).collect();
        let distortion = |bits: usize| levels(bits).distortion;
        let gain = |u: usize, bits: usize| power[u] * (distortion(bits) - distortion(bits + 1)) / units[u].len() as f64;
        let mut bits = vec![0usize; units.len()];
        let (mut left, mut full) = (8 * bytes, vec![false; units.len()]);
        // The best unit that still fits, until none does.
        while let Some(best) = (0..units.len())
            .filter(|u| !full[*u] && bits[*u] < MOST_BITS)
            .max_by(|a, b| gain(*a, bits[*a]).total_cmp(&gain(*b, bits[*b])).then(b.cmp(a)))
        {
            match left.checked_sub(units[best].len()) {
                Some(rest) => (left, bits[best]) = (rest, bits[best] + 1),
                None => full[best] = true,
            }
        }
        let fields = loop {
            match pack(bytes, units, &bits) {
                Some(fields) => break fields,
                // Widths that do not fit whole bytes: take away the bit that is missed least.
                None => {
                    let used = (0..units.len()).filter(|u| bits[*u] > 0);
                    let least = used.min_by(|a, b| gain(*a, bits[*a] - 1).total_cmp(&gain(*b, bits[*b] - 1)));
                    let Some(least) = least else { break vec![] };
                    bits[least] -= 1;
                }
            }
        };
        Self { bytes, mean: mean.to_vec(), scale: scale.to_vec(), fields }
    }

    /// Writes the codes of `keys [n, D]` to `codes [n, bytes]`.
    pub fn encode(&self, keys: &[f32], codes: &mut [u8]) {
        let inverse: Vec<f32> = self.scale.iter().map(|s| 1.0 / s.max(f32::MIN_POSITIVE)).collect();
        for (key, code) in keys.chunks_exact(self.mean.len()).zip(codes.chunks_exact_mut(self.bytes)) {
            code.fill(0);
            for f in &self.fields {
                let x = (key[f.channel] - self.mean[f.channel]) * inverse[f.channel];
                code[f.byte] |= (levels(f.bits).nearest(x) << f.shift) as u8;
            }
        }
    }

    /// Writes the decoded keys of `codes [n, bytes]` to `keys [n, D]`.
    pub fn decode(&self, codes: &[u8], keys: &mut [f32]) {
        for (code, key) in codes.chunks_exact(self.bytes).zip(keys.chunks_exact_mut(self.mean.len())) {
            key.copy_from_slice(&self.mean);
            for f in &self.fields {
                key[f.channel] += self.scale[f.channel] * self.level(f, code[f.byte]);
            }
        }
    }

    /// Returns the tables of up to `W` queries `[heads, D]`, `[bytes, 256, W]`, and their constants:
    /// `q_h · k̂ = constant_h + Σ_m table[m][code_m][h]`.
    fn tables<const W: usize>(&self, queries: &[f32]) -> (Vec<[[f32; W]; 256]>, [f32; W]) {
        let dim = self.mean.len();
        let mut tables = vec![[[0f32; W]; 256]; self.bytes];
        let mut constants = [0f32; W];
        for (constant, q) in constants.iter_mut().zip(queries.chunks_exact(dim)) {
            *constant = q.iter().zip(&self.mean).map(|(q, m)| q * m).sum();
        }
        let mut fields = self.fields.iter().peekable();
        for (byte, table) in tables.iter_mut().enumerate() {
            // The table of the bits so far doubles with each bit of the next field.
            let mut known = 0;
            while let Some(f) = fields.next_if(|f| f.byte == byte) {
                repeat(table, known, f.shift);
                let mut factor = [0f32; W];
                let q = queries.chunks_exact(dim).map(|q| q[f.channel] * self.scale[f.channel]);
                factor.iter_mut().zip(q).for_each(|(x, q)| *x = q);
                let (low, high) = table.split_at_mut(1 << f.shift);
                let levels = &levels(f.bits).levels;
                for (high, level) in high.chunks_exact_mut(1 << f.shift).zip(&levels[1..]) {
                    for (high, low) in high.iter_mut().zip(&*low) {
                        high.iter_mut().zip(low).zip(&factor).for_each(|((y, x), f)| *y = x + f * level);
                    }
                }
                for low in low {
                    low.iter_mut().zip(&factor).for_each(|(x, f)| *x += f * levels[0]);
                }
                known = f.shift + f.bits;
            }
            repeat(table, known, 8);
        }
        (tables, constants)
    }

    /// Appends the scores `q · k̂` of `codes [n, bytes]` to one list per query of `queries [heads, D]`.
    pub fn scan(&self, queries: &[f32], codes: &[u8], scores: &mut [Vec<f32>]) {
        for (queries, scores) in queries.chunks(LANES * self.mean.len()).zip(scores.chunks_mut(LANES)) {
            match scores.len() {
                0..=4 => self.scan_lanes::<4>(queries, codes, scores),
                _ => self.scan_lanes::<LANES>(queries, codes, scores),
            }
        }
    }

    /// Scores up to `W` queries at a time: their table entries of a byte lie side by side, so that one load serves all.
    fn scan_lanes<const W: usize>(&self, queries: &[f32], codes: &[u8], scores: &mut [Vec<f32>]) {
        struct Scan<'a, const W: usize> {
            tables: &'a [[[f32; W]; 256]],
            constants: [f32; W],
            codes: &'a [u8],
            out: &'a mut [[f32; W]],
        }
        impl<const W: usize> WithSimd for Scan<'_, W> {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) {
                for (code, out) in self.codes.chunks_exact(self.tables.len()).zip(self.out) {
                    let mut sum = self.constants;
                    for (byte, table) in code.iter().zip(self.tables) {
                        let entry = &table[usize::from(*byte)];
                        for (s, x) in sum.iter_mut().zip(entry) {
                            *s += x;
                        }
                    }
                    *out = sum;
                }
            }
        }
        let (tables, constants) = self.tables::<W>(queries);
        let mut out = [[0f32; W]; TILE];
        for codes in codes.chunks(TILE * self.bytes) {
            let out = &mut out[..codes.len() / self.bytes];
            Arch::new().dispatch(Scan { tables: &tables, constants, codes, out });
            for (lane, scores) in scores.iter_mut().enumerate() {
                scores.extend(out.iter().map(|x| x[lane]));
            }
        }
    }

    pub(super) fn level(&self, f: &Field, byte: u8) -> f32 {
        levels(f.bits).levels[usize::from(byte) >> f.shift & ((1 << f.bits) - 1)]
    }
}

/// Copies a table's entries of `from` bits to all those of `to` bits.
fn repeat<const W: usize>(table: &mut [[f32; W]; 256], from: usize, to: usize) {
    for bits in from..to {
        table.copy_within(..1 << bits, 1 << bits);
    }
}

/// Packs each channel's bits into one byte, widest first into the first byte with room; `None` if they do not fit.
fn pack(bytes: usize, units: &[Vec<usize>], bits: &[usize]) -> Option<Vec<Field>> {
    let mut widths: Vec<(usize, usize)> =
        units.iter().zip(bits).flat_map(|(u, b)| u.iter().map(|c| (*b, *c))).filter(|w| w.0 > 0).collect();
    widths.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut used = vec![0usize; bytes];
    let mut fields = vec![];
    for (bits, channel) in widths {
        let byte = used.iter().position(|u| u + bits <= 8)?;
        fields.push(Field { channel, byte, shift: used[byte], bits });
        used[byte] += bits;
    }
    fields.sort_by_key(|f| (f.byte, f.shift));
    Some(fields)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::{rngs::StdRng, Rng as _, SeedableRng};

    /// Draws from a standard normal distribution.
    fn normal(seed: usize, n: usize) -> Vec<f32> {
        let mut rng = StdRng::seed_from_u64(seed as u64);
        let draw = |_| {
            let (a, b): (f32, f32) = (rng.random(), rng.random());
            (-2.0 * (1.0 - a).ln()).sqrt() * (std::f32::consts::TAU * b).cos()
        };
        (0..n).map(draw).collect()
    }

    fn pairs(dim: usize) -> Vec<Vec<usize>> {
        (0..dim / 2).map(|i| vec![i, i + dim / 2]).collect()
    }

    proptest! {
        #[test]
        fn tables_score_the_decoded_keys(
            half in 4usize..64, bytes in 1usize..24, heads in 1usize..18, seed in 0usize..1000,
        ) {
            let dim = 2 * half;
            let (mean, q) = (normal(seed, dim), normal(seed + 1, heads * dim));
            let scale: Vec<f32> = normal(seed + 2, dim).iter().map(|x| x.abs() + 0.01).collect();
            let weight: Vec<f32> = normal(seed + 3, dim).iter().map(|x| x * x).collect();
            let code = ScalarCode::fit(bytes, &pairs(dim), &mean, &scale, &weight);
            prop_assert!(code.fields.iter().map(|f| f.bits).sum::<usize>() <= 8 * bytes);
            let keys = normal(seed + 4, 5 * dim);
            let (mut codes, mut decoded) = (vec![0; 5 * bytes], vec![0.0; 5 * dim]);
            code.encode(&keys, &mut codes);
            code.decode(&codes, &mut decoded);
            let mut scores = vec![vec![]; heads];
            code.scan(&q, &codes, &mut scores);
            for (q, scores) in q.chunks(dim).zip(&scores) {
                prop_assert_eq!(scores.len(), 5);
                for (got, key) in scores.iter().zip(decoded.chunks(dim)) {
                    let want: f32 = q.iter().zip(key).map(|(q, k)| q * k).sum();
                    prop_assert!((got - want).abs() < 1e-3 * (1.0 + want.abs()), "{got}, not {want}");
                }
            }
        }
    }

    #[test]
    fn bits_go_where_the_weight_is_and_both_of_a_pair_get_as_many() {
        let weight: Vec<f32> = (0..16).map(|c| 4f32.powi(-(c % 8))).collect();
        let code = ScalarCode::fit(2, &pairs(16), &[0.0; 16], &[1.0; 16], &weight);
        let bits = |c: usize| code.fields.iter().find(|f| f.channel == c).map_or(0, |f| f.bits);
        assert_eq!((0..8).map(bits).collect::<Vec<_>>(), (8..16).map(bits).collect::<Vec<_>>());
        assert!((1..8).all(|c| bits(c) <= bits(c - 1)) && bits(0) > bits(3));
        assert_eq!(code.fields.iter().map(|f| f.bits).sum::<usize>(), 16);
    }

    #[test]
    fn more_bits_decode_more_exactly() {
        let (dim, n) = (64, 400);
        let keys = normal(3, n * dim);
        let error = |bytes: usize| {
            let code = ScalarCode::fit(bytes, &pairs(dim), &vec![0.0; dim], &vec![1.0; dim], &vec![1.0; dim]);
            let (mut codes, mut decoded) = (vec![0; n * bytes], vec![0.0; n * dim]);
            code.encode(&keys, &mut codes);
            code.decode(&codes, &mut decoded);
            keys.iter().zip(&decoded).map(|(a, b)| (a - b) * (a - b)).sum::<f32>() / (n * dim) as f32
        };
        // The distortions of 1 and 2 bits, 0.3634 and 0.1175.
        let (one, two) = (error(8), error(16));
        assert!((0.35..0.38).contains(&one) && (0.11..0.125).contains(&two), "{one}, {two}");
    }
}
