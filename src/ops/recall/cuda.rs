//! Launches `kernels/recall_*.cu`: a decode step of exact recall, and the codes of a prefill chunk.

use crate::error::Result;
use crate::ops::cuda::{multiprocessors, suffix, Kernel, Launch};
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::cuda_backend::CudaDevice;
use candle_core::DType;

/// Dynamic shared memory of a thread block at most, bytes.
const SHARED: usize = 227 << 10;
/// Fetching thread blocks of all KV heads together: 16 warps of four rows in flight each saturate the host link, and more
/// of them cost translations of host pages.
const FETCHERS: usize = 16;
/// Channels whose value codes one thread block decodes.
const CHANNELS: usize = 64;
/// `RECALL_HEADS` of kernels/recall.cuh: query heads of a KV head at most.
pub(crate) const MOST_HEADS: usize = 8;
/// `RECALL_LISTED` of kernels/recall.cuh.
pub(crate) const LISTED: usize = 4096;
/// Bytes of the map of a KV head that `recall_choose` holds in shared memory, at most: beside its list they fit an A100's.
const MAPPED: usize = 64 << 10;
/// `RECALL_COUNTERS` of kernels/recall.cuh.
pub(crate) const COUNTERS: usize = 16;
/// `RECALL_BINS` of kernels/recall.cuh.
pub(crate) const BINS: usize = 2048;

/// `RecallParams` of kernels/recall.cuh.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Recall {
    pub q: u64,
    pub near_lse: u64,
    pub near_out: u64,
    pub out: u64,
    pub key_codes: u64,
    pub value_codes: u64,
    pub codebook: u64,
    pub means: u64,
    pub mean: u64,
    pub scale: u64,
    pub fields: u64,
    pub first: u64,
    pub levels: u64,
    pub scores: u64,
    pub slices: u64,
    pub weights: u64,
    pub histogram: u64,
    pub listed: u64,
    pub chosen: u64,
    pub counts: u64,
    pub bitmap: u64,
    pub lowest: u64,
    pub mass: u64,
    pub store: u64,
    pub own_k: u64,
    pub own_v: u64,
    pub parts: u64,
    pub counters: u64,
    pub previous: u64,
    pub fetched: u64,
    pub redone: u64,
    pub state: u64,
    pub position: i32,
    pub ctx: i32,
    pub rows: i32,
    pub own_rows: i32,
    pub heads: i32,
    pub kv_heads: i32,
    pub dim: i32,
    pub bytes: i32,
    pub k: i32,
    pub slice_count: i32,
    pub fetchers: i32,
    pub rest_slices: i32,
    pub block: i32,
    pub blocks: i32,
    pub sinks: i32,
    pub window_kind: i32,
    pub window_size: i32,
    pub window_count: i32,
    pub store_type: i32,
    pub means_type: i32,
    pub factor: f32,
    pub read_mean: u64,
    pub read_scale: u64,
    pub read_codebook: u64,
}
// SAFETY: numbers in C's layout.
unsafe impl DeviceRepr for Recall {}
crate::ops::cuda::mirrored!(Recall, 368, {
    q: 0, near_lse: 8, near_out: 16, out: 24, key_codes: 32, value_codes: 40, codebook: 48, means: 56, mean: 64,
    scale: 72, fields: 80, first: 88, levels: 96, scores: 104, slices: 112, weights: 120, histogram: 128, listed: 136,
    chosen: 144, counts: 152, bitmap: 160, lowest: 168, mass: 176, store: 184, own_k: 192, own_v: 200, parts: 208,
    counters: 216, previous: 224, fetched: 232, redone: 240, state: 248, position: 256, ctx: 260, rows: 264,
    own_rows: 268, heads: 272, kv_heads: 276, dim: 280, bytes: 284, k: 288, slice_count: 292, fetchers: 296,
    rest_slices: 300, block: 304, blocks: 308, sinks: 312, window_kind: 316, window_size: 320, window_count: 324,
    store_type: 328, means_type: 332, factor: 336, read_mean: 344, read_scale: 352, read_codebook: 360,
});

/// `EncodeParams` of kernels/recall_encode.cu.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Encode {
    pub k: u64,
    pub v: u64,
    pub key_codes: u64,
    pub value_codes: u64,
    pub codebook: u64,
    pub mean: u64,
    pub scale: u64,
    pub fields: u64,
    pub first: u64,
    pub levels: u64,
    pub store: u64,
    pub means: u64,
    pub tokens: i32,
    pub start: i32,
    pub ctx: i32,
    pub kv_heads: i32,
    pub dim: i32,
    pub bytes: i32,
    pub dtype: i32,
    pub rows: i32,
    pub block: i32,
    pub blocks: i32,
    pub sinks: i32,
}
// SAFETY: numbers in C's layout.
unsafe impl DeviceRepr for Encode {}
crate::ops::cuda::mirrored!(Encode, 144, {
    k: 0, v: 8, key_codes: 16, value_codes: 24, codebook: 32, mean: 40, scale: 48, fields: 56, first: 64, levels: 72,
    store: 80, means: 88, tokens: 96, start: 100, ctx: 104, kv_heads: 108, dim: 112, bytes: 116, dtype: 120, rows: 124,
    block: 128, blocks: 132, sinks: 136,
});

/// `TextParams` of kernels/recall_text.cu.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Text {
    pub k: u64,
    pub v: u64,
    pub key_codes: u64,
    pub value_codes: u64,
    pub mean: u64,
    pub scale: u64,
    pub read_mean: u64,
    pub read_scale: u64,
    pub fields: u64,
    pub first: u64,
    pub levels: u64,
    pub lines: u64,
    pub read_codebook: u64,
    pub counts: u64,
    pub tokens: i32,
    pub start: i32,
    pub ctx: i32,
    pub kv_heads: i32,
    pub dim: i32,
    pub bytes: i32,
    pub dtype: i32,
    pub sinks: i32,
}
// SAFETY: numbers in C's layout.
unsafe impl DeviceRepr for Text {}
crate::ops::cuda::mirrored!(Text, 144, {
    k: 0, v: 8, key_codes: 16, value_codes: 24, mean: 32, scale: 40, read_mean: 48, read_scale: 56, fields: 64, first: 72,
    levels: 80, lines: 88, read_codebook: 96, counts: 104, tokens: 112, start: 116, ctx: 120, kv_heads: 124, dim: 128,
    bytes: 132, dtype: 136, sinks: 140,
});

/// The number of an element type in `Recall::store_type`, `Recall::means_type` and `Encode::dtype`.
///
/// # Errors
/// A type other than f32, bf16 and f16.
pub(crate) fn kind(dtype: DType) -> Result<i32> {
    suffix(dtype).map(|_| match dtype {
        DType::F32 => 0,
        DType::BF16 => 1,
        _ => 2,
    })
}

/// The launches of a layer's decode step, in order, cut over the thread blocks of a GPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Cut {
    /// Slices of `recall_scan`: `Recall::slices` is `[H, slices]`.
    pub slices: usize,
    /// `Recall::parts` is `[G, fetchers + rest_slices + 1, 8, D up to a multiple of 4, plus 4]`.
    pub fetchers: usize,
    /// 0 without a rest.
    pub rest_slices: usize,
    subsets: usize,
    heads: usize,
    multiprocessors: usize,
}

impl Cut {
    /// The cut for the shape in `p`, whose `value_codes` and `means` say what the rest is.
    pub fn new(gpu: &CudaDevice, p: &Recall) -> Result<Self> {
        Ok(Self::over(multiprocessors(gpu)?, p))
    }

    fn over(multiprocessors: usize, p: &Recall) -> Self {
        let (kv_heads, group) = (p.kv_heads as usize, (p.heads / p.kv_heads) as usize);
        let heads = if group <= 4 || scan_shared(p, 8) > SHARED { 4 } else { 8 };
        let subsets = if p.value_codes > 0 { (p.dim as usize).div_ceil(CHANNELS) } else { 1 };
        let fetchers = (FETCHERS / kv_heads).max(1);
        // A block of every KV head appends the token; the others are all resident at once.
        let slices = multiprocessors.saturating_sub(kv_heads) / (kv_heads * group.div_ceil(heads));
        let rest = multiprocessors.saturating_sub(kv_heads * fetchers) / (kv_heads * subsets);
        let any = p.value_codes > 0 || p.means > 0;
        Self {
            slices: slices.max(1),
            fetchers,
            rest_slices: if any { rest.clamp(1, 128) } else { 0 },
            subsets,
            heads,
            multiprocessors,
        }
    }

    /// Returns the four launches with the cut filled into `p`.
    ///
    /// # Errors
    /// A kernel that cannot be loaded.
    pub fn launches(&self, gpu: &CudaDevice, dtype: DType, mut p: Recall) -> Result<[Launch; 4]> {
        p.slice_count = self.slices as i32;
        p.fetchers = self.fetchers as i32;
        p.rest_slices = self.rest_slices as i32;
        p.store_type = kind(dtype)?;
        let (kv_heads, dim, ctx) = (p.kv_heads as usize, p.dim as usize, p.ctx as usize);
        let group = (p.heads / p.kv_heads) as usize;
        let length = length_of(&p).map_or("any".into(), |bytes| bytes.to_string());
        let scan = Kernel::load(gpu, "recall_scan", format!("recall_scan_{}_{length}", self.heads))?;
        let scan = scan.shared(scan_shared(&p, self.heads))?;
        let scan = Launch::new(scan, (self.slices + 1, kv_heads, group.div_ceil(self.heads)), 1024).with(p);
        let per_head = |blocks: usize, tokens: usize| (blocks / kv_heads).min(ctx.div_ceil(tokens)).max(1);
        let weigh = Kernel::load(gpu, "recall_choose", "recall_weigh".into())?;
        let weigh = Launch::new(weigh, (per_head(2 * self.multiprocessors, 4096), kv_heads, 1), 512).with(p);
        let mapped = Some(ctx / 8).filter(|bytes| *bytes <= MAPPED).unwrap_or(0);
        let choose = Kernel::load(gpu, "recall_choose", "recall_choose".into())?.shared(8 * LISTED + mapped)?;
        let choose = Launch::new(choose, (per_head(self.multiprocessors, 8192), kv_heads, 1), 1024).with(p);
        let any = !(dim * dtype.size_in_bytes()).is_multiple_of(16);
        let most = if any { 256 } else { [64, 128, 256].into_iter().find(|x| dim <= *x).unwrap_or(256) };
        let kind = if any { "any_8".into() } else { format!("{most}_{}", if group <= 4 { 4 } else { 8 }) };
        let threads = if most == 256 { 256 } else { 512 };
        let lanes = if most == 64 && dtype != DType::F32 { 16 } else { 32 };
        let rest = if p.value_codes > 0 { (128 << 10) + 64 * threads } else { 16 << 10 };
        let fetch =
            Kernel::load(gpu, &format!("recall_fetch_{most}"), format!("recall_fetch_{}_{kind}", suffix(dtype)?))?;
        let fetch = fetch.shared(rest.max(4 * (threads / lanes) * (group * (dim + 3) + 8)))?;
        let blocks = kv_heads * (self.fetchers + self.rest_slices * self.subsets);
        let fetch = Launch::new(fetch, (blocks, 1, 1), threads).with(p);
        Ok([scan, weigh, choose, fetch])
    }
}

/// Returns the bytes of a key code, where `recall_scan` has a kernel for that number.
fn length_of(p: &Recall) -> Option<i32> {
    Some(p.bytes).filter(|bytes| [8, 12, 16, 24, 32].contains(bytes))
}

/// Dynamic shared memory of `recall_scan` for `heads` heads to a thread block, bytes.
fn scan_shared(p: &Recall, heads: usize) -> usize {
    let (bytes, dim) = ((p.bytes as usize).next_multiple_of(4), p.dim as usize);
    match length_of(p) {
        Some(_) => 20 << 10,
        None => (bytes * 608 * heads + dim * heads * 4 + 4096).max(8192),
    }
}

/// Returns the launch that averages the values of the blocks that a chunk completes, if it completes any.
///
/// # Errors
/// A kernel that cannot be loaded.
pub(crate) fn means(gpu: &CudaDevice, p: Encode) -> Result<Option<Launch>> {
    let count = (p.start + p.tokens) / p.block - p.start / p.block;
    if count == 0 {
        return Ok(None);
    }
    let kernel = Kernel::load(gpu, "recall_encode", "recall_means".into())?;
    Ok(Some(Launch::new(kernel, (count as usize, p.kv_heads as usize, 1), 256).with(p)))
}

/// Returns the launch that encodes a prefill chunk.
///
/// # Errors
/// A kernel that cannot be loaded.
pub(crate) fn encode(gpu: &CudaDevice, p: Encode) -> Result<Launch> {
    let (dim, tokens) = (p.dim as usize, p.tokens as usize);
    let shared = 64 * (dim.max(16) + 1) * 4 + 64 * (p.bytes as usize).max(dim.div_ceil(16)) + 18432;
    let kernel = Kernel::load(gpu, "recall_encode", "recall_encode".into())?.shared(shared)?;
    Ok(Launch::new(kernel, (tokens.div_ceil(64), p.kv_heads as usize, 1), 256).with(p))
}

/// Returns the launches that refit what codes decode to, to a chunk that is coded: keys where `lines` is given, values
/// where `counts` is.
///
/// # Errors
/// A kernel that cannot be loaded; heads of more than 256 channels.
pub(crate) fn text(gpu: &CudaDevice, p: Text) -> Result<Vec<Launch>> {
    if p.dim > 256 {
        let message = format!("text takes heads of up to 256 channels on a GPU, not {}", p.dim);
        return Err(crate::error::Error::unsupported("--code-fit", message));
    }
    let kernel = |name: &str| Kernel::load(gpu, "recall_text", name.into());
    let (kv_heads, subs) = (p.kv_heads as usize, (p.dim as usize).div_ceil(crate::recall::SUB));
    let mut all = vec![];
    if p.lines > 0 {
        all.push(Launch::new(kernel("recall_text_keys")?, ((p.dim as usize).div_ceil(8), kv_heads, 1), 1024).with(p));
    }
    if p.counts > 0 {
        all.push(Launch::new(kernel("recall_text_values")?, (subs, kv_heads, 1), 256).with(p));
    }
    Ok(all)
}
