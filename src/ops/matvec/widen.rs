//! Products of many rows with quantised matrices on a GPU: `kernels/quantised.cu` widens some rows of the matrix at a time, cuBLAS
//! multiplies.
//!
//! Inputs are never rounded below their own type, unlike in candle's products, which give them 8 bits; and the memory needed is
//! bounded. A chunk of some hundred tokens hides the widening: two bytes written for each element of the matrix, against two
//! operations for each element and token.

use super::cuda::{blocks_address, Format};
use crate::error::{At, Result};
use crate::ops::cuda::{address, device, suffix, uninitialised, Launch};
use candle_core::quantized::QTensor;
use candle_core::{DType, Tensor};

/// Elements widened at a time, about: 64 MiB in 16 bits. A part of fewer rows would leave the product's tiles idle.
const ELEMENTS: usize = 1 << 25;
/// Parts hold a multiple of so many rows: cuBLAS's fast kernels want results whose rows begin at aligned addresses, and a last part
/// of a few rows would cost nearly as much as a whole one.
const ALIGNED: usize = 256;

/// Rows of a matrix of so many columns to a part.
fn part(rows: usize, columns: usize) -> usize {
    let parts = (rows * columns).div_ceil(ELEMENTS).max(1);
    rows.div_ceil(parts).next_multiple_of(ALIGNED).min(rows)
}

/// `x Wᵀ` in `x`'s type, from weights rounded once to it; `None` where the format has no kernel.
///
/// # Shapes
/// `x [T, cols]`, `w [rows, cols]`; the result `[T, rows]`.
pub(crate) fn quantised_rows(x: &Tensor, w: &QTensor) -> Result<Option<Tensor>> {
    let ((_, width), (rows, columns)) = (x.dims2()?, w.shape().dims2()?);
    let Some(format) = Format::blocks(w.dtype(), columns).filter(|_| width == columns) else { return Ok(None) };
    let x = x.contiguous()?;
    let (gpu, blocks) = (device(&x)?, columns / w.dtype().block_size());
    let kernel = format!("_{}", suffix(x.dtype())?);
    let units = blocks * w.dtype().block_size() / format.unit();
    let multiply = |first: usize, count: usize| -> Result<Tensor> {
        let wide = uninitialised(gpu, x.dtype(), (count, columns))?;
        let from = blocks_address(w)? + (first * blocks * w.dtype().type_size()) as u64;
        let all = count * units;
        let launch = Launch::new(format.kernel(gpu, "widen", &kernel)?, (all.div_ceil(256), 1, 1), 256);
        let launch = launch.with(from).with(address(&wide)?).with(all as i64);
        // SAFETY: `count` whole rows in and out; candle pads the matrix by 512 elements; frees are ordered after the launch on the
        // one stream.
        unsafe { launch.enqueue(false)? };
        x.matmul(&wide.t()?).at("product with a widened matrix")
    };
    let step = part(rows, columns);
    let parts = (0..rows).step_by(step).map(|first| multiply(first, step.min(rows - first)));
    let parts = parts.collect::<Result<Vec<_>>>()?;
    Ok(Some(if parts.len() == 1 { parts[0].clone() } else { Tensor::cat(&parts, 1)? }))
}

/// Bytes that [`quantised_rows`] widens at a time; `None` where the format has no kernel.
pub(crate) fn widened_bytes(w: &QTensor, dtype: DType) -> Option<u64> {
    let (rows, columns) = w.shape().dims2().ok()?;
    Format::blocks(w.dtype(), columns)?;
    Some((part(rows, columns) * columns * dtype.size_in_bytes()) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_few_even_and_aligned() {
        for (rows, columns, wanted) in [
            (1, 32, 1),
            (300, 64, 300),
            (18_944, 3584, 6400),
            (3584, 18_944, 1280),
            (9728, 2560, 9728),
            (152_064, 3584, 8960),
        ] {
            let step = part(rows, columns);
            assert_eq!(step, wanted, "{rows} x {columns}");
            assert!(step == rows || step.is_multiple_of(ALIGNED));
        }
    }
}
