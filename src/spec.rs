//! What a checkpoint's configuration says, as plain data.
//!
//! [`Config`] is a `config.json` (a GGUF file's metadata is brought into the same form by `checkpoint::gguf`), read with
//! errors that name the key. [`ModelSpec`] is what the model is built from: one [`LayerSpec`] per layer, no mathematics.

use crate::error::{Error, Result};
use serde::Serialize;
use serde_json::{Map, Value};

/// A `config.json`, with the name of the file it came from.
#[derive(Debug, Clone)]
pub struct Config {
    origin: String,
    values: Map<String, Value>,
}

impl Config {
    /// Wraps a parsed object; `origin` names it in errors.
    pub fn new(origin: impl Into<String>, value: Value) -> Result<Self> {
        let origin = origin.into();
        match value {
            Value::Object(values) => Ok(Self { origin, values }),
            _ => Err(Error::format(origin, "is not a JSON object")),
        }
    }

    /// The name used in errors.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The raw value of `key`; `null` counts as absent.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|v| !v.is_null())
    }

    /// Every key with its value, without those that are `null`.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.as_str(), v))
    }

    /// Puts `value` under `key`.
    pub fn set(&mut self, key: &str, value: Value) {
        self.values.insert(key.into(), value);
    }

    /// Puts `value` under `key` unless the key is there; a `null` that is there stays.
    pub fn set_missing(&mut self, key: &str, value: Value) {
        self.values.entry(key).or_insert(value);
    }

    /// The object under `key` (`text_config`, `rope_parameters`, ...), if there is one.
    pub fn section(&self, key: &str) -> Result<Option<Config>> {
        match self.get(key) {
            None => Ok(None),
            Some(v @ Value::Object(_)) => Config::new(format!("{}: {key}", self.origin), v.clone()).map(Some),
            Some(v) => Err(self.bad(key, "an object", v)),
        }
    }

    /// A required whole number from 1 to 2^24, which bounds every size a layer can have.
    pub fn size(&self, key: &str) -> Result<usize> {
        self.opt_size(key)?.ok_or_else(|| Error::format(&self.origin, format!("`{key}` is missing")))
    }

    /// As [`Config::size`], where the key may be absent.
    pub fn opt_size(&self, key: &str) -> Result<Option<usize>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        match v.as_u64() {
            Some(n) if (1..=1 << 24).contains(&n) => Ok(Some(n as usize)),
            _ => Err(self.bad(key, "a whole number from 1 to 2^24", v)),
        }
    }

    /// A finite number, where the key may be absent.
    pub fn opt_number(&self, key: &str) -> Result<Option<f64>> {
        let Some(v) = self.get(key) else { return Ok(None) };
        v.as_f64().filter(|x| x.is_finite()).map(Some).ok_or_else(|| self.bad(key, "a number", v))
    }

    /// A finite number, or `default`.
    pub fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.opt_number(key)?.unwrap_or(default))
    }

    /// A required finite number.
    pub fn number(&self, key: &str) -> Result<f64> {
        self.opt_number(key)?.ok_or_else(|| Error::format(&self.origin, format!("`{key}` is missing")))
    }

    /// A truth value, or `default`.
    pub fn bool_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(v) => v.as_bool().ok_or_else(|| self.bad(key, "true or false", v)),
        }
    }

    /// A string, where the key may be absent.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(v) => v.as_str().map(Some).ok_or_else(|| self.bad(key, "a string", v)),
        }
    }

    /// Token ids under `key`: one number or an array of them.
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

/// Which keys a layer's attention reads before any retrofit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionKind {
    /// Every earlier position.
    Full,
    /// The last `window` positions, the query's own among them.
    Sliding {
        /// Positions read.
        window: usize,
    },
}

/// The gated feed-forward's activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// The tanh approximation of GELU.
    GeluTanh,
}

/// Where a block's norms stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Norms {
    /// Before attention and before the feed-forward.
    Pre,
    /// Before and after each of them (Gemma 3).
    Sandwich,
}

/// One decoder layer: what mixes positions, what follows it, and where the norms stand.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerSpec {
    /// How the layer mixes information across positions.
    pub mixer: MixerSpec,
    /// The gated feed-forward after it.
    pub feed_forward: FeedForwardSpec,
    /// Where the norms stand.
    pub norms: Norms,
}

/// How a layer mixes information across positions.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MixerSpec {
    /// Softmax attention with grouped KV heads.
    Attention(AttentionSpec),
}

/// An attention layer as it was trained.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AttentionSpec {
    /// Which keys a query reads.
    pub kind: AttentionKind,
    /// Query heads, `H`.
    pub heads: usize,
    /// Key and value heads, `G`.
    pub kv_heads: usize,
    /// Head dimension, `D`.
    pub head_dim: usize,
    /// Factor on the logits, usually `1 / sqrt(D)`.
    pub scale: f64,
    /// Index into [`ModelSpec::ropes`].
    pub rope: usize,
    /// Whether q, k and v projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub out_bias: bool,
    /// Whether q and k are normed per head before rotation.
    pub qk_norm: bool,
}

impl AttentionSpec {
    /// Width of the query projection, `H D`.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the key projection and of the value projection, `G D`.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

/// The gated feed-forward of a layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FeedForwardSpec {
    /// Width of gate and up.
    pub width: usize,
    /// Activation of the gate.
    pub activation: Activation,
    /// Whether its projections have biases.
    pub bias: bool,
}

/// How rotary frequencies are changed to reach past the pretrained length.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth ramp between.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f64,
        /// Ramp start.
        low_freq_factor: f64,
        /// Ramp end.
        high_freq_factor: f64,
        /// Positions before scaling.
        original: usize,
    },
    /// YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp by wavelength, and a factor on cos and sin.
    Yarn {
        /// Divisor of the long wavelengths.
        factor: f64,
        /// Positions before scaling.
        original: usize,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is fully interpolated.
        beta_slow: f64,
        /// Factor on cos and sin.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
    /// One divisor per frequency, as GGUF files store it (`rope_freqs.weight`).
    Factors {
        /// `D / 2` divisors.
        divisors: Vec<f32>,
    },
}

impl RopeScaling {
    /// A few words for a message: `yarn, factor 4`.
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

/// One rotary embedding; layers name theirs by index.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RopeSpec {
    /// Base of the frequencies.
    pub theta: f64,
    /// Rotated dimensions, the whole head for the families here.
    pub dim: usize,
    /// Scaling in force.
    pub scaling: RopeScaling,
}

/// A whole decoder.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelSpec {
    /// The family's name, as in `config.json`'s `model_type`.
    pub family: String,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Epsilon of every RMS norm.
    pub norm_eps: f64,
    /// Factor on the embeddings (Gemma: `sqrt(hidden)`).
    pub embed_scale: f64,
    /// Whether the head reads the embedding matrix.
    pub tied: bool,
    /// Positions the model was trained for.
    pub max_positions: usize,
    /// Rotary embeddings.
    pub ropes: Vec<RopeSpec>,
    /// The layers, in order.
    pub layers: Vec<LayerSpec>,
}

impl ModelSpec {
    /// The attention layers, each with its index.
    pub fn attention(&self) -> impl Iterator<Item = (usize, &AttentionSpec)> {
        self.layers.iter().enumerate().map(|(i, l)| {
            let MixerSpec::Attention(a) = &l.mixer;
            (i, a)
        })
    }

    /// The attention layers, to be changed by a family.
    pub fn attention_mut(&mut self) -> impl Iterator<Item = &mut AttentionSpec> {
        self.layers.iter_mut().map(|l| {
            let MixerSpec::Attention(a) = &mut l.mixer;
            a
        })
    }

    /// Head dimension of the first attention layer, `D`.
    pub fn head_dim(&self) -> usize {
        self.attention().next().map_or(0, |(_, a)| a.head_dim)
    }

    /// Indices of the layers that attend to everything: what a retrofit may swap.
    pub fn full_layers(&self) -> Vec<usize> {
        self.attention().filter(|(_, a)| a.kind == AttentionKind::Full).map(|(i, _)| i).collect()
    }

    /// Checks what no family may break: divisible head groups, even rotary dimensions, valid rope indices.
    pub fn validate(self, origin: &str) -> Result<Self> {
        for (i, l) in self.attention() {
            let fail = |message: String| Err(Error::format(origin, format!("layer {i}: {message}")));
            if !l.heads.is_multiple_of(l.kv_heads) {
                return fail(format!("{} query heads cannot share {} KV heads", l.heads, l.kv_heads));
            }
            if !l.head_dim.is_multiple_of(2) || l.head_dim > 1024 {
                return fail(format!("head dimension {} must be even and at most 1024", l.head_dim));
            }
            if self.ropes.get(l.rope).is_none_or(|r| r.dim != l.head_dim) {
                return fail("its rotary embedding does not fit its head".into());
            }
        }
        Ok(self)
    }
}
