//! Block means: `K̄ₙ, V̄ₙ = mean of k, v over the positions of block n that are not sinks`, summed in f32 as keys
//! arrive.

use super::view::view;
use crate::error::Result;
use candle_core::{DType, Device, Tensor};

/// The sum over the block in progress: one f32 row per KV head for keys and one for values.
#[derive(Debug, Clone)]
pub struct RunningMean(Sums);

#[derive(Debug, Clone)]
enum Sums {
    Host {
        k: Vec<f32>,
        v: Vec<f32>,
    },
    /// f32 `[2, W]`: keys, then values.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    Device(Tensor),
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
    /// Number of blocks.
    pub count: usize,
}

impl RunningMean {
    /// A sum of no rows, for rows of `width = G * D` on `device`.
    pub fn new(width: usize, device: &Device) -> Result<Self> {
        Ok(Self(match device.is_cpu() {
            true => Sums::Host { k: vec![0.0; width], v: vec![0.0; width] },
            false => Sums::Device(Tensor::zeros((2, width), DType::F32, device)?),
        }))
    }

    /// Size in device memory, bytes.
    pub fn bytes(&self) -> u64 {
        4 * match &self.0 {
            Sums::Host { k, v } => (k.len() + v.len()) as u64,
            Sums::Device(sums) => sums.elem_count() as u64,
        }
    }

    /// The sums on a device, f32 `[2, W]`.
    pub fn on_device(&self) -> Option<&Tensor> {
        match &self.0 {
            Sums::Host { .. } => None,
            Sums::Device(sums) => Some(sums),
        }
    }
}

/// Adds a chunk to the running sums and returns the means of the blocks it completes.
///
/// # Shapes
/// `k`, `v` `[T, G, D]` of positions `start..start + T`; `block` positions to a block; positions below `sinks` are left
/// out.
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
    let count = (start + t) / block - start / block;
    let (sum_k, sum_v) = match &mut running.0 {
        Sums::Host { k, v } => (k, v),
        #[cfg(feature = "cuda")]
        Sums::Device(sums) => return cuda(k, v, (start, block, sinks), sums, count),
        #[cfg(not(feature = "cuda"))]
        Sums::Device(_) => {
            return Err(crate::Error::unsupported("summaries", "this build has no kernel for the device"))
        }
    };
    let (k_view, v_view) = (view(k, "keys to pool")?, view(v, "values to pool")?);
    let (ks, vs) = (k_view.values()?, v_view.values()?);
    let (mut mean_k, mut mean_v) = (Vec::with_capacity(count * width), Vec::with_capacity(count * width));
    for i in 0..t {
        let p = start + i;
        if p >= sinks {
            let at = i * width..(i + 1) * width;
            sum_k.iter_mut().zip(&ks[at.clone()]).for_each(|(s, x)| *s += x);
            sum_v.iter_mut().zip(&vs[at]).for_each(|(s, x)| *s += x);
        }
        if (p + 1).is_multiple_of(block) {
            let n = (p + 1 - (p + 1 - block).max(sinks.min(p + 1))).max(1) as f32;
            mean_k.extend(sum_k.iter().map(|s| s / n));
            mean_v.extend(sum_v.iter().map(|s| s / n));
            sum_k.fill(0.0);
            sum_v.fill(0.0);
        }
    }
    let tensor = |x| Tensor::from_vec(x, (count, g, d), &Device::Cpu);
    Ok(Pooled { k: tensor(mean_k)?, v: tensor(mean_v)?, first: start / block, count })
}

/// `SummaryParams` of kernels/summaries.cu.
#[cfg(feature = "cuda")]
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Params {
    k: u64,
    v: u64,
    mean_k: u64,
    mean_v: u64,
    running: u64,
    k_row: i64,
    v_row: i64,
    tokens: i32,
    start: i32,
    block: i32,
    sinks: i32,
    width: i32,
}

// SAFETY: plain numbers in C's layout.
#[cfg(feature = "cuda")]
unsafe impl candle_core::cuda_backend::cudarc::driver::DeviceRepr for Params {}
#[cfg(feature = "cuda")]
crate::ops::cuda::mirrored!(Params, 80, {
    k: 0, v: 8, mean_k: 16, mean_v: 24, running: 32, k_row: 40, v_row: 48, tokens: 56, start: 60, block: 64,
    sinks: 68, width: 72,
});

#[cfg(feature = "cuda")]
fn cuda(
    k: &Tensor,
    v: &Tensor,
    (start, block, sinks): (usize, usize, usize),
    sums: &Tensor,
    count: usize,
) -> Result<Pooled> {
    use super::cuda::{address, device, suffix, uninitialised, Kernel, Launch};
    let (t, g, d) = k.dims3()?;
    let (gpu, dtype) = (device(k)?, k.dtype());
    // Heads side by side within a row, rows at any stride.
    let dense = |x: &Tensor| if x.stride()[1] == d || g == 1 { Ok(x.clone()) } else { x.contiguous() };
    let (k, v) = (dense(k)?, dense(v)?);
    // candle has no empty tensors on a GPU: one row is allocated where no block is complete.
    let means = || uninitialised(gpu, dtype, (count.max(1), g, d));
    let (mean_k, mean_v) = (means()?, means()?);
    let params = Params {
        k: address(&k)?,
        v: address(&v)?,
        mean_k: address(&mean_k)?,
        mean_v: address(&mean_v)?,
        running: address(sums)?,
        k_row: k.stride()[0] as i64,
        v_row: v.stride()[0] as i64,
        tokens: t as i32,
        start: start as i32,
        block: block as i32,
        sinks: sinks as i32,
        width: (g * d) as i32,
    };
    let (name, columns) = (suffix(dtype)?, (g * d).div_ceil(128));
    let kernel = Kernel::load(gpu, "summaries", format!("pool_{name}"))?;
    // SAFETY: shapes as the kernel's header asks for; frees are ordered after the launch on the one stream.
    unsafe { Launch::new(kernel, (count.max(1), columns, 2), 128).with(params).enqueue(false)? };
    Ok(Pooled { k: mean_k, v: mean_v, first: start / block, count })
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
            let mut running = RunningMean::new(1, &Device::Cpu)?;
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
