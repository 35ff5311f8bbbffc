//! Launches of kernels/factored.cu.

use super::Shape;
use crate::error::{At, Error, Result};
use crate::ops::cuda::{address, device, mirrored, multiprocessors, shared_limit, uninitialised, Kernel, Launch};
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{DType, Tensor};

/// Threads of a block.
const THREADS: usize = 128;
/// Factors that a thread applies to the elements that it holds.
const FACTORS: usize = 3;
/// Rows of a tile forward, of real elements.
const ROWS: usize = 8;
/// Rows of a tile backward, at most.
const ROWS_BACK: usize = 8;
/// Largest N.
const LARGEST: usize = 4096;
/// Threads of a block that streams rows.
const STREAMED: usize = 256;
/// Sizes whose rows are streamed.
const STREAMS: std::ops::RangeInclusive<usize> = 256..=1024;

#[repr(C)]
#[derive(Debug, Clone, Copy)]
struct Butterfly {
    x: u64,
    w: u64,
    y: u64,
    dy: u64,
    partial: u64,
    index: u64,
    rows: i32,
    n: i32,
    levels: i32,
    parameters: i32,
    stack: i32,
    each: i32,
}
mirrored!(Butterfly, 72, { index: 40, rows: 48, stack: 64, each: 68 });

// SAFETY: plain numbers in C's layout, as the kernels declare them.
unsafe impl DeviceRepr for Butterfly {}

/// Row tiles of a block.
fn tiles(shape: Shape) -> usize {
    THREADS / (shape.size >> FACTORS).clamp(1, THREADS)
}

/// Bytes of shared memory that a row takes: `padded_row` of the kernels.
fn row_bytes(shape: Shape) -> usize {
    let last = shape.size - 1;
    4 * ((last + (last >> 6) * 8 + 4) & !3)
}

/// Bytes of shared memory of a block of `streams`: `Stream::SHARED` of the kernels.
fn stream_bytes(shape: Shape, streams: usize) -> usize {
    let row = shape.size + shape.size / 64 * 8;
    16 * (shape.butterfly_len() / 4 + 1) + 4 * streams * 2 * ROWS * row
}

/// `x` as rows of `columns` elements: shorter rows go on with zeros.
fn padded(x: &Tensor, columns: usize) -> Result<Tensor> {
    let own = x.dims2().at("factored layer")?.1;
    let x = if own == columns { x.clone() } else { x.pad_with_zeros(1, 0, columns - own).at("factored layer")? };
    x.contiguous().at("factored layer")
}

fn check(x: &Tensor, factors: &Tensor, shape: Shape) -> Result<()> {
    let wrong = |message: String| Err(Error::unsupported("factored layer", message));
    if shape.size > LARGEST {
        return wrong(format!("{} elements on CUDA, which takes up to {LARGEST}", shape.size));
    }
    if x.dtype() != DType::F32 || factors.dtype() != DType::F32 || !factors.is_contiguous() {
        return wrong(format!("{:?} by {:?} on CUDA, which takes contiguous f32", x.dtype(), factors.dtype()));
    }
    Ok(())
}

fn parameters(shape: Shape, rows: usize, stack: usize) -> Butterfly {
    Butterfly {
        x: 0,
        w: 0,
        y: 0,
        dy: 0,
        partial: 0,
        index: 0,
        rows: rows as i32,
        n: shape.size as i32,
        levels: shape.levels() as i32,
        parameters: shape.butterfly_len() as i32,
        stack: stack as i32,
        each: 1,
    }
}

pub(super) fn forward(x: &Tensor, factors: &Tensor, shape: Shape) -> Result<Tensor> {
    check(x, factors, shape)?;
    let (rows, stack, gpu) = (x.dims()[0], factors.dims()[0], device(x)?);
    let x = padded(x, shape.size)?;
    let y = uninitialised(gpu, DType::F32, (rows, stack * shape.size))?;
    if rows == 0 {
        return Ok(y);
    }
    let b = Butterfly { x: address(&x)?, w: address(factors)?, y: address(&y)?, ..parameters(shape, rows, stack) };
    let load = |name: String| Kernel::load(gpu, "factored", name.into());
    let launch = if STREAMS.contains(&shape.size) {
        let streams = STREAMED / (shape.size >> FACTORS);
        let blocks = rows.div_ceil(ROWS * streams).min(multiprocessors(gpu)?);
        let kernel =
            load(format!("factored_stream_real_untied_{}", shape.size))?.shared(stream_bytes(shape, streams))?;
        Launch::new(kernel, (blocks, stack, 1), STREAMED)
    } else {
        let kernel = load("factored_forward_real_untied".into())?.shared(tiles(shape) * ROWS * row_bytes(shape))?;
        Launch::new(kernel, (rows.div_ceil(tiles(shape) * ROWS), stack, 1), THREADS)
    };
    // SAFETY: `rows` rows of the lengths that the kernel reads; frees are ordered after the launch on the one stream.
    unsafe { launch.with(b).enqueue(false)? };
    Ok(y)
}

pub(super) fn backward(x: &Tensor, factors: &Tensor, dy: &Tensor, shape: Shape) -> Result<(Tensor, Tensor)> {
    check(x, factors, shape)?;
    check(dy, factors, shape)?;
    let ((rows, inputs), stack, gpu) = (x.dims2().at("factored layer")?, factors.dims()[0], device(x)?);
    if rows == 0 {
        return Ok((x.clone(), factors.zeros_like().at("gradient of factors")?));
    }
    let (x, dy) = (padded(x, shape.size)?, padded(dy, stack * shape.size)?);
    let (passes, limit) = (shape.levels().div_ceil(FACTORS), shared_limit(gpu)?);
    let shared = |each: usize| tiles(shape) * each * row_bytes(shape) * (passes + 1);
    // Two blocks a multiprocessor where that leaves more than one row.
    let mut each = ROWS_BACK;
    while each > 1 && shared(each) > limit / 2 {
        each /= 2;
    }
    let blocks = (2 * multiprocessors(gpu)?).min(rows.div_ceil(tiles(shape) * each));
    let copies = blocks * tiles(shape);
    let dx = uninitialised(gpu, DType::F32, (stack, rows, shape.size))?;
    let partial = Tensor::zeros(copies * factors.elem_count(), DType::F32, x.device()).at("gradient of factors")?;
    let d_factors = uninitialised(gpu, DType::F32, factors.shape())?;
    let b = Butterfly {
        x: address(&x)?,
        w: address(factors)?,
        y: address(&dx)?,
        dy: address(&dy)?,
        partial: address(&partial)?,
        each: each as i32,
        ..parameters(shape, rows, stack)
    };
    let kernel = Kernel::load(gpu, "factored", "factored_backward_real_untied".into())?.shared(shared(each))?;
    let sum = Launch::new(
        Kernel::load(gpu, "factored", "factored_sum".into())?,
        (shape.butterfly_len().div_ceil(256), stack, 1),
        256,
    );
    let sum = sum.with(address(&partial)?).with(address(&d_factors)?).with(copies as i32).with(stack as i32);
    let sum = sum.with(shape.size as i32).with(shape.levels() as i32).with(1i32).with(0i32);
    // SAFETY: as in `forward`; each tile of a block has a copy of the gradients in `partial`.
    unsafe {
        Launch::new(kernel, (blocks, stack, 1), THREADS).with(b).enqueue(false)?;
        sum.enqueue(false)?;
    }
    let dx = if stack == 1 { dx.squeeze(0) } else { dx.sum(0) };
    let dx = dx.and_then(|dx| dx.narrow(1, 0, inputs)?.contiguous()).at("gradient of a factored layer")?;
    Ok((dx, d_factors))
}
