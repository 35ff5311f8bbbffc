//! The decoder: embed, blocks, norm, head.

use crate::cache::{Cache, LayerState};
use crate::checkpoint::{Checkpoint, HoldAs, OnProgress};
use crate::error::{Error, ErrorKind, Result};
use crate::eviction::EvictionPlan;
use crate::method::Method;
use crate::mixer::{Butterfly, Evict, Full, Mixer, Projections, Sliding, Step};
use crate::nn::{Linear, Mlp, RmsNorm, Rope, Weight};
use crate::ops::human_bytes;
use crate::retrofit::RetrofitPlan;
use crate::spec::{AttentionKind, LayerSpec, ModelSpec, Norms};
use candle_core::{DType, Device, Tensor};

/// The residual stream, and what is yet to be added to it.
type Pending = (Tensor, Option<Tensor>);

/// What a layer is about to mix.
pub struct Observed<'a> {
    /// Its index.
    pub layer: usize,
    /// Its projections.
    pub projections: &'a Projections,
    /// The normed residual stream, `[T, hidden]`.
    pub x: &'a Tensor,
    /// What all layers share.
    pub step: &'a Step<'a>,
    /// What it holds of earlier positions.
    pub state: &'a LayerState,
}

/// Looks on.
pub type Observer<'a> = &'a mut dyn FnMut(&Observed) -> Result<()>;

pub(crate) struct Block {
    pub(crate) before_mixer: RmsNorm,
    pub(crate) mixer: Mixer,
    pub(crate) after_mixer: Option<RmsNorm>,
    pub(crate) before_mlp: RmsNorm,
    pub(crate) mlp: Mlp,
    pub(crate) after_mlp: Option<RmsNorm>,
}

impl Block {
    /// Takes the residual stream and what the block before has yet to add to it, and returns the same: additions then share a
    /// pass with the norms that follow them.
    fn forward(
        &self,
        (x, pending): Pending,
        (layer, step): (usize, &Step),
        state: &mut LayerState,
        observer: Option<Observer>,
    ) -> Result<Pending> {
        let (x, normed) = self.before_mixer.add(&x, pending.as_ref())?;
        drop(pending);
        if let Some(look) = observer {
            look(&Observed { layer, projections: self.mixer.projections(), x: &normed, step, state })?;
        }
        let y = self.mixer.forward(&normed, step, state)?;
        let y = self.after_mixer.as_ref().map_or(Ok(y.clone()), |n| n.forward(&y))?;
        let (x, normed) = self.before_mlp.add(&x, Some(&y))?;
        drop(y);
        let y = self.mlp.forward(&normed)?;
        let y = self.after_mlp.as_ref().map_or(Ok(y.clone()), |n| n.forward(&y))?;
        Ok((x, Some(y)))
    }
}

/// A loaded decoder, run as it came or by another method, for a context.
pub struct Model {
    spec: ModelSpec,
    plan: Option<RetrofitPlan>,
    /// At most one of the two.
    eviction: Option<EvictionPlan>,
    ctx: usize,
    pub(crate) embed: Weight,
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: RmsNorm,
    pub(crate) head: Linear,
    pub(crate) ropes: Vec<Rope>,
    device: Device,
    dtype: DType,
    weights_bytes: u64,
}

impl Model {
    /// Loads `checkpoint` to be run by `method` (a retrofit's plan, if any), provisioned for `ctx` positions.
    ///
    /// # Errors
    /// A missing, misshapen or non-finite tensor, a plan that does not fit the model, or too little memory.
    pub fn load<'a>(
        checkpoint: &Checkpoint,
        method: impl Into<Method<'a>>,
        ctx: usize,
        hold: &HoldAs,
        device: &Device,
        progress: OnProgress,
    ) -> Result<Self> {
        Self::read(checkpoint, method.into(), ctx, hold, device, progress).map_err(|e| match e.kind() {
            ErrorKind::Memory => {
                let asked = human_bytes(checkpoint.held(hold).values().sum());
                let message = format!("{e}: the weights ask for {asked} in all; --dtype q8_0 or q4_0 asks for less");
                Error::new(ErrorKind::Memory, "weights", message)
            }
            _ => e,
        })
    }

    fn read(
        checkpoint: &Checkpoint,
        method: Method,
        ctx: usize,
        hold: &HoldAs,
        device: &Device,
        progress: OnProgress,
    ) -> Result<Self> {
        let spec = checkpoint.spec.clone();
        method.check(&spec)?;
        let loader = Loader { checkpoint, hold, device, spec: &spec };
        let total = spec.layers.len() as u64 + 2;
        progress("load", 0, total);
        let embed = checkpoint.matrix("model.embed_tokens.weight", (spec.vocab, spec.hidden), hold, device)?;
        progress("load", 1, total);
        let mut blocks = vec![];
        for (i, layer) in spec.layers.iter().enumerate() {
            blocks.push(loader.block(i, layer, method, ctx)?);
            progress("load", 2 + i as u64, total);
        }
        let norm = loader.norm("model.norm.weight", spec.hidden)?;
        let head = match spec.tied {
            true => Linear::new(embed.clone(), None),
            false => Linear::new(checkpoint.matrix("lm_head.weight", (spec.vocab, spec.hidden), hold, device)?, None),
        };
        progress("load", total, total);
        let mut weights_bytes = embed.bytes() + if spec.tied { 0 } else { head.bytes() };
        weights_bytes += blocks.iter().map(|b| b.mixer.projections().bytes() + b.mlp.bytes()).sum::<u64>();
        let ropes = spec.ropes.iter().map(Rope::new).collect();
        let (plan, eviction) = (method.plan().cloned(), method.eviction().cloned());
        let (device, dtype) = (device.clone(), hold.compute());
        Ok(Self { spec, plan, eviction, ctx, embed, blocks, norm, head, ropes, device, dtype, weights_bytes })
    }

    /// What it was built from.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The plan it was built with, if any layer is swapped.
    pub fn plan(&self) -> Option<&RetrofitPlan> {
        self.plan.as_ref()
    }

    /// The eviction that it was built with, if its layers evict.
    pub fn eviction(&self) -> Option<&EvictionPlan> {
        self.eviction.as_ref()
    }

    /// How it is run.
    pub fn method(&self) -> Method<'_> {
        self.eviction.as_ref().map_or_else(|| self.plan.as_ref().into(), Method::Evict)
    }

    /// Bytes of weights as held (norms, a few kilobytes, are not counted).
    pub fn weights_bytes(&self) -> u64 {
        self.weights_bytes
    }

    /// Every matrix that multiplies.
    fn matrices(&self) -> impl Iterator<Item = &Linear> {
        fn of_block(b: &Block) -> [&Linear; 7] {
            let (p, m) = (b.mixer.projections(), &b.mlp);
            [&p.q, &p.k, &p.v, &p.out, &m.gate, &m.up, &m.down]
        }
        self.blocks.iter().flat_map(of_block).chain([&self.head])
    }

    /// Whether any matrix is held quantised.
    pub fn has_quantised(&self) -> bool {
        self.matrices().any(|l| matches!(l.weight(), Weight::Quantised(_)))
    }

    /// Bytes that the largest product takes besides its result.
    pub fn scratch(&self) -> u64 {
        self.matrices().map(|l| l.scratch(self.dtype, &self.device)).max().unwrap_or(0)
    }

    /// Type of activations, keys and values.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Where it runs.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// An empty cache for the context that the model was provisioned for.
    pub fn new_cache(&self) -> Result<Cache> {
        Cache::new(&self.spec, self.method(), self.ctx, self.dtype, &self.device)
    }

    /// Reads `ids` after what `cache` holds and returns the logits at the chunk-local positions `want`.
    ///
    /// # Shapes
    /// f32 `[want.len(), vocab]`.
    ///
    /// # Errors
    /// No ids, an id outside the vocabulary, more ids than the context has room for, or a position outside the chunk: all
    /// refused before the cache changes.
    pub fn forward(&self, ids: &[u32], cache: &mut Cache, want: &[usize]) -> Result<Tensor> {
        self.admit(ids, cache, want)?;
        // On a worker of the pool, so that each operator's parallel region costs a steal and not a sleep of this thread.
        rayon::scope(|_| self.run(ids, cache, want, None))
    }

    /// As [`Model::forward`]; `observer` looks on before each layer mixes.
    ///
    /// # Errors
    /// As [`Model::forward`], and those of `observer`.
    pub fn forward_observed(
        &self,
        ids: &[u32],
        cache: &mut Cache,
        want: &[usize],
        observer: Observer,
    ) -> Result<Tensor> {
        self.admit(ids, cache, want)?;
        self.run(ids, cache, want, Some(observer))
    }

    /// Refuses what cannot be read.
    fn admit(&self, ids: &[u32], cache: &Cache, want: &[usize]) -> Result<()> {
        cache.admit(ids.len())?;
        if ids.is_empty() {
            return Err(Error::new(ErrorKind::Usage, "prompt", "holds no tokens"));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.spec.vocab) {
            return Err(Error::new(
                ErrorKind::Usage,
                "token ids",
                format!("{id} is outside the vocabulary of {}", self.spec.vocab),
            ));
        }
        if let Some(w) = want.iter().find(|w| **w >= ids.len()) {
            return Err(Error::new(ErrorKind::Usage, "logits", format!("position {w} of a chunk of {}", ids.len())));
        }
        Ok(())
    }

    fn run(&self, ids: &[u32], cache: &mut Cache, want: &[usize], mut observer: Option<Observer>) -> Result<Tensor> {
        let start = cache.position();
        let positions = || (start..start + ids.len()).map(|p| p as f32);
        let tables: Result<Vec<_>> = self.ropes.iter().map(|r| r.table(positions(), &self.device)).collect();
        let step = Step { start, ropes: &self.ropes, tables: &tables? };
        let mut x = self.embed.rows(&Tensor::new(ids, &self.device)?, self.dtype)?;
        if self.spec.embed_scale != 1.0 {
            x = (x * self.spec.embed_scale)?;
        }
        let mut pending = None;
        for (i, (block, state)) in self.blocks.iter().zip(&mut cache.layers).enumerate() {
            // Lent to one layer at a time.
            let look: Option<Observer> = match &mut observer {
                Some(look) => Some(&mut **look),
                None => None,
            };
            let made = block.forward((x, pending), (i, &step), state, look);
            (x, pending) = made.map_err(|e| e.within(format!("layer {i}")))?;
        }
        cache.advance(ids.len());
        let want: Vec<u32> = want.iter().map(|w| *w as u32).collect();
        if want.is_empty() {
            return Ok(Tensor::zeros((0, self.spec.vocab), DType::F32, &Device::Cpu)?);
        }
        let want = Tensor::new(want, &self.device)?;
        let pending = pending.map(|y| y.index_select(&want, 0)).transpose()?;
        let (_, normed) = self.norm.add(&x.index_select(&want, 0)?, pending.as_ref())?;
        Ok(self.head.forward(&normed)?.to_dtype(DType::F32)?)
    }
}

impl Model {
    /// The same weights run by `method` (a plan, or `None` for the model as it came), provisioned for `ctx` positions: no tensor
    /// is read or copied.
    ///
    /// # Errors
    /// A plan that does not fit the model.
    pub fn with_plan<'a>(mut self, method: impl Into<Method<'a>>, ctx: usize) -> Result<Self> {
        let method = method.into();
        method.check(&self.spec)?;
        let remake = |(i, block): (usize, Block)| {
            let projections = match block.mixer {
                Mixer::Full(Full { projections })
                | Mixer::Sliding(Sliding { projections, .. })
                | Mixer::Evict(Evict { projections }) => projections,
                Mixer::Butterfly(m) => m.projections,
            };
            Ok(Block { mixer: mixer(projections, &self.spec, i, method, ctx)?, ..block })
        };
        self.blocks = std::mem::take(&mut self.blocks).into_iter().enumerate().map(remake).collect::<Result<_>>()?;
        (self.plan, self.eviction, self.ctx) = (method.plan().cloned(), method.eviction().cloned(), ctx);
        Ok(self)
    }

    /// Bytes of weights that one token's pass reads: all but an embedding table that is not the head too.
    pub fn bytes_per_token(&self) -> u64 {
        self.weights_bytes - if self.spec.tied { 0 } else { self.embed.bytes() }
    }
}

/// What layer `i` mixes with under `method`.
fn mixer(projections: Projections, spec: &ModelSpec, i: usize, method: Method, ctx: usize) -> Result<Mixer> {
    Ok(match (spec.layers[i].attention, method.swapped(i)) {
        (AttentionKind::Sliding { window }, _) => Mixer::Sliding(Sliding { projections, window }),
        (AttentionKind::Full, None) if method.eviction().is_some() => Mixer::Evict(Evict { projections }),
        (AttentionKind::Full, None) => Mixer::Full(Full { projections }),
        (AttentionKind::Full, Some((settings, ordinal))) => {
            Mixer::Butterfly(Box::new(Butterfly::new(projections, settings, ordinal, ctx, spec.max_positions)?))
        }
    })
}

/// Names the tensors of a layer.
struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    hold: &'a HoldAs,
    device: &'a Device,
    spec: &'a ModelSpec,
}

impl Loader<'_> {
    fn norm(&self, name: &str, len: usize) -> Result<RmsNorm> {
        Ok(RmsNorm::new(self.checkpoint.vector(name, len, self.device)?, self.spec.norm_eps))
    }

    fn linear(&self, name: String, out: usize, input: usize, bias: bool) -> Result<Linear> {
        let weight = self.checkpoint.matrix(&format!("{name}.weight"), (out, input), self.hold, self.device)?;
        let bias = bias.then(|| self.checkpoint.vector(&format!("{name}.bias"), out, self.device)).transpose()?;
        Ok(Linear::new(weight, bias))
    }

    fn block(&self, i: usize, l: &LayerSpec, method: Method, ctx: usize) -> Result<Block> {
        let hidden = self.spec.hidden;
        let name = |part: &str| format!("model.layers.{i}.{part}");
        let norm = |part: &str| self.norm(&name(&format!("{part}.weight")), hidden);
        let (q_rows, kv_rows) = (l.heads * l.head_dim, l.kv_heads * l.head_dim);
        let head_norm = |part: &str| self.norm(&name(&format!("self_attn.{part}.weight")), l.head_dim);
        let qk_norm = match l.qk_norm {
            true => Some((head_norm("q_norm")?, head_norm("k_norm")?)),
            false => None,
        };
        let projections = Projections {
            q: self.linear(name("self_attn.q_proj"), q_rows, hidden, l.qkv_bias)?,
            k: self.linear(name("self_attn.k_proj"), kv_rows, hidden, l.qkv_bias)?,
            v: self.linear(name("self_attn.v_proj"), kv_rows, hidden, l.qkv_bias)?,
            out: self.linear(name("self_attn.o_proj"), hidden, q_rows, l.out_bias)?,
            qk_norm,
            heads: l.heads,
            kv_heads: l.kv_heads,
            head_dim: l.head_dim,
            scale: l.scale as f32,
            rope: l.rope,
        };
        let sandwich = l.norms == Norms::Sandwich;
        Ok(Block {
            before_mixer: norm("input_layernorm")?,
            mixer: mixer(projections, self.spec, i, method, ctx)?,
            after_mixer: sandwich.then(|| norm("post_attention_layernorm")).transpose()?,
            before_mlp: norm(if sandwich { "pre_feedforward_layernorm" } else { "post_attention_layernorm" })?,
            mlp: Mlp {
                gate: self.linear(name("mlp.gate_proj"), l.intermediate, hidden, l.mlp_bias)?,
                up: self.linear(name("mlp.up_proj"), l.intermediate, hidden, l.mlp_bias)?,
                down: self.linear(name("mlp.down_proj"), hidden, l.intermediate, l.mlp_bias)?,
                activation: l.activation,
            },
            after_mlp: sandwich.then(|| norm("post_feedforward_layernorm")).transpose()?,
        })
    }
}
