//! The definition in f64, with every decoded key and value written out: what the faster path is checked against.

use super::{FarArgs, FarAttended, Rest};
use crate::recall::ScalarCode;

pub fn reference(a: &FarArgs, key_codes: &[ScalarCode]) -> FarAttended {
    let kv_heads = a.codes.len();
    let dim = a.dim;
    let group = a.near.len() / kv_heads;
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    let lse = |x: &[f64]| {
        let top = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if top == f64::NEG_INFINITY {
            top
        } else {
            top + x.iter().map(|x| (x - top).exp()).sum::<f64>().ln()
        }
    };
    let mut result =
        FarAttended { out: vec![0.0; a.q.len()], lse: vec![f32::NEG_INFINITY; a.near.len()], chosen: vec![] };
    for g in 0..kv_heads {
        let far: Vec<usize> = (a.far.0..a.far.1).collect();
        let key = |i: usize| &a.exact[g][2 * i * dim..][..dim];
        let value = |i: usize| &a.exact[g][(2 * i + 1) * dim..][..dim];
        let bytes = key_codes[g].bytes;
        let mut decoded = vec![0.0; a.codes[g].len() / bytes * dim];
        key_codes[g].decode(a.codes[g], &mut decoded);
        let heads = g * group..(g + 1) * group;
        let q = |h: usize| &a.q[h * dim..][..dim];
        let score = |h: usize, i: usize| f64::from(a.scale) * dot(q(h), &decoded[i * dim..][..dim]);
        let mut weights = vec![0f64; far.len()];
        for h in heads.clone() {
            let scores: Vec<f64> = far.iter().map(|i| score(h, *i)).collect();
            let total = lse(&[f64::from(a.near[h]), lse(&scores)]);
            weights.iter_mut().zip(&scores).for_each(|(w, s)| *w += (s - total).exp());
        }
        let mut order: Vec<usize> = (0..far.len()).collect();
        order.sort_by(|x, y| weights[*y].total_cmp(&weights[*x]).then(x.cmp(y)));
        let mut chosen: Vec<usize> = order.iter().take(a.chosen).map(|x| far[*x]).collect();
        chosen.sort_unstable();
        for h in heads {
            let exact = |i: usize| f64::from(a.scale) * dot(q(h), key(i));
            let cap = chosen.iter().map(|i| exact(*i)).fold(f64::NEG_INFINITY, f64::max);
            let mut terms: Vec<(f64, Vec<f32>)> = chosen.iter().map(|i| (exact(*i), value(*i).to_vec())).collect();
            for i in far.iter().filter(|i| !chosen.contains(i)) {
                let estimate = match a.rest {
                    Rest::None => continue,
                    Rest::Means { block, means } => means[g][i / block * dim..][..dim].to_vec(),
                    Rest::Codes { code, codes } => {
                        let mut v = vec![0.0; dim];
                        let bytes = code[g].bytes();
                        code[g].decode(&codes[g][i * bytes..][..bytes], &mut v);
                        v
                    }
                };
                terms.push((score(h, *i).min(cap), estimate));
            }
            let all = lse(&terms.iter().map(|t| t.0).collect::<Vec<_>>());
            if all == f64::NEG_INFINITY {
                continue;
            }
            result.lse[h] = all as f32;
            for c in 0..dim {
                let sum: f64 = terms.iter().map(|(l, v)| (l - all).exp() * f64::from(v[c])).sum();
                result.out[h * dim + c] = sum as f32;
            }
        }
        result.chosen.push(chosen.into_iter().map(|i| i as u32).collect());
    }
    result
}
