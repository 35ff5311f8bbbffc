//! The definition, one query at a time, in f64: what every faster path is checked against.

use super::{batch, Attended, AttentionArgs, KeyValues, RowList, StoreRows, NO_ROW};
use crate::error::Result;
use candle_core::{DType, Device, Tensor};

/// Query, key, value and bias.
type Seen = (Vec<f32>, Vec<f32>, Vec<f32>, f64);

fn read(x: &Tensor) -> candle_core::Result<Vec<f32>> {
    x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// Keys, values and rows.
fn pair(rows: &KeyValues) -> candle_core::Result<(Vec<f32>, Vec<f32>, usize)> {
    Ok((read(rows.k)?, read(rows.v)?, rows.k.dims()[0]))
}

/// As [`super::attend`], slowly; the output is f32 on the CPU, with the log-sum-exp.
///
/// # Errors
/// Shapes that do not fit.
pub fn reference(args: &AttentionArgs) -> Result<Attended> {
    batch::each(args, one)
}

fn one(args: &AttentionArgs) -> Result<Attended> {
    let parts = args.parts()?;
    let (t, h, g, d) = parts.dims;
    let q = read(args.q)?;
    let chunk = parts.chunk.as_ref().map(pair).transpose()?;
    let ring = parts.ring.as_ref().map(pair).transpose()?;
    let sinks = parts.sinks.as_ref().map(|s| Ok::<_, candle_core::Error>((pair(&s.0)?, s.1))).transpose()?;
    let mut stores = vec![];
    for store in &parts.stores {
        let index = match store.read {
            RowList::Table { index, .. } => Some(index.to_device(&Device::Cpu)?.to_vec3::<u32>()?),
            RowList::Blocks { .. } => None,
        };
        let rows = match store.rows {
            StoreRows::Tensors(rows) => pair(&rows)?,
            #[cfg(feature = "cuda")]
            StoreRows::Host(rows) => {
                let (k, v) = rows.to_tensors()?;
                pair(&KeyValues { k: &k, v: &v })?
            }
        };
        stores.push((store, rows, store.q.map(read).transpose()?, index));
    }
    let (mut out, mut lse) = (vec![0f32; t * h * d], vec![f32::NEG_INFINITY; t * h]);
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
            if let Some(((k, v, _), count)) = &sinks {
                seen.extend((0..(*count).min(left)).map(|r| (near.clone(), row(k, r), row(v, r), 0.0)));
            }
            if let Some((k, v, capacity)) = &ring {
                let held = (left..args.start).map(|x| x % capacity);
                seen.extend(held.map(|r| (near.clone(), row(k, r), row(v, r), 0.0)));
            }
            if let Some((k, v, _)) = &chunk {
                let own = (left.max(args.start)..=p).map(|x| x - args.start);
                seen.extend(own.map(|r| (near.clone(), row(k, r), row(v, r), 0.0)));
            }
            for (store, (k, v, _), q, index) in &stores {
                let chosen = q.as_deref().map_or_else(|| near.clone(), query);
                match (store.read, index) {
                    (RowList::Blocks { block, rows }, _) => {
                        let listed = rows[p / block - args.start / block].iter();
                        for r in listed.filter(|r| (r.from..r.until).contains(&p)) {
                            let rows = r.row..r.row + r.count;
                            seen.extend(rows.map(|i| (chosen.clone(), row(k, i), row(v, i), r.bias as f64)));
                        }
                    }
                    (RowList::Table { block, .. }, Some(index)) => {
                        let listed = index[kv][p / block - args.start / block].iter().filter(|r| **r != NO_ROW);
                        seen.extend(listed.map(|r| (chosen.clone(), row(k, *r as usize), row(v, *r as usize), 0.0)));
                    }
                    (RowList::Table { .. }, None) => {}
                }
            }
            let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| *x as f64 * *y as f64).sum::<f64>();
            let logits: Vec<f64> = seen.iter().map(|(q, k, _, b)| args.scale as f64 * dot(q, k) + b).collect();
            let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            if max == f64::NEG_INFINITY {
                continue;
            }
            let weights: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
            let total: f64 = weights.iter().sum();
            lse[i * h + head] = (max + total.ln()) as f32;
            for c in 0..d {
                let sum: f64 = seen.iter().zip(&weights).map(|((_, _, v, _), w)| w * v[c] as f64).sum();
                out[(i * h + head) * d + c] = (sum / total) as f32;
            }
        }
    }
    let lse = Some(Tensor::from_vec(lse, (t, h), &Device::Cpu)?);
    Ok(Attended { out: Tensor::from_vec(out, (t, h, d), &Device::Cpu)?, lse })
}
