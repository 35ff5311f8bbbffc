//! Codes of exact recall on a GPU: key and value codes, block means, the tables that kernels read them with, and the
//! memory that a decode step works in.

use super::decoded_keys::DecodedKeys;
use super::recall_kv::{Fetched, Workspace};
use super::recall_text::TextTables;
use super::GpuStore;
use crate::error::{At, Error, ErrorKind, Result};
use crate::layout::{LayerPlan, RecallLayer};
use crate::ops::cuda::{address, address_or_null, device, uninitialised, upload, Launch, Uploaded};
use crate::ops::recall::{encode, kind, means, Cut, Encode, Recall, BINS, COUNTERS, LISTED, MOST_HEADS};
use crate::ops::Attended;
use crate::recall::{levels, LayerTables, ScalarCode, MOST_BITS, SUB};
use crate::retrofit::RestKind;
use candle_core::cuda_backend::CudaDevice;
use candle_core::{DType, Device, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// Codes of a layer and what its kernels need.
#[derive(Debug)]
pub struct GpuCodes {
    keys: Keys,
    /// u8 `[G, ctx, D / 16]`.
    values: Option<Tensor>,
    /// Means of values of whole blocks, `[G, blocks, D]`.
    means: Option<Tensor>,
    _tables: Tables,
    /// `None` where codes stay those of the calibration.
    text: Option<TextTables>,
    scratch: Arc<Scratch>,
    /// Positions that the previous step fetched, and how many, u32 `[G, k + 1]`.
    _previous: Tensor,
    /// [`Fetched`] of all steps, i64 `[2]`.
    fetched: Tensor,
    cut: Cut,
    /// Parameters of the launches, but for a step's own.
    base: Recall,
    dtype: DType,
}

/// What scores are computed from.
#[derive(Debug)]
enum Keys {
    /// Scalar codes, which kernels read: u8 `[G, ctx, bytes]`.
    Coded(Tensor),
    /// Decoded rows of any other code.
    Decoded(DecodedKeys),
}

/// Tables on the device.
struct Tables {
    scalar: Option<ScalarTables>,
    codebook: Option<Tensor>,
}

/// Tables of scalar codes.
struct ScalarTables {
    mean: Uploaded<f32>,
    scale: Uploaded<f32>,
    fields: Uploaded<u32>,
    first: Uploaded<i32>,
    levels: Uploaded<f32>,
}

impl std::fmt::Debug for Tables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tables").finish_non_exhaustive()
    }
}

/// Memory that the decode steps of a run's layers work in, one after another.
#[derive(Debug)]
pub(super) struct Scratch {
    /// Parameters with the addresses and the shape that the memory is for.
    p: Recall,
    cut: Cut,
    /// f16 `[H, ctx]`.
    scores: Tensor,
    /// f32 `[H, slices, 2]`.
    slices: Tensor,
    /// Positions that a step fetches, ascending, u32 `[G, k]`.
    chosen: Tensor,
    /// How many they are, u32 `[G]`.
    counts: Tensor,
    _held: Vec<Tensor>,
}

impl Workspace {
    /// Enters into `p` the addresses of memory for its shape, which is allocated once.
    fn enter(&mut self, p: &mut Recall, cut: &Cut, on: &Device) -> Result<Arc<Scratch>> {
        let shape = |p: &Recall| (p.heads, p.kv_heads, p.dim, p.ctx, p.k);
        let made = self.scratch.iter().find(|s| s.cut == *cut && shape(&s.p) == shape(p)).cloned();
        let scratch = match made {
            Some(scratch) => scratch,
            None => {
                let new = Arc::new(Scratch::new(on, *cut, *p)?);
                self.scratch.push(new.clone());
                new
            }
        };
        let s = &scratch.p;
        (p.scores, p.slices, p.weights, p.histogram) = (s.scores, s.slices, s.weights, s.histogram);
        (p.listed, p.bitmap, p.lowest, p.mass) = (s.listed, s.bitmap, s.lowest, s.mass);
        (p.parts, p.counters, p.redone, p.chosen, p.counts) = (s.parts, s.counters, s.redone, s.chosen, s.counts);
        Ok(scratch)
    }
}

/// Device addresses of a step.
pub(crate) struct StepAddresses {
    /// Rotated queries, f32 `[H, D]`.
    pub q: u64,
    /// Log-sum-exp of the near zone, f32 `[H]`.
    pub near_lse: u64,
    /// Attention to the near zone, f32 `[H, D]`.
    pub near_out: u64,
    /// Result, f32 `[H, D]`.
    pub out: u64,
    /// Keys, values and capacity of a ring that holds the new token.
    pub ring: (u64, u64, i32),
    /// State of the decode loop, or 0 where `position` says it.
    pub state: u64,
    /// Position of the token.
    pub position: usize,
    /// Factor on dot products.
    pub factor: f32,
}

impl GpuCodes {
    /// Allocates the codes of `layer` on `device`.
    ///
    /// # Errors
    /// Too little memory.
    pub(super) fn new(
        layer: &RecallLayer,
        plan: &LayerPlan,
        tables: &LayerTables,
        store: &GpuStore,
        workspace: &mut Workspace,
        (dtype, on): (DType, &Device),
    ) -> Result<Self> {
        let Device::Cuda(gpu) = on else { return Err(Error::new(ErrorKind::Backend, "recall", "is not on a GPU")) };
        let codes: Option<Vec<&ScalarCode>> = tables.keys.iter().map(|k| k.scalar()).collect();
        let (heads, (kv_heads, dim)) = (plan.heads, plan.row());
        if heads > MOST_HEADS * kv_heads {
            let group = heads / kv_heads;
            let message = format!("{group} query heads share a KV head: kernels take {MOST_HEADS}; give --recall 0");
            return Err(Error::unsupported("--recall", message));
        }
        let s = &layer.settings;
        let ctx = layer.coded();
        let bytes = codes.as_ref().map_or(0, |c| c[0].bytes);
        let subs = dim.div_ceil(SUB);
        let keys = match &codes {
            Some(_) => Keys::Coded(Tensor::zeros((kv_heads, ctx, bytes), DType::U8, on)?),
            None => Keys::Decoded(DecodedKeys::new(tables, ctx, dim, on)?),
        };
        let values = (s.rest == RestKind::Codes).then(|| Tensor::zeros((kv_heads, ctx, subs), DType::U8, on));
        let values = values.transpose()?;
        let blocks = layer.ctx.div_ceil(s.block);
        let means = (s.rest == RestKind::Means).then(|| Tensor::zeros((kv_heads, blocks, dim), dtype, on));
        let means = means.transpose()?;
        let on_device = Tables::new(gpu, on, codes.as_deref(), tables, values.is_some())?;
        let scalar = |f: fn(&ScalarTables) -> u64| on_device.scalar.as_ref().map_or(0, f);
        let (window_kind, window_size, window_count) = s.raw_window().numbers();
        let mut base = Recall {
            key_codes: keys.address()?,
            value_codes: address_or_null(values.as_ref())?,
            codebook: address_or_null(on_device.codebook.as_ref())?,
            means: address_or_null(means.as_ref())?,
            mean: scalar(|t| t.mean.address),
            scale: scalar(|t| t.scale.address),
            fields: scalar(|t| t.fields.address),
            first: scalar(|t| t.first.address),
            levels: scalar(|t| t.levels.address),
            store: store.address(),
            ctx: ctx as i32,
            rows: layer.ctx as i32,
            heads: heads as i32,
            kv_heads: kv_heads as i32,
            dim: dim as i32,
            bytes: bytes as i32,
            k: s.recall as i32,
            block: s.block as i32,
            blocks: blocks as i32,
            sinks: s.sink_tokens as i32,
            window_kind,
            window_size,
            window_count,
            means_type: kind(dtype)?,
            read_mean: scalar(|t| t.mean.address),
            read_scale: scalar(|t| t.scale.address),
            read_codebook: address_or_null(on_device.codebook.as_ref())?,
            ..Recall::default()
        };
        let text = TextTables::new(layer, codes.as_deref(), on_device.codebook.as_ref(), plan.row(), on)?;
        text.as_ref().map(|text| text.enter(&mut base)).transpose()?;
        let cut = Cut::new(gpu, &base)?;
        let scratch = workspace.enter(&mut base, &cut, on)?;
        let previous = Tensor::zeros((kv_heads, s.recall + 1), DType::U32, on)?;
        let fetched = Tensor::zeros(2, DType::I64, on)?;
        (base.previous, base.fetched) = (address(&previous)?, address(&fetched)?);
        let (_tables, _previous) = (on_device, previous);
        Ok(Self { keys, values, means, _tables, text, scratch, _previous, fetched, cut, base, dtype })
    }

    /// Returns the allocated bytes of key codes (of decoded keys where the code has no kernels), and of value codes or
    /// means.
    pub fn bytes(&self) -> (u64, u64) {
        let bytes = |x: &Tensor| (x.elem_count() * x.dtype().size_in_bytes()) as u64;
        let means = self.means.as_ref().map_or(0, bytes);
        let keys = match &self.keys {
            Keys::Coded(keys) => bytes(keys),
            Keys::Decoded(keys) => keys.bytes(),
        };
        (keys, self.values.as_ref().map_or(0, bytes) + means)
    }

    /// Returns the rows that decode steps have fetched.
    ///
    /// # Errors
    /// The device fails.
    pub fn fetched(&self) -> Result<Fetched> {
        let counts: Vec<i64> = self.fetched.to_vec1()?;
        Ok(Fetched { rows: counts[0] as u64, repeated: counts[1] as u64 })
    }

    /// Codes the keys and values of a chunk from position `start` on and, where [`GpuCodes::stores_rows`], stores its rows.
    /// Codes that follow the text are refitted to a chunk of a `prompt`.
    ///
    /// # Shapes
    /// `k`, `v` `[T, G, D]`.
    ///
    /// # Errors
    /// Positions beyond the context; the device fails.
    pub fn push(&mut self, k: &Tensor, v: &Tensor, start: usize, prompt: bool) -> Result<()> {
        let (k, v) = (k.contiguous()?, v.contiguous()?);
        if let Keys::Decoded(keys) = &mut self.keys {
            keys.push(&k, start)?;
        }
        let b = &self.base;
        if start + k.dim(0)? > b.rows as usize {
            let message = format!("{} rows at {start} do not fit {} positions", k.dim(0)?, b.rows);
            return Err(Error::new(ErrorKind::Backend, "host store", message));
        }
        let gpu = device(&k)?;
        let p = Encode {
            k: address(&k)?,
            v: address(&v)?,
            key_codes: b.key_codes,
            value_codes: b.value_codes,
            codebook: b.codebook,
            mean: b.mean,
            scale: b.scale,
            fields: b.fields,
            first: b.first,
            levels: b.levels,
            store: b.store,
            means: b.means,
            tokens: k.dim(0)? as i32,
            start: start as i32,
            ctx: b.ctx,
            kv_heads: b.kv_heads,
            dim: b.dim,
            bytes: b.bytes,
            dtype: kind(self.dtype)?,
            rows: b.rows,
            block: b.block,
            blocks: b.blocks,
            sinks: b.sinks,
        };
        // Without bytes of key codes the kernel writes value codes alone.
        let store = if self.stores_rows() { b.store } else { 0 };
        let coded =
            (self.appends() || self.values.is_some()).then(|| encode(gpu, Encode { store, ..p })).transpose()?;
        let means = self.means.as_ref().filter(|_| b.store > 0).and_then(|_| means(gpu, p).transpose()).transpose()?;
        for launch in coded.iter().chain(&means) {
            // SAFETY: the addresses are those of tensors borrowed or held here, in the layouts that the kernel's header
            // names.
            unsafe { launch.enqueue(false)? };
        }
        match self.text.as_mut().filter(|_| prompt) {
            Some(text) => text.refit(&self.base, (&k, &v), start),
            None => Ok(()),
        }
    }

    /// Averages the values of the blocks that end within positions `new`, which `store` has, where kernels cannot read them.
    ///
    /// # Errors
    /// The device fails.
    pub(super) fn average(&mut self, store: &GpuStore, new: Range<usize>) -> Result<()> {
        let Some(means) = self.means.as_ref().filter(|_| self.base.store == 0) else { return Ok(()) };
        let block = self.base.block as usize;
        let blocks = new.start / block..new.end / block;
        if blocks.is_empty() {
            return Ok(());
        }
        let first = blocks.start;
        let new = store.value_means(blocks, block, self.base.sinks as usize)?;
        Ok(means.slice_set(&new.to_dtype(means.dtype())?.to_device(means.device())?, 1, first)?)
    }

    /// Attends one token at `position` to all zones, and, where [`GpuCodes::appends`], adds its key and value to the
    /// codes and the host store.
    ///
    /// # Shapes
    /// `q [1, H, D]`, `k`, `v` `[1, G, D]`; `near` is the attention to the near zone with its log-sum-exp, `far` the
    /// positions of the other zones ([`RecallLayer::far`]).
    ///
    /// # Errors
    /// The device fails.
    pub fn step(
        &mut self,
        [q, k, v]: [&Tensor; 3],
        near: &Attended,
        (position, far): (usize, Range<usize>),
        (factor, store): (f32, &GpuStore),
    ) -> Result<Tensor> {
        let gpu = device(q)?;
        let (k, v) = (k.contiguous()?, v.contiguous()?);
        let (q32, out32) = (q.to_dtype(DType::F32)?.contiguous()?, near.out.to_dtype(DType::F32)?.contiguous()?);
        let out = uninitialised(gpu, DType::F32, q.dims())?;
        let lse =
            near.lse.as_ref().ok_or_else(|| Error::new(ErrorKind::Backend, "recall", "lacks the near zone's lse"))?;
        let step = StepAddresses {
            q: address(&q32)?,
            near_lse: address(lse)?,
            near_out: address(&out32)?,
            out: address(&out)?,
            ring: (address(&k)?, address(&v)?, 1),
            state: 0,
            position,
            factor,
        };
        let launches = self.launches(gpu, &step)?;
        // The first is the scan, which also appends the token.
        let launches = match &self.keys {
            Keys::Coded(_) => &launches[..],
            Keys::Decoded(keys) => {
                keys.score((&q32, lse), far, factor, (&self.scratch.scores, &self.scratch.slices))?;
                &launches[1..]
            }
        };
        let (fetch, before) =
            launches.split_last().ok_or_else(|| Error::new(ErrorKind::Backend, "recall", "no step"))?;
        for launch in before {
            // SAFETY: as in `push`; scratch and tables are held by `self`, and frees are ordered after the launches.
            unsafe { launch.enqueue(false)? };
        }
        let gathered = (self.base.store == 0).then(|| self.gather(gpu, &step, store)).transpose()?;
        let fetch = gathered.as_ref().map_or(fetch, |(launch, _)| launch);
        // SAFETY: as above; gathered rows are held until after the launch.
        unsafe { fetch.enqueue(false)? };
        Ok(out.to_dtype(q.dtype())?)
    }

    /// Waits for the choice, gathers its rows on the host, and returns the launch that attends to the copy, and the
    /// tensors that it reads.
    fn gather(&self, gpu: &CudaDevice, step: &StepAddresses, store: &GpuStore) -> Result<(Launch, [Tensor; 2])> {
        let (k, on) = (self.base.k as usize, self.scratch.chosen.device());
        let counts = self.scratch.counts.to_vec1::<u32>()?;
        let mut chosen = self.scratch.chosen.to_vec2::<u32>()?;
        chosen.iter_mut().zip(&counts).for_each(|(list, n)| list.truncate(*n as usize));
        let rows = store.gather(&chosen, k, on)?;
        let places = Tensor::arange(0u32, k as u32, on)?.broadcast_as((counts.len(), k))?.contiguous()?;
        let p = Recall { store: address(&rows)?, rows: k as i32, chosen: address(&places)?, ..self.parameters(step) };
        let [.., fetch] = self.cut.launches(gpu, self.dtype, p)?;
        Ok((fetch, [rows, places]))
    }

    /// Whether kernels write rows of the host store.
    pub fn stores_rows(&self) -> bool {
        self.appends() && self.base.store > 0
    }

    /// Whether a step's kernels append the token to the codes; decoded keys are written by [`GpuCodes::push`] after the
    /// step.
    pub fn appends(&self) -> bool {
        matches!(self.keys, Keys::Coded(_))
    }

    /// Whether a captured step can hold the layer: decoded keys are scored by tensor operations, and memory that is not
    /// page-locked is gathered by the host.
    pub fn captured(&self) -> bool {
        self.stores_rows()
    }

    /// Returns the launches of a step: attention to the other zones, the merge, and the new token's codes and host row.
    ///
    /// # Errors
    /// A kernel that cannot be loaded.
    pub(crate) fn launches(&self, gpu: &CudaDevice, step: &StepAddresses) -> Result<[Launch; 4]> {
        self.cut.launches(gpu, self.dtype, self.parameters(step))
    }

    /// Returns the parameters of a step's launches.
    fn parameters(&self, step: &StepAddresses) -> Recall {
        Recall {
            q: step.q,
            near_lse: step.near_lse,
            near_out: step.near_out,
            out: step.out,
            own_k: step.ring.0,
            own_v: step.ring.1,
            own_rows: step.ring.2,
            state: step.state,
            position: step.position as i32,
            factor: step.factor,
            ..self.base
        }
    }
}

impl Keys {
    /// Returns the address of the codes that kernels read; 0 where they read none.
    fn address(&self) -> Result<u64> {
        match self {
            Self::Coded(keys) => address(keys),
            Self::Decoded(_) => Ok(0),
        }
    }
}

impl Tables {
    fn new(
        gpu: &CudaDevice,
        on: &Device,
        codes: Option<&[&ScalarCode]>,
        tables: &LayerTables,
        values: bool,
    ) -> Result<Self> {
        let codebook = values.then(|| {
            let words: Vec<f32> = tables.values.iter().flat_map(|v| v.codebook()).copied().collect();
            Tensor::new(words, on)?.to_dtype(DType::F16)
        });
        let scalar = codes.map(|codes| ScalarTables::new(gpu, codes)).transpose()?;
        Ok(Self { scalar, codebook: codebook.transpose().at("codebook")? })
    }
}

impl ScalarTables {
    fn new(gpu: &CudaDevice, codes: &[&ScalarCode]) -> Result<Self> {
        let dim = codes[0].mean.len();
        let all = |f: fn(&ScalarCode) -> &[f32]| codes.iter().flat_map(|c| f(c)).copied().collect::<Vec<f32>>();
        let (mut fields, mut first) = (vec![0u32; codes.len() * dim], vec![]);
        for (g, code) in codes.iter().enumerate() {
            for (i, f) in code.fields.iter().enumerate() {
                fields[g * dim + i] = f.channel as u32 | (f.shift as u32) << 16 | (f.bits as u32) << 24;
            }
            first.extend((0..=code.bytes).map(|byte| code.fields.partition_point(|f| f.byte < byte) as i32));
        }
        let mut numbers = vec![0f32; 256];
        for bits in 0..=MOST_BITS {
            let (at, l) = (1 << bits, levels(bits));
            numbers[at..at + l.levels.len()].copy_from_slice(&l.levels);
            numbers[128 + at..][..l.edges.len()].copy_from_slice(&l.edges);
        }
        Ok(Self {
            mean: upload(gpu, &all(|c| &c.mean))?,
            scale: upload(gpu, &all(|c| &c.scale))?,
            fields: upload(gpu, &fields)?,
            first: upload(gpu, &first)?,
            levels: upload(gpu, &numbers)?,
        })
    }
}

impl Scratch {
    /// Allocates memory for steps of the shape in `p`.
    fn new(on: &Device, cut: Cut, mut p: Recall) -> Result<Self> {
        let (heads, kv_heads, dim, ctx) = (p.heads as usize, p.kv_heads as usize, p.dim as usize, p.ctx as usize);
        let mut held = vec![];
        let mut room = |shape: &[usize], dtype: DType| -> Result<u64> {
            let tensor = Tensor::zeros(shape, dtype, on)?;
            let at = address(&tensor)?;
            held.push(tensor);
            Ok(at)
        };
        let scores = Tensor::zeros((heads, ctx), DType::F16, on)?;
        let slices = Tensor::zeros((heads, cut.slices, 2), DType::F32, on)?;
        (p.scores, p.slices) = (address(&scores)?, address(&slices)?);
        p.weights = room(&[kv_heads, ctx], DType::F32)?;
        p.histogram = room(&[kv_heads, 2, BINS], DType::U32)?;
        p.listed = room(&[kv_heads, LISTED, 2], DType::U32)?;
        p.bitmap = room(&[kv_heads, ctx / 32], DType::U32)?;
        p.lowest = room(&[kv_heads], DType::F32)?;
        p.mass = room(&[heads], DType::F32)?;
        p.parts = room(&[kv_heads, cut.fetchers + cut.rest_slices + 1, 8, dim.next_multiple_of(4) + 4], DType::F32)?;
        p.counters = room(&[kv_heads, COUNTERS], DType::U32)?;
        p.redone = room(&[1], DType::U32)?;
        let chosen = Tensor::zeros((kv_heads, p.k as usize), DType::U32, on)?;
        let counts = Tensor::zeros(kv_heads, DType::U32, on)?;
        (p.chosen, p.counts) = (address(&chosen)?, address(&counts)?);
        Ok(Self { p, cut, scores, slices, chosen, counts, _held: held })
    }
}
