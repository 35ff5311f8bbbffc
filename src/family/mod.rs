//! Model families: configuration keys, tensor names and quirks of each.
//!
//! A family is one file, with one [`Family`] value and the table of its keys, registered by one line in [`FAMILIES`].
//! It converts a [`Config`] to a [`ModelSpec`]; the layers themselves are in `nn` and `mixer`.

mod gemma3;
pub mod keys;
mod llama;
mod quantisation;
mod qwen2;
mod qwen3;
mod qwen3_5;
mod rope;

pub use quantisation::{Group, Quantisation};

use crate::error::{Error, Result};
use crate::spec::{
    Activation, AttentionKind, AttentionSpec, Config, FeedForwardSpec, LayerSpec, MixerSpec, ModelSpec, Norms,
};
use keys::Table;

/// Supported families.
pub static FAMILIES: &[&Family] = &[&qwen2::FAMILY, &qwen3::FAMILY, &llama::FAMILY, &gemma3::FAMILY, &qwen3_5::FAMILY];

/// `model_type` of the native character model, which is no family: it has no tokens, and layers of its own.
pub const CHARACTER_MODEL: &str = "bfly_char";

/// A model family: how its configuration is read, and its quirks.
pub struct Family {
    /// `model_type` in a text-only model's `config.json`.
    pub model_type: &'static str,
    /// Meaning of each key of that `config.json`.
    pub keys: Table,
    /// Multimodal model whose `text_config` describes this decoder.
    pub wrapper: Option<Wrapper>,
    /// Converts a configuration, with defaults filled in, to a specification.
    pub spec: fn(&Config) -> Result<ModelSpec>,
    /// Whether safetensors store `w` for a norm that multiplies by `1 + w` (GGUF files store the sum).
    pub norm_plus_one: bool,
    /// Possible prefixes of tensor names in safetensors; the first that matches is used.
    pub namings: &'static [Naming],
    /// Conventions of the family's GGUF files.
    pub gguf: GgufMapping,
}

/// A multimodal model that contains a family's decoder.
pub struct Wrapper {
    /// `model_type` in its `config.json`.
    pub model_type: &'static str,
    /// Meaning of each key next to `text_config`.
    pub keys: Table,
    /// Name prefixes of tensors outside the decoder, which are not loaded.
    pub other_parts: &'static [&'static str],
}

/// Prefixes of tensor names in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Naming {
    /// Prefix that replaces `model.`.
    pub body: &'static str,
    /// Prefix of the output matrix's name.
    pub head: &'static str,
}

/// Prefixes of the decoder's own transformers class (`...ForCausalLM`).
pub const PLAIN: Naming = Naming { body: "model.", head: "" };

impl Naming {
    /// Returns the file's name for the tensor that [`crate::tensors`] calls `name`.
    pub fn apply(&self, name: &str) -> String {
        match name.strip_prefix(PLAIN.body) {
            Some(rest) => format!("{}{rest}", self.body),
            None => format!("{}{name}", self.head),
        }
    }
}

/// Conventions of a family's GGUF files.
pub struct GgufMapping {
    /// Value of `general.architecture`.
    pub arch: &'static str,
    /// Whether the rows of q and k are stored with the two halves of each head interleaved.
    pub interleaved_qk: bool,
    /// Whether a tensor `rope_freqs.weight` may store divisors of the rotary frequencies.
    pub rope_factors: bool,
    /// Whether `rope.dimension_count` may be a part of the head: `partial_rotary_factor` of the configuration.
    pub partial_rope: bool,
    /// Metadata keys (without the architecture prefix) beyond those all families share, each with its `config.json`
    /// key; a value may be an array.
    pub keys: &'static [(&'static str, &'static str)],
    /// Sets configuration keys that the metadata does not store.
    pub complete: fn(&mut Config) -> Result<()>,
}

/// Returns the family of a configuration, and its decoder's configuration with keys checked and defaults filled in.
///
/// # Errors
/// The model type is not supported; a key is unknown or has an unsupported value.
pub fn read(config: &Config) -> Result<(&'static Family, Config)> {
    let missing = || Error::format(config.origin(), "`model_type` is missing");
    let name = config.opt_str("model_type")?.ok_or_else(missing)?;
    if let Some(family) = FAMILIES.iter().find(|f| f.model_type == name) {
        return Ok((family, keys::complete(config, family.keys)?));
    }
    let wraps = |f: &&'static Family| f.wrapper.as_ref().filter(|w| w.model_type == name).map(|w| (*f, w));
    if let Some((family, wrapper)) = FAMILIES.iter().find_map(wraps) {
        // Text alone under the model type of the whole, as some converters write it.
        if config.get("text_config").is_none() && config.get("hidden_size").is_some() {
            return Ok((family, keys::complete(config, family.keys)?));
        }
        let whole = keys::complete(config, wrapper.keys)?;
        let mut text = match whole.section("text_config")? {
            Some(text) => keys::complete(&text, family.keys)?,
            None => keys::complete(&Config::new(config.origin(), serde_json::json!({}))?, family.keys)?,
        };
        match text.opt_str("model_type")? {
            Some(other) if other != family.model_type => return Err(unknown("model type", other, text.origin())),
            _ => {}
        }
        // The output head belongs to the whole model, so its key decides whether the head is tied.
        text.set("tie_word_embeddings", whole.bool_or("tie_word_embeddings", true)?.into());
        return Ok((family, text));
    }
    if name == CHARACTER_MODEL {
        let message = "a native character model: run it with `bfly-char generate --model DIR`";
        return Err(Error::unsupported(config.origin(), message));
    }
    Err(unknown("model type", name, config.origin()))
}

/// Returns the family of a GGUF file's `general.architecture`.
///
/// # Errors
/// The architecture is not supported.
pub fn of_arch(arch: &str, origin: &str) -> Result<&'static Family> {
    let family = FAMILIES.iter().find(|f| f.gguf.arch == arch).copied();
    family.ok_or_else(|| unknown("architecture", arch, origin))
}

fn unknown(what: &str, name: &str, origin: &str) -> Error {
    let list: Vec<_> = FAMILIES
        .iter()
        .flat_map(|f| std::iter::once(f.model_type).chain(f.wrapper.as_ref().map(|w| w.model_type)))
        .collect();
    Error::unsupported(origin, format!("{what} `{name}` is not supported; supported: {}", list.join(", ")))
}

/// Builds the specification of a Llama-like decoder from the keys that all families share; families change what
/// differs.
fn decoder(config: &Config, family: &Family) -> Result<ModelSpec> {
    let hidden = config.size("hidden_size")?;
    let heads = config.size("num_attention_heads")?;
    let kv_heads = config.opt_size("num_key_value_heads")?.unwrap_or(heads);
    let head_dim = config.opt_size("head_dim")?.unwrap_or(hidden / heads);
    if head_dim == 0 {
        return Err(Error::format(config.origin(), format!("`hidden_size` {hidden} is smaller than {heads} heads")));
    }
    let count = config.size("num_hidden_layers")?;
    if count > 4096 {
        return Err(Error::format(
            config.origin(),
            format!("`num_hidden_layers` is {count}; at most 4096 are supported"),
        ));
    }
    let bias = config.bool_or("attention_bias", false)?;
    let attention = AttentionSpec {
        kind: AttentionKind::Full,
        heads,
        kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f64).sqrt(),
        rope: 0,
        qkv_bias: bias,
        out_bias: bias,
        qk_norm: false,
        gate: false,
    };
    let feed_forward =
        FeedForwardSpec { width: config.size("intermediate_size")?, activation: activation(config)?, bias: false };
    let layer = LayerSpec { mixer: MixerSpec::Attention(attention), feed_forward, norms: Norms::Pre };
    Ok(ModelSpec {
        family: family.model_type.into(),
        vocab: config.size("vocab_size")?,
        hidden,
        norm_eps: config.number("rms_norm_eps")?,
        embed_scale: 1.0,
        tied: config.bool_or("tie_word_embeddings", false)?,
        max_positions: config.size("max_position_embeddings")?,
        ropes: vec![],
        layers: vec![layer; count],
    })
}

fn activation(config: &Config) -> Result<Activation> {
    match config.opt_str("hidden_activation")?.or(config.opt_str("hidden_act")?) {
        Some("silu" | "swish") => Ok(Activation::Silu),
        Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
        other => {
            let name = other.unwrap_or("null");
            Err(Error::unsupported(
                config.origin(),
                format!("activation `{name}` is not supported; supported: silu, gelu_pytorch_tanh"),
            ))
        }
    }
}

/// Reads `layer_types`: true for each full-attention layer; `None` without that key.
fn layer_types(config: &Config, count: usize) -> Result<Option<Vec<bool>>> {
    let Some(list) = config.get("layer_types") else { return Ok(None) };
    let full = |v: &serde_json::Value| match v.as_str() {
        Some("full_attention") => Some(true),
        Some("sliding_attention") => Some(false),
        _ => None,
    };
    match list.as_array().and_then(|list| list.iter().map(full).collect::<Option<Vec<_>>>()) {
        Some(kinds) if kinds.len() == count => Ok(Some(kinds)),
        _ => Err(Error::format(
            config.origin(),
            format!("`layer_types` must list {count} layers, each full_attention or sliding_attention"),
        )),
    }
}

/// Refuses sliding-window layers, for families that are supported with full attention only.
fn no_windows(config: &Config, count: usize) -> Result<()> {
    match layer_types(config, count)? {
        Some(kinds) if kinds.contains(&false) => Err(Error::unsupported(
            config.origin(),
            "sliding_attention in `layer_types` is not supported for this family",
        )),
        _ => Ok(()),
    }
}
