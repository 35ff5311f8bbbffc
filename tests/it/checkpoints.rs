//! Checkpoints as people have them: split, tied by half, named by a wrapper, with keys left to the class, or too wide
//! for a type.

use crate::common::*;
use bfly::checkpoint::{Checkpoint, WeightDtype, WeightFormat};
use bfly::spec::ModelSpec;
use bfly::storage::{Ggml, Storage};
use candle_core::quantized::gguf_file::Value as Metadata;
use candle_core::{Device, Tensor};
use serde_json::json;
use std::collections::HashMap;
use std::path::Path;

/// The model of a fault gives the logits of its twin.
fn equals_twin(fault_name: &str, model: &str, twin: &str) -> Any {
    let got = fault_logits(fault_name, &fault_model(&format!("{fault_name}/{model}")))?;
    let want = fault_logits(fault_name, &fault_model(&format!("{fault_name}/{twin}")))?;
    let off = deviation(&got, &want)?;
    assert!(off < 1e-4, "{fault_name}: {off:.2e} standard deviations off its twin");
    Ok(())
}

/// What the configuration of a fault describes.
fn spec(path: &str) -> Any<ModelSpec> {
    Ok(Checkpoint::random(&fault_model(path), 0)?.spec)
}

#[test]
fn biases_of_a_llama_gguf_file_are_read() -> Any {
    equals_twin("gguf-llama-bias", "model.gguf", "twin")
}

#[test]
fn half_a_set_of_biases_is_refused_by_name() -> Any {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.gguf");
    gguf::edit(&fault_model("gguf-llama-bias/model.gguf"), &path, |t, _| drop(t.remove("blk.0.attn_k.bias")))?;
    let error = refusal(&path.to_string_lossy())?;
    assert!(error.contains("`blk.0.attn_k.bias` is missing"), "{error}");
    Ok(())
}

#[test]
fn a_gguf_scaling_factor_without_a_type_is_linear() -> Any {
    equals_twin("gguf-rope-factor-without-type", "model.gguf", "twin")?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.gguf");
    let scaling = |change: &dyn Fn(&mut std::collections::BTreeMap<String, Metadata>)| -> Any<String> {
        gguf::edit(&fault_model("gguf-rope-factor-without-type/model.gguf"), &path, |_, meta| change(meta))?;
        Ok(open(&path.to_string_lossy())?.spec.ropes[0].scaling.describe())
    };
    const FACTOR: &str = "llama.rope.scaling.factor";
    const TYPE: &str = "llama.rope.scaling.type";
    assert_eq!(scaling(&|_| ())?, "linear, factor 4");
    assert_eq!(scaling(&|m| drop(m.insert(TYPE.into(), Metadata::String("none".into()))))?, "none");
    assert_eq!(scaling(&|m| drop(m.insert(FACTOR.into(), Metadata::F32(0.0))))?, "none");
    // The key's older name.
    let old = |m: &mut std::collections::BTreeMap<String, Metadata>| {
        let factor = m.remove(FACTOR).expect("the fixture has it");
        m.insert("llama.rope.scale_linear".into(), factor);
    };
    assert_eq!(scaling(&old)?, "linear, factor 4");
    gguf::edit(&fault_model("gguf-rope-factor-without-type/model.gguf"), &path, |_, m| {
        m.insert(TYPE.into(), Metadata::String("longrope".into()));
    })?;
    assert!(refusal(&path.to_string_lossy())?.contains("`longrope`"));
    Ok(())
}

#[test]
fn the_attention_factor_of_a_gguf_file_multiplies_yarns_own() -> Any {
    equals_twin("gguf-yarn-attn-factor", "model.gguf", "twin")
}

#[test]
fn the_27b_of_gemma_3_has_its_own_query_scale_in_gguf_files() -> Any {
    equals_twin("gguf-gemma3-27b-scale", "model.gguf", "twin")
}

#[test]
fn a_gemma_3_gguf_file_without_a_window_attends_to_everything() -> Any {
    const NAME: &str = "gguf-gemma3-cap-without-window";
    let error = refusal(&fault_model(&format!("{NAME}/model.gguf")))?;
    assert!(error.contains("`gemma3.final_logit_softcapping` is 3"), "{error}");
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.gguf");
    gguf::edit(&fault_model(&format!("{NAME}/model.gguf")), &path, |_, meta| {
        meta.remove("gemma3.final_logit_softcapping");
    })?;
    let got = fault_logits(NAME, &path.to_string_lossy())?;
    let want = fault_logits(NAME, &fault_model(&format!("{NAME}/twin-without-the-cap")))?;
    let off = deviation(&got, &want)?;
    assert!(off < 1e-4, "{off:.2e} standard deviations off");
    Ok(())
}

#[test]
fn windows_of_a_gemma_3_gguf_file_follow_its_pattern_and_base() -> Any {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.gguf");
    gguf::edit(&fault_model("gguf-gemma3-27b-scale/model.gguf"), &path, |_, meta| {
        meta.insert("gemma3.attention.sliding_window_pattern".into(), Metadata::U32(2));
        meta.insert("gemma3.rope.freq_base_swa".into(), Metadata::F32(20_000.0));
    })?;
    let spec = open(&path.to_string_lossy())?.spec;
    assert_eq!(spec.full_layers(), (0..31).map(|i| 2 * i + 1).collect::<Vec<_>>());
    assert_eq!((spec.ropes[0].theta, spec.ropes[1].theta), (1_000_000.0, 20_000.0));
    Ok(())
}

#[test]
fn the_parts_of_a_split_gguf_file_are_joined() -> Any {
    for part in ["model-00001-of-00002.gguf", "model-00002-of-00002.gguf"] {
        equals_twin("gguf-split", part, "twin")?;
        let files = open(&fault_model(&format!("gguf-split/{part}")))?.files();
        assert_eq!(files.len(), 2, "{files:?}");
    }
    Ok(())
}

#[test]
fn parts_that_are_missing_or_strange_are_named() -> Any {
    let (first, second) = ("model-00001-of-00002.gguf", "model-00002-of-00002.gguf");
    let with = |names: &[(&str, &str)], given: &str, says: &[&str]| -> Any {
        let dir = tempfile::tempdir()?;
        for (from, to) in names {
            std::fs::copy(fault_model(&format!("gguf-split/{from}")), dir.path().join(to))?;
        }
        let error = refusal(&dir.path().join(given).to_string_lossy())?;
        says.iter().for_each(|word| assert!(error.contains(word), "should say {word}: {error}"));
        Ok(())
    };
    with(&[(first, first)], first, &["part 1 of 2", second, "not in the same directory"])?;
    with(&[(second, second)], second, &["part 2 of 2", first, "not in the same directory"])?;
    with(&[(first, "model.gguf")], "model.gguf", &["part 1 of 2", "-00001-of-00002.gguf"])?;
    with(&[(first, first), (first, second)], first, &[second, "split.no"])?;
    let dir = tempfile::tempdir()?;
    std::fs::copy(fault_model(&format!("gguf-split/{first}")), dir.path().join(first))?;
    let short = dir.path().join(second);
    gguf::edit(&fault_model(&format!("gguf-split/{second}")), &short, |t, _| drop(t.remove("blk.0.ffn_up.weight")))?;
    let error = refusal(&dir.path().join(first).to_string_lossy())?;
    assert!(error.contains("split.tensors.count"), "{error}");
    Ok(())
}

#[test]
fn a_tied_model_with_a_head_of_its_own_reads_it_and_says_so() -> Any {
    equals_twin("tied-config-own-head", "model", "twin")?;
    let checkpoint = open(&fault_model("tied-config-own-head/model"))?;
    assert!(!checkpoint.spec.tied);
    let warning = checkpoint.take_warnings().join("\n");
    assert!(warning.contains("`lm_head.weight`") && warning.contains("tie_word_embeddings"), "{warning}");
    Ok(())
}

type Tensors = HashMap<String, Tensor>;

fn changed(from: &Path, change: impl FnOnce(&mut Tensors)) -> Any<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    std::fs::copy(from.join("config.json"), dir.path().join("config.json"))?;
    let mut tensors = candle_core::safetensors::load(from.join("model.safetensors"), &Device::Cpu)?;
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors"))?;
    Ok(dir)
}

#[test]
fn copies_of_a_tied_matrix_and_a_head_alone_are_one_matrix() -> Any {
    let golden = Golden::open("qwen2")?;
    for keep_embedding in [true, false] {
        let dir = changed(&golden_dir("qwen2"), |t| {
            let embed = t.remove("model.embed_tokens.weight").expect("the golden has it");
            t.insert("lm_head.weight".into(), embed.clone());
            t.extend(keep_embedding.then(|| ("model.embed_tokens.weight".into(), embed)));
        })?;
        let checkpoint = open(&dir.path().to_string_lossy())?;
        assert!(checkpoint.spec.tied && checkpoint.take_warnings().is_empty());
        let model = load(&checkpoint, None, 300)?;
        let off = deviation(&last_logits(&model, &golden.ids("short")?, 300, 64)?, &golden.logits("short")?)?;
        assert!(off < 1e-4, "{off:.2e} standard deviations off");
    }
    Ok(())
}

#[test]
fn model_safetensors_goes_before_an_index_beside_it() -> Any {
    equals_twin("single-file-and-index", "model", "twin")?;
    let warning = open(&fault_model("single-file-and-index/model"))?.take_warnings().join("\n");
    assert!(warning.contains("model.safetensors is used") && warning.contains("index"), "{warning}");
    Ok(())
}

#[test]
fn a_tensor_in_two_shards_is_refused_by_name() -> Any {
    let dir = tempfile::tempdir()?;
    let from = golden_dir("llama");
    std::fs::copy(from.join("config.json"), dir.path().join("config.json"))?;
    for name in ["a.safetensors", "b.safetensors"] {
        std::fs::copy(from.join("model.safetensors"), dir.path().join(name))?;
    }
    let index = json!({ "weight_map": { "x": "a.safetensors", "y": "b.safetensors" } });
    std::fs::write(dir.path().join("model.safetensors.index.json"), index.to_string())?;
    let error = refusal(&dir.path().to_string_lossy())?;
    assert!(["b.safetensors", "a.safetensors too"].iter().all(|word| error.contains(word)), "{error}");
    Ok(())
}

#[test]
fn keys_left_to_gemma_3s_class_have_its_values() -> Any {
    let got = spec("gemma3-class-defaults/model")?;
    assert_eq!(got, spec("gemma3-class-defaults/twin")?);
    let (_, first) = got.attention().next().ok_or("no layer")?;
    assert_eq!((first.heads, first.kv_heads, first.scale), (8, 4, 1.0 / 16.0));
    Ok(())
}

#[test]
fn tensors_named_model_language_model_are_found() -> Any {
    equals_twin("gemma3-model-language-model", "model", "twin")?;
    // transformers before 4.52 put the wrapper's name first.
    let dir = changed(Path::new(&fault_model("gemma3-model-language-model/model")), |tensors| {
        let renamed = |name: &String| name.replace("model.language_model.", "language_model.model.");
        *tensors = tensors.iter().map(|(name, t)| (renamed(name), t.clone())).collect();
    })?;
    let got = fault_logits("gemma3-model-language-model", &dir.path().to_string_lossy())?;
    let want = fault_logits("gemma3-model-language-model", &fault_model("gemma3-model-language-model/twin"))?;
    assert!(deviation(&got, &want)? < 1e-6);
    Ok(())
}

#[test]
fn keys_of_gemma_3_that_change_its_mathematics_are_followed_or_refused() -> Any {
    let error = spec("gemma3-unread-keys/bidirectional").err().ok_or("was accepted")?.to_string();
    assert!(error.contains("`use_bidirectional_attention` is true"), "{error}");
    let biased = spec("gemma3-unread-keys/attention-bias")?;
    assert!(biased.attention().all(|(_, a)| a.qkv_bias && a.out_bias));
    let silu = spec("gemma3-unread-keys/silu")?;
    assert!(silu.layers.iter().all(|l| l.feed_forward.activation == bfly::spec::Activation::Silu));
    Ok(())
}

#[test]
fn the_original_length_beside_a_scaling_goes_before_the_one_in_it() -> Any {
    assert_eq!(spec("yarn-original-beside/model")?, spec("yarn-original-beside/twin")?);
    for kind in ["yarn", "llama3"] {
        let with = |beside: Option<usize>, inside: usize| -> Any<ModelSpec> {
            let dir = variant("llama", |c| {
                c["rope_parameters"] = json!({
                    "rope_type": kind, "factor": 4.0, "rope_theta": 10000.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": inside,
                });
                c["original_max_position_embeddings"] = json!(beside);
            })?;
            Ok(open(&dir.path().to_string_lossy())?.spec)
        };
        assert_eq!(with(Some(128), 256)?, with(None, 128)?, "{kind}");
    }
    Ok(())
}

#[test]
fn a_zero_mscale_counts_as_absent() -> Any {
    assert_eq!(spec("yarn-mscale-zero/model")?, spec("yarn-mscale-zero/twin")?);
    Ok(())
}

/// Loads a checkpoint held as `dtype`.
fn held_as(model: &str, dtype: Storage) -> Any<bfly::Result<Model>> {
    let format = WeightFormat::new(WeightDtype::As(dtype), 0, None);
    Ok(load_as(&open(model)?, None, 64, &format, &Device::Cpu))
}

#[test]
fn a_value_that_the_type_asked_for_cannot_hold_is_named() -> Any {
    let refused = |model: &str, dtype: Storage, says: &[&str]| -> Any {
        let error = held_as(model, dtype)?.err().ok_or(format!("{dtype:?} was accepted"))?.to_string();
        says.iter().for_each(|word| assert!(error.contains(word), "{dtype:?} should say {word}: {error}"));
        Ok(())
    };
    let model = fault_model("f16-overflow/model");
    refused(&model, Storage::F16, &["down_proj.weight", "row", "column", "too large for f16", "bf16 or f32"])?;
    held_as(&model, Storage::BF16)??;
    held_as(&model, Storage::F32)??;
    const UP: &str = "model.layers.1.mlp.up_proj.weight";
    let with = |value: f32| {
        changed(&golden_dir("llama"), |t| {
            let (rows, cols) = t[UP].dims2().expect("a matrix");
            let mut values = vec![0.01f32; rows * cols];
            values[3 * cols + 5] = value;
            t.insert(UP.into(), Tensor::from_vec(values, (rows, cols), &Device::Cpu).expect("its size"));
        })
    };
    // The scale of a block of q8_0 is a 127th of its largest value, of q4_0 an eighth, each in f16.
    let wide = with(1e7)?;
    let place = ["row 3, column 5", UP];
    refused(&wide.path().to_string_lossy(), Storage::Ggml(Ggml::Q8_0), &[&place[..], &["q8_0"]].concat())?;
    refused(&wide.path().to_string_lossy(), Storage::Ggml(Ggml::Q4_0), &[&place[..], &["q4_0"]].concat())?;
    held_as(&wide.path().to_string_lossy(), Storage::BF16)??;
    let fits = with(1e5)?;
    held_as(&fits.path().to_string_lossy(), Storage::Ggml(Ggml::Q8_0))??;
    refused(&fits.path().to_string_lossy(), Storage::F16, &place)?;
    let widest = with(f32::MAX)?;
    refused(&widest.path().to_string_lossy(), Storage::BF16, &[&place[..], &["bf16", "--dtype f32"]].concat())?;
    Ok(())
}

#[test]
fn a_bias_that_the_type_of_activations_cannot_hold_is_named() -> Any {
    const BIAS: &str = "model.layers.0.self_attn.o_proj.bias";
    let dir = changed(Path::new(&fault_model("gguf-llama-bias/twin")), |t| {
        let mut values = vec![0f32; t[BIAS].elem_count()];
        values[3] = 1e5;
        t.insert(BIAS.into(), Tensor::new(values, &Device::Cpu).expect("a vector"));
    })?;
    let checkpoint = open(&dir.path().to_string_lossy())?;
    let load = |dtype| {
        let format = WeightFormat::for_gpu(WeightDtype::As(dtype));
        load_as(&checkpoint, None, 64, &format, &Device::Cpu).map(drop)
    };
    let error = load(Storage::F16).err().ok_or("was accepted")?.to_string();
    assert!([BIAS, "row 0, column 3", "f16"].iter().all(|word| error.contains(word)), "{error}");
    load(Storage::BF16)?;
    Ok(())
}

#[test]
fn a_real_gguf_file_holds_no_key_or_tensor_that_is_not_read() -> Any {
    assert!(open(&real_model("smollm2-135m")?)?.take_warnings().is_empty());
    Ok(())
}
