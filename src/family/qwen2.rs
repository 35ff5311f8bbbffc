//! Qwen2 and Qwen2.5: the Llama layout with biases on q, k and v.

use super::keys::{Bool, Int, Null, OnlyIf, Table, Text, Used, DECODER, GENERIC, ONE_ROPE, QWEN_WINDOW};
use super::{decoder, no_windows, rope, Family, GgufMapping, PLAIN};
use crate::error::Result;
use crate::spec::{Config, ModelSpec};

pub(super) static FAMILY: Family = Family {
    model_type: "qwen2",
    keys: KEYS,
    wrapper: None,
    spec,
    norm_plus_one: false,
    namings: &[PLAIN],
    gguf: GgufMapping {
        arch: "qwen2",
        interleaved_qk: false,
        rope_factors: false,
        partial_rope: false,
        keys: &[],
        complete: |_| Ok(()),
    },
};

fn spec(config: &Config) -> Result<ModelSpec> {
    let mut spec = decoder(config, &FAMILY)?;
    no_windows(config, spec.layers.len())?;
    for attention in spec.attention_mut() {
        attention.qkv_bias = true;
    }
    spec.ropes = vec![rope::one(config, spec.head_dim())?];
    Ok(spec)
}

/// Keys of transformers' `Qwen2Config`.
const KEYS: Table = &[
    &[
        ("vocab_size", Used(Int(151_936))),
        ("hidden_size", Used(Int(4096))),
        ("intermediate_size", Used(Int(22_016))),
        ("num_hidden_layers", Used(Int(32))),
        ("num_attention_heads", Used(Int(32))),
        ("num_key_value_heads", Used(Int(32))),
        ("head_dim", Used(Null)),
        ("hidden_act", Used(Text("silu"))),
        ("max_position_embeddings", Used(Int(32_768))),
        ("tie_word_embeddings", Used(Bool(false))),
        ("use_mrope", OnlyIf(Bool(false))),
    ],
    QWEN_WINDOW,
    ONE_ROPE,
    DECODER,
    GENERIC,
];
