//! Nothing unread: every configuration key, metadata key and tensor is used, known to be without effect, or refused
//! by name.

use crate::common::*;
use bfly::family::keys::{meaning, Meaning, Table};
use bfly::family::{self, FAMILIES};
use bfly::spec::Config;
use candle_core::quantized::gguf_file::Value as Metadata;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use serde_json::{json, Value};

const RECORDED: &[&str] = &["config_keys/4.57.6.json", "config_keys/5.24.0.json"];

/// Every table, by the model type that it is for.
fn tables() -> Vec<(&'static str, Table)> {
    let of = |f: &&family::Family| {
        let wrapper = f.wrapper.as_ref().map(|w| (w.model_type, w.keys));
        std::iter::once((f.model_type, f.keys)).chain(wrapper).collect::<Vec<_>>()
    };
    FAMILIES.iter().flat_map(of).collect()
}

#[test]
fn every_key_of_transformers_classes_is_in_the_table_of_its_model_type() -> Any {
    let mut found = std::collections::BTreeSet::new();
    for file in RECORDED {
        let recorded = fixture(file)?;
        for (model_type, table) in tables() {
            let class =
                recorded["classes"].as_object().and_then(|c| c.values().find(|c| c["model_type"] == model_type));
            let Some(class) = class else { continue };
            found.insert(model_type);
            let keys = class["keys"]
                .as_array()
                .ok_or("keys")?
                .iter()
                .chain(recorded["generation"].as_array().ok_or("generation")?);
            for key in keys.filter_map(Value::as_str) {
                assert!(meaning(table, key).is_some(), "{file}: `{key}` of {model_type} is in no table");
            }
        }
    }
    // Version 4 has no classes of the younger families.
    assert_eq!(found.len(), tables().len(), "model types without a recorded class");
    Ok(())
}

#[test]
fn defaults_are_those_of_transformers_classes() -> Any {
    let mut compared = 0;
    for file in RECORDED {
        let recorded = fixture(file)?;
        for (model_type, table) in tables() {
            let class =
                recorded["classes"].as_object().and_then(|c| c.values().find(|c| c["model_type"] == model_type));
            for (key, default) in class.and_then(|c| c["defaults"].as_object()).into_iter().flatten() {
                let what = format!("{file}: `{key}` of {model_type}, {default} by default");
                match meaning(table, key) {
                    Some(Meaning::Used(ours)) => assert!(ours.is(default), "{what}, {ours:?} in the table"),
                    Some(Meaning::OnlyIf(ours)) => assert!(ours.is(default) || default.is_null(), "{what}, is refused"),
                    Some(_) => continue,
                    None => panic!("{what}, is in no table"),
                }
                compared += 1;
            }
        }
    }
    assert!(compared > 100, "{compared} defaults compared");
    Ok(())
}

/// A small configuration of each decoder, complete.
fn small(model_type: &str) -> Value {
    let mut config = json!({
        "model_type": model_type, "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 2048,
    });
    if model_type == "qwen3_5_text" {
        config["full_attention_interval"] = json!(2);
    }
    config
}

fn spec(config: Value) -> bfly::Result<bfly::spec::ModelSpec> {
    let (family, decoder) = family::read(&Config::new("config.json", config)?)?;
    (family.spec)(&decoder)?.validate("config.json")
}

/// Nothing that the table calls used is passed over: nonsense under the key is refused by its name.
#[test]
fn every_used_key_is_read() -> Any {
    for family in FAMILIES {
        spec(small(family.model_type))?;
        for (key, meaning) in family.keys.iter().copied().flatten() {
            if matches!(meaning, Meaning::Used(_) | Meaning::Section(_)) {
                let mut config = small(family.model_type);
                config[*key] = json!([["nonsense"]]);
                let error =
                    spec(config).err().ok_or(format!("{}: `{key}` is not read", family.model_type))?.to_string();
                assert!(error.contains(&format!("`{key}`")), "{}, `{key}`: {error}", family.model_type);
            }
        }
    }
    Ok(())
}

#[test]
fn every_used_key_of_a_rotary_section_is_read() -> Any {
    let llama = FAMILIES.iter().find(|f| f.model_type == "llama").ok_or("no llama")?;
    for form in ["rope_scaling", "rope_parameters"] {
        let Some(Meaning::Section(rope)) = meaning(llama.keys, form) else { panic!("{form} is no section") };
        for (key, meaning) in rope.iter().copied().flatten() {
            let refused = |kind: &str| {
                let mut config = small("llama");
                config[form] = json!({ "rope_type": kind, "factor": 2.0 });
                config[form][*key] = json!([["nonsense"]]);
                let error = spec(config).err().map_or(String::new(), |e| e.to_string());
                error.contains(&format!("`{key}`")) && error.contains(form)
            };
            if matches!(meaning, Meaning::Used(_)) && *key != "type" {
                assert!(["yarn", "llama3"].iter().any(|kind| refused(kind)), "`{form}.{key}` is not read");
            }
        }
    }
    let mut old = small("llama");
    old["rope_scaling"] = json!({ "type": "nonsense" });
    assert!(spec(old).err().ok_or("`type` is not read")?.to_string().contains("nonsense"));
    Ok(())
}

#[test]
fn keys_that_are_not_understood_are_refused_by_name() -> Any {
    let refused = |model_type: &str, key: &str, value: Value, says: &[&str]| -> Any {
        let mut config = small(model_type);
        config[key] = value;
        let error = spec(config).err().ok_or(format!("{model_type}: `{key}` was accepted"))?.to_string();
        for word in [&["config.json", &format!("`{key}`")], says].concat() {
            assert!(error.contains(word), "{model_type}, {key}: should say {word}: {error}");
        }
        Ok(())
    };
    let unknown: &[&str] = &["unknown key", "outputs"];
    refused("llama", "residual_multiplier", json!(0.2), unknown)?;
    refused("llama", "sliding_window", json!(4096), unknown)?;
    refused("llama", "text_config", json!({}), unknown)?;
    refused("llama", "hidden_activation", json!("gelu"), unknown)?;
    refused("qwen2", "attention_bias", json!(false), unknown)?;
    refused("qwen2", "use_sliding_window", json!(true), &["true", "false"])?;
    refused("qwen2", "layer_types", json!(["full_attention", "sliding_attention"]), &["sliding_attention"])?;
    refused("qwen3", "layer_types", json!(["full_attention"]), &["2 layers"])?;
    refused("llama", "is_encoder_decoder", json!(true), &["true"])?;
    refused("llama", "partial_rotary_factor", json!(0.5), &["0.5", "1.0"])?;
    refused("gemma3_text", "use_bidirectional_attention", json!(true), &["true", "false"])?;
    refused("gemma3_text", "final_logit_softcapping", json!(30.0), &["30"])?;
    refused("gemma3_text", "attn_logit_softcapping", json!(50.0), &["50"])?;
    refused("gemma3_text", "hidden_act", json!("gelu"), &["gelu_pytorch_tanh"])?;
    refused("gemma3_text", "original_max_position_embeddings", json!(8192), unknown)?;
    refused("gemma3_text", "query_pre_attn_scalar", json!(0), &["positive"])?;
    for method in ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8"] {
        refused("llama", "quantization_config", json!({ "quant_method": method, "bits": 4 }), &[method, "GGUF"])?;
    }
    refused("llama", "quantization", json!({ "group_size": 64, "bits": 4, "mode": "mxfp4" }), &["mxfp4", "affine"])?;
    // All of them at once.
    let mut config = small("llama");
    (config["alpha_one"], config["beta_two"]) = (json!(1), json!(2));
    let error = spec(config).err().ok_or("was accepted")?.to_string();
    assert!(error.contains("`alpha_one`, `beta_two`"), "{error}");
    Ok(())
}

#[test]
fn keys_inside_sections_are_refused_by_name() -> Any {
    let refused = |model_type: &str, section: &str, value: Value, says: &[&str]| -> Any {
        let mut config = small(model_type);
        config[section] = value;
        let error = spec(config).err().ok_or(format!("{section} was accepted"))?.to_string();
        says.iter().chain(&[section]).for_each(|word| assert!(error.contains(word), "should say {word}: {error}"));
        Ok(())
    };
    let long = json!({ "rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0], "factor": 4.0 });
    refused("llama", "rope_scaling", long, &["`long_factor`", "`short_factor`"])?;
    refused("llama", "rope_parameters", json!({ "rope_type": "default", "mrope_section": [1] }), &["`mrope_section`"])?;
    refused("llama", "rope_scaling", json!({ "type": "yarn", "factor": 4.0, "attn_factor": 0.1 }), &["`attn_factor`"])?;
    let partial = json!({ "rope_type": "default", "partial_rotary_factor": 0.25 });
    refused("llama", "rope_parameters", partial, &["`partial_rotary_factor`", "0.25"])?;
    // Gemma 3 has one set for each kind of layer, and transformers passes over what stands beside them.
    refused("gemma3_text", "rope_parameters", json!({ "rope_type": "linear", "factor": 8.0 }), &["`rope_type`"])?;
    let twice = json!({ "rope_type": "linear", "factor": 4.0 });
    let mut config = small("llama");
    (config["rope_scaling"], config["rope_parameters"]) = (twice, json!({ "rope_type": "linear", "factor": 8.0 }));
    let error = spec(config.clone()).err().ok_or("was accepted")?.to_string();
    assert!(error.contains("rope_scaling") && error.contains("rope_parameters"), "{error}");
    config["rope_parameters"]["factor"] = json!(4.0);
    spec(config)?;
    Ok(())
}

#[test]
fn tensors_that_are_not_read_are_refused_by_name() -> Any {
    let with = |golden: &str, names: &[&str]| -> Any<tempfile::TempDir> {
        let dir = variant(golden, |_| ())?;
        let file = dir.path().join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu)?;
        for name in names {
            tensors.insert(name.to_string(), Tensor::zeros(8, DType::F32, &Device::Cpu)?);
        }
        candle_core::safetensors::save(&tensors, &file)?;
        Ok(dir)
    };
    let refused = |golden: &str, names: &[&str]| -> Any {
        let error = refusal(&with(golden, names)?.path().to_string_lossy())?;
        names.iter().for_each(|n| assert!(error.contains(&format!("`{n}`")), "should name {n}: {error}"));
        assert!(error.contains("outputs"), "{error}");
        Ok(())
    };
    refused("llama", &["model.layers.0.self_attn.q_proj.bias"])?;
    refused("llama", &["score.weight"])?;
    refused("qwen3", &["model.layers.0.self_attn.k_proj.bias", "model.layers.0.self_attn.sinks"])?;
    refused("qwen2", &["model.vision_tower.patch.weight"])?;
    // Buffers that follow from the configuration are none.
    let buffers = with("llama", &["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"])?;
    assert!(open(&buffers.path().to_string_lossy())?.take_warnings().is_empty());
    // The other half of a multimodal model is said, not refused.
    let images = with("gemma3", &["model.vision_tower.patch.weight", "multi_modal_projector.norm"])?;
    let warnings = open(&images.path().to_string_lossy())?.take_warnings();
    assert!(warnings.len() == 1 && warnings[0].contains("2 tensors of other parts (vision_tower., "), "{warnings:?}");
    Ok(())
}

#[test]
fn metadata_keys_that_are_not_understood_are_refused_by_name() -> Any {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.gguf");
    let opened = |golden: &str, arch: &str, key: &str, value: Metadata| -> Any<bfly::Result<Vec<String>>> {
        gguf::write(golden, arch, &path, |_, meta| drop(meta.insert(key.into(), value)))?;
        Ok(open(&path.to_string_lossy()).map(|c| c.take_warnings()))
    };
    let refused = |arch: &str, key: &str, value: Metadata, says: &[&str]| -> Any {
        let error = opened(arch, arch, key, value)?.err().ok_or(format!("{key} was accepted"))?.to_string();
        let name = format!("`{key}`");
        [&["model.gguf", &name], says].concat().iter().for_each(|w| assert!(error.contains(w), "{w}: {error}"));
        Ok(())
    };
    let (f32, u32) = (Metadata::F32, Metadata::U32);
    refused("llama", "llama.logit_scale", f32(0.1), &["unknown key"])?;
    refused("llama", "llama.attention.sliding_window", u32(4096), &["unknown key"])?;
    refused("qwen2", "qwen2.rope.dimension_sections", Metadata::Array(vec![u32(8); 4]), &["unknown key"])?;
    refused("llama", "llama.attention.scale", f32(0.1), &["unknown key"])?;
    refused("llama", "llama.final_logit_softcapping", f32(30.0), &["30"])?;
    refused("qwen3", "qwen3.expert_count", u32(8), &["8"])?;
    refused("llama", "llama.attention.causal", Metadata::Bool(false), &["false", "true"])?;
    refused("llama", "llama.rope.dimension_count", u32(4), &["4", "head dimension"])?;
    refused("llama", "llama.attention.value_length", u32(16), &["16", "head dimension"])?;
    refused("llama", "llama.rope.scaling.attn_factor", f32(0.5), &["0.5"])?;
    refused("llama", "llama.rope.scaling.yarn_beta_fast", f32(64.0), &["64", "32"])?;
    refused("llama", "llama.rope.scaling.yarn_log_multiplier", f32(0.1), &["0.1"])?;
    refused("llama", "llama.attention.head_count", Metadata::Array(vec![u32(8); 4]), &["not a single number"])?;
    refused("llama", "general.type", Metadata::String("adapter".into()), &["adapter"])?;
    refused("llama", "adapter.lora.alpha", f32(16.0), &[])?;
    // Of the tokenizer they change ids, not the model; records change nothing.
    let warned = |key: &str, value: Metadata| -> Any<String> { Ok(opened("llama", "llama", key, value)??.join("\n")) };
    assert!(warned("tokenizer.ggml.add_eos_token", Metadata::Bool(true))?.contains("`tokenizer.ggml.add_eos_token`"));
    assert!(warned("tokenizer.ggml.novelty", u32(1))?.contains("`tokenizer.ggml.novelty`"));
    for key in [
        "general.sampling.temp",
        "llama.rope.scaling.finetuned",
        "quantize.imatrix.entries_count",
        "tokenizer.ggml.mask_token_id",
    ] {
        assert_eq!(warned(key, u32(1))?, "", "{key}");
    }
    Ok(())
}

#[test]
fn gguf_tensors_that_are_not_read_are_refused_by_name() -> Any {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.gguf");
    for name in ["blk.0.attn_sinks.weight", "blk.1.attn_q.scale", "rope_factors_long.weight", "rope_freqs.weight"] {
        gguf::write("qwen2", "qwen2", &path, |tensors, _| {
            let odd = Tensor::ones(8, DType::F32, &Device::Cpu).and_then(|t| QTensor::quantize(&t, GgmlDType::F32));
            tensors.insert(name.into(), odd.expect("a vector of eight"));
        })?;
        let error = refusal(&path.to_string_lossy())?;
        assert!(error.contains(&format!("`{name}`")) && error.contains("outputs"), "{error}");
    }
    Ok(())
}

#[test]
fn configurations_of_known_models_hold_no_unknown_key() -> Any {
    for folder in ["goldens", "shapes"] {
        for entry in std::fs::read_dir(root().join("tests/fixtures").join(folder))? {
            let path = entry?.path();
            if path.is_dir() {
                bfly::checkpoint::Checkpoint::random(&path.to_string_lossy(), 0)?;
            }
        }
    }
    // As published, without what concerns images.
    for text in [
        json!({ "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024 }),
        json!({ "hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16, "num_hidden_layers": 48,
                "num_key_value_heads": 8, "sliding_window": 1024 }),
        json!({ "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32, "num_hidden_layers": 62,
                "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 168, "sliding_window": 1024 }),
    ] {
        let mut text = text;
        text["model_type"] = json!("gemma3_text");
        text["rope_scaling"] = json!({ "factor": 8.0, "rope_type": "linear" });
        let spec = spec(json!({
            "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
            "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02,
            "mm_tokens_per_image": 256, "model_type": "gemma3", "text_config": text, "torch_dtype": "bfloat16",
            "transformers_version": "4.50.0.dev0",
            "vision_config": { "hidden_size": 1152, "model_type": "siglip_vision_model" },
        }))?;
        assert_eq!((spec.vocab, spec.max_positions, spec.tied), (262_208, 131_072, true));
        assert_eq!(spec.full_layers().len(), spec.layers.len() / 6);
    }
    Ok(())
}
