//! One attention operator for every mixer: segments of keys and values under one softmax.
//!
//! `out[t, h] = Σ_j softmax_j(scale · q[t, h] · k_j + bias_j) v_j` over the keys that query position `p = start + t`
//! may read, segment by segment ([`Segment`]):
//!
//! | segment | keys that `p` reads |
//! |---|---|
//! | chunk | positions `max(left(p), start)..=p` |
//! | ring | positions `left(p)..start`, position `x` in row `x % capacity` |
//! | sinks | positions `0..S` left of `left(p)` |
//! | store | rows that a list names: on the host per query block, or a table on the device per KV head and query block (or query) |
//!
//! The log-sum-exp of each query's logits comes with the output where it is asked for: partial results over disjoint
//! segments merge exactly ([`merge`]), and the backward pass needs it. A query that reads nothing has output 0 and
//! log-sum-exp `-∞`.
//!
//! Queries `[B, T, H, D]` are a batch: every tensor of the segments then has the same leading axis, positions and host
//! lists are shared, and the results are stacked. Items run one after the other, a kernel launch each; rows in host
//! memory take no batch.
//!
//! With an unbounded window chunk and ring are dense causal attention; with a window they are sliding attention. Query
//! head `h` reads KV head `h / (H / G)`. Tiles carry `(m, l, o)` in f32 and merge exactly, as in FlashAttention (Dao et
//! al. 2022, arXiv:2205.14135); no `T x T` matrix exists.

mod batch;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(feature = "cuda")]
pub(crate) mod decode;
mod merge;
mod reference;

pub use merge::merge;
#[cfg(feature = "cuda")]
pub use merge::RunningAttention;
pub use reference::reference;

use crate::error::{Error, ErrorKind, Result};
use candle_core::{DType, Tensor};

/// Which raw positions a query reads: `left(p)..=p`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// Every position.
    Unbounded,
    /// This many, ending with the query's own.
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

/// Keys and values in rows.
#[derive(Debug, Clone, Copy)]
pub struct KeyValues<'a> {
    /// `[rows, G, D]`.
    pub k: &'a Tensor,
    /// `[rows, G, D]`.
    pub v: &'a Tensor,
}

/// Rows of a store as a block's queries see them: a summary, or the rows of a raw block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FarRow {
    /// First row.
    pub row: usize,
    /// Rows from there on: 1 for a summary.
    pub count: usize,
    /// Added to the logit of each.
    pub bias: f32,
    /// First query position that sees it.
    pub from: usize,
    /// First query position that no longer does.
    pub until: usize,
}

impl FarRow {
    /// `count` rows from `row` on, seen by every position of the block.
    pub const fn run(row: usize, count: usize) -> Self {
        Self { row, count, bias: 0.0, from: 0, until: usize::MAX }
    }

    /// A summary in `row`.
    pub const fn one(row: usize) -> Self {
        Self::run(row, 1)
    }
}

/// Which rows of a store each query reads.
#[derive(Debug, Clone, Copy)]
pub enum RowList<'a> {
    /// Lists on the host, per query block of `block` positions from the one that holds `start` on.
    Blocks {
        /// Positions per query block.
        block: usize,
        /// Rows per query block.
        rows: &'a [Vec<FarRow>],
    },
    /// A table on the device of the queries, per KV head and query block: u32 `[G, blocks, n]`, [`NO_ROW`] where there
    /// is none. With blocks of 1 each query has rows of its own.
    Table {
        /// Positions per query block.
        block: usize,
        /// Row numbers.
        index: &'a Tensor,
    },
}

/// An entry of a table that names no row.
pub const NO_ROW: u32 = u32::MAX;

/// Where the rows of a store lie.
#[derive(Debug, Clone, Copy)]
pub enum StoreRows<'a> {
    /// On the device of the queries, `[R, G, D]`.
    Tensors(KeyValues<'a>),
    /// In pinned host memory, read in place by a GPU.
    #[cfg(feature = "cuda")]
    Host(&'a crate::ops::HostRows),
}

impl StoreRows<'_> {
    /// `(R, G, D)`, of keys and of values.
    fn dims(&self) -> Result<(usize, usize, usize)> {
        match self {
            Self::Tensors(rows) if rows.k.dims() == rows.v.dims() => Ok(rows.k.dims3()?),
            Self::Tensors(rows) => fail(format!("keys {:?} and values {:?} differ", rows.k.dims(), rows.v.dims())),
            #[cfg(feature = "cuda")]
            Self::Host(rows) => Ok(rows.dims()),
        }
    }
}

/// Rows beside the raw positions, and who reads them.
#[derive(Debug, Clone, Copy)]
pub struct Store<'a> {
    /// Keys and values.
    pub rows: StoreRows<'a>,
    /// The rows that each query reads.
    pub read: RowList<'a>,
    /// Queries that score these rows in place of the call's, such as queries rotated to another position.
    pub q: Option<&'a Tensor>,
}

/// Some of the keys and values that a chunk attends to.
#[derive(Debug, Clone, Copy)]
pub enum Segment<'a> {
    /// The chunk's own, `[T, G, D]`.
    Chunk(KeyValues<'a>),
    /// Positions before the chunk; must hold every position from the first query's left edge to `start`.
    Ring(KeyValues<'a>),
    /// Positions `0..count`, `[≥ count, G, D]`, and `count`.
    Sinks(KeyValues<'a>, usize),
    /// Rows that a list names.
    Store(Store<'a>),
}

/// A chunk's queries and the segments that they read: f32 and contiguous on a CPU; of one type (f32, bf16 or f16), with
/// heads and rows at any stride, on a GPU. At most one chunk, one ring and one list of sinks; any number of stores.
#[derive(Debug, Clone, Copy)]
pub struct AttentionArgs<'a> {
    /// `[T, H, D]` or `[B, T, H, D]`, rotated.
    pub q: &'a Tensor,
    /// Position of the chunk's first token.
    pub start: usize,
    /// The raw positions of chunk and ring that a query reads; sinks are read left of it.
    pub window: Window,
    /// Factor on the dot products.
    pub scale: f32,
    /// Keys and values under one softmax.
    pub segments: &'a [Segment<'a>],
    /// Whether the log-sum-exp is wanted.
    pub lse: bool,
}

/// The result of attention.
#[derive(Debug, Clone)]
pub struct Attended {
    /// As the queries in shape and type.
    pub out: Tensor,
    /// f32 `[T, H]` or `[B, T, H]`: `ln Σ_j exp(logit_j)`, `-∞` where a query reads nothing.
    pub lse: Option<Tensor>,
}

/// The segments of a call by kind.
#[derive(Debug, Clone)]
pub(super) struct Parts<'a> {
    pub chunk: Option<KeyValues<'a>>,
    pub ring: Option<KeyValues<'a>>,
    pub sinks: Option<(KeyValues<'a>, usize)>,
    pub stores: Vec<Store<'a>>,
    /// `(T, H, G, D)`.
    pub dims: (usize, usize, usize, usize),
    /// Type of the queries.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    pub dtype: DType,
}

fn fail<T>(message: String) -> Result<T> {
    Err(Error::new(ErrorKind::Backend, "attention", message))
}

impl<'a> AttentionArgs<'a> {
    /// Sorts the segments by kind, after checking that the shapes agree.
    pub(super) fn parts(&self) -> Result<Parts<'a>> {
        let (t, h, d) = self.q.dims3()?;
        let (mut chunk, mut ring, mut sinks, mut stores) = (None, None, None, vec![]);
        let mut kv_heads = None;
        for segment in self.segments {
            let (rows, twice) = match segment {
                Segment::Chunk(rows) => (StoreRows::Tensors(*rows), chunk.replace(*rows).is_some()),
                Segment::Ring(rows) => (StoreRows::Tensors(*rows), ring.replace(*rows).is_some()),
                Segment::Sinks(rows, count) => (StoreRows::Tensors(*rows), sinks.replace((*rows, *count)).is_some()),
                Segment::Store(store) => {
                    stores.push(*store);
                    (store.rows, false)
                }
            };
            let (_, g, dk) = rows.dims()?;
            if twice {
                return fail("two segments of a kind that there is one of".into());
            }
            if dk != d || *kv_heads.get_or_insert(g) != g {
                return fail(format!("rows of {g} KV heads of {dk} do not fit queries of heads of {d}"));
            }
        }
        let Some(g) = kv_heads else { return fail("nothing to attend to".into()) };
        if t == 0 || g == 0 || !h.is_multiple_of(g) {
            return fail(format!("{t} queries of {h} heads over {g} KV heads"));
        }
        let parts = Parts { chunk, ring, sinks, stores, dims: (t, h, g, d), dtype: self.q.dtype() };
        self.check(&parts)?;
        Ok(parts)
    }

    fn check(&self, parts: &Parts) -> Result<()> {
        let (t, _, g, _) = parts.dims;
        if matches!(self.window, Window::Blocks { block: 0, .. }) {
            return fail("blocks of 0".into());
        }
        if let Some(c) = parts.chunk.filter(|c| c.k.dims()[0] != t) {
            return fail(format!("{t} queries, and keys of a chunk of {}", c.k.dims()[0]));
        }
        if let Some((rows, count)) = parts.sinks.filter(|(rows, count)| rows.k.dims()[0] < *count) {
            return fail(format!("{count} sinks in {} rows", rows.k.dims()[0]));
        }
        let left = self.window.left(self.start);
        // Where the chunk alone is attended to, nothing before it is.
        let held = parts.ring.map_or(0, |r| r.k.dims()[0]);
        if parts.chunk.is_some() && left < self.start && self.start - left > held {
            return fail(format!("the window reaches back {} positions, the cache holds {held}", self.start - left));
        }
        for store in &parts.stores {
            if store.q.is_some_and(|q| q.dims() != self.q.dims()) {
                return fail(format!("queries of a store of another shape than {:?}", self.q.dims()));
            }
            let stored = store.rows.dims()?.0;
            let blocks = |block: usize| match block {
                0 => fail("query blocks of 0".into()),
                _ => Ok((self.start + t - 1) / block - self.start / block + 1),
            };
            match store.read {
                RowList::Blocks { block, rows } => {
                    let blocks = blocks(block)?;
                    if rows.len() != blocks || rows.iter().flatten().any(|r| r.row + r.count > stored) {
                        return fail(format!("{} lists for {blocks} query blocks and {stored} rows", rows.len()));
                    }
                }
                RowList::Table { block, index } => {
                    let (heads, listed, _) = index.dims3()?;
                    if (heads, listed, index.dtype()) != (g, blocks(block)?, DType::U32) {
                        return fail(format!("a table {:?} of {:?} for {g} KV heads", index.dims(), index.dtype()));
                    }
                }
            }
        }
        Ok(())
    }
}

/// Attention of one chunk, on the device that holds the queries.
///
/// # Shapes
/// See [`AttentionArgs`] and [`Attended`].
///
/// # Errors
/// Shapes that do not fit; an element type, a head dim (over 256 on a GPU) or a combination of segments without a
/// kernel.
pub fn attend(args: &AttentionArgs) -> Result<Attended> {
    batch::each(args, attend_one)
}

fn attend_one(args: &AttentionArgs) -> Result<Attended> {
    let parts = args.parts()?;
    #[cfg(feature = "cuda")]
    if args.q.device().is_cuda() {
        return cuda::attend(args, &parts);
    }
    cpu::attend(args, &parts)
}
