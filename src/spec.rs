//! Configuration of a checkpoint and specification of its model, as plain data.
//!
//! [`Config`] is a `config.json`, or GGUF metadata converted to its keys by `checkpoint::gguf_keys`; its accessors
//! return errors that name the key. [`ModelSpec`] describes the model to build: one [`LayerSpec`] per layer.

use crate::error::{Error, Result};
use serde::Serialize;
use serde_json::{Map, Value};

/// The keys of a `config.json`, and the path of its file for errors.
#[derive(Debug, Clone)]
pub struct Config {
    origin: String,
    values: Map<String, Value>,
}

impl Config {
    /// Wraps a parsed JSON object; `origin` names it in errors.
    ///
    /// # Errors
    /// `value` is not an object.
    pub fn new(origin: impl Into<String>, value: Value) -> Result<Self> {
        let origin = origin.into();
        match value {
            Value::Object(values) => Ok(Self { origin, values }),
            _ => Err(Error::format(origin, "is not a JSON object")),
        }
    }

    /// Returns the name used in errors.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Returns the value of `key`; `null` counts as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|v| !v.is_null())
    }

    /// Returns all keys with their values, except `null` ones.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.as_str(), v))
    }

    /// Sets `key` to `value`.
    pub fn set(&mut self, key: &str, value: Value) {
        self.values.insert(key.into(), value);
    }

    /// Sets `key` to `value` if the key is absent; a `null` is kept.
    pub fn set_missing(&mut self, key: &str, value: Value) {
        self.values.entry(key).or_insert(value);
    }

    /// Returns the object under `key` (`text_config`, `rope_parameters`, ...), if present.
    ///
    /// # Errors
    /// The value is not an object.
    pub fn section(&self, key: &str) -> Result<Option<Config>> {
        match self.get(key) {
            None => Ok(None),
            Some(v @ Value::Object(_)) => Config::new(format!("{}: {key}", self.origin), v.clone()).map(Some),
            Some(v) => Err(self.bad(key, "an object", v)),
        }
    }

    /// Returns a required whole number from 1 to 2^24, the limit for every dimension.
    ///
    /// # Errors
    /// The key is missing, or the value is not such a number.
    pub fn size(&self, key: &str) -> Result<usize> {
        self.opt_size(key)?.ok_or_else(|| Error::format(&self.origin, format!("`{key}` is missing")))
    }

    /// Returns an optional whole number from 1 to 2^24.
    ///
    /// # Errors
    /// The value is not such a number.
    pub fn opt_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        match v.as_u64() {
            Some(n) if (1..=1 << 24).contains(&n) => Ok(Some(n as usize)),
            _ => Err(self.bad(key, "a whole number from 1 to 2^24", v)),
        }
    }

    /// Returns an optional finite number.
    ///
    /// # Errors
    /// The value is not a finite number.
    pub fn opt_number(&self, key: &str) -> Result<Option<f64>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        v.as_f64().filter(|x| x.is_finite()).map(Some).ok_or_else(|| self.bad(key, "a number", v))
    }

    /// Returns a finite number, or `default` if the key is absent.
    ///
    /// # Errors
    /// The value is not a finite number.
    pub fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.opt_number(key)?.unwrap_or(default))
    }

    /// Returns a required finite number.
    ///
    /// # Errors
    /// The key is missing, or the value is not a finite number.
    pub fn number(&self, key: &str) -> Result<f64> {
        self.opt_number(key)?.ok_or_else(|| Error::format(&self.origin, format!("`{key}` is missing")))
    }

    /// Returns a boolean, or `default` if the key is absent.
    ///
    /// # Errors
    /// The value is not a boolean.
    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_bool().ok_or_else(|| self.bad(key, "true or false", v)),
        }
    }

    /// Returns an optional string.
    ///
    /// # Errors
    /// The value is not a string.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => v.as_str().map(Some).ok_or_else(|| self.bad(key, "a string", v)),
        }
    }

    /// Returns the token ids under `key`, one number or an array; empty if the key is absent.
    ///
    /// # Errors
    /// The value is not a token id or an array of them.
    pub fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = match self.get(key) {
            None => Some(vec![]),
            Some(Value::Array(items)) => items.iter().map(one).collect(),
            Some(v) => one(v).map(|id| vec![id]),
        };
        ids.ok_or_else(|| Error::format(&self.origin, format!("`{key}` must be a token id or a list of them")))
    }

    fn bad(&self, key: &str, want: &str, got: &Value) -> Error {
        let got: String = got.to_string().chars().take(60).collect();
        Error::format(&self.origin, format!("`{key}` must be {want}, not {got}"))
    }
}

/// Positions that a layer's attention reads in the unmodified model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionKind {
    /// All earlier positions.
    Full,
    /// The last `window` positions, the query's own included.
    Sliding {
        /// Number of positions read.
        window: usize,
    },
}

/// Activation of the gated feed-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// SiLU, `x * sigmoid(x)`.
    Silu,
    /// GELU in its tanh approximation.
    GeluTanh,
}

/// Placement of a layer's norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Norms {
    /// Before attention and before the feed-forward.
    Pre,
    /// Before and after each of them (Gemma 3).
    Sandwich,
}

/// Specification of a decoder layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerSpec {
    /// Token mixer.
    pub mixer: MixerSpec,
    /// Gated feed-forward.
    pub feed_forward: FeedForwardSpec,
    /// Placement of the norms.
    pub norms: Norms,
}

/// Specification of a layer's token mixer.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MixerSpec {
    /// Softmax attention with grouped KV heads.
    Attention(AttentionSpec),
    /// Gated DeltaNet: a recurrent state of constant size.
    Delta(DeltaSpec),
}

/// Specification of a Gated DeltaNet layer (Yang et al. 2024, arXiv:2412.06464).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct DeltaSpec {
    /// Heads of queries and keys, `K`.
    pub key_heads: usize,
    /// Heads of values, `V`: a multiple of `K`; each has a state.
    pub value_heads: usize,
    /// Dimension of a head of queries and keys, `D_k`.
    pub key_dim: usize,
    /// Dimension of a head of values, `D_v`.
    pub value_dim: usize,
    /// Positions that the causal convolution reads, the query's own included.
    pub kernel: usize,
}

impl DeltaSpec {
    /// Returns the width of queries, and of keys, `K D_k`.
    pub fn key_width(&self) -> usize {
        self.key_heads * self.key_dim
    }

    /// Returns the width of values, `V D_v`.
    pub fn value_width(&self) -> usize {
        self.value_heads * self.value_dim
    }

    /// Returns the channels that pass through the convolution: queries, keys and values.
    pub fn channels(&self) -> usize {
        2 * self.key_width() + self.value_width()
    }

    /// Returns the numbers of a layer's recurrent state: `V` matrices of `D_k` by `D_v`, and the convolution's last `n` inputs.
    pub fn state_len(&self) -> usize {
        self.value_heads * self.key_dim * self.value_dim + self.channels() * self.kernel
    }
}

/// Specification of an attention layer in the unmodified model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AttentionSpec {
    /// Positions that a query reads.
    pub kind: AttentionKind,
    /// Query heads, `H`.
    pub heads: usize,
    /// Key and value heads, `G`.
    pub kv_heads: usize,
    /// Head dimension, `D`.
    pub head_dim: usize,
    /// Factor on attention logits, usually `1 / sqrt(D)`.
    pub scale: f64,
    /// Index into [`ModelSpec::ropes`].
    pub rope: usize,
    /// Whether q, k and v projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub out_bias: bool,
    /// Whether each head of q and k is RMS-normed before rotation.
    pub qk_norm: bool,
    /// Whether the output is multiplied by the sigmoid of a gate that the query projection gives for each channel.
    pub gate: bool,
}

impl AttentionSpec {
    /// Returns the width of the query projection, `H D`.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Returns the width of the key and value projections, `G D` each.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// Specification of a gated feed-forward.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FeedForwardSpec {
    /// Width of the gate and up projections.
    pub width: usize,
    /// Activation of the gate.
    pub activation: Activation,
    /// Whether the projections have biases.
    pub bias: bool,
}

/// RoPE scaling: change of the rotary frequencies for contexts past the pretrained length.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RopeScaling {
    /// No scaling.
    None,
    /// Linear scaling: positions are divided by `factor`.
    Linear {
        /// Divisor of positions.
        factor: f64,
    },
    /// Llama 3.1's scaling: frequencies of long wavelengths are divided by `factor`, short wavelengths unchanged, with
    /// a smooth ramp between.
    Llama3 {
        /// Divisor of the frequencies of long wavelengths.
        factor: f64,
        /// Wavelengths above `original / low_freq_factor` are fully scaled.
        low_freq_factor: f64,
        /// Wavelengths below `original / high_freq_factor` are unchanged.
        high_freq_factor: f64,
        /// Pretrained length before scaling.
        original: usize,
    },
    /// YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp over dimensions, and a factor on cos and sin.
    Yarn {
        /// Divisor of the frequencies of long wavelengths.
        factor: f64,
        /// Pretrained length before scaling.
        original: usize,
        /// Rotations over the pretrained length above which a dimension is unchanged.
        beta_fast: f64,
        /// Rotations over the pretrained length below which a dimension is fully interpolated.
        beta_slow: f64,
        /// Factor on cos and sin.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// One divisor per frequency, from `rope_freqs.weight` of a GGUF file.
    Factors {
        /// Divisors, `D / 2` of them.
        divisors: Vec<f32>,
    },
}

impl RopeScaling {
    /// Returns a short description for messages, such as `yarn, factor 4`.
    pub fn describe(&self) -> String {
        match self {
            Self::None => "none".into(),
            Self::Linear { factor } => format!("linear, factor {factor}"),
            Self::Llama3 { factor, .. } => format!("llama3, factor {factor}"),
            Self::Yarn { factor, .. } => format!("yarn, factor {factor}"),
            Self::Factors { .. } => "per-frequency factors".into(),
        }
    }
}

/// Specification of a rotary embedding; layers refer to it by index.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
    /// Head dimension, `D`.
    pub dim: usize,
    /// Rotated dimensions of a head, the first ones in the file; `D` in most families.
    pub rotated: usize,
    /// Scaling of the frequencies.
    pub scaling: RopeScaling,
}

/// Specification of a decoder model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelSpec {
    /// Family name, as in `config.json`'s `model_type`.
    pub family: String,
    /// Vocabulary size: rows of the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Epsilon of every RMS norm.
    pub norm_eps: f64,
    /// Factor on the embeddings (Gemma: `sqrt(hidden)`).
    pub embed_scale: f64,
    /// Whether the output head uses the embedding matrix.
    pub tied: bool,
    /// Trained context length in positions.
    pub max_positions: usize,
    /// Rotary embeddings.
    pub ropes: Vec<RopeSpec>,
    /// Decoder layers in order.
    pub layers: Vec<LayerSpec>,
}

impl ModelSpec {
    /// Returns the attention layers, each with its index.
    pub fn attention(&self) -> impl Iterator<Item = (usize, &AttentionSpec)> {
        self.layers.iter().enumerate().filter_map(|(i, l)| match &l.mixer {
            MixerSpec::Attention(a) => Some((i, a)),
            MixerSpec::Delta(_) => None,
        })
    }

    /// Returns the attention layers for modification.
    pub fn attention_mut(&mut self) -> impl Iterator<Item = &mut AttentionSpec> {
        self.layers.iter_mut().filter_map(|l| match &mut l.mixer {
            MixerSpec::Attention(a) => Some(a),
            MixerSpec::Delta(_) => None,
        })
    }

    /// Returns the recurrent layers.
    pub fn recurrent(&self) -> impl Iterator<Item = &DeltaSpec> {
        self.layers.iter().filter_map(|l| match &l.mixer {
            MixerSpec::Attention(_) => None,
            MixerSpec::Delta(d) => Some(d),
        })
    }

    /// Returns whether any layer is recurrent.
    pub fn has_delta(&self) -> bool {
        self.layers.iter().any(|l| matches!(l.mixer, MixerSpec::Delta(_)))
    }

    /// Returns the head dimension `D` of the first attention layer.
    pub fn head_dim(&self) -> usize {
        self.attention().next().map_or(0, |(_, a)| a.head_dim)
    }

    /// Returns the indices of the full-attention layers, which a retrofit can swap.
    pub fn full_layers(&self) -> Vec<usize> {
        self.full_attention().map(|(i, _)| i).collect()
    }

    /// Returns the full-attention layers with their indices.
    pub fn full_attention(&self) -> impl Iterator<Item = (usize, &AttentionSpec)> {
        self.attention().filter(|(_, a)| a.kind == AttentionKind::Full)
    }

    /// Checks invariants of all families: heads divisible into groups, even head dimensions, valid rope indices, an
    /// attention layer.
    ///
    /// # Errors
    /// An invariant is violated; the message names the layer.
    pub fn validate(self, origin: &str) -> Result<Self> {
        for (i, l) in self.attention() {
            let fail = |message: String| Err(Error::format(origin, format!("layer {i}: {message}")));
            if !l.heads.is_multiple_of(l.kv_heads) {
                return fail(format!("{} query heads are not a multiple of {} KV heads", l.heads, l.kv_heads));
            }
            if !l.head_dim.is_multiple_of(2) || l.head_dim > 1024 {
                return fail(format!("head dimension {} must be even and at most 1024", l.head_dim));
            }
            let Some(rope) = self.ropes.get(l.rope).filter(|r| r.dim == l.head_dim) else {
                return fail("the rotary embedding's dimension differs from the head dimension".into());
            };
            if !rope.rotated.is_multiple_of(2) || rope.rotated == 0 || rope.rotated > rope.dim {
                return fail(format!("{} of {} dimensions cannot be rotated", rope.rotated, rope.dim));
            }
            if rope.rotated < rope.dim && rope.scaling != RopeScaling::None {
                return fail(format!("rope scaling ({}) of a part of the head", rope.scaling.describe()));
            }
        }
        for (i, l) in self.layers.iter().enumerate() {
            let MixerSpec::Delta(d) = &l.mixer else { continue };
            if !d.value_heads.is_multiple_of(d.key_heads) {
                let message = format!("{} value heads are not a multiple of {} key heads", d.value_heads, d.key_heads);
                return Err(Error::format(origin, format!("layer {i}: {message}")));
            }
        }
        if self.attention().next().is_none() {
            return Err(Error::unsupported(origin, "a model without attention layers"));
        }
        Ok(self)
    }
}
