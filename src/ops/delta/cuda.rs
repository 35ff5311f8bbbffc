//! Gated DeltaNet on a GPU: kernels/delta.cu position by position, kernels/delta_step.cu in a captured step; chunks on tensor
//! cores are in [`super::chunks`].

use super::{chunks, DeltaArgs, DeltaLayer};
use crate::error::{Error, Result};
use crate::ops::cuda::{address, device, mirrored, uninitialised, Kernel, Launch};
use crate::spec::DeltaSpec;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::cuda_backend::CudaDevice;
use candle_core::{DType, Device, Tensor};

/// Largest dimension of a head.
const MOST: usize = 128;
/// Most positions of a captured step's convolution.
const TAPS: usize = 4;
/// Positions of a thread block of `delta_convolve`.
const POSITIONS: usize = 64;

/// `DeltaParams` of kernels/delta.cu.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Params {
    x: u64,
    z: u64,
    beta: u64,
    decay: u64,
    conv: u64,
    rate: u64,
    bias: u64,
    norm: u64,
    u: u64,
    ring: u64,
    state: u64,
    out: u64,
    tokens: i32,
    position: i32,
    key_heads: i32,
    value_heads: i32,
    key_dim: i32,
    value_dim: i32,
    kernel: i32,
    tiled: i32,
    eps: f32,
    pad: i32,
}
// SAFETY: numbers in C's layout.
unsafe impl DeviceRepr for Params {}
mirrored!(Params, 136, {
    x: 0, z: 8, beta: 16, decay: 24, conv: 32, rate: 40, bias: 48, norm: 56, u: 64, ring: 72, state: 80, out: 88,
    tokens: 96, position: 100, key_heads: 104, value_heads: 108, key_dim: 112, value_dim: 116, kernel: 120, tiled: 124,
    eps: 128, pad: 132,
});

/// `StepParams` of kernels/delta_step.cu.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct StepParams {
    x: u64,
    z: u64,
    beta: u64,
    decay: u64,
    conv: u64,
    rate: u64,
    bias: u64,
    norm: u64,
    ring: u64,
    state: u64,
    out: u64,
    at: u64,
    key_heads: i32,
    value_heads: i32,
    key_dim: i32,
    value_dim: i32,
    kernel: i32,
    tiled: i32,
    eps: f32,
    pad: i32,
}
// SAFETY: numbers in C's layout.
unsafe impl DeviceRepr for StepParams {}
mirrored!(StepParams, 128, {
    x: 0, z: 8, beta: 16, decay: 24, conv: 32, rate: 40, bias: 48, norm: 56, ring: 64, state: 72, out: 80, at: 88,
    key_heads: 96, value_heads: 100, key_dim: 104, value_dim: 108, kernel: 112, tiled: 116, eps: 120, pad: 124,
});

/// State of a layer on a GPU.
#[derive(Debug)]
pub struct GpuDelta {
    /// `S` of each value head, `[V, D_k, D_v]`, then the last inputs of the convolution, `[n, C]`, position `x` in row
    /// `x mod n`; f32.
    memory: Tensor,
    heads: usize,
}

impl GpuDelta {
    /// The state before the first position.
    ///
    /// # Errors
    /// Heads that the kernels do not take; too little memory.
    pub fn new(spec: &DeltaSpec, device: &Device) -> Result<Self> {
        if spec.key_dim > MOST || spec.value_dim > MOST {
            let heads = format!("heads of {} and {}; at most {MOST}", spec.key_dim, spec.value_dim);
            return Err(Error::unsupported("Gated DeltaNet on CUDA", heads));
        }
        let heads = spec.value_heads * spec.key_dim * spec.value_dim;
        Ok(Self { memory: Tensor::zeros(heads + spec.kernel * spec.channels(), DType::F32, device)?, heads })
    }

    /// A copy with memory of its own.
    pub fn copy(&self) -> Result<Self> {
        Ok(Self { memory: self.memory.copy()?, heads: self.heads })
    }

    /// All of it, f32.
    pub(crate) fn memory(&self) -> &Tensor {
        &self.memory
    }

    /// Addresses of the heads and of the ring.
    pub(super) fn addresses(&self) -> Result<(u64, u64)> {
        let heads = address(&self.memory)?;
        Ok((heads, heads + 4 * self.heads as u64))
    }
}

/// Whether [`step`] takes layers of this shape.
pub(crate) fn has_step(spec: &DeltaSpec) -> bool {
    spec.key_dim <= MOST && spec.value_dim <= MOST && spec.value_dim.is_multiple_of(4) && spec.kernel <= TAPS
}

/// Addresses of one position's inputs and output in a captured step, f32.
pub(crate) struct StepInputs {
    /// Queries, keys and values before the convolution, gate, step and decay, one after the other.
    pub inputs: u64,
    /// Output.
    pub out: u64,
    /// `DecodeState` of kernels/decode.cuh.
    pub at: u64,
}

/// The launch of one position in a captured step.
pub(crate) fn step(gpu: &CudaDevice, w: &DeltaLayer, state: &GpuDelta, io: &StepInputs) -> Result<Launch> {
    let s = &w.spec;
    let after = |elements: usize| io.inputs + 4 * elements as u64;
    let (heads, ring) = state.addresses()?;
    let p = StepParams {
        x: io.inputs,
        z: after(s.channels()),
        beta: after(s.channels() + s.value_width()),
        decay: after(s.channels() + s.value_width() + s.value_heads),
        conv: address(w.conv)?,
        rate: address(w.rate)?,
        bias: address(w.decay_bias)?,
        norm: address(w.norm.0)?,
        ring,
        state: heads,
        out: io.out,
        at: io.at,
        key_heads: s.key_heads as i32,
        value_heads: s.value_heads as i32,
        key_dim: s.key_dim as i32,
        value_dim: s.value_dim as i32,
        kernel: s.kernel as i32,
        tiled: w.tiled.into(),
        eps: w.norm.1,
        pad: 0,
    };
    Ok(Launch::new(Kernel::load(gpu, "delta_step", "delta_step".into())?, (s.value_heads, 1, 1), 512).with(p))
}

/// See `delta`: on tensor cores where the shape, type and number of positions allow it, else position by position in f32.
///
/// # Shapes
/// The result `[T, V D_v]`, in the inputs' type or f32.
///
/// # Errors
/// A tensor on another device; too little memory.
pub fn delta(args: &DeltaArgs, state: &mut GpuDelta) -> Result<Tensor> {
    args.check()?;
    match chunks::takes(args)? {
        true => chunks::delta(args, state),
        false => steps(args, state),
    }
}

/// Position by position, in f32.
pub(super) fn steps(args: &DeltaArgs, state: &mut GpuDelta) -> Result<Tensor> {
    let (w, s) = (&args.layer, &args.layer.spec);
    let (gpu, tokens) = (device(args.qkv)?, args.qkv.dim(0)?);
    let wide = |x: &Tensor| Ok::<_, Error>(x.to_dtype(DType::F32)?.contiguous()?);
    let (x, z, beta, decay) = (wide(args.qkv)?, wide(args.z)?, wide(args.beta)?, wide(args.decay)?);
    let u = uninitialised(gpu, DType::F32, (tokens, s.channels()))?;
    let out = uninitialised(gpu, DType::F32, (tokens, s.value_width()))?;
    let (heads, ring) = state.addresses()?;
    let p = Params {
        x: address(&x)?,
        z: address(&z)?,
        beta: address(&beta)?,
        decay: address(&decay)?,
        conv: address(w.conv)?,
        rate: address(w.rate)?,
        bias: address(w.decay_bias)?,
        norm: address(w.norm.0)?,
        u: address(&u)?,
        ring,
        state: heads,
        out: address(&out)?,
        tokens: tokens as i32,
        position: args.start as i32,
        key_heads: s.key_heads as i32,
        value_heads: s.value_heads as i32,
        key_dim: s.key_dim as i32,
        value_dim: s.value_dim as i32,
        kernel: s.kernel as i32,
        tiled: w.tiled.into(),
        eps: w.norm.1,
        pad: 0,
    };
    let columns = s.channels().div_ceil(256);
    let launches = [
        ("delta_convolve", (columns, tokens.div_ceil(POSITIONS), 1), 256),
        ("delta_keep", (columns, 1, 1), 256),
        ("delta_unit", ((2 * s.key_heads * tokens).div_ceil(8), 1, 1), 256),
        ("delta_scan", (s.value_heads, 1, 1), 1024),
    ];
    for (name, grid, threads) in launches {
        let launch = Launch::new(Kernel::load(gpu, "delta", name.into())?, grid, threads).with(p);
        // SAFETY: shapes are those of the layer, checked by `DeltaArgs::check`; frees are ordered after the launch on the
        // one stream.
        unsafe { launch.enqueue(false)? };
    }
    Ok(out)
}
