//! The CPU path: one task per KV head scores, chooses and sums; the scan is in tiles that stay in the L1 cache.

use super::{FarArgs, FarAttended, Rest};
use crate::error::{Error, ErrorKind, Result};
use crate::ops::gemm::{multiply_add, multiply_transposed, Strided};
use crate::ops::simd;
use crate::recall::{HeadRows, ValueCode};
use rayon::prelude::*;

/// Attends to the far zone, as [`super`] defines it.
///
/// # Shapes
/// See [`FarArgs`] and [`FarAttended`].
///
/// # Errors
/// Slices that are too short for the far positions.
pub fn attend_far(a: &FarArgs) -> Result<FarAttended> {
    let (kv_heads, heads) = (a.codes.len(), a.near.len());
    let end = a.far.1;
    let short = a.q.len() != heads * a.dim
        || kv_heads == 0
        || !heads.is_multiple_of(kv_heads)
        || [a.code.len(), a.exact.len()].iter().any(|n| *n != kv_heads)
        || a.code.iter().zip(a.codes).any(|(c, codes)| codes.len() < end.next_multiple_of(c.page()) * c.bytes())
        || a.exact.iter().any(|x| x.len() < 2 * end * a.dim)
        || match a.rest {
            Rest::None => false,
            Rest::Means { block, means } => {
                block == 0 || means.len() != kv_heads || means.iter().any(|m| m.len() < end.div_ceil(block) * a.dim)
            }
            Rest::Codes { code, codes } => {
                [code.len(), codes.len()].iter().any(|n| *n != kv_heads)
                    || code.iter().zip(codes).any(|(code, codes)| codes.len() < end * code.bytes())
            }
        };
    if short || a.far.0 > end {
        return Err(Error::new(ErrorKind::Backend, "recall", format!("inputs too short for {end} far tokens")));
    }
    let group = heads / kv_heads;
    let parts: Vec<Part> = (0..kv_heads).into_par_iter().map(|g| head(a, g, group)).collect();
    let mut result = FarAttended { out: vec![], lse: vec![], chosen: vec![] };
    for part in parts {
        result.out.extend(part.out);
        result.lse.extend(part.lse);
        result.chosen.push(part.chosen);
    }
    Ok(result)
}

/// Result of one KV head.
struct Part {
    out: Vec<f32>,
    lse: Vec<f32>,
    chosen: Vec<u32>,
}

fn head(a: &FarArgs, g: usize, group: usize) -> Part {
    let (n, dim) = (a.far.1 - a.far.0, a.dim);
    let none = || Part { out: vec![0.0; group * dim], lse: vec![f32::NEG_INFINITY; group], chosen: vec![] };
    if n == 0 {
        return none();
    }
    let queries: Vec<f32> = a.q[g * group * dim..][..group * dim].iter().map(|x| x * a.scale).collect();
    let mut scores: Vec<Vec<f32>> = (0..group).map(|_| Vec::with_capacity(n)).collect();
    let rows = HeadRows { codes: a.codes[g], exact: a.exact[g] };
    a.code[g].scores(&queries, &rows, a.far.0..a.far.1, &mut scores);
    let heads: Vec<Softmax> = scores.into_iter().map(Softmax::new).collect();
    let chosen = choose(&heads, &a.near[g * group..][..group], a.chosen);
    // Without an exact logit nothing bounds the estimates: `k` is at least 1 where there is a rest.
    if chosen.is_empty() {
        return none();
    }
    let Exact { max, sum, mut out } = Exact::new(a, g, &queries, &chosen);
    let mut part = Part { out: vec![], lse: vec![], chosen: chosen.iter().map(|i| (a.far.0 + i) as u32).collect() };
    let sums = rest(a, g, heads, &chosen, &max, &mut out);
    for (h, (out, rest)) in out.chunks_exact(dim).zip(sums).enumerate() {
        let sum = f64::from(sum[h]) + rest;
        part.lse.push(max[h] + sum.ln() as f32);
        part.out.extend(out.iter().map(|x| (f64::from(*x) / sum) as f32));
    }
    part
}

/// Decoded scores of a query, as weights relative to the largest.
struct Softmax {
    /// `exp(ŝ - top)`.
    weights: Vec<f32>,
    top: f32,
    sum: f32,
}

impl Softmax {
    fn new(mut scores: Vec<f32>) -> Self {
        let (mut top, mut sum) = (f32::NEG_INFINITY, 0.0);
        simd::softmax_row(&mut scores, &mut top, &mut sum);
        Self { weights: scores, top, sum }
    }
}

/// Attention of a group's queries to the chosen tokens, before division.
struct Exact {
    /// Largest logit, `[H / G]`.
    max: Vec<f32>,
    /// Sum of the weights relative to it, `[H / G]`.
    sum: Vec<f32>,
    /// Weighted values, `[H / G, D]`.
    out: Vec<f32>,
}

impl Exact {
    fn new(a: &FarArgs, g: usize, queries: &[f32], chosen: &[usize]) -> Self {
        let (dim, n) = (a.dim, chosen.len());
        let group = queries.len() / dim;
        let (mut keys, mut values) = (Vec::with_capacity(n * dim), Vec::with_capacity(n * dim));
        for i in chosen {
            let (key, value) = a.exact[g][2 * (a.far.0 + i) * dim..][..2 * dim].split_at(dim);
            keys.extend_from_slice(key);
            values.extend_from_slice(value);
        }
        let rows = |data| Strided { data, stride: dim };
        let mut logits = vec![0f32; group * n];
        multiply_transposed(group, n, dim, rows(queries), rows(&keys), &mut logits);
        let (mut max, mut sum, mut out) = (vec![f32::NEG_INFINITY; group], vec![0.0; group], vec![0.0; group * dim]);
        for ((row, max), sum) in logits.chunks_mut(n).zip(&mut max).zip(&mut sum) {
            simd::softmax_row(row, max, sum);
        }
        multiply_add(group, dim, n, Strided { data: &logits, stride: n }, rows(&values), &mut out);
        Self { max, sum, out }
    }
}

/// Places of the chosen tokens among the far ones, ascending.
fn choose(heads: &[Softmax], near: &[f32], count: usize) -> Vec<usize> {
    let n = heads[0].weights.len();
    if count >= n {
        return (0..n).collect();
    }
    if count == 0 {
        return vec![];
    }
    let mut weights = vec![0f32; n];
    for (h, near) in heads.iter().zip(near) {
        // exp(ŝ - ln(e^n + e^f)) with f = top + ln(sum): the softmax weight times the far zone's share of the mass.
        let far = h.top + h.sum.ln();
        let factor = 1.0 / ((1.0 + (near - far).min(80.0).exp()) * h.sum);
        weights.iter_mut().zip(&h.weights).for_each(|(w, x)| *w += factor * x);
    }
    // Weights are not negative, so that their bits are in their order; of equals the earlier token goes first.
    let mut order: Vec<u64> =
        weights.iter().enumerate().map(|(i, w)| u64::from(!w.to_bits()) << 32 | i as u64).collect();
    order.select_nth_unstable(count - 1);
    order.truncate(count);
    let mut chosen: Vec<usize> = order.into_iter().map(|x| (x & 0xffff_ffff) as usize).collect();
    chosen.sort_unstable();
    chosen
}

/// Adds the estimates of the tokens that are not chosen to `out [H / G, D]`, at weights relative to each head's `cap`,
/// and returns the sums of the weights.
fn rest(a: &FarArgs, g: usize, heads: Vec<Softmax>, chosen: &[usize], caps: &[f32], out: &mut [f32]) -> Vec<f64> {
    if matches!(a.rest, Rest::None) {
        return vec![0.0; heads.len()];
    }
    let weights: Vec<Vec<f32>> = heads
        .into_iter()
        .zip(caps)
        .map(|(mut head, cap)| {
            chosen.iter().for_each(|i| head.weights[*i] = 0.0);
            // exp(min(ŝ, cap) - cap) from exp(ŝ - top); the bound keeps the factor finite.
            let factor = simd::exp((head.top - cap).min(80.0));
            head.weights.iter_mut().for_each(|w| *w = (*w * factor).min(1.0));
            head.weights
        })
        .collect();
    match a.rest {
        Rest::None => {}
        Rest::Means { block, means } => {
            for (weights, out) in weights.iter().zip(out.chunks_exact_mut(a.dim)) {
                let mut at = 0;
                while at < weights.len() {
                    let n = (a.far.0 + at) / block;
                    let end = ((n + 1) * block - a.far.0).min(weights.len());
                    let sum: f32 = weights[at..end].iter().sum();
                    out.iter_mut().zip(&means[g][n * a.dim..][..a.dim]).for_each(|(o, m)| *o += sum * m);
                    at = end;
                }
            }
        }
        Rest::Codes { code, codes } => {
            let codes = &codes[g][a.far.0 * code[g].bytes()..];
            for (weights, out) in weights.chunks(LANES).zip(out.chunks_mut(LANES * a.dim)) {
                by_codewords(&code[g], codes, weights, out);
            }
        }
    }
    weights.iter().map(|w| w.iter().map(|w| f64::from(*w)).sum()).collect()
}

/// Query heads whose weights are summed at a time.
const LANES: usize = 4;

/// Adds the decoded values of `codes`, weighted by each head, to `out [heads, D]`: weights are summed per codeword, and
/// codewords once.
fn by_codewords(code: &ValueCode, codes: &[u8], weights: &[Vec<f32>], out: &mut [f32]) {
    let bytes = code.bytes();
    let mut by_word = vec![[0f32; LANES]; bytes * 256];
    for (i, code) in codes.chunks_exact(bytes).take(weights[0].len()).enumerate() {
        let mut w = [0f32; LANES];
        w.iter_mut().zip(weights).for_each(|(w, weights)| *w = weights[i]);
        for (byte, sums) in code.iter().zip(by_word.chunks_exact_mut(256)) {
            sums[usize::from(*byte)].iter_mut().zip(&w).for_each(|(s, w)| *s += w);
        }
    }
    let dim = out.len() / weights.len();
    for (lane, out) in out.chunks_exact_mut(dim).enumerate() {
        let sums: Vec<f32> = by_word.iter().map(|w| w[lane]).collect();
        code.add_weighted(&sums, out);
    }
}

#[cfg(test)]
mod tests {
    use super::super::reference::reference;
    use super::*;
    use crate::recall::{HeadCode, ScalarCode};
    use proptest::prelude::*;
    use std::sync::Arc;

    fn numbers(seed: usize, n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + seed * 104_729 + 13) % 9973) as f32 / 4986.5 - 1.0).collect()
    }

    fn agree(got: &FarAttended, want: &FarAttended) -> std::result::Result<(), TestCaseError> {
        prop_assert_eq!(&got.chosen, &want.chosen);
        for (x, y) in got.out.iter().zip(&want.out).chain(got.lse.iter().zip(&want.lse)) {
            prop_assert!(x == y || (x - y).abs() < 2e-4 * (1.0 + y.abs()), "{} and {}", x, y);
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_zones_are_those_of_the_definition(
            group in 1usize..9, kv in 1usize..4, half in prop::sample::select(vec![8usize, 20, 32, 64, 128]),
            n in 0usize..300, sinks in 0usize..5, chosen in 0usize..400, kind in 0usize..3, block in 1usize..40,
            seed in 0usize..1000,
        ) {
            let dim = 2 * half;
            let (bytes, total) = (dim.div_ceil(8), n + sinks);
            let units: Vec<Vec<usize>> = (0..half).map(|i| vec![i, i + half]).collect();
            let code: Vec<ScalarCode> = (0..kv)
                .map(|g| {
                    let mean = numbers(seed + g, dim);
                    let weight: Vec<f32> = mean.iter().map(|x| x * x + 0.01).collect();
                    ScalarCode::fit(bytes, &units, &mean, &vec![0.6; dim], &weight)
                })
                .collect();
            let exact: Vec<Vec<f32>> = (0..kv).map(|g| numbers(seed + 10 + g, 2 * total * dim)).collect();
            let rows = |g: usize, part: usize| -> Vec<f32> {
                exact[g].chunks(dim).skip(part).step_by(2).flatten().copied().collect()
            };
            let codes: Vec<Vec<u8>> = (0..kv).map(|g| {
                let mut codes = vec![0; total * bytes];
                code[g].encode(&rows(g, 0), &mut codes);
                codes
            }).collect();
            let value: Vec<ValueCode> = (0..kv).map(|g| ValueCode::fit(dim, &rows(g, 1))).collect();
            let value_codes: Vec<Vec<u8>> = (0..kv).map(|g| {
                let mut codes = vec![0; total * value[g].bytes()];
                value[g].encode(&rows(g, 1), &mut codes);
                codes
            }).collect();
            let means: Vec<Vec<f32>> = (0..kv).map(|g| numbers(seed + 20 + g, total.div_ceil(block) * dim)).collect();
            let (q, near) = (numbers(seed + 30, kv * group * dim), numbers(seed + 40, kv * group));
            let code_rows: Vec<&[u8]> = codes.iter().map(Vec::as_slice).collect();
            let value_rows: Vec<&[u8]> = value_codes.iter().map(Vec::as_slice).collect();
            let exact_rows: Vec<&[f32]> = exact.iter().map(Vec::as_slice).collect();
            let mean_rows: Vec<&[f32]> = means.iter().map(Vec::as_slice).collect();
            // Without a chosen token there is no exact logit to cap the estimates with.
            let rest = match kind {
                1 if chosen > 0 => Rest::Means { block, means: &mean_rows },
                2 if chosen > 0 => Rest::Codes { code: &value, codes: &value_rows },
                _ => Rest::None,
            };
            let fitted: Vec<Arc<dyn HeadCode>> = code.iter().map(|c| Arc::new(c.clone()) as Arc<dyn HeadCode>).collect();
            let args = FarArgs {
                q: &q, near: &near, scale: 0.3, far: (sinks, total), dim, chosen, code: &fitted, codes: &code_rows,
                exact: &exact_rows, rest,
            };
            agree(&attend_far(&args).unwrap(), &reference(&args, &code))?;
        }
    }
}
