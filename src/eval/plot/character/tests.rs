//! Figures of the character model, also of odd ones: every value is drawn, nothing touches, and faults are named.

use super::*;
use crate::eval::plot::scene::{Coord, Shape};
use crate::eval::plot::tests::assert_tidy;
use crate::eval::plot::theme::MARKER;
use crate::eval::plot::Figure;
use crate::eval::report::CharRecall;
use std::path::PathBuf;
use tempfile::TempDir;

/// Places of the full markers of series 0, of which the first is the legend's.
fn markers(figure: &Figure) -> Vec<Coord> {
    let place = |shape: &Shape| match shape {
        Shape::Dot { at, radius, ink: Ink::Series(0) } if *radius == MARKER => Some(*at),
        _ => None,
    };
    figure.scene.shapes.iter().filter_map(place).collect()
}

fn bands(figure: &Figure) -> usize {
    figure.scene.shapes.iter().filter(|s| matches!(s, Shape::Polygon { ink: Ink::Haze(_), .. })).count()
}

fn says(figure: &Figure, words: &str) -> bool {
    figure.scene.shapes.iter().any(|s| matches!(s, Shape::Text { text, .. } if text.contains(words)))
}

/// Writes a log of `steps` steps under `name`, evaluated every 25, whose losses are those of `bits`.
fn log(dir: &TempDir, name: &str, steps: u32, bits: impl Fn(u32) -> f64) -> PathBuf {
    let line = |step: u32| {
        let mut line = serde_json::json!({"step": step, "bits_per_character": bits(step), "learning_rate": 0.001});
        if step.is_multiple_of(25) {
            line["held_out_bits_per_character"] = (bits(step) + 0.1).into();
        }
        format!("{line}\n")
    };
    let path = dir.path().join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, (1..=steps).map(line).collect::<String>()).unwrap();
    path
}

#[test]
fn every_log_has_a_line_a_band_and_its_held_out_points() {
    let dir = tempfile::tempdir().unwrap();
    let paths = [log(&dir, "wide/log.jsonl", 100, |step| 8.0 / f64::from(step)), log(&dir, "deep.jsonl", 60, |_| 4.5)];
    let (figures, notes) = training(&[&paths[0], &paths[1]]).unwrap();
    assert_eq!((figures.len(), figures[0].name.as_str(), notes.len()), (1, "training", 0));
    let figure = &figures[0];
    assert_tidy("two logs", &figure.scene);
    assert_eq!((markers(figure).len(), bands(figure)), (4 + 1, 2), "markers with the legend's");
    assert!(says(figure, "wide") && says(figure, "deep") && says(figure, "held out"));
    assert!(says(figure, "0.1"), "a loss that falls far has a logarithmic axis");
}

#[test]
fn odd_logs_are_drawn_or_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let nan_after = |last: u32| move |step: u32| if step > last { f64::NAN } else { 3.0 };
    let long = "long name ".repeat(20);
    for (name, steps, finite, words) in [
        ("one", 1, 1, "one"),
        ("diverged", 90, 40, "diverged: 50 steps without a finite loss"),
        (long.as_str(), 30, 30, "long name"),
    ] {
        let path = log(&dir, &format!("{name}.jsonl"), steps, nan_after(finite));
        let (figures, _) = training(&[&path]).unwrap();
        assert_tidy(name, &figures[0].scene);
        assert!(says(&figures[0], words), "{name}");
    }
    for (name, steps, words) in [("never.jsonl", 3, "without a finite loss"), ("empty.jsonl", 0, "without steps")] {
        let said = training(&[&log(&dir, name, steps, nan_after(0))]).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(said.contains(&format!("{name}: is a training log {words}")), "{said}");
    }
}

fn bits() -> CharEval {
    CharEval {
        command: ["bfly-char", "eval", "--model", "runs/tiny"].map(String::from).into(),
        device: "cpu".into(),
        corpus: "0123456789abcdef".into(),
        window: 8192,
        positions: vec![[0, 1024], [1024, 2048], [2048, 4096], [4096, 8192]],
        bits_by_position: vec![vec![2.5, 2.2, 2.1, 2.0], vec![2.4, 2.3, 2.0, 1.9], vec![2.6, 2.2, 2.1, 1.9]],
        contexts: vec![4096, 1024],
        segment: 1024,
        bits_by_context: vec![vec![2.0, 2.2], vec![1.9, 2.2], vec![2.1, 2.2]],
    }
}

fn of(change: impl FnOnce(&mut CharEval)) -> Result<FiguresAndNotes> {
    let mut value = bits();
    change(&mut value);
    eval(&value, Path::new("a/eval.json"))
}

#[test]
fn bits_have_a_mark_per_octave_and_gains_one_per_longer_context() {
    let (figures, notes) = of(|_| ()).unwrap();
    assert_eq!((figures[0].name.as_str(), figures[1].name.as_str(), notes.len()), ("positions", "contexts", 0));
    for figure in &figures {
        assert_tidy(&figure.name, &figure.scene);
        assert!(says(figure, "Model tiny") && says(figure, "95% interval"));
    }
    let places = markers(&figures[0]);
    assert_eq!(places.len(), 4 + 1);
    let steps: Vec<f64> = places[1..].windows(2).map(|p| p[1].0 - p[0].0).collect();
    assert!(steps.iter().all(|s| (s - steps[0]).abs() < 1e-6), "octaves are equally wide: {steps:?}");
    // The longer context is better, so its gain over the shorter one is above the line of no gain.
    let gain = markers(&figures[1]);
    let none = figures[1].scene.shapes.iter().rev().find_map(|s| match s {
        Shape::Dot { at, ink: Ink::Muted, .. } => Some(at.1),
        _ => None,
    });
    assert!(gain.len() == 2 && none.is_some_and(|y| gain[1].1 < y - 50.0), "{gain:?} {none:?}");
    assert!(says(&figures[1], "gain over a context of 1k"));
}

#[test]
fn few_bits_are_drawn_and_odd_ones_refused_by_name() {
    let one = |e: &mut CharEval| {
        e.contexts.truncate(1);
        e.bits_by_context.iter_mut().for_each(|row| row.truncate(1));
    };
    let (figures, notes) = of(one).unwrap();
    assert_eq!((figures.len(), notes.len()), (1, 1), "a single context has no gain, which is said");
    let (figures, notes) = of(|e| e.contexts.clear()).unwrap();
    assert_eq!((figures.len(), notes.len()), (1, 0));
    let (figures, _) = of(|e| e.bits_by_position.truncate(1)).unwrap();
    assert!(!says(&figures[0], "95% interval"), "one window has no interval");
    let refused = |change: fn(&mut CharEval), words: &str| {
        let said = of(change).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(said.starts_with("a/eval.json") && said.contains(words), "{said}");
    };
    refused(|e| e.bits_by_position.clear(), "holds no bits by position");
    refused(|e| e.positions.clear(), "holds no bits by position");
    refused(|e| e.bits_by_position[1].truncate(3), "a row of 3 values in bits by position; expected 4");
    refused(|e| e.bits_by_position[0][0] = -1.0, "-1 bits per character");
    refused(|e| e.positions[1] = [1024, 1024], "positions 1024 to 1024 out of order");
    refused(|e| e.positions[2] = [3000, 4096], "positions 3000 to 4096 out of order");
    refused(|e| e.bits_by_context.clear(), "holds no bits by context");
}

#[test]
fn recall_has_a_mark_per_group_and_the_chance_level() {
    let columns = ["place", "distance", "letters_right_of_16"].map(String::from);
    let values = (0..400).map(|i| [900, 22 + 2 * i, (i * 7) % 17]).collect();
    let mut value = CharRecall { command: vec![], window: 1024, chunk: 16, columns, values };
    // Distances of 22 to 820 lie in six octaves; distances of 2 to 51 chunks have 1 to 5 set bits.
    for (what, marks) in [("many values", 6 + 5), ("one value", 2)] {
        let figures = recall(&value, Path::new("recall.json")).unwrap();
        assert_tidy(what, &figures[0].scene);
        assert_eq!(markers(&figures[0]).len(), marks + 1, "{what}, with the legend's");
        assert!(says(&figures[0], "chance"));
        value.values.truncate(1);
    }
}
