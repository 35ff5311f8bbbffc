//! Llama: SmolLM2, Llama 2 and Llama 3 (with rope scaling `llama3`).

use super::{decoder, keys, rope, Family, GgufMapping, PLAIN};
use crate::error::Result;
use crate::spec::{Config, ModelSpec};

pub(super) static FAMILY: Family = Family {
    model_type: "llama",
    keys: keys::LLAMA,
    wrapper: None,
    spec,
    norm_plus_one: false,
    namings: &[PLAIN],
    gguf: GgufMapping { arch: "llama", interleaved_qk: true, rope_factors: true, keys: &[], complete: |_| Ok(()) },
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
