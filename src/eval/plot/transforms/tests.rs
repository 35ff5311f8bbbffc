//! Figures of sweeps: every run is drawn, devices have their own panels, and faults are named.

use super::*;
use crate::eval::plot::kinds::draw;
use crate::eval::plot::scene::Shape;
use crate::eval::plot::tests::assert_tidy;
use crate::eval::plot::theme::{Ink, MARKER, SAMPLE};
use crate::eval::plot::Figure;
use serde_json::{json, Value};
use std::path::PathBuf;
use tempfile::TempDir;

fn run(transform: &str, n: usize, seed: u64, device: &str, rmse: f64) -> Value {
    json!({
        "transform": transform, "n": n, "seed": seed, "device": device, "rmse": rmse, "parameters": 56,
        "seconds": n as f64 * 0.03 * (seed + 1) as f64, "threads": 2, "start": 0, "rounds": 0,
        "converged": rmse < 1e-4, "settings": {"tolerance": 1e-4},
    })
}

/// Runs of `transforms` at sizes 8 and 16, whose three seeds are found at 8 only.
fn runs(transforms: &[&str], device: &str) -> Vec<Value> {
    let places = transforms.iter().flat_map(|t| [8, 16].map(|n| (t, n)));
    let seeds = |(t, n): (&&str, usize)| [0, 1, 2].map(|s| run(t, n, s, device, if n == 8 { 1e-5 } else { 0.02 }));
    places.flat_map(seeds).collect()
}

fn sweep(dir: &TempDir, name: &str, runs: &[Value]) -> PathBuf {
    let path = dir.path().join(format!("{name}.json"));
    let machine = json!({"device": format!("machine {name}"), "driver": null, "compute_capability": null,
        "memory_bytes": 1});
    let sweep = json!({"kind": SWEEP, "schema_version": 1, "git_sha": "0", "command": [], "machine": machine,
        "runs": runs});
    std::fs::write(&path, sweep.to_string()).unwrap();
    path
}

/// Draws sweeps together, and checks how their figures are named.
fn drawn(sweeps: &[(&str, Vec<Value>)]) -> Result<Vec<Figure>> {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = sweeps.iter().map(|(name, runs)| sweep(&dir, name, runs)).collect();
    let mut drawings = draw(&paths, None)?;
    assert_eq!(drawings.len(), 1, "all in the same figures");
    assert_eq!(drawings[0].stem, if sweeps.len() > 1 { "sweeps" } else { sweeps[0].0 });
    Ok(drawings.remove(0).figures)
}

/// Number of dots of an ink and a radius.
fn dots(figure: &Figure, ink: Ink, radius: f64) -> usize {
    let same = |s: &&Shape| matches!(s, Shape::Dot { radius: r, ink: i, .. } if *r == radius && *i == ink);
    figure.scene.shapes.iter().filter(same).count()
}

fn polygons(figure: &Figure, ink: Ink) -> usize {
    figure.scene.shapes.iter().filter(|s| matches!(s, Shape::Polygon { ink: i, .. } if *i == ink)).count()
}

/// Texts of a figure, which may be broken into lines, in one.
fn text(figure: &Figure) -> String {
    let text = |s: &Shape| if let Shape::Text { text, .. } = s { Some(text.clone()) } else { None };
    figure.scene.shapes.iter().filter_map(text).collect::<Vec<_>>().join(" ")
}

#[test]
fn every_seed_and_median_is_drawn_beside_the_authors_errors() {
    let names: Vec<&str> = Transform::ALL.iter().map(|t| t.name()).collect();
    let figures = drawn(&[("sweep", runs(&names, "cpu"))]).unwrap();
    assert_eq!(figures.iter().map(|f| f.name.as_str()).collect::<Vec<_>>(), ["rmse", "seconds"]);
    for figure in &figures {
        assert_tidy(&figure.name, &figure.scene);
        let text = text(figure);
        assert!(text.contains("cpu: machine sweep, 2 CPU threads, 3 seeds"), "{text}");
    }
    let (rmse, seconds) = (&figures[0], &figures[1]);
    assert_eq!(dots(rmse, Ink::Series(0), SAMPLE), 8 * 2 * 3);
    assert_eq!(dots(rmse, Ink::Series(0), MARKER), 8 * 2 + 1, "medians and the legend");
    assert_eq!(polygons(rmse, Ink::Series(1)), 8 * 8 + 1, "the authors' errors and the legend");
    let said = text(rmse);
    let order: Vec<usize> = names.iter().map(|name| said.find(&format!("{name}: RMSE")).unwrap()).collect();
    assert!(order.is_sorted(), "{order:?}");
    for words in ["tolerance, 1e-4", "learning_transforms/rmse.pkl", "8 16 32 64 128 256 512 1024 N"] {
        assert!(said.contains(words), "lacks `{words}`: {said}");
    }
    // Those of size 16 are hollow: a small marker on a large one. That of the first transform is round.
    assert_eq!(dots(seconds, Ink::Paper, MARKER * 0.55), 1 + 1, "the first transform and the legend");
    assert_eq!(polygons(seconds, Ink::Paper), 7, "the other transforms");
    assert_eq!(dots(seconds, Ink::Series(0), MARKER), 2 + 1);
    assert!(text(seconds).contains("no seed within the tolerance"));
}

#[test]
fn a_median_is_that_of_its_seeds_and_the_devices_share_axes() {
    let of = |device: &str, errors: [f64; 3]| -> Vec<Value> {
        (0..).zip(errors).map(|(seed, rmse)| run("dct", 32, seed, device, rmse)).collect()
    };
    let (cpu, cuda) = (of("cpu", [1e-5, 4e-5, 1e-2]), of("cuda", [3e-5; 3]));
    let figures = drawn(&[("b", cuda), ("a", cpu)]).unwrap();
    figures.iter().for_each(|f| assert_tidy(&f.name, &f.scene));
    let (rmse, seconds) = (&figures[0], &figures[1]);
    let places = |radius: f64| -> Vec<f64> {
        let place = |s: &Shape| match s {
            Shape::Dot { at, radius: r, ink: Ink::Series(0) } if *r == radius => Some(at.1),
            _ => None,
        };
        rmse.scene.shapes.iter().filter_map(place).collect()
    };
    assert_eq!(places(MARKER)[1], places(SAMPLE)[1], "the median of three seeds is the second");
    assert_eq!(dots(rmse, Ink::Series(2), SAMPLE), 3, "the second device has its own series");
    let said = text(seconds);
    assert!(said.contains("Seconds of a seed on cpu") && said.contains("Seconds of a seed on cuda"), "{said}");
    assert!(said.contains("cpu: machine a") && said.contains("cuda: machine b"), "{said}");
    assert!(!said.contains("hollow"), "a seed of each is within the tolerance: {said}");
}

#[test]
fn odd_sweeps_are_drawn_or_refused_by_name() {
    let change = |key: &str, value: Value| {
        let mut run = run("dft", 8, 0, "cpu", 1e-5);
        run[key] = value;
        vec![run]
    };
    let many = [2, 4, 1 << 11, 1 << 40].map(|n| run("a transform of a remarkably long name", n, 0, "cuda:7", 3e-13));
    for (what, runs) in [
        ("an exact transform", change("rmse", 0.0.into())),
        ("no settings", change("settings", json!(null))),
        ("sizes that the authors have not", many.into()),
    ] {
        drawn(&[("odd", runs)]).unwrap().iter().for_each(|f| assert_tidy(what, &f.scene));
    }
    let refused = |sweeps: &[(&str, Vec<Value>)], words: &str| {
        let said = drawn(sweeps).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(said.contains(words), "{said}");
    };
    refused(&[("empty", vec![])], "empty.json: holds no runs");
    refused(&[("odd", change("n", 12.into()))], "odd.json: dft of size 12 with seed 0 on cpu is not of a power of two");
    refused(&[("odd", change("n", 0.into()))], "size 0");
    refused(&[("odd", change("rmse", (-1.0).into()))], "has an error of -1");
    refused(&[("odd", change("seconds", 0.0.into()))], "took 0 seconds");
    let one = change("seed", 0.into());
    refused(&[("a", one.clone()), ("b", one)], "holds dft of size 8 with seed 0 on cpu, which");
}

#[test]
fn the_authors_errors_are_of_every_transform() {
    let names: Vec<&str> = rmse::AUTHORS.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, Transform::ALL.map(Transform::name));
}
