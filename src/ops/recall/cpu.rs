//! The CPU path: one task per KV head scores and chooses, and has tasks of its own for parts of the exact attention and of
//! the estimate, so that cores without a KV head take those.

use super::exact::Exact;
use super::highest::highest;
use super::rest::rest;
use super::{FarArgs, FarAttended, Rest};
use crate::error::{Error, ErrorKind, Result};
use crate::ops::simd;
use crate::recall::HeadRows;
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
    let Exact { max, sum, mut out } = Exact::new(&a.exact[g][2 * a.far.0 * dim..], dim, &queries, &chosen);
    let mut part = Part { out: vec![], lse: vec![], chosen: chosen.iter().map(|i| a.far.0 as u32 + i).collect() };
    let sums = rest(a, g, heads, &chosen, &max, &mut out);
    for (h, (out, rest)) in out.chunks_exact(dim).zip(sums).enumerate() {
        let sum = f64::from(sum[h]) + rest;
        part.lse.push(max[h] + sum.ln() as f32);
        part.out.extend(out.iter().map(|x| (f64::from(*x) / sum) as f32));
    }
    part
}

/// Decoded scores of a query, as weights relative to the largest.
pub(super) struct Softmax {
    /// `exp(ŝ - top)`.
    pub weights: Vec<f32>,
    pub top: f32,
    sum: f32,
}

impl Softmax {
    fn new(mut scores: Vec<f32>) -> Self {
        let (mut top, mut sum) = (f32::NEG_INFINITY, 0.0);
        simd::softmax_row(&mut scores, &mut top, &mut sum);
        Self { weights: scores, top, sum }
    }
}

/// Places of the chosen tokens among the far ones, ascending.
fn choose(heads: &[Softmax], near: &[f32], count: usize) -> Vec<u32> {
    let n = heads[0].weights.len();
    if count >= n {
        return (0..n as u32).collect();
    }
    if count == 0 {
        return vec![];
    }
    let mut weights = vec![0f32; n];
    for (h, near) in heads.iter().zip(near) {
        // exp(ŝ - ln(e^n + e^f)) with f = top + ln(sum): the softmax weight times the far zone's share of the mass.
        let far = h.top + h.sum.ln();
        let factor = 1.0 / ((1.0 + (near - far).min(80.0).exp()) * h.sum);
        simd::add_scaled(&mut weights, factor, &h.weights);
    }
    highest(&weights, count)
}

#[cfg(test)]
mod tests {
    use super::super::reference::reference;
    use super::*;
    use crate::recall::{HeadCode, ScalarCode, ValueCode};
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

    /// Sizes and settings of a comparison with the reference.
    #[derive(Debug, Clone, Copy)]
    struct Case {
        group: usize,
        kv: usize,
        half: usize,
        n: usize,
        sinks: usize,
        chosen: usize,
        kind: usize,
        block: usize,
        seed: usize,
    }

    fn check(case: Case) -> std::result::Result<(), TestCaseError> {
        let Case { group, kv, half, n, sinks, chosen, kind, block, seed } = case;
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
        let encoded = |g: usize| {
            let mut codes = vec![0; total * bytes];
            code[g].encode(&rows(g, 0), &mut codes);
            codes
        };
        let codes: Vec<Vec<u8>> = (0..kv).map(encoded).collect();
        let value: Vec<ValueCode> = (0..kv).map(|g| ValueCode::fit(dim, &rows(g, 1))).collect();
        let value_encoded = |g: usize| {
            let mut codes = vec![0; total * value[g].bytes()];
            value[g].encode(&rows(g, 1), &mut codes);
            codes
        };
        let value_codes: Vec<Vec<u8>> = (0..kv).map(value_encoded).collect();
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
            q: &q,
            near: &near,
            scale: 0.3,
            far: (sinks, total),
            dim,
            chosen,
            code: &fitted,
            codes: &code_rows,
            exact: &exact_rows,
            rest,
        };
        agree(&attend_far(&args).unwrap(), &reference(&args, &code))
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_zones_are_those_of_the_definition(
            group in 1usize..9, kv in 1usize..4, half in prop::sample::select(vec![7usize, 8, 20, 32, 64, 128]),
            n in 0usize..300, sinks in 0usize..5, chosen in 0usize..400, kind in 0usize..3, block in 1usize..40,
            seed in 0usize..1000,
        ) {
            check(Case { group, kv, half, n, sinks, chosen, kind, block, seed })?;
        }
    }

    #[test]
    fn zones_of_many_tasks_are_those_of_the_definition() {
        for (group, chosen, kind) in [(3, 1100, 2), (5, 700, 1), (1, 4500, 2), (8, 513, 0)] {
            let case = Case { group, kv: 1, half: 8, n: 4600, sinks: 4, chosen, kind, block: 32, seed: chosen };
            check(case).unwrap();
        }
    }

    #[test]
    fn threads_do_not_change_a_bit() {
        let (dim, n, group) = (32, 5000, 3);
        let exact = numbers(1, 2 * n * dim);
        let rows = |part: usize| -> Vec<f32> { exact.chunks(dim).skip(part).step_by(2).flatten().copied().collect() };
        let units: Vec<Vec<usize>> = (0..dim).map(|i| vec![i]).collect();
        let key = ScalarCode::fit(4, &units, &vec![0.0; dim], &vec![0.6; dim], &vec![1.0; dim]);
        let value = ValueCode::fit(dim, &rows(1));
        let (mut keys, mut values) = (vec![0; n * 4], vec![0; n * value.bytes()]);
        key.encode(&rows(0), &mut keys);
        value.encode(&rows(1), &mut values);
        let (q, code): (_, [Arc<dyn HeadCode>; 1]) = (numbers(2, group * dim), [Arc::new(key)]);
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let args = FarArgs {
                q: &q,
                near: &[0.0; 3],
                scale: 0.3,
                far: (0, n),
                dim,
                chosen: 1500,
                code: &code,
                codes: &[&keys],
                exact: &[&exact],
                rest: Rest::Codes { code: std::slice::from_ref(&value), codes: &[&values] },
            };
            let got = pool.install(|| attend_far(&args)).unwrap();
            (got.out.iter().chain(&got.lse).map(|x| x.to_bits()).collect::<Vec<_>>(), got.chosen)
        };
        let one = run(1);
        assert!((2..6).all(|threads| run(threads) == one));
    }
}
