//! Block means: `K̄ₙ, V̄ₙ = mean of k, v over the positions of block n that are not sinks`, summed in f32 as keys arrive.

use super::view::view;
use crate::error::Result;
use candle_core::{Device, Tensor};

/// The sum over the block in progress: one f32 row per KV head for keys and one for values.
#[derive(Debug, Clone)]
pub struct RunningMean {
    k: Vec<f32>,
    v: Vec<f32>,
    count: usize,
}

/// Means of the blocks that a chunk completed.
#[derive(Debug, Clone)]
pub struct Pooled {
    /// `[n, G, D]`; a block of sinks alone has zeros, and no route may read it.
    pub k: Tensor,
    /// `[n, G, D]`.
    pub v: Tensor,
    /// Index of the first of these blocks.
    pub first: usize,
    /// How many.
    pub count: usize,
}

impl RunningMean {
    /// Nothing summed yet, for rows of `width = G · D`.
    pub fn new(width: usize) -> Self {
        Self { k: vec![0.0; width], v: vec![0.0; width], count: 0 }
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        4 * (self.k.len() + self.v.len()) as u64
    }
}

/// Adds a chunk to the running sums and returns the means of the blocks it completes.
///
/// # Shapes
/// `k`, `v` `[T, G, D]` of positions `start..start + T`; `block` positions to a block; positions below `sinks` are left out.
pub fn pool_blocks(
    k: &Tensor,
    v: &Tensor,
    start: usize,
    block: usize,
    sinks: usize,
    running: &mut RunningMean,
) -> Result<Pooled> {
    let (t, g, d) = k.dims3()?;
    let width = g * d;
    let (k_view, v_view) = (view(k, "keys to pool")?, view(v, "values to pool")?);
    let (ks, vs) = (k_view.values()?, v_view.values()?);
    let count = (start + t) / block - start / block;
    let (mut mean_k, mut mean_v) = (Vec::with_capacity(count * width), Vec::with_capacity(count * width));
    for i in 0..t {
        let p = start + i;
        if p >= sinks {
            let at = i * width..(i + 1) * width;
            running.k.iter_mut().zip(&ks[at.clone()]).for_each(|(s, x)| *s += x);
            running.v.iter_mut().zip(&vs[at]).for_each(|(s, x)| *s += x);
            running.count += 1;
        }
        if (p + 1).is_multiple_of(block) {
            let n = running.count.max(1) as f32;
            mean_k.extend(running.k.iter().map(|s| s / n));
            mean_v.extend(running.v.iter().map(|s| s / n));
            running.k.fill(0.0);
            running.v.fill(0.0);
            running.count = 0;
        }
    }
    let tensor = |x| Tensor::from_vec(x, (count, g, d), &Device::Cpu);
    Ok(Pooled { k: tensor(mean_k)?, v: tensor(mean_v)?, first: start / block, count })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_do_not_depend_on_how_the_text_is_chunked_and_leave_sinks_out() -> Result<()> {
        let t = 23;
        let values: Vec<f32> = (0..t).map(|i| (i * i % 17) as f32).collect();
        let k = Tensor::from_vec(values.clone(), (t, 1, 1), &Device::Cpu)?;
        for cuts in [vec![23], vec![1; 23], vec![4, 9, 10], vec![5, 5, 5, 8]] {
            let mut running = RunningMean::new(1);
            let (mut got, mut at) = (vec![], 0);
            for n in cuts {
                let part = k.narrow(0, at, n)?.contiguous()?;
                got.extend(pool_blocks(&part, &part, at, 5, 3, &mut running)?.k.flatten_all()?.to_vec1::<f32>()?);
                at += n;
            }
            let mean = |r: std::ops::Range<usize>| values[r.clone()].iter().sum::<f32>() / r.len() as f32;
            assert_eq!(got, [mean(3..5), mean(5..10), mean(10..15), mean(15..20)]);
        }
        Ok(())
    }
}
