//! Launches of kernels/pair.cu: bf16, chunks of 16 or 128, heads of 64.

use super::{PairRope, PairShape, Partner};
use crate::error::{Error, Result};
use crate::ops::cuda::{address, device, mirrored, uninitialised, Kernel, Launch};
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{DType, Tensor};

const DIM: usize = 64;

/// `PairParams` of kernels/pair.cu.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Params {
    qkv: u64,
    out: u64,
    grad: u64,
    lse: u64,
    to: u64,
    far: u64,
    rope: u64,
    heads: i32,
    chunks: i32,
    distance: i32,
    kind: i32,
}
// SAFETY: numbers in C's layout.
unsafe impl DeviceRepr for Params {}
mirrored!(Params, 72, {
    qkv: 0, out: 8, grad: 16, lse: 24, to: 32, far: 40, rope: 48, heads: 56, chunks: 60, distance: 64, kind: 68,
});

/// Refuses what the kernels do not take, by name.
pub(super) fn check(shape: PairShape, tensors: &[&Tensor]) -> Result<()> {
    let refuse = |what: String| Err(Error::unsupported("training on CUDA", what));
    if shape.dim != DIM || !matches!(shape.chunk, 16 | 128) {
        return refuse(format!("heads of {} in chunks of {}; it takes 64 in 16 or 128", shape.dim, shape.chunk));
    }
    match tensors.iter().find(|t| t.dtype() != DType::BF16 || !t.is_contiguous()) {
        Some(t) => refuse(format!("{:?}, which is not contiguous bf16", t)),
        None => Ok(()),
    }
}

fn params(shape: PairShape, partner: Partner, rope: &PairRope) -> Result<Params> {
    Ok(Params {
        rope: address(rope.tables())?,
        heads: shape.heads as i32,
        chunks: shape.chunks as i32,
        distance: partner.distance() as i32,
        kind: match partner {
            Partner::Shift(_) => 0,
            Partner::Summary(_) => 1,
            Partner::Xor(_) => 2,
        },
        ..Params::default()
    })
}

/// A kernel with a thread block for each chunk and head.
fn by_chunk(like: &Tensor, shape: PairShape, partner: Partner, name: &str, shared: usize) -> Result<Launch> {
    let suffix = if partner.is_summary() { "_mean" } else { "" };
    let kernel = Kernel::load(device(like)?, "pair", format!("{name}_{}{suffix}", shape.chunk))?.shared(shared)?;
    Ok(Launch::new(kernel, (shape.chunks, shape.heads, shape.batch), 2 * shape.chunk))
}

pub(super) fn forward(qkv: &Tensor, s: PairShape, partner: Partner, rope: &PairRope) -> Result<(Tensor, Tensor)> {
    check(s, &[qkv])?;
    let gpu = device(qkv)?;
    let out = uninitialised(gpu, DType::BF16, (s.rows(), s.width()))?;
    let lse = uninitialised(gpu, DType::F32, (s.rows(), s.heads))?;
    let mut p = params(s, partner, rope)?;
    (p.qkv, p.to, p.lse) = (address(qkv)?, address(&out)?, address(&lse)?);
    // Four tiles of a chunk.
    let launch = by_chunk(qkv, s, partner, "pair_forward", 4 * s.chunk * DIM * 2)?.with(p);
    // SAFETY: shapes were checked; frees are ordered after the launch on the one stream.
    unsafe { launch.enqueue(false)? };
    Ok((out, lse))
}

pub(super) fn backward(
    qkv: &Tensor,
    (out, lse): (&Tensor, &Tensor),
    grad: &Tensor,
    s: PairShape,
    partner: Partner,
    rope: &PairRope,
) -> Result<Tensor> {
    check(s, &[qkv, out, grad])?;
    let gpu = device(qkv)?;
    let d_qkv = uninitialised(gpu, DType::BF16, qkv.shape())?;
    let far = uninitialised(gpu, DType::F32, (s.rows(), s.width()))?;
    let mut p = params(s, partner, rope)?;
    (p.qkv, p.out, p.grad, p.lse) = (address(qkv)?, address(out)?, address(grad)?, address(lse)?);
    (p.to, p.far) = (address(&d_qkv)?, address(&far)?);
    // Four tiles, scores' gradients in rows of B + 8, two numbers a query, and two a channel.
    let shared = 4 * s.chunk * DIM * 2 + s.chunk * (s.chunk + 8) * 2 + 2 * s.chunk * 4 + 2 * DIM * 4;
    let backward = by_chunk(qkv, s, partner, "pair_backward", shared)?.with(p);
    let finish = Kernel::load(gpu, "pair", format!("pair_finish_{}", s.chunk))?;
    let blocks = (s.rows() * s.width() / 8).div_ceil(256).min(1024);
    let finish = Launch::new(finish, (blocks, 1, 1), 256).with(p).with(s.rows() as i32);
    // SAFETY: as in `forward`; `finish` reads the rows of `far` that `backward` wrote.
    unsafe {
        backward.enqueue(false)?;
        finish.enqueue(false)?;
    }
    Ok(d_qkv)
}
