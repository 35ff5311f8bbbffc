//! The CPU path: one task per KV head scores, chooses and sums; the scan is in tiles that stay in the L1 cache.

use super::{FarArgs, FarAttended, Rest};
use crate::error::{Error, ErrorKind, Result};
use crate::ops::gemm::{multiply_add, multiply_transposed, Strided};
use crate::ops::simd;
use rayon::prelude::*;

/// Tokens scored at a time.
const TILE: usize = 1024;

/// Attends to the far zone, as [`super`] defines it.
///
/// # Shapes
/// See [`FarArgs`] and [`FarAttended`].
///
/// # Errors
/// Slices that are too short for the far positions.
pub fn attend_far(a: &FarArgs) -> Result<FarAttended> {
    let (kv_heads, heads) = (a.codes.len(), a.near.len());
    let dim = a.code.first().map_or(0, |c| c.mean.len());
    let end = a.far.1;
    let short = a.q.len() != heads * dim
        || kv_heads == 0
        || !heads.is_multiple_of(kv_heads)
        || [a.code.len(), a.exact.len()].iter().any(|n| *n != kv_heads)
        || a.code.iter().zip(a.codes).any(|(code, codes)| codes.len() < end * code.bytes)
        || a.exact.iter().any(|x| x.len() < 2 * end * dim)
        || match a.rest {
            Rest::None => false,
            Rest::Means { block, means } => {
                block == 0 || means.len() != kv_heads || means.iter().any(|m| m.len() < end.div_ceil(block) * dim)
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
    let parts: Vec<Part> = (0..kv_heads).into_par_iter().map(|g| head(a, g, group, dim)).collect();
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

fn head(a: &FarArgs, g: usize, group: usize, dim: usize) -> Part {
    let n = a.far.1 - a.far.0;
    let none = || Part { out: vec![0.0; group * dim], lse: vec![f32::NEG_INFINITY; group], chosen: vec![] };
    if n == 0 {
        return none();
    }
    let queries: Vec<Vec<f32>> =
        a.q[g * group * dim..][..group * dim].chunks(dim).map(|q| q.iter().map(|x| x * a.scale).collect()).collect();
    let scores = scan(a, g, &queries);
    let chosen = choose(a, g, &scores);
    // Without an exact logit nothing bounds the estimates: `k` is at least 1 where there is a rest.
    if chosen.is_empty() {
        return none();
    }
    let exact = Exact::new(a, g, &queries.concat(), &chosen);
    let mut part = Part { out: vec![], lse: vec![], chosen: chosen.iter().map(|i| (a.far.0 + i) as u32).collect() };
    for (h, scores) in scores.into_iter().enumerate() {
        let mut out = exact.out[h * dim..(h + 1) * dim].to_vec();
        let sum = f64::from(exact.sum[h]) + rest(a, g, scores, &chosen, exact.max[h], &mut out);
        part.lse.push(exact.max[h] + sum.ln() as f32);
        part.out.extend(out.iter().map(|x| (f64::from(*x) / sum) as f32));
    }
    part
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
        let (dim, n) = (a.code[g].mean.len(), chosen.len());
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

/// Decoded scores of the far tokens, per query of the group.
fn scan(a: &FarArgs, g: usize, queries: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let (code, bytes) = (&a.code[g], a.code[g].bytes);
    let tables: Vec<(Vec<f32>, f32)> = queries.iter().map(|q| code.table(q)).collect();
    let mut scores: Vec<Vec<f32>> = queries.iter().map(|_| Vec::with_capacity(a.far.1 - a.far.0)).collect();
    for tile in a.codes[g][a.far.0 * bytes..a.far.1 * bytes].chunks(TILE * bytes) {
        for ((table, constant), scores) in tables.iter().zip(&mut scores) {
            scores.extend(tile.chunks_exact(bytes).map(|code| {
                let entries = code.iter().zip(table.chunks_exact(256)).map(|(byte, t)| t[usize::from(*byte)]);
                constant + entries.sum::<f32>()
            }));
        }
    }
    scores
}

/// Places of the chosen tokens among the far ones, ascending.
fn choose(a: &FarArgs, g: usize, scores: &[Vec<f32>]) -> Vec<usize> {
    let n = scores[0].len();
    if a.chosen >= n {
        return (0..n).collect();
    }
    if a.chosen == 0 {
        return vec![];
    }
    let mut weights = vec![0f32; n];
    for (scores, near) in scores.iter().zip(&a.near[g * scores.len()..]) {
        let (mut top, mut sum) = (f32::NEG_INFINITY, 0.0);
        let mut copy = scores.clone();
        simd::softmax_row(&mut copy, &mut top, &mut sum);
        // exp(ŝ - ln(e^n + e^f)) with f = top + ln(sum): the softmax weight times the far zone's share of the mass.
        let far = top + sum.ln();
        let share = 1.0 / (1.0 + (near - far).min(80.0).exp());
        weights.iter_mut().zip(&copy).for_each(|(w, x)| *w += share * x / sum);
    }
    let mut order: Vec<u32> = (0..n as u32).collect();
    let by = |x: &u32, y: &u32| weights[*y as usize].total_cmp(&weights[*x as usize]).then(x.cmp(y));
    order.select_nth_unstable_by(a.chosen - 1, by);
    order.truncate(a.chosen);
    order.sort_unstable();
    order.into_iter().map(|i| i as usize).collect()
}

/// Adds the estimates of the tokens that are not chosen to `out`, at weights relative to `cap`, and returns their sum.
fn rest(a: &FarArgs, g: usize, mut scores: Vec<f32>, chosen: &[usize], cap: f32, out: &mut [f32]) -> f64 {
    if matches!(a.rest, Rest::None) {
        return 0.0;
    }
    chosen.iter().for_each(|i| scores[*i] = f32::NEG_INFINITY);
    scores.iter_mut().for_each(|x| *x = simd::exp(x.min(cap) - cap));
    let weights = scores;
    match a.rest {
        Rest::None => {}
        Rest::Means { block, means } => {
            let mut at = 0;
            while at < weights.len() {
                let n = (a.far.0 + at) / block;
                let end = ((n + 1) * block - a.far.0).min(weights.len());
                let sum: f32 = weights[at..end].iter().sum();
                let dim = out.len();
                out.iter_mut().zip(&means[g][n * dim..][..dim]).for_each(|(o, m)| *o += sum * m);
                at = end;
            }
        }
        Rest::Codes { code, codes } => {
            let bytes = code[g].bytes();
            let mut by_word = vec![0f32; bytes * 256];
            for (w, code) in weights.iter().zip(codes[g][a.far.0 * bytes..].chunks_exact(bytes)) {
                for (byte, sums) in code.iter().zip(by_word.chunks_exact_mut(256)) {
                    sums[usize::from(*byte)] += w;
                }
            }
            code[g].add_weighted(&by_word, out);
        }
    }
    weights.iter().map(|w| f64::from(*w)).sum()
}

#[cfg(test)]
mod tests {
    use super::super::reference::reference;
    use super::*;
    use crate::recall::{ScalarCode, ValueCode};
    use proptest::prelude::*;

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
            let args = FarArgs {
                q: &q, near: &near, scale: 0.3, far: (sinks, total), chosen, code: &code, codes: &code_rows,
                exact: &exact_rows, rest,
            };
            agree(&attend_far(&args).unwrap(), &reference(&args))?;
        }
    }
}
