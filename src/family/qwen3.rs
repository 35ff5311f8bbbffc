//! Qwen3: the Llama layout with an explicit head dimension and RMS norms on each head of q and k.

use super::{decoder, keys, no_windows, rope, Family, GgufMapping, PLAIN};
use crate::error::Result;
use crate::spec::{Config, ModelSpec};

pub(super) static FAMILY: Family = Family {
    model_type: "qwen3",
    keys: keys::QWEN3,
    wrapper: None,
    spec,
    norm_plus_one: false,
    namings: &[PLAIN],
    gguf: GgufMapping { arch: "qwen3", interleaved_qk: false, rope_factors: false, keys: &[], complete: |_| Ok(()) },
};

fn spec(config: &Config) -> Result<ModelSpec> {
    let mut spec = decoder(config, &FAMILY)?;
    no_windows(config, spec.layers.len())?;
    for attention in spec.attention_mut() {
        attention.qk_norm = true;
    }
    spec.ropes = vec![rope::one(config, spec.head_dim())?];
    Ok(spec)
}
