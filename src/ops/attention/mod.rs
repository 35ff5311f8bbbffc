//! One attention operator for every mixer: raw keys in a window, sinks, and routed summaries under one softmax.
//!
//! `out[t, h] = Σ_j softmax_j(scale · q[t, h] · k_j + bias_j) v_j` over the keys that query position `p = start + t` may read:
//!
//! - raw positions `left(p)..=p`, from the past (positions before `start`) and from the chunk itself;
//! - sinks `0..S` left of `left(p)`;
//! - the far rows routed to the query's block, each with a bias, against `q` or against `q_far`: summaries one by one, raw blocks
//!   as runs of rows.
//!
//! With an unbounded window this is dense causal attention; with a window alone it is sliding attention. Query head `h` reads
//! KV head `h / (H / G)`. Tiles carry `(m, l, o)` in f32 and merge exactly, as in FlashAttention (Dao et al. 2022,
//! arXiv:2205.14135); no `T x T` matrix is ever held.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
pub(crate) mod decode;
mod reference;

pub use reference::reference;

use crate::error::{Error, ErrorKind, Result};
use candle_core::Tensor;

/// Which raw positions a query reads: `left(p)..=p`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// All.
    Unbounded,
    /// The last so many, the query's own among them.
    Tokens(usize),
    /// The query's block and `count` blocks of `block` before it.
    Blocks {
        /// Positions per block.
        block: usize,
        /// Blocks before the query's own.
        count: usize,
    },
}

impl Window {
    /// Kind, size and count, as the kernels take a window (kernels/attention.cuh).
    #[cfg(feature = "cuda")]
    pub(crate) fn numbers(&self) -> (i32, i32, i32) {
        match *self {
            Self::Unbounded => (0, 0, 0),
            Self::Tokens(n) => (1, n as i32, 0),
            Self::Blocks { block, count } => (2, block as i32, count as i32),
        }
    }

    /// The first raw position that query position `p` reads. Never falls as `p` grows.
    pub fn left(&self, p: usize) -> usize {
        match *self {
            Self::Unbounded => 0,
            Self::Tokens(n) => (p + 1).saturating_sub(n),
            Self::Blocks { block, count } => (p / block).saturating_sub(count) * block,
        }
    }
}

/// Raw keys and values of positions before the chunk: position `x` lies in row `x % capacity`.
#[derive(Debug, Clone, Copy)]
pub struct Past<'a> {
    /// `[capacity, G, D]`.
    pub k: &'a Tensor,
    /// `[capacity, G, D]`.
    pub v: &'a Tensor,
}

/// Far rows as a block's queries see them: a summary, or the rows of a raw block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FarRow {
    /// First row of [`FarArgs::k`].
    pub row: usize,
    /// Rows from there on: 1 for a summary.
    pub count: usize,
    /// Added to the logit of each.
    pub bias: f32,
    /// Scored with `q_far` instead of `q`.
    pub far_query: bool,
    /// Query positions that see it: from this one,
    pub from: usize,
    /// up to, not including, this one.
    pub until: usize,
}

impl FarRow {
    /// `count` rows from `row` on, seen by every position of the block.
    pub fn run(row: usize, count: usize) -> Self {
        Self { row, count, bias: 0.0, far_query: false, from: 0, until: usize::MAX }
    }

    /// A summary in `row`.
    pub fn one(row: usize) -> Self {
        Self::run(row, 1)
    }
}

/// A store of far keys and values, and which of them each query block reads.
#[derive(Debug, Clone, Copy)]
pub struct FarArgs<'a> {
    /// `[R, G, D]`.
    pub k: &'a Tensor,
    /// `[R, G, D]`.
    pub v: &'a Tensor,
    /// Positions per query block.
    pub block: usize,
    /// Per query block, from the one that holds `start` on.
    pub routes: &'a [Vec<FarRow>],
}

/// Everything that a chunk's attention reads: f32 and contiguous on a CPU; of one type (f32, bf16 or f16), with heads and rows at
/// any stride, on a GPU.
#[derive(Debug, Clone, Copy)]
pub struct AttentionArgs<'a> {
    /// `[T, H, D]`, rotated for raw keys and for far rows that do not ask otherwise.
    pub q: &'a Tensor,
    /// `[T, H, D]`, rotated for far rows with `far_query`.
    pub q_far: Option<&'a Tensor>,
    /// The chunk's keys, `[T, G, D]`.
    pub k: &'a Tensor,
    /// The chunk's values, `[T, G, D]`.
    pub v: &'a Tensor,
    /// Position of the chunk's first token.
    pub start: usize,
    /// Keys before the chunk; must hold every position from the first query's left edge to `start`.
    pub past: Option<Past<'a>>,
    /// Keys and values of positions `0..count`, `[≥ count, G, D]`, and `count`.
    pub sinks: Option<(Past<'a>, usize)>,
    /// The raw window.
    pub window: Window,
    /// The far rows, by the store that holds them: summaries, raw blocks.
    pub far: &'a [FarArgs<'a>],
    /// Factor on the dot products.
    pub scale: f32,
}

impl AttentionArgs<'_> {
    /// `(T, H, G, D)`, after checking that the shapes agree.
    fn dims(&self) -> Result<(usize, usize, usize, usize)> {
        let (t, h, d) = self.q.dims3()?;
        let (tk, g, dk) = self.k.dims3()?;
        let fail = |m: String| Err(Error::new(ErrorKind::Backend, "attention", m));
        if (tk, dk) != (t, d) || g == 0 || !h.is_multiple_of(g) || self.v.dims() != self.k.dims() {
            return fail(format!("q {:?}, k {:?} and v {:?} do not fit", self.q.dims(), self.k.dims(), self.v.dims()));
        }
        if t == 0 || self.q_far.is_some_and(|q| q.dims() != self.q.dims()) {
            return fail(format!("no queries, or far queries of another shape than {:?}", self.q.dims()));
        }
        if matches!(self.window, Window::Blocks { block: 0, .. }) || self.far.iter().any(|f| f.block == 0) {
            return fail("blocks of 0".into());
        }
        if let Some((rows, count)) = self.sinks.filter(|(rows, count)| rows.k.dims()[0] < *count) {
            return fail(format!("{count} sinks in {} rows", rows.k.dims()[0]));
        }
        let far = self.far.iter().map(|f| Past { k: f.k, v: f.v });
        for p in self.past.into_iter().chain(self.sinks.map(|s| s.0)).chain(far) {
            if p.k.dims() != p.v.dims() || p.k.dims()[1..] != [g, d] {
                return fail(format!("stored keys {:?} and values {:?} do not fit", p.k.dims(), p.v.dims()));
            }
        }
        let left = self.window.left(self.start);
        let held = self.past.map_or(0, |p| p.k.dims()[0]);
        if left < self.start && self.start - left > held {
            return fail(format!("the window reaches back {} positions, the cache holds {held}", self.start - left));
        }
        for far in self.far {
            let blocks = (self.start + t - 1) / far.block - self.start / far.block + 1;
            let rows = far.k.dims()[0];
            let strange = |r: &FarRow| r.row + r.count > rows || (r.far_query && self.q_far.is_none());
            if far.routes.len() != blocks || far.routes.iter().flatten().any(strange) {
                return fail(format!("{} routes for {blocks} query blocks and {rows} far rows", far.routes.len()));
            }
        }
        Ok((t, h, g, d))
    }
}

/// Attention of one chunk, on the device that holds the queries.
///
/// # Shapes
/// See [`AttentionArgs`]; the result is `[T, H, D]`.
///
/// # Errors
/// Shapes that do not fit, an element type or a head dim (over 256 on a GPU) without a kernel.
pub fn attend(args: &AttentionArgs) -> Result<Tensor> {
    let dims = args.dims()?;
    #[cfg(feature = "cuda")]
    if args.q.device().is_cuda() {
        return cuda::attend(args, dims);
    }
    cpu::attend(args, dims)
}
