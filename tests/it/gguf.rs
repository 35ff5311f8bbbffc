//! Other forms of a golden checkpoint give its logits: GGUF (names, metadata, interleaved heads) and shards.

use crate::common::*;
use bfly::checkpoint::{Checkpoint, OpenOptions};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::Device;

#[test]
fn a_gguf_copy_of_a_golden_gives_its_logits() -> Any {
    for (name, arch) in [("llama", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("llama_linear", "llama")] {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("model.gguf");
        gguf::write(name, arch, &path, |_, _| ())?;
        let golden = Golden::open(name)?;
        let model = load(&open(&path.to_string_lossy())?, None, 300)?;
        let off = deviation(&last_logits(&model, &golden.ids("short")?, 300, 64)?, &golden.logits("short")?)?;
        assert!(off < 1e-4, "{name}: {off:.2e} standard deviations off");
    }
    Ok(())
}

/// Written by the converters of llama.cpp and MLX from the golden (`scripts/convert_forms.py`): value heads tiled, the decay's
/// rate as it is, norms with 1 added, a convolution of another shape, a nested configuration.
#[test]
fn other_converters_forms_of_a_hybrid_give_its_logits() -> Any {
    let golden = Golden::open("qwen3_5_heads")?;
    for form in ["qwen3_5_heads.gguf", "qwen3_5_heads-mlx"] {
        let checkpoint = open(&root().join("tests/fixtures/forms").join(form).to_string_lossy())?;
        for (case, last, limit) in [("short", 64, 1e-4), ("long", 8, 1e-3)] {
            let ids = golden.ids(case)?;
            let off =
                deviation(&last_logits(&load(&checkpoint, None, ids.len())?, &ids, 512, last)?, &golden.logits(case)?)?;
            assert!(off < limit, "{form}, {case}: {off:.2e} standard deviations off");
        }
    }
    Ok(())
}

/// In 4 bits, groups of 32, as mlx-lm writes and runs it on a CPU (integrations/mlx/parity.py).
#[test]
fn a_checkpoint_that_mlx_quantised_gives_its_logits() -> Any {
    let dir = root().join("tests/fixtures/forms/qwen3_5_heads-mlx4");
    let theirs = candle_core::safetensors::load(dir.join("logits.safetensors"), &Device::Cpu)?;
    let ids: Vec<u32> = theirs["ids"].to_dtype(candle_core::DType::U32)?.to_vec1()?;
    let checkpoint = open(&dir.to_string_lossy())?;
    let model = load(&checkpoint, None, ids.len())?;
    for chunk in [ids.len(), 7] {
        let off = deviation(&last_logits(&model, &ids, chunk, ids.len())?, &theirs["logits"])?;
        assert!(off < 1e-4, "in chunks of {chunk}: {off:.2e} standard deviations off");
    }
    Ok(())
}

#[test]
fn a_sharded_copy_of_a_golden_gives_its_logits() -> Any {
    let dir = variant("qwen3", |_| ())?;
    let single = dir.path().join("model.safetensors");
    let tensors = candle_core::safetensors::load(&single, &candle_core::Device::Cpu)?;
    std::fs::remove_file(&single)?;
    let mut shards = [std::collections::HashMap::new(), std::collections::HashMap::new()];
    let mut map = serde_json::Map::new();
    for (i, (name, tensor)) in tensors.into_iter().enumerate() {
        map.insert(name.clone(), format!("model-0000{}-of-00002.safetensors", i % 2 + 1).into());
        shards[i % 2].insert(name, tensor);
    }
    for (i, shard) in shards.iter().enumerate() {
        candle_core::safetensors::save(shard, dir.path().join(format!("model-0000{}-of-00002.safetensors", i + 1)))?;
    }
    let index = serde_json::json!({ "weight_map": map }).to_string();
    std::fs::write(dir.path().join("model.safetensors.index.json"), index)?;
    let golden = Golden::open("qwen3")?;
    let model = load(&open(&dir.path().to_string_lossy())?, None, 300)?;
    let off = deviation(&last_logits(&model, &golden.ids("short")?, 300, 64)?, &golden.logits("short")?)?;
    assert!(off < 1e-4, "{off:.2e} standard deviations off");
    Ok(())
}

/// GGUF files of tied models may store the one matrix twice, the embedding's copy the coarser.
#[test]
fn tied_embeddings_stored_twice_are_read_from_the_output_matrix() -> Any {
    let (dir, golden) = (tempfile::tempdir()?, Golden::open("qwen2")?);
    let path = dir.path().join("model.gguf");
    gguf::write("qwen2", "qwen2", &path, |tensors, _| {
        let embed = tensors.remove("token_embd.weight").expect("the golden has an embedding");
        let coarse = embed.dequantize(&Device::Cpu).and_then(|t| QTensor::quantize(&t, GgmlDType::Q4_0));
        tensors.insert("token_embd.weight".into(), coarse.expect("rows hold whole blocks"));
        tensors.insert("output.weight".into(), embed);
    })?;
    let off = |tie: bool| -> Any<f32> {
        let mut checkpoint = open(&path.to_string_lossy())?;
        if tie {
            checkpoint.tie_embeddings()?;
        }
        assert_eq!(checkpoint.spec.tied, tie);
        let model = load(&checkpoint, None, 300)?;
        deviation(&last_logits(&model, &golden.ids("short")?, 300, 64)?, &golden.logits("short")?)
    };
    let options = OpenOptions { tie_embeddings: true, ..OpenOptions::default() };
    let opened = Checkpoint::open(&path.to_string_lossy(), &options, &|_, _, _| ())?;
    assert!(opened.spec.tied, "--tie-embeddings was not heard");
    assert!(off(true)? < 1e-4, "the coarse copy was read");
    assert!(off(false)? > 1e-3, "the coarse copy makes no difference: the test shows nothing");
    Ok(())
}

#[test]
fn a_model_that_is_not_tied_is_not_tied_by_force() -> Any {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.gguf");
    gguf::write("qwen3", "qwen3", &path, |_, _| ())?;
    let error = open(&path.to_string_lossy())?.tie_embeddings().unwrap_err().to_string();
    assert!(error.contains("--tie-embeddings") && error.contains("not tied"), "{error}");
    Ok(())
}
