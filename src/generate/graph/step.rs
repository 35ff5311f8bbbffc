//! Kernel launches of one decode step, and their device memory.

use super::matvec::matrix;
use super::{widest, Routes, State, BATCH};
use crate::cache::{Codes, LayerState, RecallKv, Ring, StepAddresses, TwoPool};
use crate::error::{Error, Result};
use crate::layout::{ButterflyLayer, LayerPlan};
use crate::mixer::{DeltaWeights, MixerWeights, Projections};
use crate::nn::{Linear, RmsNorm};
use crate::ops::cuda::{address, address_or_null, uninitialised, upload, Kernel, Launch, Uploaded};
use crate::ops::decode::{Cut, DecodeAttention, Scratch};
use crate::ops::delta_gpu::{self, StepInputs};
use crate::ops::on_gpu::Form;
use crate::run::Run;
use crate::spec::{AttentionSpec, MixerSpec};
use crate::weights::{Block, Weights};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr};
use candle_core::cuda_backend::CudaDevice;
use candle_core::{DType, Tensor};

/// Device memory that the launches read and write.
#[derive(Default)]
pub(super) struct StepBuffers {
    tensors: Vec<Tensor>,
    floats: Vec<Uploaded<f32>>,
    ints: Vec<Uploaded<i32>>,
    words: Vec<Uploaded<u32>>,
    scratch: Vec<(Cut, Scratch)>,
}

/// Device addresses of a step's activations and rotary tables.
struct Vectors {
    x: u64,
    y: u64,
    /// Queries, keys and values of an attention layer, then its gate; inputs of a recurrent layer.
    qkv: u64,
    /// Output of attention or recurrence.
    attended: u64,
    /// Rotated queries, attention to the near zone and its log-sum-exp, of layers with exact recall.
    rotated: u64,
    near: u64,
    near_lse: u64,
    hidden: u64,
    cos: u64,
    sin: u64,
}

/// Returns the error for an eviction rule that still has to see queries, which a captured step does not store.
fn without_form() -> Error {
    Error::unsupported("decode graph", "a layer whose rule evicts at the end of the context cannot be captured")
}

/// Returns the addresses of a ring's keys and values and its capacity; zeros without a ring.
fn rows(ring: Option<&Ring>) -> Result<(u64, u64, i32)> {
    match ring {
        Some(ring) => Ok((address(ring.rows().k)?, address(ring.rows().v)?, ring.capacity() as i32)),
        None => Ok((0, 0, 0)),
    }
}

/// Collects the launches of a step.
pub(super) struct Builder<'a> {
    weights: &'a Weights,
    pub(super) gpu: &'a CudaDevice,
    pub(super) state: u64,
    tokens: u64,
    pub(super) logits: u64,
    vectors: Vectors,
    tables: usize,
    half: usize,
    pub(super) launches: Vec<Launch>,
    pub(super) buffers: StepBuffers,
}

impl<'a> Builder<'a> {
    pub(super) fn new(
        weights: &'a Weights,
        gpu: &'a CudaDevice,
        state: &CudaSlice<State>,
        (tokens, logits): (&Tensor, &Tensor),
    ) -> Result<Self> {
        let spec = weights.spec();
        let most = |f: fn(&AttentionSpec) -> usize| spec.attention().map(|(_, a)| f(a)).max().unwrap_or(0);
        let q = most(AttentionSpec::q_width);
        let inputs = spec.layers.iter().map(|l| match &l.mixer {
            MixerSpec::Attention(a) => 2 * a.q_width() + 2 * a.kv_width(),
            MixerSpec::Delta(d) => d.channels() + d.value_width() + 2 * d.value_heads,
        });
        let outputs = spec.layers.iter().map(|l| match &l.mixer {
            MixerSpec::Attention(a) => a.q_width(),
            MixerSpec::Delta(d) => d.value_width(),
        });
        let (inputs, outputs) = (inputs.max().unwrap_or(0), outputs.max().unwrap_or(0));
        let wide = spec.layers.iter().map(|l| l.feed_forward.width).max().unwrap_or(0);
        let half = weights.ropes.iter().map(|r| r.frequencies().0.len()).max().unwrap_or(0);
        let tables = weights.ropes.len();
        let mut buffers = StepBuffers::default();
        let mut room = |dtype: DType, n: usize| -> Result<u64> {
            let tensor = uninitialised(gpu, dtype, n.max(1))?;
            let at = address(&tensor)?;
            buffers.tensors.push(tensor);
            Ok(at)
        };
        let vectors = Vectors {
            x: room(DType::F32, spec.hidden)?,
            y: room(DType::F32, spec.hidden)?,
            qkv: room(DType::F32, inputs)?,
            attended: room(DType::F32, outputs)?,
            rotated: room(DType::F32, q)?,
            near: room(DType::F32, q)?,
            near_lse: room(DType::F32, most(|a| a.heads))?,
            hidden: room(DType::F32, wide)?,
            cos: room(DType::F32, tables * half)?,
            sin: room(DType::F32, tables * half)?,
        };
        let state = state.device_ptr(&gpu.cuda_stream()).0;
        let (tokens, logits) = (address(tokens)?, address(logits)?);
        Ok(Self { weights, gpu, state, tokens, logits, vectors, tables, half, launches: vec![], buffers })
    }

    fn push(
        &mut self,
        kernel: &str,
        grid: usize,
        threads: usize,
        arguments: impl FnOnce(Launch) -> Launch,
    ) -> Result<()> {
        let kernel = Kernel::load(self.gpu, "decode", kernel.into())?;
        self.launches.push(arguments(Launch::new(kernel, (grid, 1, 1), threads)));
        Ok(())
    }

    fn floats(&mut self, values: &[f32]) -> Result<u64> {
        let uploaded = upload(self.gpu, values)?;
        let at = uploaded.address;
        self.buffers.floats.push(uploaded);
        Ok(at)
    }

    /// Adds all launches of a step; `routes` holds one entry per layer.
    pub(super) fn step(&mut self, run: &Run, routes: &[Routes], stop: &[u32]) -> Result<()> {
        let weights = self.weights;
        self.embed()?;
        let layers = run.layout().layers.iter().zip(&run.cache().layers).zip(routes);
        for (i, (block, ((plan, layer), routes))) in weights.blocks.iter().zip(layers).enumerate() {
            self.block(block, plan, layer, routes).map_err(|e| e.within(format!("layer {i}")))?;
        }
        self.matvec(Form::Largest, &[&weights.head], self.vectors.x, Some(&weights.norm), 0, None)?;
        let stops = upload(self.gpu, if stop.is_empty() { &[0] } else { stop })?;
        let (state, tokens, at, count) = (self.state, self.tokens, stops.address, stop.len() as i32);
        self.buffers.words.push(stops);
        self.push("decode_finish", 1, 1, |l| l.with(state).with(tokens).with(BATCH as i32).with(at).with(count))
    }

    /// Adds the embedding lookup and the computation of the rotary tables, padded to the widest.
    fn embed(&mut self) -> Result<()> {
        let weights = self.weights;
        let (mut frequencies, mut amplitudes) = (vec![], vec![]);
        for rope in &weights.ropes {
            let (f, amplitude) = rope.frequencies();
            frequencies.extend_from_slice(f);
            frequencies.resize(frequencies.len().next_multiple_of(self.half), 0.0);
            amplitudes.push(amplitude);
        }
        let (frequencies, amplitudes) = (self.floats(&frequencies)?, self.floats(&amplitudes)?);
        let n = weights.spec().hidden;
        let grid = n.max(self.tables * self.half).div_ceil(256);
        let (table, scale) = (matrix(&weights.embed, 0)?, weights.spec().embed_scale as f32);
        let (x, cos, sin) = (self.vectors.x, self.vectors.cos, self.vectors.sin);
        let (tables, half, state) = (self.tables as i32, self.half as i32, self.state);
        let kernel = table.format.kernel(self.gpu, "decode_embed", "")?;
        let l = Launch::new(kernel, (grid, 1, 1), 256).with(table.at).with(scale).with(x).with(n as i32);
        let l = l.with(frequencies).with(amplitudes).with(cos).with(sin).with(tables).with(half).with(state);
        self.launches.push(table.format.add_settings(l));
        Ok(())
    }

    fn block(&mut self, b: &Block, plan: &LayerPlan, layer: &LayerState, routes: &Routes) -> Result<()> {
        let vectors = &self.vectors;
        let (x, y, qkv, hidden, attended) = (vectors.x, vectors.y, vectors.qkv, vectors.hidden, vectors.attended);
        let out = match &b.mixer {
            MixerWeights::Attention(p) => {
                let matrices: Vec<&Linear> = [&p.q, &p.k, &p.v].into_iter().chain(&p.gate).collect();
                self.matvec(Form::Store, &matrices, x, Some(&b.before_mixer), qkv, None)?;
                self.attend(p, plan, layer, routes)?;
                if p.gate.is_some() {
                    let n = p.heads * p.head_dim;
                    let gate = qkv + 4 * (n + 2 * p.kv_heads * p.head_dim) as u64;
                    self.push("decode_gate", n.div_ceil(256), 256, |l| l.with(attended).with(gate).with(n as i32))?;
                }
                &p.out
            }
            MixerWeights::Delta(d) => {
                self.matvec(Form::Store, &d.inputs(), x, Some(&b.before_mixer), qkv, None)?;
                self.recur(d, layer)?;
                &d.out
            }
        };
        self.add(out, attended, &b.after_mixer, (x, y))?;
        let m = &b.mlp;
        self.matvec(Form::Gated, &[&m.gate, &m.up], x, Some(&b.before_mlp), hidden, Some(m.activation))?;
        self.add(&m.down, hidden, &b.after_mlp, (x, y))
    }

    /// Adds the product of a layer's output matrix, normed where the family has a norm there, to the residual stream.
    fn add(&mut self, layer: &Linear, from: u64, norm: &Option<RmsNorm>, (x, y): (u64, u64)) -> Result<()> {
        let Some(norm) = norm else {
            return self.matvec(Form::Add, &[layer], from, None, x, None);
        };
        self.matvec(Form::Store, &[layer], from, None, y, None)?;
        let (weight, eps) = norm.parts();
        let (weight, n) = (address(weight)?, weight.elem_count() as i32);
        self.push("decode_add_norm", 1, 256, |l| l.with(x).with(y).with(weight).with(n).with(eps))
    }

    /// Adds a step of Gated DeltaNet.
    fn recur(&mut self, d: &DeltaWeights, layer: &LayerState) -> Result<()> {
        let state = match layer {
            LayerState::Recurrent(layer) => layer.on_gpu().ok_or_else(without_form)?,
            _ => return Err(without_form()),
        };
        let io = StepInputs { inputs: self.vectors.qkv, out: self.vectors.attended, at: self.state };
        self.launches.push(delta_gpu::step(self.gpu, &d.layer(), state, &io)?);
        Ok(())
    }

    fn attend(&mut self, p: &Projections, plan: &LayerPlan, layer: &LayerState, routes: &Routes) -> Result<()> {
        let norms = p.qk_norm.as_ref().map(|(q, k)| (q.parts(), k.parts()));
        let table = (p.rope * self.half * 4) as u64;
        let (ring, shift) = match layer {
            LayerState::Dense(ring) | LayerState::Ring(ring) => (ring, 0),
            LayerState::TwoPool(pools) => (&pools.local, 0),
            LayerState::CompressedKv(kept) => kept.captured().ok_or_else(without_form)?,
            LayerState::Recall(cache) => (&cache.local, 0),
            LayerState::Recurrent(_) => return Err(without_form()),
        };
        let (ring_k, ring_v, capacity) = rows(Some(ring))?;
        let mut launch = DecodeAttention {
            qkv: self.vectors.qkv,
            q_norm: norms.map_or(Ok(0), |(q, _)| address(q.0))?,
            k_norm: norms.map_or(Ok(0), |(_, k)| address(k.0))?,
            eps: norms.map_or(0.0, |(q, _)| q.1),
            cos: self.vectors.cos + table,
            sin: self.vectors.sin + table,
            ring_k,
            ring_v,
            capacity,
            state: self.state,
            shift: shift as i32,
            out: self.vectors.attended,
            block: 1,
            mean_rows: 1,
            heads: p.heads as i32,
            kv_heads: p.kv_heads as i32,
            dim: p.head_dim as i32,
            scale: p.scale,
            ..DecodeAttention::default()
        };
        (launch.window_kind, launch.window_size, launch.window_count) = plan.window().numbers();
        if let (Some(b), LayerState::TwoPool(pools)) = (plan.butterfly(), layer) {
            self.far(b, pools, routes, &mut launch)?;
        }
        let cut = Cut::new(capacity as usize, p.heads, p.kv_heads, p.head_dim);
        let scratch = match self.buffers.scratch.iter().position(|(c, _)| *c == cut) {
            Some(i) => i,
            None => {
                self.buffers.scratch.push((cut, cut.scratch(self.gpu)?));
                self.buffers.scratch.len() - 1
            }
        };
        let recall = match layer {
            LayerState::Recall(cache) => Some(self.recall(p, cache, &mut launch)?),
            _ => None,
        };
        let l = cut.launch(self.gpu, self.weights.dtype(), &self.buffers.scratch[scratch].1, launch)?;
        self.launches.push(l);
        self.launches.extend(recall.into_iter().flatten());
        Ok(())
    }

    /// Makes `launch` attend to the near zone of exact recall, and returns the launches of the other zones, which end
    /// in `launch.out`.
    fn recall(&self, p: &Projections, cache: &RecallKv, launch: &mut DecodeAttention) -> Result<[Launch; 4]> {
        let Codes::Gpu(codes) = &cache.codes else { return Err(without_form()) };
        (launch.sink_k, launch.sink_v, launch.sinks) = rows(cache.sinks())?;
        let near = &self.vectors;
        let step = StepAddresses {
            q: near.rotated,
            near_lse: near.near_lse,
            near_out: near.near,
            out: launch.out,
            ring: (launch.ring_k, launch.ring_v, launch.capacity),
            state: self.state,
            position: 0,
            factor: p.scale,
        };
        (launch.q_out, launch.out, launch.lse) = (step.q, step.near_out, step.near_lse);
        codes.launches(self.gpu, &step)
    }

    /// Sets a swapped layer's sinks, summaries and route table in `launch`.
    fn far(
        &mut self,
        b: &ButterflyLayer,
        pools: &TwoPool,
        routes: &Routes,
        launch: &mut DecodeAttention,
    ) -> Result<()> {
        (launch.sink_k, launch.sink_v, launch.sinks) = rows(pools.sinks())?;
        (launch.mean_k, launch.mean_v, launch.mean_rows) = rows(pools.summary_rows())?;
        launch.mean_rows = launch.mean_rows.max(1);
        launch.running = address_or_null(pools.running.on_device())?;
        (launch.block, launch.readable) = (b.settings.block as i32, b.grid.readable() as i32);
        let width = widest(routes);
        if width == 0 || launch.mean_k == 0 {
            return Ok(());
        }
        let (mut blocks, mut biases) = (vec![], vec![]);
        for route in routes {
            for i in 0..width {
                let (n, bias) = route.get(i).map_or((-1, 0.0), |(n, bias)| (*n as i32, *bias));
                blocks.push(n);
                biases.push(bias);
            }
        }
        let uploaded = upload(self.gpu, &blocks)?;
        launch.routes = uploaded.address;
        self.buffers.ints.push(uploaded);
        launch.route_bias = self.floats(&biases)?;
        launch.route_width = width as i32;
        Ok(())
    }
}
