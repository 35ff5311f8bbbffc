//! Qwen3: no biases, an explicit head dimension, and a norm per head on q and k.

use super::{decoder, Family};
use crate::error::{Error, Result};
use crate::spec::{Config, ModelSpec};

pub(super) static FAMILY: Family = Family {
    model_types: &["qwen3"],
    gguf_arch: "qwen3",
    spec,
    norm_plus_one: false,
    gguf_interleaved_qk: false,
    prefixes: &[""],
};

fn spec(config: &Config) -> Result<ModelSpec> {
    if config.bool_or("use_sliding_window", false)? {
        return Err(Error::unsupported(config.origin(), "`use_sliding_window` for qwen3"));
    }
    let mut spec = decoder(config, "qwen3")?;
    let bias = config.bool_or("attention_bias", false)?;
    for attention in spec.attention_mut() {
        attention.qk_norm = true;
        (attention.qkv_bias, attention.out_bias) = (bias, bias);
    }
    Ok(spec)
}
