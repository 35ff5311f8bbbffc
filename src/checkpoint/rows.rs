//! From stored bytes to weights in memory, a few megabytes of rows at a time, spread over the cores.

use super::{Checkpoint, TensorInfo, WeightFormat};
use crate::error::{At, Error, ErrorKind, Result};
use crate::nn::{Blocks, Weight};
use crate::storage::Storage;
use crate::tensors::Order;
use candle_core::quantized::{QStorage, QTensor};
use candle_core::{Device, Tensor};
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
    let stored = stored(from, info)?;
    let bytes = read_rows(from, info, stored, rows.clone(), cols)?;
    let values = to_f32(stored, bytes, rows.len() * cols).at(place(from, info))?;
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(values),
        Some(at) => {
            let (row, col) = (rows.start + at / cols, at % cols);
            let message = format!("tensor `{}` holds {} at row {row}, column {col}", info.name, values[at]);
            Err(Error::new(ErrorKind::NotFinite, from.identity.place(), message))
        }
    }
}

/// Loads a matrix in the type that `format` resolves to, its rows in `order` where one is given.
///
/// # Errors
/// Those of [`decode`]; a value is too large for the type in memory.
pub fn load_matrix(
    from: &Checkpoint,
    info: &TensorInfo,
    order: Option<Order>,
    format: &WeightFormat,
    device: &Device,
) -> Result<Weight> {
    let cols = info.shape[1];
    let rows = order.map_or(info.shape[0], |o| o.rows(info.shape[0]));
    let stored = stored(from, info)?;
    let target = format.resolve(stored, cols);
    let unit = order.map_or(1, |o| o.heads.dim);
    let chunk = (CHUNK / cols).max(1).div_ceil(unit) * unit;
    let row_bytes = target.row_bytes(cols);
    format.count(target, rows * row_bytes);
    // Whole heads of the file, which a chunk's rows are among.
    let range = |i: usize| {
        let (from, to) = (i * chunk, rows.min((i + 1) * chunk));
        order.map_or(from..to, |o| from / unit * o.heads.stored..to / unit * o.heads.stored)
    };
    let source = |row: usize| order.map_or(row, |o| o.source(row));
    if target == Storage::F32 {
        let mut out = vec![0f32; rows * cols];
        out.par_chunks_mut(chunk * cols).enumerate().try_for_each(|(i, out)| -> Result<()> {
            let values = decode(from, info, range(i), cols)?;
            for (r, row) in out.chunks_mut(cols).enumerate() {
                row.copy_from_slice(&values[source(r) * cols..][..cols]);
            }
            Ok(())
        })?;
        return Ok(Weight::Dense(Tensor::from_vec(out, (rows, cols), device).at(place(from, info))?));
    }
    let mut out = vec![0u8; rows * row_bytes];
    out.par_chunks_mut(chunk * row_bytes).enumerate().try_for_each(|(i, out)| -> Result<()> {
        // Decoding finds NaN also where the bytes stay as stored.
        let values = decode(from, info, range(i), cols)?;
        let bytes = match target == stored {
            true => read_rows(from, info, stored, range(i), cols)?,
            false => encode(from, info, target, &values, (range(i).start, cols))?,
        };
        for (r, row) in out.chunks_mut(row_bytes).enumerate() {
            row.copy_from_slice(&bytes[source(r) * row_bytes..][..row_bytes]);
        }
        Ok(())
    })?;
    // On a CPU 16-bit matrices are blocks too, since its GEMM cannot multiply them by f32.
    if let Some(float) = target.dense().filter(|_| !device.is_cpu()) {
        let tensor = Tensor::from_raw_buffer(&out, float.dtype(), &[rows, cols], device);
        return Ok(Weight::Dense(tensor.at(place(from, info))?));
    }
    Ok(Weight::Blocks(Blocks::new(target, (rows, cols), out, device).map_err(|e| e.within(place(from, info)))?))
}

/// Names file and tensor for an error.
fn place(from: &Checkpoint, info: &TensorInfo) -> String {
    format!("{}: tensor `{}`", from.identity.place(), info.name)
}

fn stored(from: &Checkpoint, info: &TensorInfo) -> Result<Storage> {
    let unknown = |why: String| Error::unsupported(place(from, info), format!("{why} is not supported for weights"));
    info.storage.clone().map_err(unknown)
}

fn read_rows(
    from: &Checkpoint,
    info: &TensorInfo,
    stored: Storage,
    rows: Range<usize>,
    cols: usize,
) -> Result<Vec<u8>> {
    if !stored.fits(cols) {
        let message = format!("rows of {cols} elements are not a multiple of the {stored} block size");
        return Err(Error::format(place(from, info), message));
    }
    let row_bytes = stored.row_bytes(cols);
    from.read(info, (rows.start * row_bytes) as u64, rows.len() * row_bytes)
}

/// Puts the elements of a vector in order.
pub fn in_order(values: Vec<f32>, order: Option<Order>) -> Vec<f32> {
    match order {
        None => values,
        Some(order) => (0..order.rows(values.len())).map(|r| values[order.source(r)]).collect(),
    }
}

/// Dequantizes `count` values.
pub(super) fn to_f32(stored: Storage, bytes: Vec<u8>, count: usize) -> candle_core::Result<Vec<f32>> {
    let half = |f: fn([u8; 2]) -> f32| bytes.chunks_exact(2).map(|b| f([b[0], b[1]])).collect();
    Ok(match stored {
        Storage::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Storage::F16 => half(|b| half::f16::from_le_bytes(b).to_f32()),
        Storage::BF16 => half(|b| half::bf16::from_le_bytes(b).to_f32()),
        // candle's decoder, unlike the one of products, also gives the infinities and NaN of damaged scales.
        Storage::Ggml(format) => {
            let blocks = QStorage::from_data(Cow::Owned(bytes), &Device::Cpu, format.candle())?;
            QTensor::new(blocks, (1, count))?.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?
        }
        Storage::Affine(_) => {
            let mut values = vec![0f32; count];
            crate::ops::dequantise(stored, &bytes, 0, count, &mut values);
            values
        }
    })
}

/// Encodes rows of `cols` values, from `first_row` on, in `target`.
///
/// # Errors
/// A value too large for `target`.
pub fn encode(
    from: &Checkpoint,
    info: &TensorInfo,
    target: Storage,
    values: &[f32],
    (first_row, cols): (usize, usize),
) -> Result<Vec<u8>> {
    let bytes = from_f32(target, values, cols).at(place(from, info))?;
    refuse_overflow(from, info, target, values, &bytes, (first_row, cols))?;
    Ok(bytes)
}

fn from_f32(target: Storage, values: &[f32], cols: usize) -> candle_core::Result<Vec<u8>> {
    Ok(match target {
        Storage::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        Storage::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
        Storage::BF16 => values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect(),
        Storage::Ggml(format) => {
            let tensor = Tensor::from_slice(values, (values.len() / cols, cols), &Device::Cpu)?;
            QTensor::quantize(&tensor, format.candle())?.data()?.into_owned()
        }
        Storage::Affine(_) => candle_core::bail!("weights are not converted to {target}"),
    })
}

/// Refuses finite `values` that became infinite in `bytes`: f16's maximum is 65504, and the scales of block formats are
/// f16.
fn refuse_overflow(
    from: &Checkpoint,
    info: &TensorInfo,
    target: Storage,
    values: &[f32],
    bytes: &[u8],
    (first_row, cols): (usize, usize),
) -> Result<()> {
    if values.iter().all(|v| v.abs() <= half::f16::MAX.to_f32()) {
        return Ok(());
    }
    let decoded = to_f32(target, bytes.to_vec(), values.len()).at(place(from, info))?;
    let Some(lost) = decoded.iter().position(|v| !v.is_finite()) else { return Ok(()) };
    // The scale of a block follows from its largest value.
    let (elements, _) = target.block();
    let block = lost / elements * elements;
    let largest = |at: &usize, other: &usize| values[*at].abs().total_cmp(&values[*other].abs());
    let at = (block..block + elements).max_by(largest).unwrap_or(lost);
    let wider = if target == Storage::BF16 { "use --dtype f32" } else { "use --dtype bf16 or f32" };
    let (name, value, row, column) = (&info.name, values[at], first_row + at / cols, at % cols);
    let message = format!(
        "tensor `{name}` holds {value} at row {row}, column {column}, which is too large for {target}; {wider}"
    );
    Err(Error::new(ErrorKind::NotFinite, from.identity.place(), message))
}
