//! The definition, one query at a time, in f64: what every faster path is checked against.

use super::AttentionArgs;
use crate::error::Result;
use candle_core::{DType, Device, Tensor};

/// Query, key, value and bias.
type Seen = (Vec<f32>, Vec<f32>, Vec<f32>, f64);

/// As [`super::attend`], slowly.
pub fn reference(args: &AttentionArgs) -> Result<Tensor> {
    let (t, h, g, d) = args.dims()?;
    let read = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let (q, k, v) = (read(args.q)?, read(args.k)?, read(args.v)?);
    let q_far = args.q_far.map(read).transpose()?;
    let pair = |p: &super::Past| Ok::<_, candle_core::Error>((read(p.k)?, read(p.v)?, p.k.dims()[0]));
    let past = args.past.as_ref().map(pair).transpose()?;
    let sinks = args.sinks.as_ref().map(|s| pair(&s.0)).transpose()?;
    let far = args.far.iter().map(|f| Ok((f, pair(&super::Past { k: f.k, v: f.v })?)));
    let far = far.collect::<candle_core::Result<Vec<_>>>()?;
    let mut out = vec![0f32; t * h * d];
    for i in 0..t {
        let p = args.start + i;
        let left = args.window.left(p);
        for head in 0..h {
            let kv = head / (h / g);
            let query = |q: &[f32]| q[(i * h + head) * d..][..d].to_vec();
            let row = |x: &[f32], row: usize| x[(row * g + kv) * d..][..d].to_vec();
            let near = query(&q);
            // Everything this query reads.
            let mut seen: Vec<Seen> = vec![];
            if let Some((sk, sv, _)) = &sinks {
                let count = args.sinks.map_or(0, |s| s.1);
                seen.extend((0..count.min(left)).map(|r| (near.clone(), row(sk, r), row(sv, r), 0.0)));
            }
            if let Some((pk, pv, capacity)) = &past {
                let held = (left..args.start).map(|x| x % capacity);
                seen.extend(held.map(|r| (near.clone(), row(pk, r), row(pv, r), 0.0)));
            }
            let own = (left.max(args.start)..=p).map(|x| x - args.start);
            seen.extend(own.map(|r| (near.clone(), row(&k, r), row(&v, r), 0.0)));
            for (far, (fk, fv, _)) in &far {
                let routed = &far.routes[p / far.block - args.start / far.block];
                for r in routed.iter().filter(|r| (r.from..r.until).contains(&p)) {
                    let chosen = if r.far_query { query(q_far.as_deref().unwrap_or(&q)) } else { near.clone() };
                    let rows = r.row..r.row + r.count;
                    seen.extend(rows.map(|i| (chosen.clone(), row(fk, i), row(fv, i), r.bias as f64)));
                }
            }
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| *x as f64 * *y as f64).sum::<f64>();
            let logits: Vec<f64> = seen.iter().map(|(q, k, _, b)| args.scale as f64 * dot(q, k) + b).collect();
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let weights: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            for c in 0..d {
                let sum: f64 = seen.iter().zip(&weights).map(|((_, _, v, _), w)| w * v[c] as f64).sum();
                out[(i * h + head) * d + c] = (sum / total) as f32;
            }
        }
    }
    Ok(Tensor::from_vec(out, (t, h, d), &Device::Cpu)?)
}
