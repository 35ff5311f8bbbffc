//! Llama: SmolLM2, Llama 2 and Llama 3 (with its own rope scaling).

use super::{decoder, Family};
use crate::error::Result;
use crate::spec::{Config, ModelSpec};

pub(super) static FAMILY: Family = Family {
    model_types: &["llama"],
    gguf_arch: "llama",
    spec,
    norm_plus_one: false,
    gguf_interleaved_qk: true,
    prefixes: &[""],
};

fn spec(config: &Config) -> Result<ModelSpec> {
    let mut spec = decoder(config, "llama")?;
    let bias = config.bool_or("attention_bias", false)?;
    let mlp_bias = config.bool_or("mlp_bias", false)?;
    for attention in spec.attention_mut() {
        (attention.qkv_bias, attention.out_bias) = (bias, bias);
    }
    for layer in &mut spec.layers {
        layer.feed_forward.bias = mlp_bias;
    }
    Ok(spec)
}
