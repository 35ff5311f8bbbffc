//! Variants that share one prefill of a sample's context, and how recall reads the question after it.

use crate::common::*;
use assert_cmd::Command;
use bfly::eval::report::{read, Answers, Cell, Smoke, ANSWERS, SMOKE};
use candle_core::{Device, Tensor};
use predicates::prelude::PredicateBooleanExt;
use std::collections::BTreeMap;
use std::path::Path;

const RECALL: &str = "recall:block=16,window=32,recall=16";

fn quality(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bfly-quality-smoke"));
    command.current_dir(root()).args(args).args(["--device", "cpu", "-q"]);
    command
}

/// Answers of `variants` to two tasks, unseen questions.
fn ask(model: &Path, out: &Path, variants: &[&str], more: &[&str]) -> Any<Answers> {
    let (model, name, variants) = (model.to_string_lossy(), out.to_string_lossy(), variants.join(","));
    let args = [
        "ruler",
        "--model",
        &model,
        "--ctx",
        "3k",
        "--allow-extrapolation",
        "--tasks",
        "niah_single_1,recall_turns",
        "--question-unseen",
    ];
    let args = [&args[..], &["--prefill-chunk", "512", "--out", &name, "--variants", &variants], more].concat();
    let cache = model.to_string() + "/cache";
    quality(&args).env("XDG_CACHE_HOME", cache).assert().success();
    Ok(read(out, ANSWERS)?)
}

/// The one-layer model with other weights, under which answers depend on what attention reads: as it is stored, it
/// repeats one letter under every variant.
fn attentive_model() -> Any<tempfile::TempDir> {
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(fault("model/config.json"))?)?;
    config["tie_word_embeddings"] = false.into();
    let dir = tiny_model(&[("config.json", config.to_string().as_bytes())])?;
    let file = dir.path().join("model.safetensors");
    let mut tensors: BTreeMap<_, _> = candle_core::safetensors::load(&file, &Device::Cpu)?.into_iter().collect();
    tensors.insert("lm_head.weight".into(), tensors["model.embed_tokens.weight"].clone());
    let mut count = 0u32;
    for (name, tensor) in &mut tensors {
        if tensor.rank() == 2 {
            let gain = if name.contains("self_attn") { 2.0 } else { 1.0 };
            let numbers = (count..).take(tensor.elem_count()).map(|i| (f64::from(i) * 12.9898).sin() * 43758.5453);
            let numbers: Vec<f32> = numbers.map(|x| ((x - x.floor() - 0.5) * gain) as f32).collect();
            count += numbers.len() as u32;
            *tensor = Tensor::from_vec(numbers, tensor.shape().clone(), &Device::Cpu)?;
        }
    }
    candle_core::safetensors::save(&tensors.into_iter().collect(), file)?;
    Ok(dir)
}

fn cells<'a>(answers: &'a Answers, variant: &str) -> Vec<&'a Cell> {
    answers.cells.iter().filter(|c| c.record.variant == variant).collect()
}

#[test]
fn variants_that_share_a_context_answer_as_each_by_itself() -> Any {
    let (dir, model) = (tempfile::tempdir()?, attentive_model()?);
    let (model, exact) = (model.path(), format!("{RECALL},question=exact"));
    let out = |name: &str| dir.path().join(format!("{name}.json"));
    let all = [RECALL, "stock", &exact, "retrofit:block=16,window=32", "keydiff:budget=256,block=16"];
    let together = ask(model, &out("together"), &all, &["--samples", "3", "--jobs", "2"])?;
    let order: Vec<&str> = together.cells.iter().map(|c| c.record.variant.as_str()).collect();
    assert_eq!(order, [all, all].concat(), "cells are in the order of --variants");
    for (i, variant) in all.iter().enumerate() {
        let alone = ask(model, &out(&format!("alone-{i}")), &[variant], &["--samples", "3"])?;
        assert_eq!(alone.cells.len(), 2);
        for (one, other) in cells(&alone, variant).iter().zip(cells(&together, variant)) {
            assert_eq!((one.answers.len(), &one.task, &one.record), (3, &other.task, &other.record));
            assert_eq!(one.answers, other.answers, "{variant}, {}", one.task);
        }
    }
    let texts = |variant: &str| -> Vec<&str> {
        cells(&together, variant).iter().flat_map(|c| &c.answers).map(|a| a.answer.as_str()).collect()
    };
    assert!(texts(RECALL) != texts("stock") && texts(RECALL) != texts(&exact), "the variants differ at all");

    // One sample first, stock ahead of the others, then the rest.
    let resumed = out("resumed");
    ask(model, &resumed, &["stock"], &["--samples", "2"])?;
    ask(model, &resumed, &all[..3], &["--samples", "1"])?;
    let resumed = ask(model, &resumed, &all, &["--samples", "3"])?;
    assert_eq!(resumed.cells.len(), together.cells.len());
    for variant in all {
        for (one, other) in cells(&resumed, variant).iter().zip(cells(&together, variant)) {
            assert_eq!((&one.record, &one.answers), (&other.record, &other.answers), "{variant}, {}", one.task);
        }
    }
    Ok(())
}

#[test]
fn an_exact_question_needs_one_that_is_read_after_its_context() -> Any {
    let model = tiny_model(&[])?;
    let model = model.path().to_string_lossy().into_owned();
    let refused = |args: &[&str], says: &str| {
        let variant = format!("{RECALL},question=exact");
        let args = [args, &["--model", &model, "--ctx", "2k", "--variants", &variant]].concat();
        let refused = quality(&args).assert().code(2);
        refused.stderr(predicates::str::contains("question=exact: `question`").and(predicates::str::contains(says)));
    };
    refused(&["ruler"], "makes no difference without --question-unseen");
    refused(&["needle"], "makes no difference without --question-unseen");
    refused(&[], "is a setting of ruler, fidelity and needle alone");
    refused(&["positions"], "is a setting of ruler, fidelity and needle alone");
    Ok(())
}

#[test]
fn divergence_over_answers_is_rounding_for_dense_attention_and_grows_as_less_is_fetched() -> Any {
    let (dir, model) = (tempfile::tempdir()?, attentive_model()?);
    let (out, model) = (dir.path().join("fidelity.json.gz"), model.path().to_string_lossy().into_owned());
    let everything = "recall:block=16,window=32,recall=3000";
    let variants =
        ["stock", everything, RECALL, "recall:block=16,window=32,recall=1,rest=none", "retrofit:block=16,window=32"];
    let args = ["fidelity", "--model", &model, "--ctx", "3k", "--allow-extrapolation", "--prefill-chunk", "512"];
    let more = ["--tasks", "niah_single_1,recall_turns", "--samples", "2", "--jobs", "2", "--variants"];
    let all = variants.join(",");
    let command = || {
        let mut command = quality(&args);
        command.args(more).arg(&all).env("XDG_CACHE_HOME", model.clone() + "/cache");
        command
    };
    let shown = command().args(["--out", &out.to_string_lossy()]).assert().success();
    let shown = String::from_utf8_lossy(&shown.get_output().stdout).into_owned();
    assert!(shown.contains("stock's answers to niah_single_1, recall_turns after the context"), "{shown}");
    let file: Smoke = read(&out, SMOKE)?;
    let means: Vec<f64> = file
        .runs
        .iter()
        .map(|run| {
            let names: Vec<&str> = run.documents.iter().map(|d| d.document.as_str()).collect();
            assert_eq!(names, ["niah_single_1/0", "niah_single_1/1", "recall_turns/0", "recall_turns/1"]);
            assert!(run.documents.iter().all(|d| d.greedy_equal == (d.top1 == 1.0)));
            run.documents.iter().map(|d| d.kl).sum::<f64>() / 4.0
        })
        .collect();
    assert_eq!(file.runs.iter().map(|r| r.record.variant.as_str()).collect::<Vec<_>>(), variants);
    assert!(means[0] < 1e-8 && means[1] < 1e-8, "dense attention in other orders: {means:?}");
    assert!(means[2] > 1e-6 && means[3] > means[2] && means[4] > means[2], "{means:?}");
    command().args(["--fail-above", "kl=1e-9"]).assert().code(1);
    Ok(())
}
