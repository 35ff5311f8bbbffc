//! Streaming on a GPU: the launches of one character are captured once as a CUDA graph and replayed (kernels/char_step.cu).
//! Weights, keys and values are bf16, the residual stream and all sums f32.

use super::config::SYMBOLS;
use super::model::{CharModel, Weights};
use super::stream::Streaming;
use crate::error::{At, Error, ErrorKind, Result};
use crate::ops::cuda::{address, address_or_null, capture, mirrored, Kernel, Launch};
use crate::ops::pair::Partner;
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaSlice, DevicePtr, DeviceRepr, ValidAsZeroBits};
use candle_core::cuda_backend::CudaDevice;
use candle_core::{DType, Device, Tensor};

const THREADS: usize = 256;
/// Symbols that a prompt's first forward pass reads, at most.
const PIECE: usize = 1 << 20;
/// Rows of a thread block of `char_project`.
const ROWS: usize = THREADS / 32;

/// `CharState` of kernels/char_step.cu.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct State {
    position: i32,
    symbol: u32,
}
// SAFETY: numbers in C's layout, of which zeros are valid.
unsafe impl DeviceRepr for State {}
unsafe impl ValidAsZeroBits for State {}

/// `CharProject` there.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Project {
    weight: u64,
    x: u64,
    norm: u64,
    to: u64,
    rows: i32,
    n: i32,
    mode: i32,
    eps: f32,
}
// SAFETY: numbers in C's layout.
unsafe impl DeviceRepr for Project {}
mirrored!(Project, 48, { weight: 0, x: 8, norm: 16, to: 24, rows: 32, n: 36, mode: 40, eps: 44 });

/// What `char_project` does with its products: `STORE`, `ADD` and `GATE` there.
#[derive(Clone, Copy)]
enum Mode {
    Store = 0,
    Add = 1,
    Gate = 2,
}

/// `CharAttend` there.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Attend {
    state: u64,
    qkv: u64,
    rope: u64,
    keys: u64,
    values: u64,
    out: u64,
    mean_keys: u64,
    mean_values: u64,
    heads: i32,
    chunk: i32,
    distance: i32,
    chunks: i32,
}
// SAFETY: numbers in C's layout.
unsafe impl DeviceRepr for Attend {}
mirrored!(Attend, 80, {
    state: 0, qkv: 8, rope: 16, keys: 24, values: 32, out: 40, mean_keys: 48, mean_values: 56, heads: 64, chunk: 68,
    distance: 72, chunks: 76,
});

/// A text being read on a GPU.
pub struct GpuStream<'a> {
    model: &'a CharModel,
    weights: Weights,
    gpu: CudaDevice,
    graph: CudaGraph,
    state: CudaSlice<State>,
    /// Attention of each layer.
    attend: Vec<Attend>,
    logits: Tensor,
    position: usize,
    bytes: u64,
    /// What the graph's launches read and write.
    _held: Vec<Tensor>,
}

impl Drop for GpuStream<'_> {
    /// Waits for the last launch: a running graph must not be destroyed.
    fn drop(&mut self) {
        let _ = self.gpu.cuda_stream().synchronize();
    }
}

fn driver(e: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Backend, "stream", e)
}

impl<'a> GpuStream<'a> {
    /// An empty text; `weights` f32 `[len]` on a GPU.
    ///
    /// # Errors
    /// A shape that the kernels do not take, by name, or no memory for the keys and values.
    pub fn new(model: &'a CharModel, weights: &Tensor) -> Result<Self> {
        let Device::Cuda(gpu) = weights.device() else {
            return Err(Error::new(ErrorKind::Backend, "stream", "the weights are not on a GPU"));
        };
        let (config, on, weights) = (model.config(), weights.device(), Weights::new(weights)?);
        let (d, wide, heads) = (config.hidden_size, config.intermediate_size, config.num_attention_heads);
        let width = heads * config.head_dim;
        if config.head_dim != 64 || !matches!(config.chunk, 16 | 128) || [d, width, wide].iter().any(|n| *n > 4096) {
            let shape = format!("heads of {} in chunks of {}, widths {d} and {wide}", config.head_dim, config.chunk);
            return Err(Error::unsupported("stream on CUDA", format!("{shape}; use --device cpu")));
        }
        let bytes = config.stream_bytes(2);
        let room = |shape: &[usize], dtype| {
            let message = |e| driver(format!("{}; keys and values take {} bytes", crate::plain(&e), bytes));
            Tensor::zeros(shape, dtype, on).map_err(message)
        };
        let f32s = |n: usize| room(&[n], DType::F32);
        let (x, qkv, attended, gated, logits) =
            (f32s(d)?, f32s(3 * width)?, f32s(width)?, f32s(wide)?, room(&[1, SYMBOLS], DType::F32)?);
        let state = gpu.alloc_zeros::<State>(1)?;
        let at_state = state.device_ptr(&gpu.cuda_stream()).0;
        let kernel = |name: &str| Kernel::load(gpu, "char_step", name.into());
        let embedding = model.embedding(&weights)?;
        let embed = Launch::new(kernel("char_embed")?, (d.div_ceil(THREADS), 1, 1), THREADS);
        let mut launches = vec![embed.with(at_state).with(address(&embedding)?).with(address(&x)?).with(d as i32)];
        let project =
            |weight: &Tensor, from: &Tensor, norm: Option<&Tensor>, to: &Tensor, mode: Mode| -> Result<Launch> {
                let (all, n) = weight.dims2().at("projection")?;
                let rows = if matches!(mode, Mode::Gate) { all / 2 } else { all };
                let p = Project {
                    weight: address(weight)?,
                    x: address(from)?,
                    norm: address_or_null(norm)?,
                    to: address(to)?,
                    rows: rows as i32,
                    n: n as i32,
                    mode: mode as i32,
                    eps: config.rms_norm_eps as f32,
                };
                Ok(Launch::new(kernel("char_project")?.shared(4 * n)?, (rows.div_ceil(ROWS), 1, 1), THREADS).with(p))
            };
        let (mut attend, mut held) = (vec![], vec![]);
        for (i, partner) in config.layers().into_iter().enumerate() {
            if let Partner::Xor(_) = partner {
                return Err(Error::unsupported("pairing", "xor reads later characters: it has no stream"));
            }
            let (distance, mean) = (partner.distance(), matches!(partner, Partner::Summary(_)));
            let chunks = if mean { 1 } else { distance + 1 };
            let w = model.layer_weights(&weights, i)?;
            let ring = [chunks, heads, config.chunk, config.head_dim];
            let (keys, values) = (room(&ring, DType::BF16)?, room(&ring, DType::BF16)?);
            let means = || room(&[distance, heads, config.head_dim], DType::BF16);
            let means = mean.then(|| Ok::<_, Error>((means()?, means()?))).transpose()?;
            let p = Attend {
                state: at_state,
                qkv: address(&qkv)?,
                rope: address(model.rope().tables())?,
                keys: address(&keys)?,
                values: address(&values)?,
                out: address(&attended)?,
                mean_keys: address_or_null(means.as_ref().map(|m| &m.0))?,
                mean_values: address_or_null(means.as_ref().map(|m| &m.1))?,
                heads: heads as i32,
                chunk: config.chunk as i32,
                distance: distance as i32,
                chunks: chunks as i32,
            };
            launches.push(project(&w.qkv, &x, Some(&w.norm1), &qkv, Mode::Store)?);
            launches.push(Launch::new(kernel("char_attend")?, (heads, 1, 1), THREADS).with(p));
            launches.push(project(&w.o, &attended, None, &x, Mode::Add)?);
            launches.push(project(w.gate_up.dense()?, &x, Some(&w.norm2), &gated, Mode::Gate)?);
            launches.push(project(w.down.dense()?, &gated, None, &x, Mode::Add)?);
            attend.push(p);
            held.extend([keys, values]);
            held.extend(means.into_iter().flat_map(|(k, v)| [k, v]));
        }
        let last = model.final_weight(&weights)?;
        launches.push(project(&embedding, &x, Some(&last), &logits, Mode::Store)?);
        held.extend([x, qkv, attended, gated]);
        // SAFETY: every address belongs to the weights, the state or `held`, which outlive the graph's last launch.
        let graph = unsafe { capture(gpu, &launches, false)? };
        let gpu = gpu.clone();
        Ok(Self { model, weights, gpu, graph, state, attend, logits, position: 0, bytes, _held: held })
    }

    /// Keeps keys and values of the first `rows` characters of a text, whole chunks, in the ring of a layer, or the means of
    /// these chunks.
    fn fill(gpu: &CudaDevice, p: Attend, qkv: &Tensor, rows: usize) -> Result<()> {
        if p.mean_keys != 0 {
            let chunks = rows / p.chunk as usize;
            let first = chunks.saturating_sub(p.distance as usize);
            let kernel = Kernel::load(gpu, "char_step", "char_fill_means".into())?;
            let launch = Launch::new(kernel, (chunks - first, p.heads as usize, 1), 128);
            let launch = launch.with(p).with(address(qkv)?).with(first as i32);
            // SAFETY: as below.
            return unsafe { launch.enqueue(false) };
        }
        let from = (rows / p.chunk as usize).saturating_sub(p.chunks as usize) * p.chunk as usize;
        let blocks = ((rows - from) * p.heads as usize * 32).div_ceil(THREADS).min(1024);
        let launch = Launch::new(Kernel::load(gpu, "char_step", "char_fill".into())?, (blocks, 1, 1), THREADS);
        let launch = launch.with(p).with(address(qkv)?).with(from as i32).with(rows as i32);
        // SAFETY: `qkv` holds `rows` rows; frees are ordered after the launch on the one stream.
        unsafe { launch.enqueue(false) }
    }
}

impl Streaming for GpuStream<'_> {
    fn at_once(&self) -> (usize, usize) {
        (self.model.config().chunk, PIECE)
    }

    fn read_chunks(&mut self, symbols: &[u8]) -> Result<()> {
        let wide: Vec<u32> = symbols.iter().map(|s| u32::from(*s)).collect();
        let (gpu, attend) = (&self.gpu, &self.attend);
        self.model.forward(&self.weights, &wide, 1, |layer, qkv| Self::fill(gpu, attend[layer], qkv, wide.len()))?;
        self.position = symbols.len();
        Ok(())
    }

    fn read(&mut self, symbol: u8) -> Result<Vec<f32>> {
        let state = State { position: self.position as i32, symbol: symbol.into() };
        self.gpu.memcpy_htod(&[state], &mut self.state)?;
        self.graph.launch().map_err(driver)?;
        self.position += 1;
        self.logits.flatten_all().and_then(|l| l.to_vec1()).at("logits")
    }

    fn position(&self) -> usize {
        self.position
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }
}
