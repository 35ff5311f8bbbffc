//! Llama: SmolLM2, Llama 2 and Llama 3 (with rope scaling `llama3`).

use super::keys::{Bool, Int, NoEffect, Null, OnlyIf, Table, Text, Used, DECODER, GENERIC, ONE_ROPE, RECORD};
use super::{decoder, rope, Family, GgufMapping, PLAIN};
use crate::error::Result;
use crate::spec::{Config, ModelSpec};

pub(super) static FAMILY: Family = Family {
    model_type: "llama",
    keys: KEYS,
    wrapper: None,
    spec,
    norm_plus_one: false,
    namings: &[PLAIN],
    gguf: GgufMapping {
        arch: "llama",
        interleaved_qk: true,
        rope_factors: true,
        partial_rope: false,
        keys: &[],
        complete: |_| Ok(()),
    },
};

fn spec(config: &Config) -> Result<ModelSpec> {
    let mut spec = decoder(config, &FAMILY)?;
    let bias = config.bool_or("mlp_bias", false)?;
    for layer in &mut spec.layers {
        layer.feed_forward.bias = bias;
    }
    spec.ropes = vec![rope::one(config, spec.head_dim())?];
    Ok(spec)
}

/// Keys of transformers' `LlamaConfig`.
const KEYS: Table = &[
    &[
        ("vocab_size", Used(Int(32_000))),
        ("hidden_size", Used(Int(4096))),
        ("intermediate_size", Used(Int(11_008))),
        ("num_hidden_layers", Used(Int(32))),
        ("num_attention_heads", Used(Int(32))),
        ("num_key_value_heads", Used(Null)),
        ("head_dim", Used(Null)),
        ("hidden_act", Used(Text("silu"))),
        ("max_position_embeddings", Used(Int(2048))),
        ("tie_word_embeddings", Used(Bool(false))),
        ("attention_bias", Used(Bool(false))),
        ("mlp_bias", Used(Bool(false))),
        ("pretraining_tp", NoEffect("splits matrix products without changing their results")),
        ("rope_interleaved", OnlyIf(Bool(false))),
        ("is_llama_config", NoEffect(RECORD)),
    ],
    ONE_ROPE,
    DECODER,
    GENERIC,
];
