//! The character model over whole sequences: logits, loss and the gradient of all parameters.
//!
//! Layer: `x1 = x + Wo pair(Wqkv norm(x))`, `x' = x1 + Wd (silu(Wg n) ⊙ Wu n)` with `n = norm(x1)`; the embedding is tied.
//! `Wg`, `Wu` and `Wd` may be products of butterfly factors.
//! The backward pass is written out, layer by layer: candle's `rms_norm`, `softmax_last_dim` and `rope` have none, and its
//! automatic differentiation keeps every intermediate result.

use super::config::{CharConfig, MlpForm, SYMBOLS};
use super::projection::{input_gradient, product, Projection};
use super::text::END_OF_TEXT;
use crate::error::{At, Error, ErrorKind, Result};
use crate::nn::{Factored, FactoredShape};
use crate::ops::pair::{self, PairRope, PairShape, Partner};
use crate::ops::training::{cross_entropy, gated_silu, gated_silu_backward, norm, norm_backward};
use crate::ops::training::{FlatGradient, Normed, NO_TARGET};
use crate::train::{Init, Layout, Objective, Parameter};
use candle_core::{DType, Device, Tensor};

/// What the forward pass keeps for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rematerialise {
    /// Everything.
    Nothing,
    /// The input of each layer; the rest is computed again, at a third more work.
    Layers,
}

/// Sequences of one length with their targets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Symbols read: `[sequences][length]`, the length a multiple of the chunk.
    pub symbols: Vec<u32>,
    /// Symbols to predict, or [`NO_TARGET`].
    pub targets: Vec<u32>,
    /// Number of sequences.
    pub sequences: usize,
}

impl Batch {
    /// Whole documents, each after [`END_OF_TEXT`], padded at the end to the longest in whole chunks.
    pub fn documents(documents: &[&[u8]], chunk: usize) -> Self {
        let longest = documents.iter().map(|d| d.len()).max().unwrap_or(0).max(1).next_multiple_of(chunk);
        let (mut symbols, mut targets) = (vec![], vec![]);
        for document in documents {
            let pad = |count| std::iter::repeat_n(u32::from(END_OF_TEXT), count);
            let read = document.len().saturating_sub(1);
            symbols.extend(pad(1).chain(document[..read].iter().map(|s| u32::from(*s))).chain(pad(longest - 1 - read)));
            targets.extend(document.iter().map(|s| u32::from(*s)));
            targets.extend(std::iter::repeat_n(NO_TARGET, longest - document.len()));
        }
        Self { symbols, targets, sequences: documents.len() }
    }

    /// Adds a sequence of `symbols` to predict, preceded by [`END_OF_TEXT`]; `targets` are those symbols or [`NO_TARGET`].
    /// `sequences` stays as it was.
    pub fn push(&mut self, symbols: &[u8], targets: &[u32]) {
        let read = std::iter::once(END_OF_TEXT).chain(symbols[..symbols.len().saturating_sub(1)].iter().copied());
        self.symbols.extend(read.map(u32::from));
        self.targets.extend(targets);
    }

    /// Number of symbols to predict.
    pub fn predicted(&self) -> usize {
        self.targets.iter().filter(|t| **t != NO_TARGET).count()
    }
}

/// First elements of a layer's parameters.
#[derive(Debug, Clone, Copy)]
struct Places {
    norm1: usize,
    qkv: usize,
    o: usize,
    norm2: usize,
    gate_up: usize,
    down: usize,
}

/// A layer's parameters.
pub(super) struct LayerWeights {
    pub norm1: Tensor,
    /// `[3 H D, d]`: queries, keys, values.
    pub qkv: Tensor,
    pub o: Tensor,
    pub norm2: Tensor,
    /// `[2 I, d]`: gate, up.
    pub gate_up: Projection,
    pub down: Projection,
}

/// All weights: the master copy, and the one that products are computed with, bf16 on CUDA.
pub(super) struct Weights {
    master: Tensor,
    compute: Tensor,
}

impl Weights {
    pub(super) fn new(master: &Tensor) -> Result<Self> {
        let dtype = if master.device().is_cuda() { DType::BF16 } else { DType::F32 };
        Ok(Self { master: master.clone(), compute: master.to_dtype(dtype).at("weights")? })
    }
}

/// Where a layer's input comes from: the residual stream, and what the layer before adds to it.
type Residual = (Tensor, Option<Tensor>);

/// Results of a layer's forward pass that the backward pass reads.
struct Saved {
    before: Normed,
    qkv: Tensor,
    attended: Tensor,
    lse: Tensor,
    between: Normed,
    both: Tensor,
    gated: Tensor,
}

/// A character model without weights: those are one flat vector ([`CharModel::layout`]).
pub struct CharModel {
    config: CharConfig,
    layout: Layout,
    places: Vec<Places>,
    final_norm: usize,
    layers: Vec<Partner>,
    rope: PairRope,
    rematerialise: Rematerialise,
}

impl CharModel {
    /// The model of a configuration.
    ///
    /// # Errors
    /// A configuration that makes no model.
    pub fn new(config: CharConfig, rematerialise: Rematerialise, device: &Device) -> Result<Self> {
        config.check()?;
        let (d, width, wide) =
            (config.hidden_size, config.num_attention_heads * config.head_dim, config.intermediate_size);
        let factored = config.mlp == MlpForm::Factored;
        let mut layout = Layout::default();
        let mut push = |name: &str, shape: &[usize], init| {
            // None for factors: what shrinks each of log2 N factors shrinks their product log2 N times as fast, and they begin
            // as rotations, of which no norm or later matrix makes up for the lost scale.
            let decay = shape.len() > 1 && !matches!(init, Init::Rotations(_));
            layout.push(Parameter { name: name.into(), shape: shape.to_vec(), init, decay })
        };
        let std = |inputs: usize| Init::Normal(1.0 / (inputs as f32).sqrt());
        // The residual stream is a sum of two terms a layer.
        let last = |inputs: usize| Init::Normal(1.0 / (2.0 * config.num_layers() as f32 * inputs as f32).sqrt());
        push("model.embed_tokens.weight", &[SYMBOLS, d], std(d));
        let mut places = vec![];
        for i in 0..config.num_layers() {
            let mut own =
                |name: &str, shape: &[usize], init| push(&format!("model.layers.{i}.{name}.weight"), shape, init);
            let norm1 = own("input_layernorm", &[d], Init::Ones);
            let [qkv, _, _] =
                ["q_proj", "k_proj", "v_proj"].map(|p| own(&format!("self_attn.{p}"), &[width, d], std(d)));
            let o = own("self_attn.o_proj", &[d, width], last(width));
            let norm2 = own("post_attention_layernorm", &[d], Init::Ones);
            let mut mlp = |name: &str, (outputs, inputs): (usize, usize), init: Init| match init {
                Init::Normal(std) if factored => {
                    let shape = FactoredShape { outputs, inputs };
                    let init = Init::Rotations(shape.gain(std.into()) as f32);
                    push(&format!("model.layers.{i}.mlp.{name}.factors"), &shape.factors(), init)
                }
                _ => push(&format!("model.layers.{i}.mlp.{name}.weight"), &[outputs, inputs], init),
            };
            let [gate_up, _] = ["gate_proj", "up_proj"].map(|p| mlp(p, (wide, d), std(d)));
            let down = mlp("down_proj", (d, wide), last(wide));
            places.push(Places { norm1, qkv, o, norm2, gate_up, down });
        }
        let final_norm = push("model.norm.weight", &[d], Init::Ones);
        let rope = PairRope::new(config.chunk, config.head_dim, config.rope_theta, device)?;
        let layers = config.layers();
        Ok(Self { config, layout, places, final_norm, layers, rope, rematerialise })
    }

    /// The configuration.
    pub fn config(&self) -> &CharConfig {
        &self.config
    }

    /// Logits of every symbol of every sequence.
    ///
    /// # Shapes
    /// `weights` f32 `[len]`; the result `[N, 256]`.
    ///
    /// # Errors
    /// Sequences that are not whole chunks, or a backend's failure.
    pub fn logits(&self, weights: &Tensor, symbols: &[u32], sequences: usize) -> Result<Tensor> {
        let weights = Weights::new(weights)?;
        let normed = self.forward(&weights, symbols, sequences, |_, _| Ok(()))?;
        product(&normed, &self.embedding(&weights)?)
    }

    /// The normed output of the last layer, `[N, d]`; `each` is given the number of every layer and its queries, keys and
    /// values, `[N, 3 H D]`, before they are rotated.
    pub(super) fn forward(
        &self,
        weights: &Weights,
        symbols: &[u32],
        sequences: usize,
        mut each: impl FnMut(usize, &Tensor) -> Result<()>,
    ) -> Result<Tensor> {
        let shape = self.shape(symbols.len(), sequences)?;
        let mut x = (self.embed(weights, symbols)?, None);
        for i in 0..self.layers.len() {
            let (next, saved) = self.layer(weights, i, &x, shape)?;
            each(i, &saved.qkv)?;
            x = next;
        }
        Ok(norm(&x.0, x.1.as_ref(), &self.final_weight(weights)?, self.eps())?.y)
    }

    /// Loss in nats of every predicted symbol, 0 where there is no target.
    ///
    /// # Errors
    /// As of [`CharModel::logits`].
    pub fn losses(&self, weights: &Tensor, batch: &Batch) -> Result<Vec<f32>> {
        let logits = self.logits(weights, &batch.symbols, batch.sequences)?;
        cross_entropy(&logits, &batch.targets, 0.0)?.0.to_vec1().at("losses")
    }

    fn shape(&self, symbols: usize, sequences: usize) -> Result<PairShape> {
        let (c, per) = (&self.config, symbols / sequences.max(1));
        if symbols == 0 || per * sequences != symbols || !per.is_multiple_of(c.chunk) {
            let message = format!("{symbols} symbols are not {sequences} sequences of whole chunks of {}", c.chunk);
            return Err(Error::new(ErrorKind::Usage, "batch", message));
        }
        let (heads, dim) = (c.num_attention_heads, c.head_dim);
        Ok(PairShape { batch: sequences, chunks: per / c.chunk, chunk: c.chunk, heads, dim })
    }

    fn eps(&self) -> f32 {
        self.config.rms_norm_eps as f32
    }

    pub(super) fn rope(&self) -> &PairRope {
        &self.rope
    }

    pub(super) fn embedding(&self, weights: &Weights) -> Result<Tensor> {
        Layout::part(&weights.compute, 0, &[SYMBOLS, self.config.hidden_size])
    }

    pub(super) fn final_weight(&self, weights: &Weights) -> Result<Tensor> {
        Layout::part(&weights.master, self.final_norm, &[self.config.hidden_size])
    }

    pub(super) fn layer_weights(&self, weights: &Weights, layer: usize) -> Result<LayerWeights> {
        let (c, p) = (&self.config, self.places[layer]);
        let (d, width) = (c.hidden_size, c.num_attention_heads * c.head_dim);
        let part = |start, shape: &[usize]| Layout::part(&weights.compute, start, shape);
        // `count` matrices, one above the other.
        let mlp = |start, count: usize, outputs, inputs| -> Result<Projection> {
            let shape = FactoredShape { outputs, inputs };
            let [stack, len] = shape.factors();
            Ok(match c.mlp {
                MlpForm::Dense => Projection::Dense(part(start, &[count * outputs, inputs])?),
                MlpForm::Factored => {
                    // Of the master copy, in f32: the products of log2 N roundings to bf16 would differ by several per cent.
                    let factors = Layout::part(&weights.master, start, &[count * stack, len])?;
                    Projection::Factored(Factored::new(shape, factors)?)
                }
            })
        };
        Ok(LayerWeights {
            norm1: Layout::part(&weights.master, p.norm1, &[d])?,
            qkv: part(p.qkv, &[3 * width, d])?,
            o: part(p.o, &[d, width])?,
            norm2: Layout::part(&weights.master, p.norm2, &[d])?,
            gate_up: mlp(p.gate_up, 2, c.intermediate_size, d)?,
            down: mlp(p.down, 1, d, c.intermediate_size)?,
        })
    }

    fn embed(&self, weights: &Weights, symbols: &[u32]) -> Result<Tensor> {
        if let Some(symbol) = symbols.iter().find(|s| **s as usize >= SYMBOLS) {
            return Err(Error::new(ErrorKind::Usage, "batch", format!("symbol {symbol} of {SYMBOLS}")));
        }
        let embedding = self.embedding(weights)?;
        let rows = Tensor::new(symbols, embedding.device()).and_then(|i| embedding.index_select(&i, 0));
        rows.at("embedding")
    }

    fn layer(&self, weights: &Weights, layer: usize, x: &Residual, shape: PairShape) -> Result<(Residual, Saved)> {
        let w = self.layer_weights(weights, layer)?;
        let before = norm(&x.0, x.1.as_ref(), &w.norm1, self.eps())?;
        let qkv = product(&before.y, &w.qkv)?;
        let (attended, lse) = pair::forward(&qkv, shape, self.layers[layer], &self.rope)?;
        let between = norm(&before.sum, Some(&product(&attended, &w.o)?), &w.norm2, self.eps())?;
        let both = w.gate_up.forward(&between.y)?;
        let gated = gated_silu(&both)?;
        let next = (between.sum.clone(), Some(w.down.forward(&gated)?));
        Ok((next, Saved { before, qkv, attended, lse, between, both, gated }))
    }

    /// Writes the gradient of a layer's parameters and returns that of its input, given that of its output.
    fn layer_backward(
        &self,
        weights: &Weights,
        layer: usize,
        s: &Saved,
        dy: &Tensor,
        shape: PairShape,
        to: &mut FlatGradient,
    ) -> Result<Tensor> {
        let (w, at) = (self.layer_weights(weights, layer)?, self.places[layer]);
        let d_both = gated_silu_backward(&s.both, &w.down.backward(&s.gated, dy, at.down, to)?)?;
        let d_normed = w.gate_up.backward(&s.between.y, &d_both, at.gate_up, to)?;
        let (d_x1, d_norm2) = norm_backward(&s.between.sum, &w.norm2, &s.between.r, &d_normed, Some(dy))?;
        to.put(at.norm2, &d_norm2)?;
        to.put_product(at.o, &d_x1, &s.attended)?;
        let d_attended = input_gradient(&d_x1, &w.o)?;
        let d_qkv = pair::backward(&s.qkv, (&s.attended, &s.lse), &d_attended, shape, self.layers[layer], &self.rope)?;
        to.put_product(at.qkv, &d_qkv, &s.before.y)?;
        let d_normed = input_gradient(&d_qkv, &w.qkv)?;
        let (d_x, d_norm1) = norm_backward(&s.before.sum, &w.norm1, &s.before.r, &d_normed, Some(&d_x1))?;
        to.put(at.norm1, &d_norm1)?;
        Ok(d_x)
    }
}

impl Objective for CharModel {
    type Batch = Batch;

    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn gradient(&self, weights: &Tensor, batch: &Batch, scale: f32) -> Result<(f64, usize, Tensor)> {
        let (shape, weights) = (self.shape(batch.symbols.len(), batch.sequences)?, Weights::new(weights)?);
        let mut x = (self.embed(&weights, &batch.symbols)?, None);
        let mut kept = vec![];
        for i in 0..self.layers.len() {
            let (y, saved) = self.layer(&weights, i, &x, shape)?;
            kept.push(match self.rematerialise {
                Rematerialise::Nothing => Err(saved),
                // The sum alone: one tensor a layer.
                Rematerialise::Layers => Ok(saved.before.sum),
            });
            x = y;
        }
        let (embedding, final_weight) = (self.embedding(&weights)?, self.final_weight(&weights)?);
        let last = norm(&x.0, x.1.as_ref(), &final_weight, self.eps())?;
        drop(x);
        let (losses, d_logits) = cross_entropy(&product(&last.y, &embedding)?, &batch.targets, scale)?;
        let mut to = FlatGradient::zeros(self.layout.len(), self.rope.tables().device())?;
        to.put_product(0, &d_logits, &last.y)?;
        let d_normed = input_gradient(&d_logits, &embedding)?;
        let (mut dx, d_final) = norm_backward(&last.sum, &final_weight, &last.r, &d_normed, None)?;
        to.put(self.final_norm, &d_final)?;
        drop((last, d_logits, d_normed));
        for i in (0..self.layers.len()).rev() {
            let saved = match kept.pop() {
                Some(Err(saved)) => saved,
                Some(Ok(sum)) => self.layer(&weights, i, &(sum, None), shape)?.1,
                None => return Err(Error::new(ErrorKind::Backend, "backward pass", "lost a layer")),
            };
            dx = self.layer_backward(&weights, i, &saved, &dx, shape, &mut to)?;
        }
        to.add_embedding(0, &batch.symbols, &dx)?;
        // Read last: a device has by then been given all its work.
        let losses: Vec<f32> = losses.to_vec1().at("losses")?;
        let sum = losses.iter().map(|l| f64::from(*l)).sum();
        Ok((sum, batch.predicted(), to.into_tensor()))
    }
}
