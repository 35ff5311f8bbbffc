//! Gemma 3, text only: five sliding-window layers per full-attention layer, two RoPE bases, norms before and after
//! attention and feed-forward, scaled embeddings, and norm weights stored as `w` for a factor of `1 + w`.

use super::keys::{
    Bool, Float, Int, NoEffect, Null, OnlyIf, Section, Table, Text, Used, DECODER, GENERIC, ROPE, TRAINING,
};
use super::{decoder, layer_types, rope, Family, GgufMapping, Naming, Wrapper, PLAIN};
use crate::error::{Error, Result};
use crate::spec::{AttentionKind, Config, ModelSpec, Norms};
use serde_json::json;

pub(super) static FAMILY: Family = Family {
    model_type: "gemma3_text",
    keys: KEYS,
    wrapper: Some(Wrapper {
        model_type: "gemma3",
        keys: WRAPPER_KEYS,
        other_parts: &[
            "vision_tower.",
            "multi_modal_projector.",
            "model.vision_tower.",
            "model.multi_modal_projector.",
        ],
    }),
    spec,
    norm_plus_one: true,
    // Text-only, multimodal saved by transformers before 4.52, multimodal saved since.
    namings: &[
        PLAIN,
        Naming { body: "language_model.model.", head: "language_model." },
        Naming { body: "model.language_model.", head: "" },
    ],
    gguf: GgufMapping {
        arch: "gemma3",
        interleaved_qk: false,
        rope_factors: false,
        partial_rope: false,
        keys: &[
            ("attention.sliding_window", "sliding_window"),
            ("attention.sliding_window_pattern", "sliding_window_pattern"),
            ("rope.freq_base_swa", "rope_local_base_freq"),
        ],
        complete,
    },
};

fn spec(config: &Config) -> Result<ModelSpec> {
    let mut spec = decoder(config, &FAMILY)?;
    let (full, sliding) = rope::two(config, spec.head_dim())?;
    spec.ropes = vec![full, sliding];
    spec.embed_scale = (spec.hidden as f64).sqrt();
    let scalar = config.number("query_pre_attn_scalar")?;
    if scalar <= 0.0 {
        return Err(Error::format(config.origin(), format!("`query_pre_attn_scalar` must be positive, not {scalar}")));
    }
    let scale = 1.0 / scalar.sqrt();
    let count = spec.layers.len();
    let kinds = match layer_types(config, count)? {
        Some(kinds) => kinds,
        None => {
            let pattern = config.size("sliding_window_pattern")?;
            (0..count).map(|i| (i + 1).is_multiple_of(pattern)).collect()
        }
    };
    for layer in &mut spec.layers {
        layer.norms = Norms::Sandwich;
    }
    for (attention, full) in spec.attention_mut().zip(kinds) {
        attention.qk_norm = true;
        attention.scale = scale;
        if !full {
            attention.kind = AttentionKind::Sliding { window: config.size("sliding_window")? };
            attention.rope = 1;
        }
    }
    Ok(spec)
}

/// Sets what llama.cpp hard-codes: the attention scale (the 27B, known by its 62 layers, differs), the activation, and
/// full attention in every layer of a model without a window.
/// <https://github.com/ggml-org/llama.cpp/blob/master/src/models/gemma3.cpp>
fn complete(config: &mut Config) -> Result<()> {
    let (hidden, layers) = (config.size("hidden_size")?, config.size("num_hidden_layers")?);
    let scalar = match layers {
        62 => hidden / config.size("num_attention_heads")?,
        _ => config.size("head_dim")?,
    };
    config.set("query_pre_attn_scalar", json!(scalar));
    config.set("hidden_activation", json!("gelu_pytorch_tanh"));
    if let Some(kind) = config.section("rope_scaling")?.map(|s| s.opt_str("rope_type").map(|k| k.map(String::from))) {
        // llama.cpp applies YaRN's factor on cos and sin to sliding-window layers too, transformers does not.
        if kind?.as_deref() == Some("yarn") {
            return Err(Error::unsupported(
                config.origin(),
                "rope scaling `yarn` is not supported for gemma3; supported: linear",
            ));
        }
    }
    if config.get("sliding_window").is_none_or(|w| *w == 0) {
        config.set("layer_types", json!(vec!["full_attention"; layers.min(4096)]));
    }
    Ok(())
}

/// Keys of transformers' `Gemma3TextConfig`.
const KEYS: Table = &[
    &[
        ("vocab_size", Used(Int(262_208))),
        ("hidden_size", Used(Int(2304))),
        ("intermediate_size", Used(Int(9216))),
        ("num_hidden_layers", Used(Int(26))),
        ("num_attention_heads", Used(Int(8))),
        ("num_key_value_heads", Used(Int(4))),
        ("head_dim", Used(Int(256))),
        ("hidden_activation", Used(Text("gelu_pytorch_tanh"))),
        ("hidden_act", OnlyIf(Text("gelu_pytorch_tanh"))),
        ("max_position_embeddings", Used(Int(131_072))),
        ("tie_word_embeddings", Used(Bool(true))),
        ("attention_bias", Used(Bool(false))),
        ("query_pre_attn_scalar", Used(Int(256))),
        ("sliding_window", Used(Int(4096))),
        ("layer_types", Used(Null)),
        ("sliding_window_pattern", Used(Int(6))),
        ("_sliding_window_pattern", NoEffect("`layer_types` or `sliding_window_pattern` is used")),
        ("final_logit_softcapping", OnlyIf(Null)),
        ("attn_logit_softcapping", OnlyIf(Null)),
        ("use_bidirectional_attention", OnlyIf(Bool(false))),
        ("rope_theta", Used(Float(1_000_000.0))),
        ("rope_local_base_freq", Used(Float(10_000.0))),
        ("rope_scaling", Section(ROPE)),
        ("rope_parameters", Section(&[&[("full_attention", Section(ROPE)), ("sliding_attention", Section(ROPE))]])),
    ],
    DECODER,
    GENERIC,
];

const IMAGES: &str = "for image inputs, which are not supported";

/// Keys of transformers' `Gemma3Config`, whose `text_config` has the keys [`KEYS`].
const WRAPPER_KEYS: Table = &[
    &[
        ("text_config", Section(KEYS)),
        ("vision_config", NoEffect(IMAGES)),
        ("tie_word_embeddings", Used(Bool(true))),
        ("mm_tokens_per_image", NoEffect(IMAGES)),
        ("boi_token_index", NoEffect(IMAGES)),
        ("eoi_token_index", NoEffect(IMAGES)),
        ("image_token_index", NoEffect(IMAGES)),
        ("boi_token_id", NoEffect(IMAGES)),
        ("eoi_token_id", NoEffect(IMAGES)),
        ("image_token_id", NoEffect(IMAGES)),
        ("initializer_range", NoEffect(TRAINING)),
    ],
    GENERIC,
];
