//! Model families: what each calls its tensors and where it departs from the others.
//!
//! A family is one file with one [`Family`] value, registered by one line in [`FAMILIES`], and one table in [`keys`].
//! It turns a [`Config`] into a [`ModelSpec`] and states its quirks; the mathematics lives in `nn` and `mixer`.

mod gemma3;
pub mod keys;
mod llama;
mod qwen2;
mod qwen3;
mod rope;

use crate::error::{Error, Result};
use crate::spec::{
    Activation, AttentionKind, AttentionSpec, Config, FeedForwardSpec, LayerSpec, MixerSpec, ModelSpec, Norms,
};
use keys::Table;

/// Every family this build knows.
pub static FAMILIES: &[&Family] = &[&qwen2::FAMILY, &qwen3::FAMILY, &llama::FAMILY, &gemma3::FAMILY];

/// One family's reading of a configuration, and its quirks.
pub struct Family {
    /// `model_type` of a decoder's own `config.json`.
    pub model_type: &'static str,
    /// What the keys of such a configuration mean.
    pub keys: Table,
    /// Multimodal models whose `text_config` describes this decoder.
    pub wrapper: Option<Wrapper>,
    /// Reads a decoder's configuration, its defaults filled in.
    pub spec: fn(&Config) -> Result<ModelSpec>,
    /// safetensors hold `w` where the norm multiplies by `1 + w` (a GGUF file already holds the sum).
    pub norm_plus_one: bool,
    /// How safetensors may name the tensors; the first that fits is used.
    pub namings: &'static [Naming],
    /// How GGUF files hold it.
    pub gguf: GgufForm,
}

/// A multimodal model around a decoder.
pub struct Wrapper {
    /// `model_type` of its `config.json`.
    pub model_type: &'static str,
    /// What the keys beside `text_config` mean.
    pub keys: Table,
    /// Beginnings of the names of its other parts' tensors, which are not read.
    pub other_parts: &'static [&'static str],
}

/// What stands in a file for the beginning of a tensor's name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Naming {
    /// In place of `model.`.
    pub body: &'static str,
    /// Before the name of the output matrix.
    pub head: &'static str,
}

/// Names as the decoder's own class has them.
pub const PLAIN: Naming = Naming { body: "model.", head: "" };

impl Naming {
    /// The file's name for the tensor that [`crate::tensors`] calls `name`.
    pub fn apply(&self, name: &str) -> String {
        match name.strip_prefix(PLAIN.body) {
            Some(rest) => format!("{}{rest}", self.body),
            None => format!("{}{name}", self.head),
        }
    }
}

/// How GGUF files hold a family.
pub struct GgufForm {
    /// `general.architecture`.
    pub arch: &'static str,
    /// The rows of q and k are stored with each head's halves interleaved.
    pub interleaved_qk: bool,
    /// A tensor `rope_freqs.weight` divides the rotary frequencies.
    pub rope_factors: bool,
    /// Metadata keys beyond those of every decoder, without the architecture, and the configuration's keys that they
    /// stand for.
    pub keys: &'static [(&'static str, &'static str)],
    /// Fills in what the metadata has no key for.
    pub complete: fn(&mut Config) -> Result<()>,
}

/// The family and its decoder's configuration: keys checked by [`keys`], defaults filled in.
///
/// # Errors
/// A model type without a family; a key that is not understood, or that has a value which is not supported.
pub fn read(config: &Config) -> Result<(&'static Family, Config)> {
    let missing = || Error::format(config.origin(), "`model_type` is missing");
    let name = config.opt_str("model_type")?.ok_or_else(missing)?;
    if let Some(family) = FAMILIES.iter().find(|f| f.model_type == name) {
        return Ok((family, keys::complete(config, family.keys)?));
    }
    let wraps = |f: &&'static Family| f.wrapper.as_ref().filter(|w| w.model_type == name).map(|w| (*f, w));
    if let Some((family, wrapper)) = FAMILIES.iter().find_map(wraps) {
        let whole = keys::complete(config, wrapper.keys)?;
        let mut text = match whole.section("text_config")? {
            Some(text) => keys::complete(&text, family.keys)?,
            None => keys::complete(&Config::new(config.origin(), serde_json::json!({}))?, family.keys)?,
        };
        match text.opt_str("model_type")? {
            Some(other) if other != family.model_type => return Err(unknown("model type", other, text.origin())),
            _ => {}
        }
        // Whether the head is tied is the whole model's to say: the decoder inside has none.
        text.set("tie_word_embeddings", whole.bool_or("tie_word_embeddings", true)?.into());
        return Ok((family, text));
    }
    Err(unknown("model type", name, config.origin()))
}

/// The family of a GGUF file's `general.architecture`.
///
/// # Errors
/// An architecture without a family.
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

/// The fields that every family here shares, with the Llama layout as the default; families change what differs.
fn decoder(config: &Config, family: &Family) -> Result<ModelSpec> {
    let hidden = config.size("hidden_size")?;
    let heads = config.size("num_attention_heads")?;
    let kv_heads = config.opt_size("num_key_value_heads")?.unwrap_or(heads);
    let head_dim = config.opt_size("head_dim")?.unwrap_or(hidden / heads);
    if head_dim == 0 {
        return Err(Error::format(config.origin(), format!("{heads} heads cannot share a width of {hidden}")));
    }
    let count = config.size("num_hidden_layers")?;
    if count > 4096 {
        return Err(Error::format(config.origin(), format!("`num_hidden_layers` claims {count} layers")));
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
            Err(Error::unsupported(config.origin(), format!("activation `{name}`; supported: silu, gelu_pytorch_tanh")))
        }
    }
}

/// Per layer, whether it attends to everything, as `layer_types` says; `None` without that key.
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
            format!("`layer_types` must name {count} layers, each full_attention or sliding_attention"),
        )),
    }
}

/// Refuses windows in a family whose layers attend to everything.
fn no_windows(config: &Config, count: usize) -> Result<()> {
    match layer_types(config, count)? {
        Some(kinds) if kinds.contains(&false) => {
            Err(Error::unsupported(config.origin(), "`layer_types` with sliding_attention"))
        }
        _ => Ok(()),
    }
}
