//! Converts stored tensors to weights in memory, a few megabytes of rows at a time, in parallel.

use super::{Checkpoint, TensorInfo, WeightFormat};
use crate::error::{At, Error, ErrorKind, Result};
use crate::nn::Weight;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// Elements decoded at a time: 8 MiB of f32 per worker.
const CHUNK: usize = 2 << 20;

/// Reads `rows` of `cols` elements each and dequantizes them to f32.
///
/// # Errors
/// The tensor's type is unknown; its file cannot be read; a value is NaN or infinite.
pub fn decode(from: &Checkpoint, info: &TensorInfo, rows: Range<usize>, cols: usize) -> Result<Vec<f32>> {
    let dtype = stored(info)?;
    let bytes = read_rows(from, info, dtype, rows.clone(), cols)?;
    let values = dequantize(dtype, bytes, rows.len() * cols).at(&info.name)?;
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(values),
        Some(at) => {
            let (row, col) = (rows.start + at / cols, at % cols);
            let message = format!("tensor `{}` holds {} at row {row}, column {col}", info.name, values[at]);
            Err(Error::new(ErrorKind::NotFinite, from.identity.place(), message))
        }
    }
}

/// Loads a matrix in the type that `format` resolves to. With `head_rows` rows per head, the file stores the two halves
/// of each head interleaved (stored row `2 j + i` is row `i * head_rows / 2 + j`), and the rows are put back in order.
///
/// # Errors
/// Those of [`decode`]; a value is too large for the type in memory.
pub fn load_matrix(
    from: &Checkpoint,
    info: &TensorInfo,
    head_rows: Option<usize>,
    format: &WeightFormat,
    device: &Device,
) -> Result<Weight> {
    let (rows, cols) = (info.shape[0], info.shape[1]);
    let dtype = stored(info)?;
    let target = format.resolve(dtype, cols);
    let unit = head_rows.unwrap_or(1);
    let chunk = (CHUNK / cols).max(1).div_ceil(unit) * unit;
    let row_bytes = cols / target.block_size() * target.type_size();
    format.count(target, rows * row_bytes);
    let range = |i: usize| i * chunk..rows.min((i + 1) * chunk);
    if target == GgmlDType::F32 {
        let mut out = vec![0f32; rows * cols];
        out.par_chunks_mut(chunk * cols).enumerate().try_for_each(|(i, out)| -> Result<()> {
            let values = decode(from, info, range(i), cols)?;
            for (r, row) in out.chunks_mut(cols).enumerate() {
                let s = source_row(r, head_rows);
                row.copy_from_slice(&values[s * cols..(s + 1) * cols]);
            }
            Ok(())
        })?;
        return Ok(Weight::Dense(Tensor::from_vec(out, (rows, cols), device).at(&info.name)?));
    }
    let mut out = vec![0u8; rows * row_bytes];
    out.par_chunks_mut(chunk * row_bytes).enumerate().try_for_each(|(i, out)| -> Result<()> {
        // Decoded even where the bytes are kept as stored, to find NaN.
        let values = decode(from, info, range(i), cols)?;
        let bytes = match target == dtype {
            true => read_rows(from, info, dtype, range(i), cols)?,
            false => convert(from, info, target, &values, (range(i).start, cols))?,
        };
        for (r, row) in out.chunks_mut(row_bytes).enumerate() {
            let s = source_row(r, head_rows);
            row.copy_from_slice(&bytes[s * row_bytes..(s + 1) * row_bytes]);
        }
        Ok(())
    })?;
    let dense = match target {
        GgmlDType::F16 => Some(DType::F16),
        GgmlDType::BF16 => Some(DType::BF16),
        _ => None,
    };
    // On a CPU 16-bit types are stored as quantised blocks of one element, since the CPU's GEMM cannot multiply them by
    // f32.
    if let Some(dtype) = dense.filter(|_| !device.is_cpu()) {
        return Ok(Weight::Dense(Tensor::from_raw_buffer(&out, dtype, &[rows, cols], device).at(&info.name)?));
    }
    let storage = QStorage::from_data(Cow::Owned(out), device, target).at(&info.name)?;
    Ok(Weight::Quantised(std::sync::Arc::new(QTensor::new(storage, (rows, cols)).at(&info.name)?)))
}

fn stored(info: &TensorInfo) -> Result<GgmlDType> {
    info.dtype.clone().map_err(|why| Error::unsupported(&info.name, format!("{why} is not supported for weights")))
}

fn read_rows(
    from: &Checkpoint,
    info: &TensorInfo,
    dtype: GgmlDType,
    rows: Range<usize>,
    cols: usize,
) -> Result<Vec<u8>> {
    if !cols.is_multiple_of(dtype.block_size()) {
        let message = format!("rows of {cols} elements are not a multiple of the {dtype:?} block size");
        return Err(Error::format(&info.name, message));
    }
    let row_bytes = cols / dtype.block_size() * dtype.type_size();
    from.read(info, (rows.start * row_bytes) as u64, rows.len() * row_bytes)
}

/// Puts the elements of a vector in order; for `head_rows` see [`load_matrix`].
pub fn in_order(values: Vec<f32>, head_rows: Option<usize>) -> Vec<f32> {
    match head_rows {
        None => values,
        Some(_) => (0..values.len()).map(|r| values[source_row(r, head_rows)]).collect(),
    }
}

fn source_row(row: usize, head_rows: Option<usize>) -> usize {
    let Some(d) = head_rows else { return row };
    let (head, within) = (row / d, row % d);
    head * d + 2 * (within % (d / 2)) + within / (d / 2)
}

fn dequantize(dtype: GgmlDType, bytes: Vec<u8>, count: usize) -> candle_core::Result<Vec<f32>> {
    let half = |f: fn([u8; 2]) -> f32| bytes.chunks_exact(2).map(|b| f([b[0], b[1]])).collect();
    Ok(match dtype {
        GgmlDType::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        GgmlDType::F16 => half(|b| half::f16::from_le_bytes(b).to_f32()),
        GgmlDType::BF16 => half(|b| half::bf16::from_le_bytes(b).to_f32()),
        _ => {
            let storage = QStorage::from_data(Cow::Owned(bytes), &Device::Cpu, dtype)?;
            QTensor::new(storage, (1, count))?.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?
        }
    })
}

/// Converts rows of `cols` values to type `target`; `first_row` is the first row's index in the matrix, for errors.
///
/// # Errors
/// A value is too large for `target`.
pub fn convert(
    from: &Checkpoint,
    info: &TensorInfo,
    target: GgmlDType,
    values: &[f32],
    (first_row, cols): (usize, usize),
) -> Result<Vec<u8>> {
    let bytes = cast(target, values, cols).at(&info.name)?;
    refuse_overflow(from, info, target, values, &bytes, (first_row, cols))?;
    Ok(bytes)
}

fn cast(target: GgmlDType, values: &[f32], cols: usize) -> candle_core::Result<Vec<u8>> {
    Ok(match target {
        GgmlDType::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        GgmlDType::BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        _ => {
            let tensor = Tensor::from_slice(values, (values.len() / cols, cols), &Device::Cpu)?;
            QTensor::quantize(&tensor, target)?.data()?.into_owned()
        }
    })
}

/// Refuses finite `values` that became infinite in `bytes`: f16's maximum is 65504, and the scales of block formats are
/// f16.
fn refuse_overflow(
    from: &Checkpoint,
    info: &TensorInfo,
    target: GgmlDType,
    values: &[f32],
    bytes: &[u8],
    (first_row, cols): (usize, usize),
) -> Result<()> {
    if values.iter().all(|v| v.abs() <= half::f16::MAX.to_f32()) {
        return Ok(());
    }
    let restored = dequantize(target, bytes.to_vec(), values.len()).at(&info.name)?;
    let Some(lost) = restored.iter().position(|v| !v.is_finite()) else { return Ok(()) };
    // The scale of a block follows from its largest value.
    let block = lost / target.block_size() * target.block_size();
    let largest = |at: &usize, other: &usize| values[*at].abs().total_cmp(&values[*other].abs());
    let at = (block..block + target.block_size()).max_by(largest).unwrap_or(lost);
    let wider = if target == GgmlDType::BF16 { "use --dtype f32" } else { "use --dtype bf16 or f32" };
    let (name, target, value) = (&info.name, super::weight_format::type_name(target), values[at]);
    let (row, column) = (first_row + at / cols, at % cols);
    let message = format!(
        "tensor `{name}` holds {value} at row {row}, column {column}, which is too large for {target}; {wider}"
    );
    Err(Error::new(ErrorKind::NotFinite, from.identity.place(), message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_heads_are_put_back_in_halves() {
        // Stored rows of one head of 8: 0 4 1 5 2 6 3 7.
        let stored = [0, 4, 1, 5, 2, 6, 3, 7];
        let restored: Vec<_> = (0..8).map(|r| stored[source_row(r, Some(8))]).collect();
        assert_eq!(restored, (0..8).collect::<Vec<_>>());
        assert_eq!(source_row(11, Some(8)), 8 + 2 * 3);
    }
}
