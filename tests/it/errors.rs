//! Bad input: exit code 2, one line on stderr that names what and where, nothing half-written.

use crate::common::*;
use assert_cmd::Command;
use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Device, Tensor};
use std::collections::HashMap;
use std::path::Path;

fn bfly(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bfly-retrofit"));
    command.args(args);
    command
}

/// Runs, and checks the code, the single line, the absence of a panic, and what the line says.
fn refused(args: &[&str], says: &[&str]) {
    let out = bfly(args).output().expect("the binary runs");
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(2), "{args:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{args:?}: {stderr}");
    assert!(out.stdout.is_empty(), "{args:?} wrote to stdout");
    let lines: Vec<_> = stderr.lines().filter(|l| l.starts_with("error:")).collect();
    assert_eq!(lines.len(), 1, "{args:?}: {stderr}");
    for word in says {
        assert!(stderr.contains(word), "{args:?} should say `{word}`: {stderr}");
    }
}

struct Setting {
    dir: tempfile::TempDir,
    ids: String,
    model: String,
}

/// A place to write, a prompt of ten ids, and a model that works.
fn setting() -> Any<Setting> {
    let dir = tempfile::tempdir()?;
    let ids = dir.path().join("ids.json");
    std::fs::write(&ids, "[5,6,7,8,9,10,11,12,13,14]")?;
    let model = golden_dir("llama").to_string_lossy().into_owned();
    Ok(Setting { ids: ids.to_string_lossy().into_owned(), dir, model })
}

impl Setting {
    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    /// Refuses the working model with more flags.
    fn flags(&self, flags: &[&str], says: &[&str]) {
        let base = ["--model", &self.model, "--token-ids", &self.ids, "-n", "2"];
        refused(&[&base[..], flags].concat(), says);
    }

    /// Refuses another model.
    fn model(&self, model: &Path, says: &[&str]) {
        refused(&["--model", &model.to_string_lossy(), "--token-ids", &self.ids, "-n", "2", "--ctx", "64"], says);
    }
}

type Tensors = HashMap<String, Tensor>;

/// A copy of the llama golden with changed tensors.
fn broken(change: impl FnOnce(&mut Tensors)) -> Any<tempfile::TempDir> {
    let dir = variant("llama", |_| ())?;
    let file = dir.path().join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu)?;
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, &file)?;
    Ok(dir)
}

const DOWN: &str = "model.layers.1.mlp.down_proj.weight";

#[test]
fn broken_tensors_are_named() -> Any {
    let s = setting()?;
    let zeros = |shape: (usize, usize), dtype| Tensor::zeros(shape, dtype, &Device::Cpu);
    let gone = broken(|t| drop(t.remove(DOWN)))?;
    s.model(gone.path(), &[DOWN, "missing"]);
    let renamed = broken(|t| {
        let w = t.remove(DOWN);
        t.extend(w.map(|w| (format!("module.{DOWN}"), w)));
    })?;
    s.model(renamed.path(), &[DOWN, "the file has `module."]);
    let small = zeros((3, 5), DType::F32)?;
    s.model(broken(|t| drop(t.insert(DOWN.into(), small)))?.path(), &[DOWN, "[3, 5]", "[64, 160]"]);
    for bad in [f32::NAN, f32::INFINITY] {
        let mut values = vec![0.5; 64 * 160];
        values[2 * 160 + 7] = bad;
        let w = Tensor::from_vec(values, (64, 160), &Device::Cpu)?;
        s.model(broken(|t| drop(t.insert(DOWN.into(), w)))?.path(), &[DOWN, "row 2, column 7"]);
    }
    let whole = zeros((64, 160), DType::I64)?;
    s.model(broken(|t| drop(t.insert(DOWN.into(), whole)))?.path(), &[DOWN, "I64"]);
    Ok(())
}

#[test]
fn truncated_and_hostile_safetensors_are_refused() -> Any {
    let s = setting()?;
    let original = std::fs::read(golden_dir("llama").join("model.safetensors"))?;
    let with = |bytes: &[u8]| -> Any<tempfile::TempDir> {
        let dir = variant("llama", |_| ())?;
        std::fs::write(dir.path().join("model.safetensors"), bytes)?;
        Ok(dir)
    };
    s.model(with(&original[..original.len() - 1000])?.path(), &["model.safetensors", "truncated"]);
    s.model(with(&original[..40])?.path(), &["model.safetensors", "not a safetensors file"]);
    s.model(with(&[])?.path(), &["model.safetensors"]);
    let mut absurd = original.clone();
    absurd[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    s.model(with(&absurd)?.path(), &["model.safetensors", "not a safetensors file"]);
    let header = br#"{"a":{"dtype":"F32","shape":[9999999999,9999999999],"data_offsets":[0,8]}}"#;
    let mut lying = (header.len() as u64).to_le_bytes().to_vec();
    lying.extend_from_slice(header);
    lying.extend_from_slice(&[0; 8]);
    s.model(with(&lying)?.path(), &["model.safetensors"]);
    Ok(())
}

#[test]
fn broken_gguf_files_are_refused() -> Any {
    let s = setting()?;
    let path = s.dir.path().join("model.gguf");
    gguf::write("llama", "llama", &path, |_, _| ())?;
    let original = std::fs::read(&path)?;
    let with = |bytes: &[u8], says: &[&str]| -> Any {
        std::fs::write(&path, bytes)?;
        s.model(&path, says);
        Ok(())
    };
    with(&original[..original.len() - 1000], &["model.gguf", "truncated"])?;
    with(&original[..100], &["model.gguf", "not a readable GGUF file"])?;
    with(b"not a model", &["model.gguf", "not a readable GGUF file"])?;
    // Counts of tensors and of metadata, then the length of the first key.
    for at in [8, 16, 24] {
        let mut absurd = original.clone();
        absurd[at..at + 8].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
        with(&absurd, &["model.gguf", "not a readable GGUF file"])?;
    }
    gguf::write("llama", "llama", &path, |_, meta| drop(meta.insert("general.alignment".into(), Value::U32(0))))?;
    s.model(&path, &["general.alignment"]);
    gguf::write("llama", "llama", &path, |t, _| drop(t.remove("blk.2.ffn_up.weight")))?;
    s.model(&path, &["blk.2.ffn_up.weight", "missing"]);
    gguf::write("llama", "mamba", &path, |_, _| ())?;
    s.model(&path, &["`mamba` is not supported", "qwen2", "gemma3"]);
    // Every tensor's type is four bytes somewhere behind its name: put IQ4_XS (23) there.
    let mut odd = original.clone();
    let name = b"blk.0.attn_k.weight";
    let at = odd.windows(name.len()).position(|w| w == name).ok_or("no name")? + name.len() + 4 + 16;
    odd[at..at + 4].copy_from_slice(&23u32.to_le_bytes());
    with(&odd, &["IQ4_XS", "not supported", "Q4_K"])
}

#[test]
fn hostile_bytes_never_panic() -> Any {
    // Every early byte of a header flipped, one at a time: an error or a run, but no panic and no runaway allocation.
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.gguf");
    gguf::write("llama", "llama", &path, |_, _| ())?;
    let original = std::fs::read(&path)?;
    for at in (0..original.len().min(4000)).step_by(3) {
        let mut bytes = original.clone();
        bytes[at] ^= 0xff;
        std::fs::write(&path, &bytes)?;
        let loaded = open(&path.to_string_lossy()).and_then(|c| load(&c, None, 16).map(drop));
        drop(loaded);
    }
    let dir = variant("llama", |_| ())?;
    let path = dir.path().join("model.safetensors");
    let original = std::fs::read(&path)?;
    for at in (0..original.len().min(6000)).step_by(3) {
        let mut bytes = original.clone();
        bytes[at] ^= 0xff;
        std::fs::write(&path, &bytes)?;
        drop(open(&dir.path().to_string_lossy()).and_then(|c| load(&c, None, 16).map(drop)));
    }
    Ok(())
}

#[test]
fn bad_configurations_are_refused() -> Any {
    let s = setting()?;
    let with = |change: fn(&mut serde_json::Value), says: &[&str]| -> Any {
        s.model(variant("llama", change)?.path(), says);
        Ok(())
    };
    with(|c| c["model_type"] = "mamba".into(), &["config.json", "`mamba` is not supported", "qwen2, qwen3, llama"])?;
    with(|c| c["hidden_size"] = 0.into(), &["config.json", "hidden_size"])?;
    with(|c| c["num_hidden_layers"] = 9_999_999.into(), &["num_hidden_layers", "9999999"])?;
    with(|c| c["num_attention_heads"] = 7.into(), &["7 query heads are not a multiple of 4 KV heads"])?;
    with(|c| c["vocab_size"] = "many".into(), &["vocab_size", "\"many\""])?;
    with(|c| c["rope_parameters"]["rope_type"] = "su".into(), &["rope scaling `su`", "yarn"])?;
    with(|c| c["hidden_act"] = "relu".into(), &["activation `relu`"])?;
    with(|c| *c = serde_json::json!([1]), &["config.json", "not a JSON object"])?;
    let hybrid = |change: fn(&mut serde_json::Value), says: &[&str]| -> Any {
        s.model(variant("qwen3_5", change)?.path(), says);
        Ok(())
    };
    hybrid(|c| c["layer_types"][2] = "full_attention".into(), &["model.layers.2.self_attn", "missing"])?;
    hybrid(|c| c["layer_types"][3] = "linear_attention".into(), &["model.layers.3.linear_attn", "missing"])?;
    hybrid(|c| c["layer_types"] = serde_json::json!(["mamba"]), &["`layer_types` must list 8 layers"])?;
    hybrid(|c| c["linear_num_value_heads"] = 6.into(), &["6", "4"])?;
    hybrid(
        |c| c["quantization"] = serde_json::json!({"bits": 4, "group_size": 64, "mode": "nvfp4"}),
        &["`nvfp4`", "affine"],
    )?;
    hybrid(
        |c| c["quantization"] = serde_json::json!({"bits": 7, "group_size": 64}),
        &["`bits` is 7", "2, 3, 4, 5, 6, 8"],
    )?;
    // The whole model's configuration around the text's: its placeholders for images are no text.
    let whole = |c: &mut serde_json::Value| {
        let mut text = c.take();
        text["model_type"] = "qwen3_5_text".into();
        *c = serde_json::json!({"model_type": "qwen3_5", "text_config": text, "vision_config": {}, "image_token_id": 7,
            "tie_word_embeddings": true});
    };
    hybrid(whole, &["--token-ids", "7", "`image_token_id`", "only text"])?;
    let dir = tempfile::tempdir()?;
    s.model(dir.path(), &["config.json"]);
    s.model(&dir.path().join("absent"), &["absent"]);
    Ok(())
}

#[test]
fn contexts_that_do_not_fit_are_refused() -> Any {
    let s = setting()?;
    s.flags(&["--ctx", "0"], &["--ctx", "0 is not a context length"]);
    s.flags(&["--ctx", "many"], &["--ctx", "not a number of tokens"]);
    s.flags(&["--ctx", "17M"], &["--ctx", "16M"]);
    s.flags(&["--ctx", "-5"], &["-5"]);
    s.flags(&["--ctx", "11"], &["--ctx 12 or more"]);
    Ok(())
}

#[test]
fn unknown_and_contradicting_options_are_refused() -> Any {
    let s = setting()?;
    s.flags(&["--partner", "nearest"], &["nearest", "causal_shift", "xor", "benes"]);
    s.flags(&["--layers", "0,9"], &["layer 9 is out of range", "0-3"]);
    s.flags(&["--layers", "x"], &["--layers", "0-3,5"]);
    s.flags(&["--stock", "--partner", "xor"], &["--stock", "--partner"]);
    s.flags(&["--stock", "--window", "256"], &["--stock", "--window"]);
    s.flags(&["--far-position", "clamp"], &["--far-position", "--pool pre-rope"]);
    s.flags(&["--window", "500", "--recall", "0"], &["--window", "384 or 512"]);
    s.flags(&["--window", "100", "--rest", "means"], &["--window", "less than a block", "--rest means"]);
    s.flags(&["--window", "0", "--window-align", "token"], &["--window"]);
    s.flags(&["--window", "18446744073709551104"], &["--window"]);
    s.flags(&["--sink-tokens", "1000000000000"], &["--sink-tokens"]);
    s.flags(&["--block", "0"], &["--block"]);
    s.flags(&["--partner-count", "0"], &["--partner-count"]);
    s.flags(&["--partner", "all"], &["--partner", "--recall 0"]);
    s.flags(&["--stock", "--recall", "9"], &["--stock", "--recall"]);
    s.flags(&["--key-code", "pear"], &["--key-code", "pair, qpq, scalar2, page, exact"]);
    s.flags(&["--key-code", "pair:5bit"], &["--key-code", "1.5bit, 2bit, 1.25bit, 1bit, 1/2bit"]);
    s.flags(&["--rest", "all"], &["--rest", "codes, means, none"]);
    s.flags(&["--shift-unit", "0"], &["--shift-unit"]);
    s.flags(&["--summary-bias", "nan"], &["--summary-bias"]);
    s.flags(&["--temperature", "-1"], &["--temperature"]);
    s.flags(&["--top-p", "1.5"], &["--top-p"]);
    s.flags(&["--top-k", "0"], &["--top-k"]);
    s.flags(&["--dtype", "q3"], &["--dtype", "q8_0", "native"]);
    s.flags(&["--device", "tpu"], &["--device", "tpu"]);
    #[cfg(not(feature = "cuda"))]
    s.flags(&["--device", "cuda:0"], &["--device", "no CUDA support"]);
    s.flags(&["--device", "cpu", "--memory-budget", "10G"], &["--memory-budget", "counts GPU memory"]);
    s.flags(&["--memory-budget", "ten"], &["--memory-budget", "is not a size"]);
    s.flags(&["--threads", "0"], &["--threads"]);
    s.flags(&["--logits-out", &s.path("l.safetensors"), "--logits-last", "11"], &["--logits-last", "11"]);
    s.flags(&["--logits-last", "2"], &["--logits-out"]);
    let gemma = golden_dir("gemma3");
    let base = ["--token-ids", &s.ids, "-n", "2", "--layers", "0"];
    refused(&[&base[..], &["--model", &gemma.to_string_lossy()]].concat(), &["layer 0 is a sliding-window layer", "5"]);
    Ok(())
}

#[test]
fn bad_prompts_are_refused() -> Any {
    let s = setting()?;
    let model = real_model("smollm2-135m")?;
    let with = |flags: &[&str], says: &[&str]| refused(&[&["--model", &model, "-n", "1"], flags].concat(), says);
    let file = s.path("prompt.txt");
    std::fs::write(&file, b"caf\xe9")?;
    with(&["--prompt-file", &file], &["prompt.txt", "not UTF-8", "byte 3"]);
    std::fs::write(&file, "")?;
    with(&["--prompt-file", &file], &["prompt.txt", "empty"]);
    with(&["--prompt", ""], &["empty"]);
    with(&["--prompt-file", &s.path("absent.txt")], &["absent.txt"]);
    with(&[], &["--prompt"]);
    with(&["--prompt", "x", "--token-ids", &s.ids], &["--prompt", "--token-ids"]);
    with(&["--prompt", "x", "--system", "y"], &["--chat"]);
    // A model without a tokenizer: text is refused, ids are not.
    refused(&["--model", &s.model, "--prompt", "hello"], &["tokenizer.json is missing", "--token-ids"]);
    for (content, says) in
        [("[]", "empty"), ("{}", "JSON array"), ("[5, -1]", "JSON array"), ("[5, 999]", "vocabulary of 384")]
    {
        std::fs::write(&s.ids, content)?;
        s.flags(&[], &[says]);
    }
    Ok(())
}

#[test]
fn unwritable_outputs_are_refused_before_any_work() -> Any {
    let s = setting()?;
    s.flags(&["--json", &s.path("no/such/dir/out.json")], &["--json", "cannot be written"]);
    s.flags(&["--logits-out", &s.path("no/such/dir/l.safetensors")], &["--logits-out", "cannot be written"]);
    let taken = s.path("taken");
    std::fs::create_dir(&taken)?;
    s.flags(&["--save", &taken], &["--save", "has no bfly.json"]);
    s.flags(&["--json", &taken], &["--json", "is a directory"]);
    assert_eq!(std::fs::read_dir(s.dir.path())?.count(), 2, "only the ids and the taken directory are left");
    Ok(())
}

#[test]
fn a_refused_run_leaves_no_partial_file() -> Any {
    let s = setting()?;
    s.flags(&["--json", &s.path("out.json"), "--ctx", "11"], &["--ctx"]);
    assert_eq!(std::fs::read_dir(s.dir.path())?.count(), 1, "only the ids are left");
    Ok(())
}

#[test]
fn patches_that_no_longer_fit_are_refused() -> Any {
    let s = setting()?;
    let base = variant("llama", |_| ())?;
    let (model, patch) = (base.path().to_string_lossy().into_owned(), s.path("patch"));
    let run = ["--token-ids", &s.ids, "-n", "2", "--quiet"];
    bfly(&[&run[..], &["--model", &model, "--save", &patch]].concat()).assert().success();
    bfly(&[&run[..], &["--model", &patch]].concat()).assert().success();
    let plan = |text: &str| -> Any<String> {
        let path = s.path("plan.json");
        std::fs::write(&path, text)?;
        Ok(path)
    };
    let saved: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(s.dir.path().join("patch/bfly.json"))?)?;
    let mut other = saved["plan"].clone();
    other["model_layers"] = 30.into();
    s.flags(&["--plan", &plan(&other.to_string())?], &["30 layers", "4"]);
    other["schema_version"] = 9.into();
    s.flags(&["--plan", &plan(&other.to_string())?], &["plan.json", "version 9"]);
    s.flags(&["--plan", &plan("{")?], &["plan.json"]);
    // The base's weights change.
    let file = base.path().join("model.safetensors");
    let mut bytes = std::fs::read(&file)?;
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&file, bytes)?;
    refused(&[&run[..], &["--model", &patch]].concat(), &["has changed since the patch was saved"]);
    base.close()?;
    refused(&[&run[..], &["--model", &patch]].concat(), &["no such file"]);
    Ok(())
}
