//! Launches of kernels/train.cu, and matrix products into f32.

use super::{Normed, SYMBOLS};
use crate::error::{At, Error, ErrorKind, Result};
use crate::ops::cuda::{address, address_or_null, device, multiprocessors, uninitialised, Kernel, Launch};
use candle_core::cuda_backend::cudarc::cublas::{result::gemm_ex, sys};
use candle_core::{DType, Tensor};

const THREADS: usize = 256;
/// Rows of a thread block where a warp has one.
const ROWS: usize = THREADS / 32;
/// Columns that the norms keep in registers, at most.
const MOST: usize = 1024;

/// Refuses what the kernels do not take.
fn check(tensors: &[&Tensor], columns: usize, what: &str) -> Result<()> {
    for x in tensors {
        if x.dtype() != DType::BF16 || !x.is_contiguous() || !columns.is_multiple_of(8) || address(x)? % 16 != 0 {
            let message = format!("{what} on CUDA takes contiguous bf16 rows of a multiple of 8 elements");
            return Err(Error::new(ErrorKind::Backend, "training", format!("{message}, not {:?} {x:?}", x.dtype())));
        }
    }
    Ok(())
}

/// Thread blocks of a kernel that takes any grid.
fn blocks(tensor: &Tensor) -> Result<usize> {
    Ok(4 * multiprocessors(device(tensor)?)?)
}

fn kernel(tensor: &Tensor, name: &str) -> Result<Kernel> {
    Kernel::load(device(tensor)?, "train", name.into())
}

pub(super) fn norm(x: &Tensor, add: Option<&Tensor>, weight: &Tensor, eps: f32) -> Result<Normed> {
    let (rows, n) = x.dims2().at("norm")?;
    check(&[&[x], add.as_slice()].concat(), n, "norm")?;
    if n > MOST || weight.dtype() != DType::F32 {
        return Err(Error::unsupported("norm", format!("{n} columns in training on CUDA, which takes up to {MOST}")));
    }
    let gpu = device(x)?;
    let sum = add.map_or(Ok(x.clone()), |_| uninitialised(gpu, DType::BF16, x.shape()))?;
    let (y, r) = (uninitialised(gpu, DType::BF16, x.shape())?, uninitialised(gpu, DType::F32, rows)?);
    let launch = Launch::new(kernel(x, "norm_forward")?, (rows.div_ceil(ROWS), 1, 1), THREADS)
        .with(address(x)?)
        .with(address_or_null(add)?)
        .with(address(weight)?)
        .with(address(&sum)?)
        .with(address(&y)?)
        .with(address(&r)?)
        .with(n as i32)
        .with(rows as i32)
        .with(eps);
    // SAFETY: `rows` rows of `n` in every tensor; frees are ordered after the launch on the one stream.
    unsafe { launch.enqueue(false)? };
    Ok(Normed { sum, y, r })
}

pub(super) fn norm_backward(
    x: &Tensor,
    weight: &Tensor,
    r: &Tensor,
    dy: &Tensor,
    add: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let (rows, n) = x.dims2().at("norm")?;
    check(&[&[x, dy], add.as_slice()].concat(), n, "norm")?;
    let (gpu, blocks) = (device(x)?, blocks(x)?.min(rows.div_ceil(ROWS)));
    let dx = uninitialised(gpu, DType::BF16, x.shape())?;
    let (partial, dw) = (uninitialised(gpu, DType::F32, (blocks, n))?, uninitialised(gpu, DType::F32, n)?);
    let backward = Launch::new(kernel(x, "norm_backward")?.shared(ROWS * n * 4)?, (blocks, 1, 1), THREADS)
        .with(address(x)?)
        .with(address(weight)?)
        .with(address(r)?)
        .with(address(dy)?)
        .with(address_or_null(add)?)
        .with(address(&dx)?)
        .with(address(&partial)?)
        .with(n as i32)
        .with(rows as i32);
    let sum = Launch::new(kernel(x, "sum_partials")?, (n.div_ceil(THREADS), 1, 1), THREADS)
        .with(address(&partial)?)
        .with(address(&dw)?)
        .with(n as i32)
        .with(blocks as i32);
    // SAFETY: as in `norm`; a block writes one row of `partial`.
    unsafe {
        backward.enqueue(false)?;
        sum.enqueue(false)?;
    }
    Ok((dx, dw))
}

pub(super) fn gated_silu(both: &Tensor) -> Result<Tensor> {
    let (rows, wide) = both.dims2().at("gated activation")?;
    check(&[both], wide / 2, "gated activation")?;
    let out = uninitialised(device(both)?, DType::BF16, (rows, wide / 2))?;
    let launch = Launch::new(kernel(both, "gated_forward")?, (2 * blocks(both)?, 1, 1), THREADS)
        .with(address(both)?)
        .with(address(&out)?)
        .with((wide / 2) as i32)
        .with(out.elem_count() as i64);
    // SAFETY: `rows` rows of both tensors; frees are ordered after the launch on the one stream.
    unsafe { launch.enqueue(false)? };
    Ok(out)
}

pub(super) fn gated_silu_backward(both: &Tensor, grad: &Tensor) -> Result<Tensor> {
    let wide = both.dims2().at("gated activation")?.1;
    check(&[both, grad], wide / 2, "gated activation")?;
    let out = uninitialised(device(both)?, DType::BF16, both.shape())?;
    let launch = Launch::new(kernel(both, "gated_backward")?, (2 * blocks(both)?, 1, 1), THREADS)
        .with(address(both)?)
        .with(address(grad)?)
        .with(address(&out)?)
        .with((wide / 2) as i32)
        .with(grad.elem_count() as i64);
    // SAFETY: as in `gated_silu`; the caller has checked the shapes.
    unsafe { launch.enqueue(false)? };
    Ok(out)
}

pub(super) fn cross_entropy(logits: &Tensor, targets: &[u32], scale: f32) -> Result<(Tensor, Tensor)> {
    let (rows, symbols) = logits.dims2().at("cross-entropy")?;
    check(&[logits], symbols, "cross-entropy")?;
    if symbols != SYMBOLS {
        return Err(Error::unsupported("cross-entropy", format!("{symbols} symbols on CUDA, which takes {SYMBOLS}")));
    }
    let gpu = device(logits)?;
    let targets = Tensor::new(targets, logits.device()).at("targets")?;
    let (losses, grad) = (uninitialised(gpu, DType::F32, rows)?, uninitialised(gpu, DType::BF16, logits.shape())?);
    let launch = Launch::new(kernel(logits, "cross_entropy_256")?, (rows.div_ceil(ROWS), 1, 1), THREADS)
        .with(address(logits)?)
        .with(address(&targets)?)
        .with(address(&losses)?)
        .with(address(&grad)?)
        .with(rows as i32)
        .with(scale);
    // SAFETY: `rows` rows of every tensor; frees are ordered after the launch on the one stream.
    unsafe { launch.enqueue(false)? };
    Ok((losses, grad))
}

/// Rows of [`SYMBOLS`] with a one at each symbol, on the device of `like`.
pub(super) fn one_hot(like: &Tensor, symbols: &[u32]) -> Result<Tensor> {
    let rows = symbols.len();
    let symbols = Tensor::new(symbols, like.device()).at("symbols")?;
    let out = uninitialised(device(like)?, DType::BF16, (rows, SYMBOLS))?;
    let launch = Launch::new(kernel(like, "one_hot_256")?, (rows.div_ceil(ROWS), 1, 1), THREADS)
        .with(address(&symbols)?)
        .with(address(&out)?)
        .with(rows as i32);
    // SAFETY: `rows` symbols and rows; frees are ordered after the launch on the one stream.
    unsafe { launch.enqueue(false)? };
    Ok(out)
}

/// `to[start ..] = beta to[start ..] + aᵀ b`, in f32 of bf16 factors.
///
/// # Shapes
/// `a [T, M]`, `b [T, N]`, `to` f32; writes `[M, N]`.
pub(super) fn product_into(to: &Tensor, start: usize, a: &Tensor, b: &Tensor, beta: f32) -> Result<()> {
    let ((rows, m), (others, n)) = (a.dims2().at("product")?, b.dims2().at("product")?);
    check(&[a, b], m, "product")?;
    if rows != others || to.dtype() != DType::F32 || start + m * n > to.elem_count() {
        let message = format!("{:?} and {:?} into {:?} from {start} on", a.dims(), b.dims(), to.dims());
        return Err(Error::new(ErrorKind::Backend, "product", message));
    }
    let gpu = device(to)?;
    let fail = |e: &dyn std::fmt::Debug| Error::new(ErrorKind::Backend, "product", format!("{e:?}"));
    gpu.cuda_stream().context().bind_to_thread().map_err(|e| fail(&e))?;
    let (alpha, c) = (1f32, address(to)? + 4 * start as u64);
    let half = sys::cudaDataType_t::CUDA_R_16BF;
    // cuBLAS counts columns first: it makes `bᵀ a`, `[N, M]` by columns, which is `[M, N]` by rows.
    // SAFETY: shapes were checked above; all work is on the one stream that the handle was made with.
    unsafe {
        gemm_ex(
            *gpu.cublas_handle().handle(),
            sys::cublasOperation_t::CUBLAS_OP_N,
            sys::cublasOperation_t::CUBLAS_OP_T,
            n as i32,
            m as i32,
            rows as i32,
            (&raw const alpha).cast(),
            address(b)? as *const _,
            half,
            n as i32,
            address(a)? as *const _,
            half,
            m as i32,
            (&raw const beta).cast(),
            c as *mut _,
            sys::cudaDataType_t::CUDA_R_32F,
            n as i32,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .map_err(|e| fail(&e))
}
