//! `bfly-transforms`.

use crate::common::Any;
use assert_cmd::Command;
use candle_core::{Device, Tensor};
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::HashMap;
use std::path::Path;

fn run(subcommand: &str, args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("bfly-transforms").expect("is built");
    command.arg(subcommand).args(args);
    command
}

fn learn(args: &[&str]) -> Command {
    run("learn", args)
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// `N` rows of the DFT on the unitary scale, times `scale`: real parts, then imaginary.
fn dft(n: usize, scale: f32) -> [Vec<f32>; 2] {
    let turn = |at: usize| -2.0 * std::f32::consts::PI * ((at / n) * (at % n) % n) as f32 / n as f32;
    let part = |of: fn(f32) -> f32| (0..n * n).map(|at| scale * of(turn(at)) / (n as f32).sqrt()).collect();
    [part(f32::cos), part(f32::sin)]
}

fn write_tensors(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<f32>)]) -> Any {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| t.3.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&bytes).map(|(t, b)| Ok((t.0, TensorView::new(t.1, t.2.clone(), b)?)));
    Ok(std::fs::write(path, safetensors::serialize(views.collect::<Any<Vec<_>>>()?, None)?)?)
}

/// The f32 numbers of `output`.
fn read_output(path: &Path) -> Any<Vec<f32>> {
    let bytes = std::fs::read(path)?;
    let tensors = SafeTensors::deserialize(&bytes)?;
    let numbers = tensors.tensor("output")?.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    Ok(numbers)
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

#[test]
fn vectors_of_a_file_are_multiplied_by_what_was_learned() -> Any {
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    let (n, run_dir) = (8, text(&at("run")));
    learn(&["--transform", "dft", "--n", "8", "--out", &run_dir]).assert().success();
    let [re, im] = dft(n, 1.0);
    // Unit vectors: the products are the columns, and the DFT is symmetric. Times i, so that inputs are complex.
    let units: Vec<f32> = (0..n * n).flat_map(|at| [0.0, f32::from(at / n == at % n)]).collect();
    write_tensors(&at("x.safetensors"), &[("x", Dtype::C64, vec![n, n], units)])?;
    let (input, out) = (text(&at("x.safetensors")), text(&at("y.safetensors")));
    let factors = text(&at("run/factors.safetensors"));
    for factors in [&run_dir, &factors] {
        let apply = ["--factors", factors, "--input", &input, "--out", &out];
        run("apply", &apply).assert().success().stdout(contains("8 vectors of 8, complex"));
        let got = read_output(&at("y.safetensors"))?;
        for (at, z) in got.chunks_exact(2).enumerate() {
            assert!((z[0] + im[at]).abs() < 1e-3 && (z[1] - re[at]).abs() < 1e-3, "{at}: {z:?}");
        }
    }
    // A real vector of NumPy, f64.
    let x: Vec<f64> = (0..n).map(|i| i as f64).collect();
    Tensor::from_vec(x, n, &Device::Cpu)?.write_npy(at("x.npy"))?;
    let (npy, out) = (text(&at("x.npy")), text(&at("z.npy")));
    run("apply", &["--factors", &run_dir, "--input", &npy, "--out", &out]).assert().success();
    let bytes = std::fs::read(at("z.npy"))?;
    assert!(String::from_utf8_lossy(&bytes[..128]).contains("<c16"), "f64 in, complex of f64 out");
    let got: Vec<f64> = bytes[bytes.len() - 16 * n..].as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
    let first: f64 = (0..n).map(|i| i as f64).sum::<f64>() / (n as f64).sqrt();
    assert!((got[0] - first).abs() < 1e-2 && got[1].abs() < 1e-2, "{got:?}");
    Ok(())
}

#[test]
fn inputs_that_do_not_fit_are_refused() -> Any {
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    let hadamard = text(&at("hadamard"));
    learn(&["--transform", "hadamard", "--n", "8", "--out", &hadamard]).assert().success();
    write_tensors(&at("short.safetensors"), &[("x", Dtype::F32, vec![1, 4], vec![1.0; 4])])?;
    write_tensors(&at("complex.safetensors"), &[("x", Dtype::C64, vec![8], vec![1.0; 16])])?;
    let mut bad = vec![1.0; 16];
    bad[11] = f32::NAN;
    write_tensors(&at("nan.safetensors"), &[("x", Dtype::F32, vec![2, 8], bad)])?;
    let two = ["a", "b"].map(|name| (name, Dtype::F32, vec![8], vec![1.0; 8]));
    write_tensors(&at("two.safetensors"), &two)?;
    std::fs::write(at("x.csv"), "1,2")?;
    let out = text(&at("y.safetensors"));
    let refused = |input: &str, more: &[&str], why: &str| {
        let input = text(&at(input));
        let apply = ["--factors", &hadamard, "--input", &input, "--out", &out];
        run("apply", &apply).args(more).assert().code(2).stderr(contains("--input").and(contains(why)));
    };
    refused("short.safetensors", &[], "has the shape [1, 4]; hadamard of 8 takes [8] or [batch, 8]");
    refused("complex.safetensors", &[], "is complex, and hadamard is real");
    refused("nan.safetensors", &[], "element [1, 3] of `x` is NaN");
    refused("two.safetensors", &[], "has `a`, `b`; name one with --tensor");
    refused("two.safetensors", &["--tensor", "c"], "has no tensor `c`; it has `a`, `b`");
    refused("x.csv", &[], "is no .npy, .npz or .safetensors file");
    assert!(!at("y.safetensors").exists());
    // A factor file that lost a tensor.
    let all = candle_core::safetensors::load(at("hadamard/factors.safetensors"), &Device::Cpu)?;
    let some: HashMap<_, _> = all.into_iter().filter(|(name, _)| name != "permutation.0").collect();
    std::fs::create_dir(at("damaged"))?;
    candle_core::safetensors::save(&some, at("damaged/factors.safetensors"))?;
    let damaged = text(&at("damaged"));
    let input = text(&at("two.safetensors"));
    let apply = ["--factors", &damaged, "--input", &input, "--tensor", "a", "--out", &out];
    run("apply", &apply).assert().code(2).stderr(contains("there is no result.json beside it"));
    // Without metadata, as earlier runs have written, the result.json beside it says what the tensors are.
    std::fs::copy(at("hadamard/result.json"), at("damaged/result.json"))?;
    run("apply", &apply).assert().code(2).stderr(contains("has no tensor `permutation.0`"));
    Ok(())
}

#[test]
fn a_matrix_and_pairs_of_a_file_are_learned() -> Any {
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    let n = 8;
    let [re, im] = dft(n, 20.0);
    let both: Vec<f32> = re.iter().zip(&im).flat_map(|(a, b)| [*a, *b]).collect();
    write_tensors(&at("matrix.safetensors"), &[("m", Dtype::C64, vec![n, n], both.clone())])?;
    let units: Vec<f32> = (0..n * n).map(|at| f32::from(at / n == at % n)).collect();
    let pairs = [("input", Dtype::F32, vec![n, n], units.clone()), ("output", Dtype::C64, vec![n, n], both.clone())];
    write_tensors(&at("pairs.safetensors"), &pairs)?;
    write_tensors(&at("x.safetensors"), &[("x", Dtype::F32, vec![n, n], units)])?;
    let (input, out) = (text(&at("x.safetensors")), text(&at("y.safetensors")));
    for (file, count) in [("matrix.safetensors", None), ("pairs.safetensors", Some(n))] {
        let (target, run_dir) = (text(&at(file)), text(&at(file).with_extension("run")));
        learn(&["--target", &target, "--product", "BP", "--out", &run_dir]).assert().success();
        let result: serde_json::Value =
            serde_json::from_slice(&std::fs::read(Path::new(&run_dir).join("result.json"))?)?;
        let about = &result["target"];
        assert_eq!((about["file"].as_str(), about["pairs"].as_u64()), (Some(file), count.map(|c| c as u64)));
        assert!(about["sha256"].as_str().is_some_and(|h| h.len() == 64), "{about}");
        run("apply", &["--factors", &run_dir, "--input", &input, "--out", &out]).assert().success();
        for (got, want) in read_output(&at("y.safetensors"))?.iter().zip(&both) {
            assert!((got - want).abs() < 2e-2, "{file}: {got} {want}, of entries of 7");
        }
    }
    Ok(())
}

#[test]
fn targets_that_cannot_be_learned_are_refused() -> Any {
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name);
    let real =
        |name: &'static str, shape: &[usize]| (name, Dtype::F32, shape.to_vec(), vec![1.0; shape.iter().product()]);
    let mut nan = real("m", &[4, 4]);
    nan.3[6] = f32::NAN;
    for (tensors, why) in [
        (vec![real("m", &[4, 8])], "is no square matrix: 4 rows, 8 columns"),
        (vec![real("m", &[6, 6])], "a size of 6, which is no power of two"),
        (vec![real("m", &[16])], "a matrix is [N, N]"),
        (vec![nan], "element [1, 2] of `m` is NaN"),
        (vec![real("input", &[0, 8]), real("output", &[0, 8])], "has no pair"),
        (vec![real("input", &[2, 8]), real("output", &[3, 8])], "both are [pairs, N] alike"),
        (vec![("m", Dtype::F32, vec![2, 2], vec![0.0; 4])], "nothing but zeros"),
    ] {
        write_tensors(&at("t.safetensors"), &tensors)?;
        let (target, out) = (text(&at("t.safetensors")), text(&at("run")));
        let refused = learn(&["--target", &target, "--out", &out]).assert().code(2);
        refused.stderr(contains("--target").and(contains(why)));
    }
    assert!(!at("run").exists());
    learn(&["--transform", "dft", "--out", "x"]).assert().code(2).stderr(contains("--n"));
    Ok(())
}

#[cfg(feature = "eval")]
#[test]
fn every_method_is_timed_in_every_round() -> Any {
    let dir = tempfile::tempdir()?;
    let json = text(&dir.path().join("speed.json"));
    let bench = ["--n", "64", "--rounds", "3", "--json", &json];
    let table = run("bench", &bench).assert().success().stdout(contains("random factors"));
    let table = String::from_utf8(table.get_output().stdout.clone())?;
    let report: serde_json::Value = serde_json::from_slice(&std::fs::read(&json)?)?;
    assert_eq!((report["kind"].as_str(), report["threads"].as_u64()), (Some("bfly-transform-speed"), Some(1)));
    let timings = report["timings"].as_array().ok_or("no timings")?;
    let methods = |case: &str| -> Vec<&str> {
        timings.iter().filter(|t| t["case"] == case).filter_map(|t| t["method"].as_str()).collect()
    };
    let dense = ["dense f32 by rows", "dense f32 by columns"];
    assert_eq!(methods("Hadamard"), [&["plan"][..], &dense].concat());
    assert_eq!(methods("DFT of real input"), [&["plan"][..], &dense, &["realfft"]].concat());
    assert_eq!(methods("DFT").len(), 7);
    for timing in timings {
        let samples: Vec<f64> =
            timing["samples_s"].as_array().into_iter().flatten().filter_map(|s| s.as_f64()).collect();
        assert!(samples.len() == 3 && samples.iter().all(|s| *s > 0.0), "{timing}");
    }
    assert_eq!(table.lines().count(), 1 + 8 + 1, "{table}");
    run("bench", &["--n", "64..48"]).assert().code(2).stderr(contains("sizes are powers of two"));
    Ok(())
}

#[test]
fn a_sweep_keeps_what_is_there_and_goes_on() -> Any {
    let dir = tempfile::tempdir()?;
    let (out, few) = (text(dir.path()), ["--transforms", "hadamard,dft", "--n", "4..8", "--seeds", "2", "--quiet"]);
    let sweep = |more: &[&str]| run("sweep", &few).args(["--device", "cpu", "--out", &out]).args(more).assert();
    sweep(&[]).success().stdout(contains("2 of 2").count(4).and(contains("8 runs in")));
    let read =
        |file: &str| -> Any<serde_json::Value> { Ok(serde_json::from_slice(&std::fs::read(dir.path().join(file))?)?) };
    let first = read("sweep.json")?;
    assert_eq!((&first["kind"], first["runs"].as_array().map_or(0, Vec::len)), (&"bfly-transforms-sweep".into(), 8));
    let own = read("dft-8-1/result.json")?;
    assert!(first["runs"].as_array().is_some_and(|runs| runs.iter().any(|r| r["rmse"] == own["rmse"])), "{own}");

    // A run that is gone is learned again, the others are those of before.
    std::fs::remove_dir_all(dir.path().join("dft-8-1"))?;
    sweep(&[]).success();
    let again = read("sweep.json")?;
    for (a, b) in again["runs"].as_array().into_iter().flatten().zip(first["runs"].as_array().into_iter().flatten()) {
        assert_eq!(a["rmse"], b["rmse"], "the same settings find the same product");
        assert!(a["seconds"] == b["seconds"] || (a["transform"] == "dft" && a["seed"] == 1), "{a}");
    }
    sweep(&["--set", "starts=3"]).code(2).stderr(contains("was learned with other settings"));
    sweep(&["--set", "sterts=3"]).code(2).stderr(contains("--set sterts=3").and(contains("unknown field")));
    sweep(&["--set", "starts"]).code(2).stderr(contains("is not NAME=VALUE"));
    Ok(())
}

#[test]
fn an_unfinished_run_of_something_else_is_refused() -> Any {
    let dir = tempfile::tempdir()?;
    let out = text(&dir.path().join("run"));
    std::fs::write(dir.path().join("run.unfinished"), b"none of ours")?;
    let dft = ["--transform", "dft", "--n", "8", "--device", "cpu", "--out", &out];
    learn(&dft).assert().code(2).stderr(contains("run.unfinished").and(contains("remove it to begin anew")));
    assert!(dir.path().join("run.unfinished").exists() && !dir.path().join("run").exists());
    std::fs::remove_file(dir.path().join("run.unfinished"))?;
    learn(&dft).assert().success();
    Ok(())
}
