//! Writes golden checkpoints as GGUF files, as llama.cpp's converter does for these families.

use super::{golden_dir, Any};
use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::path::Path;

/// Tensors by GGUF name, and metadata, which `change` may break.
pub type Change<'a> = &'a mut BTreeMap<String, QTensor>;

/// Writes `name` as `arch` to `path`.
pub fn write(name: &str, arch: &str, path: &Path, change: impl FnOnce(Change, &mut BTreeMap<String, Value>)) -> Any {
    let config: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(golden_dir(name).join("config.json"))?)?;
    let number = |key: &str| config[key].as_u64().map(|n| n as u32);
    let dim = number("head_dim")
        .or(Some(number("hidden_size").ok_or("hidden_size")? / number("num_attention_heads").ok_or("heads")?));
    let mut meta = BTreeMap::from([("general.architecture".to_string(), Value::String(arch.into()))]);
    for (key, value) in [
        ("embedding_length", number("hidden_size")),
        ("block_count", number("num_hidden_layers")),
        ("feed_forward_length", number("intermediate_size")),
        ("attention.head_count", number("num_attention_heads")),
        ("attention.head_count_kv", number("num_key_value_heads")),
        ("attention.key_length", dim),
        ("context_length", number("max_position_embeddings")),
    ] {
        meta.insert(format!("{arch}.{key}"), Value::U32(value.ok_or(key)?));
    }
    let rope = &config["rope_parameters"];
    let theta = rope["rope_theta"].as_f64().or(config["rope_theta"].as_f64()).ok_or("rope_theta")?;
    meta.insert(format!("{arch}.rope.freq_base"), Value::F32(theta as f32));
    let eps = config["rms_norm_eps"].as_f64().ok_or("rms_norm_eps")?;
    meta.insert(format!("{arch}.attention.layer_norm_rms_epsilon"), Value::F32(eps as f32));
    if let Some(factor) = config["rope_scaling"]["factor"].as_f64() {
        meta.insert(format!("{arch}.rope.scaling.type"), Value::String("linear".into()));
        meta.insert(format!("{arch}.rope.scaling.factor"), Value::F32(factor as f32));
    }
    let mut tensors = BTreeMap::new();
    for (name, tensor) in candle_core::safetensors::load(golden_dir(name).join("model.safetensors"), &Device::Cpu)? {
        let tensor = match arch == "llama" && (name.ends_with("q_proj.weight") || name.ends_with("k_proj.weight")) {
            true => interleave(&tensor, dim.ok_or("head_dim")? as usize)?,
            false => tensor,
        };
        tensors.insert(gguf_name(&name), QTensor::quantize(&tensor, GgmlDType::F32)?);
    }
    change(&mut tensors, &mut meta);
    save(path, &tensors, &meta)
}

/// Writes the file at `from` to `to`, with tensors and metadata that `change` may break.
pub fn edit(from: &str, to: &Path, change: impl FnOnce(Change, &mut BTreeMap<String, Value>)) -> Any {
    let mut file = std::fs::File::open(from)?;
    let content = gguf_file::Content::read(&mut file)?;
    let mut tensors = BTreeMap::new();
    for name in content.tensor_infos.keys() {
        tensors.insert(name.clone(), content.tensor(&mut file, name, &Device::Cpu)?);
    }
    let mut meta: BTreeMap<_, _> = content.metadata.into_iter().collect();
    change(&mut tensors, &mut meta);
    save(to, &tensors, &meta)
}

fn save(path: &Path, tensors: &BTreeMap<String, QTensor>, meta: &BTreeMap<String, Value>) -> Any {
    let meta: Vec<_> = meta.iter().map(|(k, v)| (k.as_str(), v)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(k, v)| (k.as_str(), v)).collect();
    Ok(gguf_file::write(&mut std::fs::File::create(path)?, &meta, &tensors)?)
}

fn interleave(w: &Tensor, dim: usize) -> candle_core::Result<Tensor> {
    let (rows, cols) = w.dims2()?;
    w.reshape((rows / dim, 2, dim / 2, cols))?.transpose(1, 2)?.contiguous()?.reshape((rows, cols))
}

fn gguf_name(name: &str) -> String {
    let mut out = name.replace("model.layers.", "blk.");
    for (from, to) in [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ] {
        out = out.replace(from, to);
    }
    out
}
