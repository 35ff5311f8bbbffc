//! Gated DeltaNet over many positions on a GPU's tensor cores: kernels/delta_chunks.cu.

use super::{cuda::GpuDelta, DeltaArgs};
use crate::error::Result;
use crate::ops::cuda::{
    address, device, mirrored, multiprocessors, shared_limit, suffix, uninitialised, Kernel, Launch,
};
use crate::spec::DeltaSpec;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{DType, Tensor};

/// Positions of a piece.
const PIECE: usize = 64;
/// Dimension of heads.
const DIM: usize = 128;
/// Positions computed at once: bounds the scratch. Longer segments are 10% faster (kernels/README.md).
const SEGMENT: usize = 2048;
/// Fewest positions for which pieces are faster than steps.
const LEAST: usize = 16;
/// Columns of a state to a thread block of `delta_states`, and its threads.
const COLUMNS: usize = 32;
const THREADS: usize = 128;
/// Shared memory of the kernels, bytes: the sizes of their structs.
const PREPARE: usize = 2 * PIECE * 136 * 2 + PIECE * 68 * 4 + 2 * PIECE * 4;
const STAGE: usize = 2 * (PIECE * 136 + PIECE * 72 + PIECE * 40) + PIECE * 4;
const OUTPUTS: usize = 2 * (PIECE * 136 + PIECE * 72) + DIM / 16 * PIECE * 4;

/// `ChunkParams` of kernels/delta_chunks.cu.
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
    q: u64,
    k: u64,
    v: u64,
    m: u64,
    a: u64,
    u: u64,
    before: u64,
    sums: u64,
    ring: u64,
    state: u64,
    out: u64,
    start: i32,
    length: i32,
    position: i32,
    key_heads: i32,
    value_heads: i32,
    tiled: i32,
    eps: f32,
    pad: i32,
}
// SAFETY: numbers in C's layout.
unsafe impl DeviceRepr for Params {}
mirrored!(Params, 184, {
    x: 0, z: 8, beta: 16, decay: 24, conv: 32, rate: 40, bias: 48, norm: 56, q: 64, k: 72, v: 80, m: 88, a: 96, u: 104,
    before: 112, sums: 120, ring: 128, state: 136, out: 144, start: 152, length: 156, position: 160, key_heads: 164,
    value_heads: 168, tiled: 172, eps: 176, pad: 180,
});

/// Elements of 16 bits of each scratch buffer of a segment: q, k, v, m, a, u, states; the sums of logarithms are f32.
fn elements(s: &DeltaSpec, positions: usize) -> [usize; 8] {
    let rows = positions.next_multiple_of(PIECE);
    let (key, value) = (rows * s.key_heads * DIM, rows * s.value_heads * DIM);
    let square = rows * s.value_heads * PIECE;
    [key, key, value, square, square, value, rows / PIECE * s.value_heads * DIM * DIM, 2 * rows * s.value_heads]
}

/// Device memory that a chunk takes at most besides its inputs and outputs, bytes.
pub(super) fn scratch(s: &DeltaSpec) -> u64 {
    2 * elements(s, SEGMENT).iter().sum::<usize>() as u64
}

/// Whether the kernels take layers of this shape.
pub(super) fn fits(s: &DeltaSpec) -> bool {
    (s.key_dim, s.value_dim, s.kernel) == (DIM, DIM, 4)
}

/// Whether [`delta`] takes these inputs; others go position by position.
pub(super) fn takes(args: &DeltaArgs) -> Result<bool> {
    let (s, dtype) = (&args.layer.spec, args.qkv.dtype());
    let inputs = [args.qkv, args.z, args.beta, args.decay];
    Ok(fits(s)
        && matches!(dtype, DType::BF16 | DType::F16)
        && inputs.iter().all(|x| x.dtype() == dtype && x.is_contiguous())
        && args.qkv.dim(0)? >= LEAST
        && shared_limit(device(args.qkv)?)? >= 2 * STAGE)
}

/// See [`super::delta`]; factors of products are rounded to the inputs' type, sums and the state are f32.
pub(super) fn delta(args: &DeltaArgs, state: &mut GpuDelta) -> Result<Tensor> {
    let (w, s) = (&args.layer, &args.layer.spec);
    let (gpu, tokens, dtype) = (device(args.qkv)?, args.qkv.dim(0)?, args.qkv.dtype());
    let room = elements(s, tokens.min(SEGMENT)).map(|n| uninitialised(gpu, dtype, n));
    let room = room.into_iter().collect::<Result<Vec<_>>>()?;
    let out = uninitialised(gpu, dtype, (tokens, s.value_width()))?;
    let (heads, ring) = state.addresses()?;
    let mut p = Params {
        x: address(args.qkv)?,
        z: address(args.z)?,
        beta: address(args.beta)?,
        decay: address(args.decay)?,
        conv: address(w.conv)?,
        rate: address(w.rate)?,
        bias: address(w.decay_bias)?,
        norm: address(w.norm.0)?,
        q: address(&room[0])?,
        k: address(&room[1])?,
        v: address(&room[2])?,
        m: address(&room[3])?,
        a: address(&room[4])?,
        u: address(&room[5])?,
        before: address(&room[6])?,
        sums: address(&room[7])?,
        ring,
        state: heads,
        out: address(&out)?,
        position: args.start as i32,
        key_heads: s.key_heads as i32,
        value_heads: s.value_heads as i32,
        tiled: w.tiled.into(),
        eps: w.norm.1,
        ..Params::default()
    };
    // Four pieces ahead with one thread block to a multiprocessor, two with two.
    let blocks = s.value_heads * DIM / COLUMNS;
    let ahead = if blocks > multiprocessors(gpu)? || shared_limit(gpu)? < 4 * STAGE { 2 } else { 4 };
    let name = suffix(dtype)?;
    let launch =
        |kernel: &str, end: &str, grid: (usize, usize), (threads, shared): (usize, usize), p: Params| -> Result<()> {
            let kernel = Kernel::load(gpu, "delta_chunks", format!("delta_{kernel}_{name}{end}"))?.shared(shared)?;
            let launch = Launch::new(kernel, (grid.0, grid.1, 1), threads).with(p);
            // SAFETY: shapes are those of the layer, checked by `DeltaArgs::check` and `takes`; frees are ordered after the
            // launch on the one stream.
            unsafe { launch.enqueue(false) }
        };
    for start in (0..tokens).step_by(SEGMENT) {
        (p.start, p.length) = (start as i32, SEGMENT.min(tokens - start) as i32);
        let pieces = SEGMENT.min(tokens - start).div_ceil(PIECE);
        launch("prepare", "", (pieces, s.key_heads), (256, PREPARE), p)?;
        launch("states", &format!("_{ahead}"), (blocks, 1), (THREADS, ahead * STAGE), p)?;
        launch("outputs", "", (pieces, s.value_heads), (256, OUTPUTS), p)?;
    }
    (p.start, p.length) = (0, tokens as i32);
    launch("keep", "", (s.channels().div_ceil(256), 1), (256, 0), p)?;
    Ok(out)
}
