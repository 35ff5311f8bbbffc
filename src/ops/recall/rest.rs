//! Estimates of the far tokens that are not chosen, for one KV head.

use super::cpu::Softmax;
use super::{FarArgs, Rest};
use crate::ops::simd;
use crate::recall::WORDS;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Query heads whose weights are summed at a time.
const LANES: usize = 4;
/// Tokens of a task: a fixed number, so that the result does not depend on the number of threads.
const TASK: usize = 4096;
/// Tokens whose weights are laid out head by head at a time.
const TILE: usize = 256;

/// Adds the estimates of the tokens that are not chosen to `out [H / G, D]`, at weights relative to each head's `cap`,
/// and returns the sums of the weights.
pub(super) fn rest(
    a: &FarArgs,
    g: usize,
    heads: Vec<Softmax>,
    chosen: &[u32],
    caps: &[f32],
    out: &mut [f32],
) -> Vec<f64> {
    if matches!(a.rest, Rest::None) {
        return vec![0.0; heads.len()];
    }
    let weights: Vec<Vec<f32>> = heads
        .into_iter()
        .zip(caps)
        .map(|(mut head, cap)| {
            // exp(min(ŝ, cap) - cap) from exp(ŝ - top); the bound keeps the factor finite.
            let factor = simd::exp((head.top - cap).min(80.0));
            simd::map(&mut head.weights, |w| if w * factor < 1.0 { w * factor } else { 1.0 });
            chosen.iter().for_each(|i| head.weights[*i as usize] = 0.0);
            head.weights
        })
        .collect();
    match a.rest {
        Rest::None => vec![],
        Rest::Means { block, means } => {
            let heads = weights.iter().zip(out.chunks_exact_mut(a.dim));
            heads.map(|(weights, out)| by_blocks(weights, a.far.0, block, means[g], out)).collect()
        }
        Rest::Codes { code, codes } => {
            let codes = &codes[g][a.far.0 * code[g].bytes()..];
            let groups = weights.chunks(LANES).zip(out.chunks_mut(LANES * a.dim));
            let add = |(weights, out): (&[Vec<f32>], &mut [f32])| {
                let sums = by_codeword(codes, code[g].bytes(), weights);
                out.chunks_exact_mut(a.dim).enumerate().for_each(|(lane, out)| {
                    code[g].add_weighted(&sums.iter().map(|w| w[lane]).collect::<Vec<f32>>(), out);
                });
                // Every token has one codeword of the first sub-vector.
                let total = |lane: usize| sums[..WORDS].iter().map(|w| f64::from(w[lane])).sum();
                (0..weights.len()).map(total).collect::<Vec<f64>>()
            };
            groups.flat_map(add).collect()
        }
    }
}

/// Adds the means of blocks to `out [D]`, each at the sum of its tokens' weights, and returns the sum of all.
fn by_blocks(weights: &[f32], first: usize, block: usize, means: &[f32], out: &mut [f32]) -> f64 {
    let (dim, mut at, mut total) = (out.len(), 0, 0.0);
    while at < weights.len() {
        let n = (first + at) / block;
        let end = ((n + 1) * block - first).min(weights.len());
        let sum: f32 = weights[at..end].iter().sum();
        out.iter_mut().zip(means[n * dim..].iter()).for_each(|(o, m)| *o += sum * m);
        total += f64::from(sum);
        at = end;
    }
    total
}

/// Sums the weights of up to [`LANES`] heads by codeword, `[bytes, 256]`.
fn by_codeword(codes: &[u8], bytes: usize, weights: &[Vec<f32>]) -> Vec<[f32; LANES]> {
    let n = weights[0].len();
    let part = |task: usize| {
        let (from, to) = (task * TASK, n.min((task + 1) * TASK));
        let mut sums = vec![[0f32; LANES]; bytes * WORDS];
        Arch::new().dispatch(Sum { codes: &codes[from * bytes..to * bytes], bytes, weights, from, sums: &mut sums });
        sums
    };
    let mut parts = (0..n.div_ceil(TASK)).into_par_iter().map(part).collect::<Vec<_>>().into_iter();
    let mut sums = parts.next().unwrap_or_default();
    for part in parts {
        sums.as_flattened_mut().iter_mut().zip(part.as_flattened()).for_each(|(s, x)| *s += x);
    }
    sums
}

/// One task of [`by_codeword`], the tokens from `from` on.
struct Sum<'a> {
    codes: &'a [u8],
    bytes: usize,
    weights: &'a [Vec<f32>],
    from: usize,
    sums: &'a mut [[f32; LANES]],
}

impl WithSimd for Sum<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let mut tile = [[0f32; LANES]; TILE];
        for (i, codes) in self.codes.chunks(TILE * self.bytes).enumerate() {
            let n = codes.len() / self.bytes;
            for (lane, weights) in self.weights.iter().enumerate() {
                let weights = &weights[self.from + i * TILE..][..n];
                tile.iter_mut().zip(weights).for_each(|(w, x)| w[lane] = *x);
            }
            for (code, w) in codes.chunks_exact(self.bytes).zip(&tile) {
                for (byte, sums) in code.iter().zip(self.sums.chunks_exact_mut(WORDS)) {
                    sums[usize::from(*byte)].iter_mut().zip(w).for_each(|(s, w)| *s += w);
                }
            }
        }
    }
}
