//! Launches `kernels/attention_hopper.cu` on compute capability 9.0, `attention_prefill.cu` elsewhere,
//! `attention_decode.cu` for one token, and `attention_any.cu` for f32 and head dims that are no multiple of 8.

use super::decode::{Cut, DecodeAttention};
use super::{Attended, AttentionArgs, FarRow, KeyValues, Parts, RowList, Store, StoreRows, Window};
use crate::error::{Error, ErrorKind, Result};
use crate::ops::cuda::{address, address_or_null, device, is_hopper, suffix, uninitialised, upload, Kernel, Launch};
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::{DType, Tensor};

/// Positions per list of extra rows: `EXTRA_TILE` in kernels/attention.cuh.
const EXTRA_TILE: usize = 128;
/// Rows of a piece at most: `PIECE` in kernels/attention.cuh.
const PIECE: usize = 16;
/// Largest head dim of the kernels.
const LARGEST: usize = 256;

/// `Extra` of kernels/attention.cuh.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
struct Extra {
    k: u64,
    v: u64,
    bias: f32,
    from: i32,
    until: i32,
    far_query: i32,
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for Extra {}
crate::ops::cuda::mirrored!(Extra, 32, {
    k: 0, v: 8, bias: 16, from: 20, until: 24, far_query: 28,
});

/// `Piece` of kernels/attention.cuh.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
struct Piece {
    k: u64,
    v: u64,
    bias: f32,
    from: i32,
    until: i32,
    rows: i32,
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for Piece {}
crate::ops::cuda::mirrored!(Piece, 32, {
    k: 0, v: 8, bias: 16, from: 20, until: 24, rows: 28,
});

/// `AttentionParams` of kernels/attention.cuh.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Params {
    q: u64,
    q_far: u64,
    k: u64,
    v: u64,
    past_k: u64,
    past_v: u64,
    out: u64,
    extras: u64,
    extra_offsets: u64,
    far_offsets: u64,
    pieces: u64,
    piece_offsets: u64,
    lse: u64,
    q_row: i64,
    q_head: i64,
    k_row: i64,
    k_head: i64,
    v_row: i64,
    v_head: i64,
    past_row: i64,
    past_head: i64,
    tokens: i32,
    start: i32,
    heads: i32,
    kv_heads: i32,
    dim: i32,
    capacity: i32,
    window_kind: i32,
    window_size: i32,
    window_count: i32,
    scale: f32,
}

// SAFETY: plain numbers in C's layout.
unsafe impl DeviceRepr for Params {}
crate::ops::cuda::mirrored!(Params, 208, {
    q: 0, q_far: 8, k: 16, v: 24, past_k: 32, past_v: 40, out: 48, extras: 56, extra_offsets: 64, far_offsets: 72,
    pieces: 80, piece_offsets: 88, lse: 96, q_row: 104, q_head: 112, k_row: 120, k_head: 128, v_row: 136, v_head: 144,
    past_row: 152, past_head: 160, tokens: 168, start: 172, heads: 176, kv_heads: 180, dim: 184, capacity: 188,
    window_kind: 192, window_size: 196, window_count: 200, scale: 204,
});

/// The kernel's shape for a head dim: as in the `TYPES` lines of kernels/attention_prefill.cu.
struct Shape {
    dim: usize,
    keys: usize,
    threads: usize,
    shared_row: usize,
}

const SHAPES: [Shape; 4] = [
    Shape { dim: 64, keys: 64, threads: 128, shared_row: 64 },
    Shape { dim: 96, keys: 64, threads: 128, shared_row: 128 },
    Shape { dim: 128, keys: 64, threads: 128, shared_row: 128 },
    Shape { dim: 256, keys: 32, threads: 256, shared_row: 256 },
];
/// The shape of `attention_hopper`: as in the `TYPES` lines of kernels/attention_hopper.cu.
struct Hopper {
    dim: usize,
    keys: usize,
    stages: usize,
    shared_row: usize,
}

impl Hopper {
    /// `SHARED` there: queries, rings of keys and of values, 16 extra rows of both, barriers, alignment.
    fn shared(&self) -> usize {
        (QUERIES + 2 * self.stages * self.keys + 32) * self.shared_row * 2 + (4 * self.stages + 2) * 8 + 1024
    }
}

const HOPPER: [Hopper; 4] = [
    Hopper { dim: 64, keys: 128, stages: 2, shared_row: 64 },
    Hopper { dim: 96, keys: 128, stages: 2, shared_row: 128 },
    Hopper { dim: 128, keys: 96, stages: 2, shared_row: 128 },
    Hopper { dim: 256, keys: 64, stages: 2, shared_row: 256 },
];
/// Query positions per tile, in every shape.
const QUERIES: usize = 128;

pub(super) fn attend(args: &AttentionArgs, parts: &Parts) -> Result<Attended> {
    let (t, h, g, d) = parts.dims;
    let (gpu, dtype) = (device(args.q)?, args.q.dtype());
    if d > LARGEST {
        return Err(Error::unsupported("attention", format!("head dim {d}; the kernels go up to {LARGEST}")));
    }
    let q_far = far_queries(parts)?;
    let rows = |x: &Tensor| (x.stride()[0] as i64, x.stride()[1] as i64);
    let ([k, v], [past_k, past_v]) = (pair(parts.chunk), pair(parts.ring));
    let strides_of = |x: Option<&Tensor>| x.map_or((0, 0), rows);
    let (q_row, q_head) = rows(args.q);
    let ((k_row, k_head), (v_row, v_head), (past_row, past_head)) = (strides_of(k), strides_of(v), strides_of(past_k));
    if let Some(x) = [q_far, k, v, past_k, past_v].into_iter().flatten().find(|x| x.dtype() != dtype) {
        return Err(Error::new(ErrorKind::Backend, "attention", format!("q is {dtype:?}, keys are {:?}", x.dtype())));
    }
    if q_far.is_some_and(|x| rows(x) != (q_row, q_head)) || strides_of(past_v) != (past_row, past_head) {
        return Err(Error::new(ErrorKind::Backend, "attention", "paired tensors differ in their strides"));
    }
    let name = suffix(dtype)?;
    // 16-byte loads need rows and heads at multiples of 8 elements.
    let strides = [q_row, q_head, k_row, k_head, v_row, v_head, past_row, past_head];
    let wide = dtype != DType::F32 && d.is_multiple_of(8) && strides.iter().all(|s| s % 8 == 0);
    let dense = [Some(args.q), k, v, past_k].into_iter().flatten().all(|x| x.is_contiguous());
    let one_token = wide && t == 1 && q_far.is_none() && dense;
    let table = table_of(parts)?;
    if table.is_some() && !one_token {
        let message = "a table of rows is read by one 16-bit query at a time, with head dims of a multiple of 8";
        return Err(Error::unsupported("attention", message));
    }
    // The portable tiled kernel needs the chunk's own keys.
    let tiled = wide && k.is_some();
    let past_alone = wide && past_k.is_some() && parts.stores.is_empty() && parts.sinks.is_none();
    let hopper = HOPPER
        .iter()
        .find(|s| d <= s.dim)
        .filter(|_| (tiled || past_alone) && !one_token && q_far.is_none() && is_hopper(gpu));
    // Only this kernel reads runs of rows as pieces.
    let extras = Extras::of(args, parts, hopper.is_some())?;
    let on_device = match extras.rows.is_empty() {
        true => None,
        false => Some((upload(gpu, &extras.rows)?, upload(gpu, &extras.offsets)?, upload(gpu, &extras.far_offsets)?)),
    };
    let pieces = match extras.pieces.is_empty() {
        true => None,
        false => Some((upload(gpu, &extras.pieces)?, upload(gpu, &extras.piece_offsets)?)),
    };
    let (window_kind, window_size, window_count) = args.window.numbers();
    let out = uninitialised(gpu, dtype, (t, h, d))?;
    let lse = args.lse.then(|| uninitialised(gpu, DType::F32, (t, h))).transpose()?;
    let params = Params {
        q: address(args.q)?,
        q_far: address_or_null(q_far)?,
        k: address_or_null(k)?,
        v: address_or_null(v)?,
        // The tiled kernels form addresses of a ring even where it holds no position.
        past_k: address_or_null(past_k.or(k.filter(|_| tiled)))?,
        past_v: address_or_null(past_v.or(v.filter(|_| tiled)))?,
        out: address(&out)?,
        extras: on_device.as_ref().map_or(0, |(rows, ..)| rows.address),
        extra_offsets: on_device.as_ref().map_or(0, |(_, near, _)| near.address),
        far_offsets: on_device.as_ref().map_or(0, |(.., far)| far.address),
        pieces: pieces.as_ref().map_or(0, |(rows, _)| rows.address),
        piece_offsets: pieces.as_ref().map_or(0, |(_, offsets)| offsets.address),
        lse: address_or_null(lse.as_ref())?,
        q_row,
        q_head,
        k_row,
        k_head,
        v_row,
        v_head,
        past_row,
        past_head,
        tokens: t as i32,
        start: args.start as i32,
        heads: h as i32,
        kv_heads: g as i32,
        dim: d as i32,
        capacity: past_k.map_or(1, |k| k.dims()[0]) as i32,
        window_kind,
        window_size,
        window_count,
        scale: args.scale,
    };
    if one_token {
        one(args, parts, &params, extras.rows.len(), table)?;
        return Ok(Attended { out, lse });
    }
    if !tiled && hopper.is_none() {
        let kernel = Kernel::load(gpu, "attention_any", format!("attention_any_{name}"))?;
        // SAFETY: the addresses are those of tensors borrowed here; frees are ordered after the launch on the one
        // stream.
        unsafe { Launch::new(kernel, (t.div_ceil(4), h, 1), 128).with(params).enqueue(false)? };
        return Ok(Attended { out, lse });
    }
    let tiles = (args.start + t - 1) / QUERIES - args.start / QUERIES + 1;
    if let Some(shape) = hopper {
        let form = if pieces.is_some() { "attention_hopper_pieces" } else { "attention_hopper" };
        let module = format!("{form}_{}", shape.dim);
        let kernel = Kernel::load(gpu, &module, format!("{form}_{name}_{}", shape.dim))?.shared(shape.shared())?;
        // SAFETY: as above.
        unsafe { Launch::new(kernel, (h, tiles, 1), 384).with(params).enqueue(false)? };
        return Ok(Attended { out, lse });
    }
    let shape = SHAPES.iter().find(|s| d <= s.dim).ok_or_else(|| Error::unsupported("attention", "head dim"))?;
    let module = format!("attention_prefill_{}", shape.dim);
    let kernel = Kernel::load(gpu, &module, format!("attention_prefill_{name}_{}", shape.dim))?
        .shared((QUERIES + 2 * shape.keys) * shape.shared_row * 2)?;
    // SAFETY: as above.
    unsafe { Launch::new(kernel, (tiles, h, 1), shape.threads).with(params).enqueue(false)? };
    Ok(Attended { out, lse })
}

/// Keys and values as two tensors.
fn pair(rows: Option<KeyValues<'_>>) -> [Option<&Tensor>; 2] {
    rows.map_or([None, None], |r| [Some(r.k), Some(r.v)])
}

/// The queries that score stores in place of the call's, one tensor for all stores.
fn far_queries<'a>(parts: &Parts<'a>) -> Result<Option<&'a Tensor>> {
    let mut all = parts.stores.iter().filter_map(|s| s.q);
    let first = all.next();
    match all.all(|q| first.is_some_and(|f| f.id() == q.id())) {
        true => Ok(first),
        false => Err(Error::unsupported("attention", "stores with different tensors of queries")),
    }
}

/// A store with a table: addresses of keys, values and table, and entries per KV head.
struct Table {
    store: (u64, u64),
    index: u64,
    places: usize,
}

fn table_of(parts: &Parts) -> Result<Option<Table>> {
    let mut found = None;
    for store in &parts.stores {
        let RowList::Table { index, .. } = store.read else {
            if !matches!(store.rows, StoreRows::Tensors(_)) {
                return Err(Error::unsupported("attention", "rows in host memory without a table"));
            }
            continue;
        };
        let (places, dtype) = (index.dims()[2], stored_type(store));
        let at = match store.rows {
            StoreRows::Tensors(rows) => (contiguous(rows.k)?, contiguous(rows.v)?),
            StoreRows::Host(rows) => rows.addresses()?,
        };
        let table = Table { store: at, index: contiguous(index)?, places };
        if dtype != parts.dtype {
            return Err(Error::new(
                ErrorKind::Backend,
                "attention",
                format!("q is {:?}, a store {dtype:?}", parts.dtype),
            ));
        }
        if found.replace(table).is_some() {
            return Err(Error::unsupported("attention", "more than one table of rows"));
        }
    }
    Ok(found)
}

fn stored_type(store: &Store) -> DType {
    match store.rows {
        StoreRows::Tensors(rows) => rows.k.dtype(),
        StoreRows::Host(rows) => rows.dtype(),
    }
}

/// Attention of one token, with its keys split over the whole GPU.
fn one(args: &AttentionArgs, parts: &Parts, p: &Params, extra_count: usize, table: Option<Table>) -> Result<()> {
    let (gpu, (_, h, g, d)) = (device(args.q)?, parts.dims);
    // Without a ring the token reads no earlier position.
    let window = if parts.ring.is_some() { args.window } else { Window::Tokens(1) };
    let (window_kind, window_size, window_count) = window.numbers();
    let raw = args.start + 1 - window.left(args.start);
    let places = table.as_ref().map_or(0, |t| t.places);
    let cut = Cut::new(raw + extra_count + places, h, g, d);
    let scratch = cut.scratch_of(gpu)?;
    let launch = DecodeAttention {
        q: p.q,
        ring_k: p.past_k,
        ring_v: p.past_v,
        own_k: p.k,
        own_v: p.v,
        extras: p.extras,
        extra_count: extra_count as i32,
        store_k: table.as_ref().map_or(0, |t| t.store.0),
        store_v: table.as_ref().map_or(0, |t| t.store.1),
        table: table.as_ref().map_or(0, |t| t.index),
        table_places: places as i32,
        out16: p.out,
        lse: p.lse,
        position: p.start,
        capacity: p.capacity,
        block: 1,
        heads: p.heads,
        kv_heads: p.kv_heads,
        dim: p.dim,
        window_kind,
        window_size,
        window_count,
        scale: p.scale,
        ..DecodeAttention::default()
    };
    // SAFETY: as in `attend`; the scratch is freed after the launch, in stream order.
    unsafe { cut.launch(gpu, args.q.dtype(), &scratch, launch)?.enqueue(false) }
}

/// Lists sinks and rows of stores per tile of positions, rows with queries of their own last; with `pieces`, runs of
/// rows get separate lists.
#[derive(Default)]
struct Extras {
    rows: Vec<Extra>,
    offsets: Vec<i32>,
    far_offsets: Vec<i32>,
    pieces: Vec<Piece>,
    piece_offsets: Vec<i32>,
}

impl Extras {
    fn of(args: &AttentionArgs, parts: &Parts, pieces: bool) -> Result<Self> {
        let t = parts.dims.0;
        let (first, last) = (args.start / EXTRA_TILE, (args.start + t - 1) / EXTRA_TILE);
        let sinks = sinks(args, parts)?;
        let mut lists = Self { offsets: vec![0], piece_offsets: vec![0], ..Self::default() };
        for tile in first..=last {
            let from = (tile * EXTRA_TILE).max(args.start);
            let until = ((tile + 1) * EXTRA_TILE).min(args.start + t);
            let mut rows: Vec<Extra> = sinks.iter().filter(|e| (e.from as usize) < until).copied().collect();
            for store in &parts.stores {
                let (RowList::Blocks { block, rows: listed }, StoreRows::Tensors(stored)) = (store.read, store.rows)
                else {
                    continue;
                };
                let step = row_bytes(stored.k);
                for (count, first) in far_rows(args, (store, stored), (block, listed), from, until)? {
                    let nth = |i: usize| {
                        let at = i as u64 * step;
                        Extra { k: first.k + at, v: first.v + at, ..first }
                    };
                    if pieces && count > 1 {
                        lists.pieces.extend((0..count).step_by(PIECE).map(|i| {
                            let Extra { k, v, bias, from, until, .. } = nth(i);
                            Piece { k, v, bias, from, until, rows: PIECE.min(count - i) as i32 }
                        }));
                        continue;
                    }
                    rows.extend((0..count).map(nth));
                }
            }
            rows.sort_by_key(|e| e.far_query);
            let near = rows.iter().filter(|e| e.far_query == 0).count();
            lists.far_offsets.push((lists.rows.len() + near) as i32);
            lists.rows.extend(rows);
            lists.offsets.push(lists.rows.len() as i32);
            lists.piece_offsets.push(lists.pieces.len() as i32);
        }
        Ok(lists)
    }
}

/// Lists the sinks, each read by the positions whose window begins after it.
fn sinks(args: &AttentionArgs, parts: &Parts) -> Result<Vec<Extra>> {
    let Some((past, count)) = parts.sinks else { return Ok(vec![]) };
    let (k, v) = (contiguous(past.k)?, contiguous(past.v)?);
    let step = row_bytes(past.k);
    let sink = |i: usize| {
        let at = i as u64 * step;
        let from = first_seeing(args.window, i).map_or(i32::MAX, |p| p as i32);
        Extra { k: k + at, v: v + at, bias: 0.0, from, until: i32::MAX, far_query: 0 }
    };
    Ok((0..count).map(sink).collect())
}

/// The first position whose raw window begins after `sink`.
fn first_seeing(window: Window, sink: usize) -> Option<usize> {
    match window {
        Window::Unbounded => None,
        Window::Tokens(n) => Some(sink + n),
        Window::Blocks { block, count } => Some((sink / block + 1 + count) * block),
    }
}

/// Bytes from a stored row `[G, D]` to the next.
fn row_bytes(rows: &Tensor) -> u64 {
    (rows.dims()[1..].iter().product::<usize>() * rows.dtype().size_in_bytes()) as u64
}

/// Rows of one store that positions `from..until` read; a row that neighbouring blocks share is listed once.
fn far_rows(
    args: &AttentionArgs,
    (store, stored): (&Store, KeyValues),
    (per, lists): (usize, &[Vec<FarRow>]),
    from: usize,
    until: usize,
) -> Result<Vec<(usize, Extra)>> {
    let (k, v, far_query) = (contiguous(stored.k)?, contiguous(stored.v)?, store.q.is_some());
    let mut rows: Vec<(usize, Extra)> = vec![];
    let mut open: std::collections::HashMap<(usize, usize, u32), usize> = Default::default();
    for block in from / per..=(until - 1) / per {
        let (begin, end) = ((block * per).max(from), ((block + 1) * per).min(until));
        for r in &lists[block - args.start / per] {
            let (begin, end) = (begin.max(r.from), end.min(r.until));
            if begin >= end {
                continue;
            }
            let key = (r.row, r.count, r.bias.to_bits());
            if let Some(i) = open.get(&key).filter(|i| rows[**i].1.until == begin as i32) {
                rows[*i].1.until = end as i32;
                continue;
            }
            open.insert(key, rows.len());
            let (at, from, until) = (r.row as u64 * row_bytes(stored.k), begin as i32, end as i32);
            let first = Extra { k: k + at, v: v + at, bias: r.bias, from, until, far_query: far_query.into() };
            rows.push((r.count, first));
        }
    }
    Ok(rows)
}

fn contiguous(x: &Tensor) -> Result<u64> {
    match x.is_contiguous() {
        true => address(x),
        false => Err(Error::new(ErrorKind::Backend, "attention", "stored rows must be contiguous")),
    }
}
