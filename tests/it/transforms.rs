//! `bfly-transforms`.

use crate::common::Any;
use assert_cmd::Command;
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;

fn learn(args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("bfly-transforms").expect("is built");
    command.arg("learn").args(args);
    command
}

#[test]
fn a_learned_transform_is_written_and_is_not_overwritten_by_another() -> Any {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("run").to_string_lossy().into_owned();
    let dft = ["--transform", "dft", "--n", "8", "--out", &out];
    learn(&dft).assert().success().stdout(contains("dft of 8: rmse "));
    let read = || -> Any<serde_json::Value> {
        Ok(serde_json::from_slice(&std::fs::read(dir.path().join("run/result.json"))?)?)
    };
    let first = read()?;
    assert!(first["rmse"].as_f64().is_some_and(|e| e > 0.0 && e < 1e-4), "{first}");
    let tensors =
        candle_core::safetensors::load(dir.path().join("run/factors.safetensors"), &candle_core::Device::Cpu)?;
    // 4 N - 4 complex numbers, and where each element comes from.
    assert_eq!((tensors["butterfly.0"].dims(), tensors["permutation.0"].dims()), (&[56][..], &[8][..]));
    assert_eq!(first["parameters"], 56);

    learn(&dft).assert().success();
    assert_eq!(read()?["rmse"], first["rmse"], "the same settings find the same product");
    let refused = |args: &[&str], why: &str| {
        learn(args).args(["--out", &out]).assert().code(2).stderr(contains("--out").and(contains(why)));
    };
    refused(&["--transform", "dct", "--n", "8"], "holds dft of 8, not dct of 8");
    refused(&["--transform", "dft", "--n", "8", "--seed", "1"], "other settings");
    assert_eq!(read()?, read()?);
    let other = dir.path().to_string_lossy().into_owned();
    let taken = learn(&["--transform", "dft", "--n", "8", "--out", &other]).assert().code(2);
    taken.stderr(contains("exists and has no result.json"));
    Ok(())
}

#[test]
fn no_convergence_is_said_and_exits_with_1() -> Any {
    let dir = tempfile::tempdir()?;
    let out = dir.path().join("run").to_string_lossy().into_owned();
    let args = ["--transform", "random", "--n", "16", "--starts", "2", "--rounds", "0", "--out", &out];
    learn(&args).assert().code(1).stderr(contains("no product within 1e-4: the best, of start"));
    assert!(dir.path().join("run/factors.safetensors").exists(), "the best is kept");
    Ok(())
}

#[test]
fn bad_flags_are_refused_by_name() {
    for (args, why) in [
        (["--transform", "dft", "--n", "12", "--out", "x"], "a power of two of at least 2"),
        (["--transform", "wavelet", "--n", "8", "--out", "x"], "possible values: dft, dct, dst"),
    ] {
        learn(&args).assert().code(2).stderr(contains(why));
    }
    learn(&["--transform", "dft", "--n", "8", "--out", "x", "--product", "BX"])
        .assert()
        .code(2)
        .stderr(contains("`X`"));
    assert!(!std::path::Path::new("x").exists());
}
