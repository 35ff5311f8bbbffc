//! A checkpoint's weights on a device: immutable, shared by every [`Run`](crate::run::Run) over them.
//!
//! On a GPU each run leases a stream from the weights for its lifetime, which only its forks share: two runs never
//! record into each other's captured step, and decode steps of several runs fill a GPU that one leaves idle. Loading
//! ends with a synchronisation, after which weights are only read.

use crate::cache::HostMemory;
use crate::checkpoint::{Checkpoint, OnProgress, WeightFormat};
use crate::error::{Error, ErrorKind, Result};
use crate::mixer::{DeltaWeights, MixerWeights, Projections};
use crate::nn::{Linear, Mlp, RmsNorm, Rope, Weight};
use crate::ops::{beside, human_bytes};
use crate::recall::{Calibration, Fits};
use crate::spec::{AttentionSpec, DeltaSpec, LayerSpec, MixerSpec, ModelSpec};
use crate::tensors::{AttentionTensors, DeltaTensors, LayerTensors, LinearSpec, MixerTensors, TensorSpec};
use candle_core::{DType, Device};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// One layer's weights.
pub(crate) struct Block {
    pub(crate) before_mixer: RmsNorm,
    pub(crate) mixer: MixerWeights,
    pub(crate) after_mixer: Option<RmsNorm>,
    pub(crate) before_mlp: RmsNorm,
    pub(crate) mlp: Mlp,
    pub(crate) after_mlp: Option<RmsNorm>,
}

/// A decoder's weights.
pub struct Weights {
    spec: ModelSpec,
    pub(crate) embed: Weight,
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: RmsNorm,
    pub(crate) head: Linear,
    pub(crate) ropes: Vec<Rope>,
    device: Device,
    dtype: DType,
    bytes: u64,
    /// Device handles that no run leases, each with its own stream.
    idle: Mutex<Vec<Device>>,
    /// Page-locked memory of the runs.
    host_memory: Arc<HostMemory>,
    /// What the codes of exact recall are fitted to, once it is known.
    calibration: OnceLock<Calibration>,
    /// Codes fitted to the calibration for earlier runs.
    fits: Fits,
}

impl Weights {
    /// Loads `checkpoint` onto `device`, with matrices encoded as `format` says.
    ///
    /// # Errors
    /// A missing, misshapen or non-finite tensor; too little memory.
    pub fn load(
        checkpoint: &Checkpoint,
        format: &WeightFormat,
        device: &Device,
        progress: OnProgress,
    ) -> Result<Arc<Self>> {
        let loaded = Loader { checkpoint, format, device }.weights(progress).map_err(|e| match e.kind() {
            ErrorKind::Memory => {
                let total = human_bytes(checkpoint.bytes_by_type(format).values().sum());
                let message = format!("{e}: the weights take {total} in all; --dtype q8_0 or q4_0 takes less");
                Error::new(ErrorKind::Memory, "weights", message)
            }
            _ => e,
        })?;
        // Runs read the weights on other streams.
        device.synchronize()?;
        Ok(Arc::new(loaded))
    }

    /// The model's specification.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The device, with the stream that loaded the weights.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Type of activations, keys and values.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Size of the matrices in memory, bytes; norms, a few kilobytes, are not counted.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes that a decode step reads: every matrix but an untied embedding table.
    pub fn bytes_per_token(&self) -> u64 {
        self.bytes - if self.spec.tied { 0 } else { self.embed.bytes() }
    }

    /// Returns the page-locked memory that runs share.
    pub fn host_memory(&self) -> &Arc<HostMemory> {
        &self.host_memory
    }

    /// Sets what the codes of exact recall are fitted to; has no effect if it is set already.
    pub fn calibrate(&self, calibration: Calibration) {
        let _ = self.calibration.set(calibration);
    }

    /// Returns the codes fitted to the calibration so far.
    pub(crate) fn fits(&self) -> &Fits {
        &self.fits
    }

    /// What the codes of exact recall are fitted to.
    ///
    /// # Errors
    /// It has not been set.
    pub fn calibration(&self) -> Result<&Calibration> {
        let missing = || Error::new(ErrorKind::Usage, "recall", "needs a calibration of this model");
        self.calibration.get().ok_or_else(missing)
    }

    /// Whether any matrix is block-encoded.
    pub fn has_quantised(&self) -> bool {
        self.matrices().any(|l| matches!(l.weight(), Weight::Blocks(_)))
    }

    /// Largest temporary allocation of a product besides its result, bytes.
    pub fn scratch(&self) -> u64 {
        self.matrices().map(|l| l.scratch(self.dtype, &self.device)).max().unwrap_or(0)
    }

    /// Iterates over the linear layers.
    fn matrices(&self) -> impl Iterator<Item = &Linear> {
        fn mlp(b: &Block) -> [&Linear; 3] {
            [&b.mlp.gate, &b.mlp.up, &b.mlp.down]
        }
        let mixers = self.blocks.iter().flat_map(|b| b.mixer.matrices());
        mixers.chain(self.blocks.iter().flat_map(mlp)).chain([&self.head])
    }
}

/// A device handle whose stream only one run and its forks use; dropping it returns the handle to the weights.
pub(crate) struct Lease {
    weights: Arc<Weights>,
    device: Device,
}

impl Lease {
    /// Takes an idle handle or opens a new one.
    ///
    /// # Errors
    /// A GPU that cannot be opened again.
    pub(crate) fn new(weights: &Arc<Weights>) -> Result<Self> {
        let idle = weights.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let device = match idle {
            Some(device) => device,
            None => beside(&weights.device)?,
        };
        Ok(Self { weights: weights.clone(), device })
    }

    pub(crate) fn device(&self) -> &Device {
        &self.device
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.weights.idle.lock().unwrap_or_else(PoisonError::into_inner).push(self.device.clone());
    }
}

/// Reads tensors by the schema.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    format: &'a WeightFormat,
    device: &'a Device,
}

impl Loader<'_> {
    fn weights(&self, progress: OnProgress) -> Result<Weights> {
        let (spec, schema) = (self.checkpoint.spec.clone(), &self.checkpoint.schema);
        let total = spec.layers.len() as u64 + 2;
        progress("load", 0, total);
        let embed = self.matrix(&schema.embed)?;
        progress("load", 1, total);
        let mut blocks = vec![];
        for (i, (layer, tensors)) in spec.layers.iter().zip(&schema.layers).enumerate() {
            blocks.push(self.block(layer, tensors)?);
            progress("load", 2 + i as u64, total);
        }
        let norm = self.norm(&schema.norm)?;
        let head = match &schema.head {
            None => Linear::new(embed.clone(), None),
            Some(head) => Linear::new(self.matrix(head)?, None),
        };
        progress("load", total, total);
        let mut bytes = embed.bytes() + if spec.tied { 0 } else { head.bytes() };
        let mixers = blocks.iter().flat_map(|b| b.mixer.matrices());
        bytes += mixers.map(Linear::bytes).sum::<u64>() + blocks.iter().map(|b| b.mlp.bytes()).sum::<u64>();
        let ropes = spec.ropes.iter().map(Rope::new).collect();
        let (device, dtype) = (self.device.clone(), self.format.compute());
        let idle = Mutex::new(vec![device.clone()]);
        let (host_memory, calibration, fits) = Default::default();
        Ok(Weights {
            spec,
            embed,
            blocks,
            norm,
            head,
            ropes,
            device,
            dtype,
            bytes,
            idle,
            host_memory,
            calibration,
            fits,
        })
    }

    fn matrix(&self, tensor: &TensorSpec) -> Result<Weight> {
        self.checkpoint.matrix(tensor, self.format, self.device)
    }

    fn norm(&self, tensor: &TensorSpec) -> Result<RmsNorm> {
        Ok(RmsNorm::new(self.checkpoint.vector(tensor, self.device)?, self.checkpoint.spec.norm_eps))
    }

    fn linear(&self, linear: &LinearSpec) -> Result<Linear> {
        let bias = linear.bias.as_ref().map(|b| self.checkpoint.vector(b, self.device)).transpose()?;
        Ok(Linear::new(self.matrix(&linear.weight)?, bias))
    }

    /// Loads a layer whose bias is added in the type of the activations.
    fn linear_with_cast_bias(&self, linear: &LinearSpec) -> Result<Linear> {
        let dtype = self.format.compute();
        linear.bias.as_ref().map_or(Ok(()), |b| self.checkpoint.fits(b, dtype))?;
        self.linear(linear)?.with_bias_in(dtype)
    }

    fn attention(&self, a: &AttentionSpec, t: &AttentionTensors) -> Result<Projections> {
        let qk_norm = t.qk_norm.as_ref();
        Ok(Projections {
            q: self.linear(&t.q)?,
            k: self.linear(&t.k)?,
            v: self.linear(&t.v)?,
            out: self.linear_with_cast_bias(&t.out)?,
            gate: t.gate.as_ref().map(|g| self.linear_with_cast_bias(g)).transpose()?,
            qk_norm: qk_norm.map(|(q, k)| Ok::<_, Error>((self.norm(q)?, self.norm(k)?))).transpose()?,
            heads: a.heads,
            kv_heads: a.kv_heads,
            head_dim: a.head_dim,
            scale: a.scale as f32,
            rope: a.rope,
        })
    }

    fn delta(&self, spec: &DeltaSpec, t: &DeltaTensors) -> Result<DeltaWeights> {
        let vector = |tensor: &TensorSpec| self.checkpoint.vector(tensor, self.device);
        Ok(DeltaWeights {
            spec: *spec,
            qkv: self.linear(&t.qkv)?,
            z: self.linear(&t.z)?,
            beta: self.linear(&t.beta)?,
            decay: self.linear(&t.decay)?,
            out: self.linear(&t.out)?,
            conv: vector(&t.conv)?,
            rate: vector(&t.rate)?,
            decay_bias: vector(&t.decay_bias)?,
            norm: self.norm(&t.norm)?,
            tiled: self.checkpoint.tiles_value_heads(),
        })
    }

    fn block(&self, l: &LayerSpec, t: &LayerTensors) -> Result<Block> {
        let mixer = match (&l.mixer, &t.mixer) {
            (MixerSpec::Attention(a), MixerTensors::Attention(t)) => {
                MixerWeights::Attention(Box::new(self.attention(a, t)?))
            }
            (MixerSpec::Delta(d), MixerTensors::Delta(t)) => MixerWeights::Delta(Box::new(self.delta(d, t)?)),
            _ => return Err(Error::new(ErrorKind::Backend, "schema", "was made for another specification")),
        };
        Ok(Block {
            before_mixer: self.norm(&t.before_mixer)?,
            mixer,
            after_mixer: t.after_mixer.as_ref().map(|n| self.norm(n)).transpose()?,
            before_mlp: self.norm(&t.before_mlp)?,
            mlp: Mlp {
                gate: self.linear_with_cast_bias(&t.gate)?,
                up: self.linear_with_cast_bias(&t.up)?,
                down: self.linear_with_cast_bias(&t.down)?,
                activation: l.feed_forward.activation,
            },
            after_mlp: t.after_mlp.as_ref().map(|n| self.norm(n)).transpose()?,
        })
    }
}
