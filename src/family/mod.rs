//! Model families: what each calls its tensors and where it departs from the others.
//!
//! A family is one file with one [`Family`] value, registered by one line in [`FAMILIES`]. It turns a [`Config`] into a
//! [`ModelSpec`] and states its quirks; the mathematics lives in `nn`, `mixer` and `model`.

mod gemma3;
mod llama;
mod qwen2;
mod qwen3;

use crate::error::{Error, Result};
use crate::spec::{
    Activation, AttentionKind, AttentionSpec, Config, FeedForwardSpec, LayerSpec, MixerSpec, ModelSpec, Norms,
    RopeScaling, RopeSpec,
};

/// Every family this build knows.
pub static FAMILIES: &[&Family] = &[&qwen2::FAMILY, &qwen3::FAMILY, &llama::FAMILY, &gemma3::FAMILY];

/// One family's reading of a configuration, and its quirks.
pub struct Family {
    /// Values of `config.json`'s `model_type`.
    pub model_types: &'static [&'static str],
    /// GGUF's `general.architecture`.
    pub gguf_arch: &'static str,
    /// Reads the configuration.
    pub spec: fn(&Config) -> Result<ModelSpec>,
    /// safetensors hold `w` where the norm multiplies by `1 + w` (a GGUF file already holds the sum).
    pub norm_plus_one: bool,
    /// GGUF files store the rows of q and k with each head's halves interleaved.
    pub gguf_interleaved_qk: bool,
    /// Put before every tensor name by multimodal wrappers of the same decoder.
    pub prefixes: &'static [&'static str],
}

/// The family whose `model_type` (or GGUF architecture) is `name`.
pub fn find(name: &str, origin: &str) -> Result<&'static Family> {
    let known = |f: &&&Family| f.model_types.contains(&name) || f.gguf_arch == name;
    FAMILIES.iter().find(known).copied().ok_or_else(|| {
        let list: Vec<_> = FAMILIES.iter().flat_map(|f| f.model_types.iter().copied()).collect();
        Error::unsupported(origin, format!("model type `{name}` is not supported; supported: {}", list.join(", ")))
    })
}

/// The fields that every family here shares, with the Llama layout as the default; families change what differs.
fn decoder(config: &Config, family: &str) -> Result<ModelSpec> {
    let hidden = config.size("hidden_size")?;
    let heads = config.size("num_attention_heads")?;
    let kv_heads = config.opt_size("num_key_value_heads")?.unwrap_or(heads);
    let head_dim = config.opt_size("head_dim")?.unwrap_or(hidden / heads);
    let count = config.size("num_hidden_layers")?;
    if count > 4096 {
        return Err(Error::format(config.origin(), format!("`num_hidden_layers` claims {count} layers")));
    }
    let max_positions = config.size("max_position_embeddings")?;
    let activation = match config.opt_str("hidden_act")?.or(config.opt_str("hidden_activation")?) {
        None | Some("silu" | "swish") => Activation::Silu,
        Some("gelu_pytorch_tanh" | "gelu_new") => Activation::GeluTanh,
        Some(other) => return Err(Error::unsupported(config.origin(), format!("activation `{other}`"))),
    };
    let attention = AttentionSpec {
        kind: AttentionKind::Full,
        heads,
        kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f64).sqrt(),
        rope: 0,
        qkv_bias: false,
        out_bias: false,
        qk_norm: false,
    };
    let feed_forward = FeedForwardSpec { width: config.size("intermediate_size")?, activation, bias: false };
    let layer = LayerSpec { mixer: MixerSpec::Attention(attention), feed_forward, norms: Norms::Pre };
    Ok(ModelSpec {
        family: family.into(),
        vocab: config.size("vocab_size")?,
        hidden,
        norm_eps: config.number_or("rms_norm_eps", 1e-6)?,
        embed_scale: 1.0,
        tied: config.bool_or("tie_word_embeddings", false)?,
        max_positions,
        ropes: vec![rope(config, None, head_dim, 10_000.0)?],
        layers: vec![layer; count],
    })
}

/// Reads one rotary embedding in either form: `rope_theta` with `rope_scaling`, or `rope_parameters`, which may hold
/// one set per layer type (`kind`).
fn rope(config: &Config, kind: Option<&str>, dim: usize, default_theta: f64) -> Result<RopeSpec> {
    let max_positions = config.size("max_position_embeddings")?;
    let mut parameters = config.section("rope_parameters")?;
    if let (Some(p), Some(kind)) = (&parameters, kind) {
        if let Some(own) = p.section(kind)? {
            parameters = Some(own);
        }
    }
    let section = match parameters {
        Some(p) => Some(p),
        None => config.section("rope_scaling")?,
    };
    let theta = match section.as_ref().map(|s| s.opt_number("rope_theta")).transpose()?.flatten() {
        Some(theta) => theta,
        None => config.number_or("rope_theta", default_theta)?,
    };
    if theta <= 0.0 {
        return Err(Error::format(config.origin(), format!("`rope_theta` must be positive, not {theta}")));
    }
    let scaling = match &section {
        Some(s) => scaling(s, max_positions)?,
        None => RopeScaling::None,
    };
    Ok(RopeSpec { theta, dim, scaling })
}

fn scaling(s: &Config, max_positions: usize) -> Result<RopeScaling> {
    let name = s.opt_str("rope_type")?.or(s.opt_str("type")?).unwrap_or("default");
    let factor = || match s.opt_number("factor")? {
        Some(f) if f >= 1.0 => Ok(f),
        _ => Err(Error::format(s.origin(), "`factor` must be a number of at least 1")),
    };
    let original = || Ok::<_, Error>(s.opt_size("original_max_position_embeddings")?.unwrap_or(max_positions));
    match name {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: factor()?,
            low_freq_factor: s.number_or("low_freq_factor", 1.0)?,
            high_freq_factor: s.number_or("high_freq_factor", 4.0)?,
            original: original()?,
        }),
        "yarn" => {
            let factor = factor()?;
            let mscale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
            let attention_factor =
                match (s.opt_number("attention_factor")?, s.opt_number("mscale")?, s.opt_number("mscale_all_dim")?) {
                    (Some(a), _, _) => a,
                    (None, Some(m), Some(all)) => mscale(m) / mscale(all),
                    _ => mscale(1.0),
                };
            Ok(RopeScaling::Yarn {
                factor,
                original: original()?,
                beta_fast: s.number_or("beta_fast", 32.0)?,
                beta_slow: s.number_or("beta_slow", 1.0)?,
                attention_factor,
                truncate: s.bool_or("truncate", true)?,
            })
        }
        other => Err(Error::unsupported(
            s.origin(),
            format!("rope scaling `{other}`; supported: default, linear, llama3, yarn"),
        )),
    }
}
