//! Selection of the highest scores of each head.

use crate::error::{Error, ErrorKind, Result};
use candle_core::Tensor;

/// Returns the rows of the `keep` highest scores of each head in order of position; later tokens win ties.
///
/// ```text
/// index[i, g] = s_i G + g,   s_0 < s_1 < .. the selected tokens of head g
/// ```
///
/// On a GPU there is no host synchronisation (`kernels/select.cu`).
///
/// # Shapes
/// `scores` f32 `[G, N]`, `1 <= keep <= N`; returns u32 `[keep * G]`, rows of `[N, G, D]` seen as `[N G, D]`.
pub fn highest_rows(scores: &Tensor, keep: usize) -> Result<Tensor> {
    let (heads, count) = scores.dims2()?;
    if keep == 0 || keep > count {
        return Err(Error::new(ErrorKind::Backend, "select", format!("{keep} of {count} scores")));
    }
    #[cfg(feature = "cuda")]
    if scores.device().is_cuda() {
        return cuda(scores, keep);
    }
    let stay: Vec<Vec<usize>> = scores.to_vec2::<f32>()?.iter().map(|s| highest(s, keep)).collect();
    let index = (0..keep).flat_map(|i| stay.iter().enumerate().map(move |(g, s)| (s[i] * heads + g) as u32));
    Ok(Tensor::from_iter(index, scores.device())?)
}

/// Indices of the `count` highest of `scores` in ascending order; later ones win ties.
fn highest(scores: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    if count < order.len() {
        order.select_nth_unstable_by(count, |a, b| scores[*b].total_cmp(&scores[*a]).then(b.cmp(a)));
        order.truncate(count);
    }
    order.sort_unstable();
    order
}

#[cfg(feature = "cuda")]
fn cuda(scores: &Tensor, keep: usize) -> Result<Tensor> {
    use super::cuda::{address, device, uninitialised, Kernel, Launch};
    let (heads, count) = scores.dims2()?;
    let (gpu, scores) = (device(scores)?, scores.contiguous()?);
    let index = uninitialised(gpu, candle_core::DType::U32, keep * heads)?;
    let kernel = Kernel::load(gpu, "select", "highest".into())?;
    let launch = Launch::new(kernel, (heads, 1, 1), 1024).with(address(&scores)?).with(address(&index)?);
    // SAFETY: shapes as the kernel's header asks for; frees are ordered after the launch on the one stream.
    unsafe { launch.with(count as i32).with(keep as i32).with(heads as i32).enqueue(false)? };
    Ok(index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn the_highest_stay_in_order_and_ties_go_to_the_later() {
        assert_eq!(highest(&[1.0, 5.0, 3.0, 4.0], 2), [1, 3]);
        assert_eq!(highest(&[2.0, 2.0, 1.0, 2.0], 2), [1, 3]);
        assert_eq!(highest(&[0.0, f32::INFINITY, -1.0, 0.0], 3), [0, 1, 3]);
        assert_eq!(highest(&[1.0, 2.0], 2), [0, 1]);
        assert_eq!(highest(&[1.0, 2.0], 9), [0, 1]);
    }

    #[test]
    fn rows_of_heads_lie_side_by_side() -> Result<()> {
        let scores = Tensor::new(&[[3f32, 1.0, 2.0], [0.0, 5.0, 0.0]], &Device::Cpu)?;
        // Tokens 0 and 2 of head 0, 1 and 2 of head 1.
        assert_eq!(highest_rows(&scores, 2)?.to_vec1::<u32>()?, [0, 3, 4, 5]);
        assert!(highest_rows(&scores, 0).is_err() && highest_rows(&scores, 4).is_err());
        Ok(())
    }
}
