//! Qwen2 and Qwen2.5: the Llama layout with biases on q, k and v.

use super::{decoder, Family};
use crate::error::{Error, Result};
use crate::spec::{Config, ModelSpec};

pub(super) static FAMILY: Family = Family {
    model_types: &["qwen2"],
    gguf_arch: "qwen2",
    spec,
    norm_plus_one: false,
    gguf_interleaved_qk: false,
    prefixes: &[""],
};

fn spec(config: &Config) -> Result<ModelSpec> {
    if config.bool_or("use_sliding_window", false)? {
        return Err(Error::unsupported(config.origin(), "`use_sliding_window` for qwen2"));
    }
    let mut spec = decoder(config, "qwen2")?;
    for attention in spec.attention_mut() {
        attention.qkv_bias = true;
    }
    Ok(spec)
}
