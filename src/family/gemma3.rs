//! Gemma 3, text only: five sliding layers to one full layer, two rope bases, norms on both sides of attention and
//! feed-forward, scaled embeddings, and norm weights stored as `w` for a factor of `1 + w`.

use super::{decoder, rope, Family};
use crate::error::{Error, Result};
use crate::spec::{Activation, AttentionKind, Config, ModelSpec, Norms, RopeScaling};

pub(super) static FAMILY: Family = Family {
    model_types: &["gemma3_text", "gemma3"],
    gguf_arch: "gemma3",
    spec,
    norm_plus_one: true,
    gguf_interleaved_qk: false,
    prefixes: &["", "language_model."],
};

fn spec(config: &Config) -> Result<ModelSpec> {
    let text = config.section("text_config")?;
    let config = text.as_ref().unwrap_or(config);
    for key in ["attn_logit_softcapping", "final_logit_softcapping"] {
        if config.get(key).is_some() {
            return Err(Error::unsupported(config.origin(), format!("`{key}` for gemma3")));
        }
    }
    let mut spec = decoder(config, "gemma3_text")?;
    let head_dim = spec.attention().next().map_or(0, |(_, a)| a.head_dim);
    // GGUF files lack the local rope base and the layer pattern: 10,000 and every sixth layer are the family's.
    let global = rope(config, Some("full_attention"), head_dim, 1_000_000.0)?;
    let mut local = match config.section("rope_parameters")? {
        Some(_) => rope(config, Some("sliding_attention"), head_dim, 10_000.0)?,
        None => global.clone(),
    };
    if config.section("rope_parameters")?.is_none() {
        local.theta = config.number_or("rope_local_base_freq", 10_000.0)?;
        local.scaling = RopeScaling::None;
    }
    spec.ropes = vec![global, local];
    spec.tied = config.bool_or("tie_word_embeddings", true)?;
    spec.embed_scale = (spec.hidden as f64).sqrt();
    let scalar = config.number_or("query_pre_attn_scalar", head_dim as f64)?;
    let window = config.opt_size("sliding_window")?.unwrap_or(4096);
    let kinds = layer_kinds(config, spec.layers.len())?;
    for layer in &mut spec.layers {
        layer.feed_forward.activation = Activation::GeluTanh;
        layer.norms = Norms::Sandwich;
    }
    for (attention, full) in spec.attention_mut().zip(kinds) {
        attention.qk_norm = true;
        attention.scale = 1.0 / scalar.sqrt();
        if !full {
            attention.kind = AttentionKind::Sliding { window };
            attention.rope = 1;
        }
    }
    Ok(spec)
}

/// Per layer, whether it attends to everything.
fn layer_kinds(config: &Config, count: usize) -> Result<Vec<bool>> {
    let Some(list) = config.get("layer_types") else {
        let pattern = config.opt_size("sliding_window_pattern")?.unwrap_or(6);
        return Ok((0..count).map(|i| (i + 1).is_multiple_of(pattern)).collect());
    };
    let kinds = list.as_array().map(|a| {
        a.iter()
            .map(|v| match v.as_str() {
                Some("full_attention") => Some(true),
                Some("sliding_attention") => Some(false),
                _ => None,
            })
            .collect::<Option<Vec<_>>>()
    });
    match kinds.flatten() {
        Some(kinds) if kinds.len() == count => Ok(kinds),
        _ => Err(Error::format(
            config.origin(),
            format!("`layer_types` must name {count} layers, each full_attention or sliding_attention"),
        )),
    }
}
