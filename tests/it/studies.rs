//! `layers` and `ablate` under exact recall.

use crate::common::*;
use assert_cmd::Command;
use bfly::eval::report::{read, Ablation, AblationAxis, LayerStudy, Score, ABLATION, LAYERS};
use bfly::retrofit::{CodeFit, RestKind, RetrofitPlan};
use std::path::Path;
use std::sync::OnceLock;

/// A base that fetches a few of the 150 tokens left of its window.
const RECALL: &str = "recall:block=8,window=16,window-align=block,recall=8";

/// Calibrations of the models of this file, each made once.
fn cache() -> &'static Path {
    static CACHE: OnceLock<tempfile::TempDir> = OnceLock::new();
    CACHE.get_or_init(|| tempfile::tempdir().unwrap()).path()
}

fn quality(model: &str, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bfly-quality-smoke"));
    command.current_dir(root()).env("XDG_CACHE_HOME", cache()).args(args).args(["--model", model, "--device", "cpu"]);
    command.args(["-q", "--tasks", "none", "--ctx", "200", "--documents", "2", "--positions", "16", "--decode", "4"]);
    command
}

fn golden(name: &str) -> String {
    golden_dir(name).to_string_lossy().into_owned()
}

fn kl(score: &Score) -> f64 {
    score.texts.iter().map(|t| t.kl).sum::<f64>() / score.texts.len() as f64
}

#[test]
fn layers_are_ranked_by_decode_steps_with_recall_and_plans_keep_some_dense() -> Any {
    let (dir, model) = (tempfile::tempdir()?, golden("qwen3"));
    let (out, plans) = (dir.path().join("layers.json"), dir.path().join("plans"));
    let (name, folder) = (out.to_string_lossy().into_owned(), plans.to_string_lossy().into_owned());
    let args = ["layers", "--rank", "alone", "--plans", &folder, "--out", &name, "--variants", RECALL];
    let shown = quality(&model, &args).assert().success();
    let shown = String::from_utf8_lossy(&shown.get_output().stdout).into_owned();
    assert!(shown.contains("every compared position is a decode step"), "{shown}");
    let study: LayerStudy = read(&out, LAYERS)?;
    assert!(study.probed.stepwise && study.stock.texts.iter().all(|t| t.kl == 0.0 && t.decode_kl == 0.0));
    let mut ranked = study.single.clone();
    ranked.sort_by(|a, b| kl(&b.score).total_cmp(&kl(&a.score)));
    assert_eq!(study.order, ranked.iter().map(|s| s.layer).collect::<Vec<_>>());
    for single in &study.single {
        let plan = single.score.record.plan.as_ref().ok_or("no plan")?;
        assert_eq!((plan.layers.as_slice(), plan.settings.recall), ([single.layer].as_slice(), 8));
        let moved = single.score.texts.iter().all(|t| t.kl > 1e-12 && t.decode_kl > 1e-12);
        assert!(moved, "layer {}: prefill, which is exact, was compared: {:?}", single.layer, single.score.texts);
    }
    assert!(kl(&study.curve[0].score) > 0.0 && study.curve[0].dense.is_empty());

    // Each plan mixes dense layers and layers with recall, and is read again.
    for point in study.curve.iter().filter(|p| p.dense.len() < study.order.len()) {
        let file = plans.join(format!("dense-{}.json", point.dense.len()));
        let plan = RetrofitPlan::load(&file)?;
        assert_eq!((plan.settings.recall, plan.layers.len()), (8, study.order.len() - point.dense.len()));
        assert!(plan.layers.iter().all(|l| !point.dense.contains(l)));
    }
    let plan = plans.join("dense-1.json").to_string_lossy().into_owned();
    let (ids, report) = (dir.path().join("ids.json"), dir.path().join("report.json"));
    std::fs::write(&ids, serde_json::to_vec(&(5..195).collect::<Vec<u32>>())?)?;
    let mut run = Command::new(env!("CARGO_BIN_EXE_bfly-retrofit"));
    run.env("XDG_CACHE_HOME", cache()).args(["--model", &model, "--plan", &plan, "--ctx", "200", "-n", "3", "-q"]);
    run.args(["--device", "cpu", "--token-ids"]).arg(&ids).arg("--json").arg(&report).assert().success();
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(report)?)?;
    assert_eq!(report["plan"], serde_json::to_value(RetrofitPlan::load(Path::new(&plan))?)?);
    let layers = study.order.len() as u64;
    let bytes = |key: &str| report["kv"][key].as_u64().unwrap_or(0);
    assert_eq!(bytes("host_bytes") * layers, bytes("dense_bytes") * (layers - 1), "one layer is dense");

    // Taken up again as it is, and not by a base that is measured in another way.
    quality(&model, &args).assert().success();
    assert_eq!(read::<LayerStudy>(&out, LAYERS)?.single, study.single);
    let other = ["layers", "--out", &name, "--variants", "retrofit:block=8,window=16"];
    let refused = quality(&model, &other).assert().code(2);
    refused.stderr(predicates::str::contains("another evaluation set"));
    Ok(())
}

#[test]
fn settings_of_recall_are_changed_one_at_a_time_and_all_are_measured() -> Any {
    // Heads of 16 channels, and a base of one bit: with 8 channels a half bit takes the same byte, and 1.25 bits take the
    // three bytes of 1.5.
    let (dir, model) = (tempfile::tempdir()?, golden("qwen3"));
    let out = dir.path().join("ablation.json");
    let name = out.to_string_lossy().into_owned();
    let base = format!("{RECALL},key-code=pair:1bit");
    let args = ["ablate", "--out", &name, "--variants", &base, "--axes", "recall,code,rest,fit,window,block"];
    let shown = quality(&model, &args).assert().success();
    let stdout = String::from_utf8_lossy(&shown.get_output().stdout).into_owned();
    assert!(stdout.contains("every compared position is a decode step") && !stdout.contains("summaries"), "{stdout}");
    let stderr = String::from_utf8_lossy(&shown.get_output().stderr).into_owned();
    assert!(stderr.contains("recall 512 is left out: its layers are dense up to 540 tokens"), "{stderr}");
    let found: Ablation = read(&out, ABLATION)?;
    assert!(found.recalls() && found.probed.stepwise && found.base_summaries_per_query.is_none());
    let of = |axis| found.changes.iter().filter(move |c| c.axis == axis);
    assert_eq!((of(AblationAxis::Code).count(), of(AblationAxis::Rest).count()), (10, 2));
    assert_eq!(of(AblationAxis::Window).map(|c| c.value.as_str()).collect::<Vec<_>>(), ["8", "128"]);
    assert_eq!(of(AblationAxis::Block).map(|c| c.value.as_str()).collect::<Vec<_>>(), ["16"]);
    for change in &found.changes {
        let what = format!("{} {}", change.axis.name(), change.value);
        assert_eq!((change.summaries_per_query, &change.same_as), (0.0, &None), "{what}");
        let score = change.score.as_ref().ok_or("not measured")?;
        assert_ne!(score.texts, found.base.texts, "{what}: measured, but nothing moved");
        let settings = &score.record.plan.as_ref().ok_or("no plan")?.settings;
        assert_eq!(settings.recall, 8, "{what}");
        match change.axis {
            AblationAxis::Code => assert_eq!(settings.key_code, change.value),
            AblationAxis::Rest => assert_ne!(settings.rest, RestKind::Codes),
            AblationAxis::Fit => assert_eq!(settings.code_fit, CodeFit::Calibration),
            _ => {}
        }
    }
    let wide = of(AblationAxis::Window).next_back().and_then(|c| c.score.as_ref()).ok_or("no window of 128")?;
    assert!(kl(wide) < kl(&found.base), "a window of 128 reads more exactly than one of 16");
    Ok(())
}

#[test]
fn numbers_of_sinks_are_each_calibrated_for() -> Any {
    let (dir, model) = (tempfile::tempdir()?, variant("llama", |config| config["num_hidden_layers"] = 1.into())?);
    let model = model.path().to_string_lossy().into_owned();
    let (out, patch) = (dir.path().join("sinks.json"), dir.path().join("patch").to_string_lossy().into_owned());
    let name = out.to_string_lossy().into_owned();
    let sinks = ["ablate", "--axes", "sinks", "--out", &name, "--variants", RECALL];
    quality(&model, &sinks).assert().success();
    let found: Ablation = read(&out, ABLATION)?;
    assert_eq!(found.changes.iter().map(|c| c.value.as_str()).collect::<Vec<_>>(), ["0", "1", "16", "64"]);
    assert!(found.changes.iter().all(|c| c.score.is_some()));

    // A patch brings a calibration for one number.
    let mut calibrate = Command::new(env!("CARGO_BIN_EXE_bfly-retrofit"));
    calibrate.args(["calibrate", "--model", &model, "--out", &patch, "--device", "cpu", "-q"]).assert().success();
    let refused = quality(&patch, &sinks).assert().code(2);
    refused.stderr(predicates::str::contains("--axes: `sinks` needs a calibration for each number of sinks"));
    Ok(())
}

#[test]
fn axes_and_contexts_without_effect_are_refused_by_name() {
    let model = golden("qwen2");
    let refused = |args: &[&str], says: &[&str]| {
        let out = quality(&model, args).assert().code(2);
        let stderr = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
        assert_eq!(stderr.lines().filter(|l| l.starts_with("error:")).count(), 1, "{stderr}");
        says.iter().for_each(|word| assert!(stderr.contains(word), "{args:?} should say `{word}`: {stderr}"));
    };
    for axis in ["partner", "pool", "bias", "count"] {
        let words = format!("--axes: `{axis}` is a setting of block summaries");
        refused(&["ablate", "--variants", RECALL, "--axes", axis], &[&words, "recall, code, rest, fit, window"]);
    }
    for axis in ["recall", "code", "rest", "fit"] {
        let words = format!("--axes: `{axis}` is a setting of exact recall");
        refused(&["ablate", "--axes", &format!("window,{axis}")], &[&words, "--variants recall", "partner, window"]);
    }
    for command in ["layers", "ablate"] {
        let all = "recall:block=8,window=16,window-align=block,recall=172";
        refused(&[command, "--variants", all], &["--ctx: 200", "cover up to 200", "every layer is dense"]);
        refused(&[command, "--variants", "recall,retrofit"], &["--variants", "give exactly one retrofit"]);
    }
}
