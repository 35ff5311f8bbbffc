//! Qwen2 and Qwen2.5: the Llama layout with biases on q, k and v.

use super::{decoder, keys, no_windows, rope, Family, GgufMapping, PLAIN};
use crate::error::Result;
use crate::spec::{Config, ModelSpec};

pub(super) static FAMILY: Family = Family {
    model_type: "qwen2",
    keys: keys::QWEN2,
    wrapper: None,
    spec,
    norm_plus_one: false,
    namings: &[PLAIN],
    gguf: GgufMapping { arch: "qwen2", interleaved_qk: false, rope_factors: false, keys: &[], complete: |_| Ok(()) },
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
