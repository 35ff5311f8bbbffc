//! Products of many rows with quantised matrices on a GPU: `kernels/quantised.cu` or
//! `kernels/affine.cu` dequantises some rows of the matrix at a time, cuBLAS multiplies.
//!
//! Inputs are never rounded below their own type, unlike in candle's products, which give them 8 bits; and the memory
//! needed is bounded. A chunk of some hundred tokens hides the dequantisation: two bytes written for each element of
//! the matrix, against two operations for each element and token.

use super::cuda::Format;
use crate::error::{At, Error, Result};
use crate::nn::Blocks;
use crate::ops::cuda::{address, device, suffix, uninitialised, Launch};
use candle_core::Tensor;

/// Elements dequantised at a time, about: 64 MiB in 16 bits. A part of fewer rows would leave the product's tiles idle.
const ELEMENTS: usize = 1 << 25;
/// Parts hold a multiple of this many rows: cuBLAS's fast kernels want results whose rows begin at aligned addresses,
/// and a last part of a few rows would cost nearly as much as a whole one.
const ALIGNED: usize = 256;

/// Rows of a `rows` by `columns` matrix that [`quantised_rows`] dequantises at a time.
pub(crate) fn rows_to_a_part(rows: usize, columns: usize) -> usize {
    let parts = (rows * columns).div_ceil(ELEMENTS).max(1);
    rows.div_ceil(parts).next_multiple_of(ALIGNED).min(rows)
}

/// `x Wᵀ` in `x`'s type, from weights rounded once to it.
///
/// # Shapes
/// `x [T, cols]`, `w [rows, cols]`; the result `[T, rows]`.
pub(crate) fn quantised_rows(x: &Tensor, w: &Blocks) -> Result<Tensor> {
    let ((_, width), (rows, columns)) = (x.dims2()?, w.dims());
    if width != columns {
        return Err(Error::unsupported("quantised product", format!("{width} columns times {rows} x {columns}")));
    }
    let (format, x) = (Format::of_blocks(w)?, x.contiguous()?);
    let gpu = device(&x)?;
    let kernel = format!("_{}", suffix(x.dtype())?);
    let multiply = |first: usize, count: usize| -> Result<Tensor> {
        let wide = uninitialised(gpu, x.dtype(), (count, columns))?;
        let from = address(w.data())? + (first * w.storage().row_bytes(columns)) as u64;
        let units = count * columns / format.unit();
        let launch = Launch::new(format.kernel(gpu, "dequantise", &kernel)?, (units.div_ceil(256), 1, 1), 256);
        let launch = launch.with(from).with(address(&wide)?).with(units as i64);
        // SAFETY: `count` whole rows in and out, padding after the last; frees are ordered after the launch on the one
        // stream.
        unsafe { format.add_settings(launch).enqueue(false)? };
        x.matmul(&wide.t()?).at("product with a dequantised matrix")
    };
    let step = rows_to_a_part(rows, columns);
    let parts = (0..rows).step_by(step).map(|first| multiply(first, step.min(rows - first)));
    let parts = parts.collect::<Result<Vec<_>>>()?;
    Ok(if parts.len() == 1 { parts[0].clone() } else { Tensor::cat(&parts, 1)? })
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
            let step = rows_to_a_part(rows, columns);
            assert_eq!(step, wanted, "{rows} x {columns}");
            assert!(step == rows || step.is_multiple_of(ALIGNED));
        }
    }
}
