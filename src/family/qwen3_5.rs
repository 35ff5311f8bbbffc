//! Qwen3.5, text only: three Gated DeltaNet layers per full-attention layer, a gate on the output of attention, rotation of
//! a part of each head, and norm weights stored as `w` for a factor of `1 + w`.

use super::keys::{
    Bool, Float, Int, NoEffect, Null, OnlyIf, Section, Table, Text, Used, DECODER, GENERIC, RECORD, ROPE_KEYS, TRAINING,
};
use super::{decoder, rope, Family, GgufMapping, Naming, Wrapper, PLAIN};
use crate::error::{Error, Result};
use crate::spec::{Config, DeltaSpec, MixerSpec, ModelSpec};
use serde_json::{json, Value};

pub(super) static FAMILY: Family = Family {
    model_type: "qwen3_5_text",
    keys: KEYS,
    wrapper: Some(Wrapper {
        model_type: "qwen3_5",
        keys: WRAPPER_KEYS,
        other_parts: &["model.visual.", "vision_tower.", "mtp."],
    }),
    spec,
    norm_plus_one: true,
    namings: &[
        PLAIN,
        Naming { body: "model.language_model.", head: "" },
        Naming { body: "language_model.model.", head: "language_model." },
    ],
    gguf: GgufMapping {
        arch: "qwen35",
        interleaved_qk: false,
        rope_factors: false,
        partial_rope: true,
        keys: GGUF_KEYS,
        complete,
    },
};

fn spec(config: &Config) -> Result<ModelSpec> {
    let mut spec = decoder(config, &FAMILY)?;
    let head_dim = spec.head_dim();
    let delta = DeltaSpec {
        key_heads: config.size("linear_num_key_heads")?,
        value_heads: config.size("linear_num_value_heads")?,
        key_dim: config.size("linear_key_head_dim")?,
        value_dim: config.size("linear_value_head_dim")?,
        kernel: config.size("linear_conv_kernel_dim")?,
    };
    let gate = config.bool_or("attn_output_gate", true)?;
    for attention in spec.attention_mut() {
        (attention.qk_norm, attention.gate) = (true, gate);
    }
    for (layer, full) in spec.layers.iter_mut().zip(full_layers(config)?) {
        if !full {
            layer.mixer = MixerSpec::Delta(delta);
        }
    }
    let mut one = rope::one(config, head_dim)?;
    one.rotated = rotated(config, head_dim)?;
    spec.ropes = vec![one];
    Ok(spec)
}

/// Which layers attend: by `layer_types`, or the last of each `full_attention_interval`.
fn full_layers(config: &Config) -> Result<Vec<bool>> {
    let count = config.size("num_hidden_layers")?;
    let Some(list) = config.get("layer_types") else {
        let every = config.size("full_attention_interval")?;
        return Ok((1..=count).map(|i| i.is_multiple_of(every)).collect());
    };
    let kind = |v: &Value| match v.as_str() {
        Some("full_attention") => Some(true),
        Some("linear_attention") => Some(false),
        _ => None,
    };
    match list.as_array().and_then(|list| list.iter().map(kind).collect::<Option<Vec<_>>>()) {
        Some(kinds) if kinds.len() == count => Ok(kinds),
        _ => {
            let message = format!("`layer_types` must list {count} layers, each full_attention or linear_attention");
            Err(Error::format(config.origin(), message))
        }
    }
}

/// Rotated dimensions of a head.
fn rotated(config: &Config, head_dim: usize) -> Result<usize> {
    let section = config.section("rope_parameters")?.or(config.section("rope_scaling")?);
    let own = section.as_ref().map_or(Ok(None), |s| s.opt_number("partial_rotary_factor"))?;
    let share = own.map_or_else(|| config.number("partial_rotary_factor"), Ok)?;
    if !(share > 0.0 && share <= 1.0) {
        let message = format!("`partial_rotary_factor` must be above 0 and at most 1, not {share}");
        return Err(Error::format(config.origin(), message));
    }
    Ok((head_dim as f64 * share) as usize)
}

/// Metadata keys of llama.cpp's `qwen35`; those under names of no configuration are read by [`complete`].
const GGUF_KEYS: &[(&str, &str)] = &[
    ("ssm.conv_kernel", "linear_conv_kernel_dim"),
    ("ssm.state_size", "linear_key_head_dim"),
    ("ssm.group_count", "linear_num_key_heads"),
    ("ssm.time_step_rank", "linear_num_value_heads"),
    ("ssm.inner_size", INNER),
    ("full_attention_interval", "full_attention_interval"),
    ("attention.recurrent_layers", RECURRENT),
    ("nextn_predict_layers", "mtp_num_hidden_layers"),
    // Text has one position on all axes.
    ("rope.dimension_sections", SECTIONS),
];
const INNER: &str = "ssm.inner_size";
const RECURRENT: &str = "attention.recurrent_layers";
const SECTIONS: &str = "rope.dimension_sections";

/// Converts what has no key of its own in a configuration. `block_count` includes the blocks that predict several tokens.
/// <https://github.com/ggml-org/llama.cpp/blob/master/src/models/qwen35.cpp>
fn complete(config: &mut Config) -> Result<()> {
    let (heads, inner) = (config.size("linear_num_value_heads")?, config.size(INNER)?);
    if !inner.is_multiple_of(heads) {
        return Err(Error::format(config.origin(), format!("`{INNER}` {inner} is not a multiple of {heads} heads")));
    }
    config.set("linear_value_head_dim", json!(inner / heads));
    config.set(INNER, Value::Null);
    config.set(SECTIONS, Value::Null);
    let more = config.get("mtp_num_hidden_layers").and_then(Value::as_u64).unwrap_or(0) as usize;
    let layers = config.size("num_hidden_layers")?.saturating_sub(more);
    config.set("num_hidden_layers", json!(layers));
    if let Some(list) = config.get(RECURRENT).cloned() {
        let flags = list.as_array().and_then(|l| l.iter().map(Value::as_bool).collect::<Option<Vec<_>>>());
        let flags = flags.filter(|f| f.len() >= layers);
        let flags =
            flags.ok_or_else(|| Error::format(config.origin(), format!("`{RECURRENT}` must list every layer")))?;
        let kind = |recurrent: &bool| if *recurrent { "linear_attention" } else { "full_attention" };
        config.set("layer_types", json!(flags[..layers].iter().map(kind).collect::<Vec<_>>()));
        config.set(RECURRENT, Value::Null);
    }
    Ok(())
}

/// With text alone the three axes of a position are equal, and every section rotates by it.
const AXES: &str = "text has one position on all axes";

const ROPE: Table = &[
    &[("partial_rotary_factor", Used(Null)), ("mrope_section", NoEffect(AXES)), ("mrope_interleaved", NoEffect(AXES))],
    ROPE_KEYS,
];

/// Keys of transformers' `Qwen3_5TextConfig`.
const KEYS: Table = &[
    &[
        ("vocab_size", Used(Int(248_320))),
        ("hidden_size", Used(Int(4096))),
        ("intermediate_size", Used(Int(12_288))),
        ("num_hidden_layers", Used(Int(32))),
        ("num_attention_heads", Used(Int(16))),
        ("num_key_value_heads", Used(Int(4))),
        ("head_dim", Used(Int(256))),
        ("hidden_act", Used(Text("silu"))),
        ("max_position_embeddings", Used(Int(32_768))),
        ("tie_word_embeddings", Used(Bool(false))),
        ("attention_bias", Used(Bool(false))),
        ("attn_output_gate", Used(Bool(true))),
        ("layer_types", Used(Null)),
        ("full_attention_interval", Used(Int(4))),
        ("linear_conv_kernel_dim", Used(Int(4))),
        ("linear_key_head_dim", Used(Int(128))),
        ("linear_value_head_dim", Used(Int(128))),
        ("linear_num_key_heads", Used(Int(16))),
        ("linear_num_value_heads", Used(Int(32))),
        ("rope_theta", Used(Float(10_000.0))),
        ("rope_scaling", Section(ROPE)),
        ("rope_parameters", Section(ROPE)),
        ("original_max_position_embeddings", Used(Null)),
        ("partial_rotary_factor", Used(Float(0.25))),
        ("mamba_ssm_dtype", OnlyIf(Text("float32"))),
        ("mtp_num_hidden_layers", NoEffect(MTP)),
        ("mtp_use_dedicated_embeddings", NoEffect(MTP)),
    ],
    DECODER,
    GENERIC,
];

const MTP: &str = "for predicting several tokens at once, which is not done";

const IMAGES: &str = "for image inputs, which are not supported";

/// Keys of transformers' `Qwen3_5Config`, whose `text_config` has the keys [`KEYS`].
const WRAPPER_KEYS: Table = &[
    &[
        ("text_config", Section(KEYS)),
        ("vision_config", NoEffect(IMAGES)),
        ("tie_word_embeddings", Used(Bool(false))),
        ("image_token_id", NoEffect(IMAGES)),
        ("video_token_id", NoEffect(IMAGES)),
        ("vision_start_token_id", NoEffect(IMAGES)),
        ("vision_end_token_id", NoEffect(IMAGES)),
        ("initializer_range", NoEffect(TRAINING)),
        ("language_model_only", NoEffect(RECORD)),
    ],
    GENERIC,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_become_a_configuration_without_the_blocks_that_predict_more() -> Result<()> {
        let metadata = json!({
            "num_hidden_layers": 5, "linear_num_value_heads": 6, INNER: 96, SECTIONS: [11, 11, 10, 0],
            "mtp_num_hidden_layers": 1, RECURRENT: [true, true, false, true, false],
        });
        let mut config = Config::new("model.gguf", metadata)?;
        complete(&mut config)?;
        let kinds = ["linear_attention", "linear_attention", "full_attention", "linear_attention"];
        assert_eq!(config.get("layer_types"), Some(&json!(kinds)));
        assert_eq!((config.size("num_hidden_layers")?, config.size("linear_value_head_dim")?), (4, 16));
        assert_eq!([INNER, SECTIONS, RECURRENT].map(|key| config.get(key)), [None; 3]);
        config.set(INNER, json!(97));
        assert!(complete(&mut config).is_err_and(|e| e.to_string().contains("97 is not a multiple of 6")));
        Ok(())
    }
}
