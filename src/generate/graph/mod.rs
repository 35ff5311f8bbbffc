//! Decode on a GPU: one step captured as a CUDA graph and replayed for every token.
//!
//! Everything that changes from token to token (position, token, running sums) is in device memory and the cache never
//! grows, so the same launches serve every position. The most likely token is found on the device and read by the next
//! replay; the host fetches [`BATCH`] tokens at a time. With a temperature the host samples from each step's logits.
//! After an eviction, which moves rows, the step is captured again. The residual stream and all sums are f32, keys and
//! values 16 bits, weights 16 bits or quantised blocks.

mod journal;
mod matvec;
mod step;

use self::journal::Journal;
use self::matvec::format;
use self::step::{Builder, StepBuffers};
use super::sample::not_finite;
use super::OnToken;
use super::{Request, Sampler, Timing};
use crate::cache::LayerState;
use crate::error::{Error, ErrorKind, Result};
use crate::layout::{LayerKind, LayerPlan};
use crate::mixer::{MixerWeights, Projections};
use crate::ops::cuda::capture;
use crate::ops::delta_gpu::has_step;
use crate::retrofit::{FarPosition, KeyPooling};
use crate::run::Run;
use crate::weights::Block;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaSlice, DeviceRepr, ValidAsZeroBits};
use candle_core::cuda_backend::CudaDevice;
use candle_core::{DType, Device, Tensor};
use std::time::Instant;

/// Tokens fetched per host synchronisation.
const BATCH: usize = 8;
/// Maximum number of summaries per block in a step's route table; rules that read more (`all`) are not captured.
const ROUTES: usize = 64;

/// Mirrors struct `DecodeState` of kernels/decode.cuh.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct State {
    position: i32,
    step: i32,
    token: u32,
    stopped: u32,
    best: u64,
}

// SAFETY: plain numbers in C's layout, of which zeros are valid.
unsafe impl DeviceRepr for State {}
crate::ops::cuda::mirrored!(State, 24, {
    position: 0, step: 4, token: 8, stopped: 12, best: 16,
});
unsafe impl ValidAsZeroBits for State {}

impl State {
    /// Returns the state before the step that reads `token` at the position of `run`.
    fn before(run: &Run, token: u32) -> Self {
        Self { position: run.cache().position() as i32, token, ..Self::default() }
    }
}

/// A captured decode step and its device memory.
pub(super) struct StepGraph {
    graph: CudaGraph,
    gpu: CudaDevice,
    state: CudaSlice<State>,
    tokens: Tensor,
    /// Logits of the last step, f32 `[1, vocab]`.
    logits: Tensor,
    journal: Journal,
    _buffers: StepBuffers,
}

impl Drop for StepGraph {
    /// Waits for the last launch. Destroying a running graph with programmatic dependent launches from several threads
    /// hangs the GPU (driver 580.159.04): in kernels/repro/graph_in_flight.cu, 0 of 7 runs finished without the wait
    /// and 7 of 7 with it.
    fn drop(&mut self) {
        // An error cannot be returned here; a broken stream fails the next call on it.
        let _ = self.gpu.cuda_stream().synchronize();
    }
}

impl StepGraph {
    /// Captures a decode step of `run`; returns `None` if [`captures`] is false.
    pub fn capture(run: &Run, stop: &[u32]) -> Result<Option<Self>> {
        let Device::Cuda(gpu) = run.device() else { return Ok(None) };
        let routes = routes(run);
        if !has_form(run, &routes) {
            return Ok(None);
        }
        let state = gpu.alloc_zeros::<State>(1)?;
        let tokens = Tensor::zeros(BATCH, DType::U32, run.device())?;
        let logits = Tensor::zeros((1, run.weights().spec().vocab), DType::F32, run.device())?;
        let mut builder = Builder::new(run.weights(), gpu, &state, (&tokens, &logits))?;
        builder.step(run, &routes, stop)?;
        let Builder { launches, buffers, .. } = builder;
        // SAFETY: every address belongs to the weights, the run's cache, or `buffers`, which outlive the graph's last
        // launch.
        let graph = unsafe { capture(gpu, &launches, true)? };
        let journal = Journal::new(run, gpu)?;
        Ok(Some(Self { graph, gpu: gpu.clone(), state, tokens, logits, journal, _buffers: buffers }))
    }

    /// Replays the step for `id`, at most `Cache::until_eviction` times in all, and returns the logits after it,
    /// f32 `[1, vocab]`, which the next step overwrites.
    pub fn read(&mut self, run: &mut Run, id: u32) -> Result<Tensor> {
        self.step(run, id)?;
        run.cache_mut().advance_captured(1)?;
        Ok(self.logits.clone())
    }

    /// Decodes from `first`, which is already delivered, until the requested count, a stop token, or a `Break` from
    /// `on_token`. An eviction ends it too: then it returns the last token, from which decode continues with a new
    /// capture.
    pub fn run(
        mut self,
        run: &mut Run,
        first: u32,
        request: &Request,
        timing: &mut Timing,
        tokens: &mut Vec<u32>,
        on_token: OnToken,
    ) -> Result<Option<u32>> {
        let begin = State::before(run, first);
        self.gpu.memcpy_htod(&[begin], &mut self.state)?;
        timing.fetched = BATCH;
        let (mut done, most) = (0, run.cache().until_eviction());
        while tokens.len() < request.max_new_tokens {
            if done == most {
                return Ok(tokens.last().copied());
            }
            let count = BATCH.min(request.max_new_tokens - tokens.len()).min(most - done);
            let token = tokens.last().copied().unwrap_or(first);
            let batch = State::before(run, token);
            let start = Instant::now();
            self.journal.exchange(&self.gpu, &self.state, count, false)?;
            for _ in 0..count {
                self.graph.launch().map_err(driver)?;
            }
            let made = self.tokens.to_vec1::<u32>()?;
            let each = start.elapsed() / count as u32;
            for i in 0..count {
                let token = &made[(done + i) % BATCH];
                if *token == u32::MAX {
                    return Err(not_finite());
                }
                run.cache_mut().advance_captured(1)?;
                timing.steps.push(each);
                // Steps after a stop token change nothing (kernels/decode.cuh).
                if request.stop.contains(token) {
                    return Ok(None);
                }
                tokens.push(*token);
                if on_token(*token).is_break() {
                    if i + 1 < count {
                        let step = || self.graph.launch().map_err(driver);
                        self.journal.rewind(&self.gpu, &mut self.state, (batch, count), step, i + 1)?;
                    }
                    return Ok(None);
                }
            }
            done += count;
        }
        Ok(None)
    }

    /// Decodes like [`StepGraph::run`], one step per host synchronisation, after which `sampler` draws from the step's
    /// logits.
    pub fn sample(
        mut self,
        run: &mut Run,
        first: u32,
        (request, sampler): (&Request, &mut Sampler),
        timing: &mut Timing,
        tokens: &mut Vec<u32>,
        on_token: OnToken,
    ) -> Result<Option<u32>> {
        for _ in 0..run.cache().until_eviction() {
            if tokens.len() >= request.max_new_tokens {
                return Ok(None);
            }
            let start = Instant::now();
            let token = tokens.last().copied().unwrap_or(first);
            self.step(run, token)?;
            let next = sampler.sample(&self.logits)?;
            run.cache_mut().advance_captured(1)?;
            timing.steps.push(start.elapsed());
            if request.stop.contains(&next) {
                return Ok(None);
            }
            tokens.push(next);
            if on_token(next).is_break() {
                return Ok(None);
            }
        }
        Ok(tokens.last().copied())
    }

    /// Launches one step that reads `token` at the run's position.
    fn step(&mut self, run: &Run, token: u32) -> Result<()> {
        self.gpu.memcpy_htod(&[State::before(run, token)], &mut self.state)?;
        self.graph.launch().map_err(driver)
    }
}

/// Whether the next decode step of `run` can be captured.
pub(super) fn captures(run: &Run) -> bool {
    run.device().is_cuda() && has_form(run, &routes(run))
}

/// Whether every part of the model can be captured: matrices in formats with a kernel (16-bit types, GGML's
/// blocks, MLX's groups; they may differ between matrices, but not between a layer's gate and up, which share a launch),
/// settings that read summaries as stored, and no eviction rule that still has to see queries.
fn has_form(run: &Run, routes: &[Routes]) -> bool {
    let weights = run.weights();
    let block = |(((b, routes), plan), layer): (((&Block, &Routes), &LayerPlan), &LayerState)| {
        let m = &b.mlp;
        let mixer = match &b.mixer {
            MixerWeights::Attention(p) => attention_has_form(p, routes, plan, layer),
            MixerWeights::Delta(d) => has_step(&d.spec) && d.inputs().iter().all(|l| l.bias().is_none()),
        };
        // A gate with a bias would need it before the activation; no known family has one.
        let plain_gate = m.gate.bias().is_none() && m.up.bias().is_none();
        let mut linear = b.mixer.matrices().into_iter().chain([&m.gate, &m.up, &m.down]);
        mixer
            && plain_gate
            && linear.all(|l| format(l.weight()).is_some())
            && format(m.gate.weight()) == format(m.up.weight())
    };
    matches!(weights.dtype(), DType::BF16 | DType::F16)
        && format(&weights.embed).is_some()
        && format(weights.head.weight()).is_some()
        && weights.blocks.iter().zip(routes).zip(&run.layout().layers).zip(&run.cache().layers).all(block)
}

/// As [`has_form`], for an attention layer.
fn attention_has_form(p: &Projections, routes: &Routes, plan: &LayerPlan, layer: &LayerState) -> bool {
    let reads_as_stored = match &plan.kind {
        LayerKind::Butterfly(l) => {
            let s = &l.settings;
            // Summaries are written by the thread block that reads them, one per KV head, which covers at most 16 query
            // heads.
            let one_block = p.heads <= 16 * p.kv_heads;
            s.pool == KeyPooling::PostRope
                && s.far_position == FarPosition::True
                && widest(routes) <= ROUTES
                && one_block
        }
        LayerKind::Evict(_) => matches!(layer, LayerState::CompressedKv(kept) if kept.captured().is_some()),
        LayerKind::Full | LayerKind::Sliding { .. } => true,
        LayerKind::Delta(_) => false,
        LayerKind::Recall(_) => p.heads <= 8 * p.kv_heads && matches!(layer, LayerState::Recall(r) if r.captured()),
    };
    reads_as_stored && p.head_dim.is_multiple_of(8) && p.head_dim <= 256
}

/// For each block of a layer, the blocks whose summaries it reads, each with its bias.
type Routes = Vec<Vec<(usize, f32)>>;

/// Returns the routes of every layer, for blocks from the run's position on; earlier blocks are left empty.
fn routes(run: &Run) -> Vec<Routes> {
    let of = |plan: &LayerPlan| {
        let Some(l) = plan.butterfly() else { return vec![] };
        let first = run.cache().position() / l.settings.block;
        let read = |b| l.route(b).into_iter().map(|n| (n, l.bias(n))).collect();
        (0..l.grid.blocks).map(|b| if b < first { vec![] } else { read(b) }).collect()
    };
    run.layout().layers.iter().map(of).collect()
}

/// Returns the largest number of summaries that a block reads.
fn widest(routes: &Routes) -> usize {
    routes.iter().map(Vec::len).max().unwrap_or(0)
}

fn driver(e: candle_core::cuda_backend::cudarc::driver::DriverError) -> Error {
    Error::new(ErrorKind::Backend, "decode graph", e)
}
