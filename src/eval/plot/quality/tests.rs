//! Figures of quality measurements, also of odd ones: nothing touches, and what cannot be drawn is one clear error.

use super::*;
use crate::eval::plot::scene::Shape;
use crate::eval::plot::tests::assert_tidy;
use crate::eval::plot::Figure;
use crate::eval::report::{
    read, Ablation, Answers, Cell, Header, LayerStudy, LossByPosition, PositionRun, Smoke, SmokeRun, ABLATION, ANSWERS,
    LAYERS, POSITIONS, SMOKE,
};
use crate::retrofit::RetrofitPlan;
use serde::de::DeserializeOwned;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Figures of the fixture `stem`, changed.
fn of<T: DeserializeOwned>(
    (stem, kind): (&str, &str),
    draw: fn(&T, &Path) -> crate::Result<Vec<Figure>>,
    change: impl FnOnce(&mut T),
) -> crate::Result<Vec<Figure>> {
    let path = PathBuf::from(format!("tests/fixtures/quality/{stem}.json"));
    let mut value: T = read(&path, kind)?;
    change(&mut value);
    draw(&value, &path)
}

fn smoke_of(change: impl FnOnce(&mut Smoke)) -> crate::Result<Vec<Figure>> {
    of(("smoke", SMOKE), smoke, change)
}

fn ruler_of(change: impl FnOnce(&mut Answers)) -> crate::Result<Vec<Figure>> {
    of(("ruler", ANSWERS), answers, change)
}

fn needle_of(change: impl FnOnce(&mut Answers)) -> crate::Result<Vec<Figure>> {
    of(("needle", ANSWERS), answers, change)
}

fn layers_of(change: impl FnOnce(&mut LayerStudy)) -> crate::Result<Vec<Figure>> {
    of(("layers", LAYERS), layers, change)
}

fn ablation_of(change: impl FnOnce(&mut Ablation)) -> crate::Result<Vec<Figure>> {
    of(("ablate", ABLATION), ablation, change)
}

fn positions_of(change: impl FnOnce(&mut LossByPosition)) -> crate::Result<Vec<Figure>> {
    of(("positions", POSITIONS), positions, change)
}

/// `retrofit:window=...`, each longer than the one before.
fn long(i: usize) -> String {
    format!("retrofit:window={},partner=bit_reversal,layers={}", 128 * (i + 1), "0-3,".repeat(3 * i))
}

fn stretch(header: &mut Header) {
    header.name = "Some-Organisation/A-Model-With-A-Remarkably-Long-Name-0.5B-Instruct".repeat(3);
    header.machine.device = "A device whose driver is proud of it, revision 17".into();
    header.random_weights = Some(1);
}

fn names(figures: crate::Result<Vec<Figure>>) -> Vec<String> {
    figures.unwrap().into_iter().map(|f| f.name).collect()
}

/// Twelve variants of the first run, with what `set` does to each.
fn twelve<T: Clone>(first: &T, set: impl Fn(usize, &mut T)) -> Vec<T> {
    let one = |i| {
        let mut run = first.clone();
        set(i, &mut run);
        run
    };
    (0..12).map(one).collect()
}

#[test]
fn a_plans_folder_is_left_out() {
    for (given, want) in [
        ("retrofit:plan=some/where/dense-4.json,window=1k", "retrofit:plan=dense-4.json,window=1k"),
        ("retrofit:sink-tokens=8,plan=dense-4.json", "retrofit:sink-tokens=8,plan=dense-4.json"),
        ("retrofit:kv=1/4,block=32", "retrofit:kv=1/4,block=32"),
    ] {
        assert_eq!(needle::short(given, 0), want);
    }
}

#[test]
fn folders_of_plans_are_named_where_files_are_alike() {
    let (rounds, heads) = ("retrofit:plan=plans/rounds/dense-4.json", "retrofit:plan=plans/heads/dense-4.json");
    for (given, want) in [
        (vec!["stock", rounds], "retrofit:plan=dense-4.json"),
        (vec![rounds, heads], "retrofit:plan=rounds/dense-4.json"),
        (vec![rounds, "retrofit:plan=old/rounds/dense-4.json"], rounds),
    ] {
        let at = given.iter().position(|v| *v == rounds).unwrap();
        let folders = needle::folders(&given);
        assert_eq!(needle::short(given[at], folders), want);
    }
}

#[test]
fn what_was_read_beyond_the_trained_length_says_so() {
    let says = |figures: crate::Result<Vec<Figure>>| {
        let shapes = figures.unwrap().into_iter().flat_map(|f| f.scene.shapes);
        shapes.filter(|s| matches!(s, Shape::Text { text, .. } if text.contains("extrapolated"))).count()
    };
    for trained in [1usize, 1 << 20] {
        let beyond = usize::from(trained == 1);
        assert_eq!(says(ablation_of(|a| a.header.trained_positions = trained)), beyond);
        assert_eq!(says(layers_of(|l| l.header.trained_positions = trained)), 2 * beyond);
    }
}

#[test]
fn every_kind_has_its_figures() {
    assert_eq!(names(smoke_of(|_| ())), ["smoke"]);
    assert_eq!(names(ruler_of(|_| ())), ["tasks", "bytes"]);
    assert_eq!(names(needle_of(|_| ())), ["needle"]);
    assert_eq!(names(layers_of(|_| ())), ["layers", "curve"]);
    assert_eq!(names(ablation_of(|_| ())), ["ablation"]);
    assert_eq!(names(positions_of(|_| ())), ["positions"]);
}

#[test]
fn no_text_of_a_smoke_test_or_of_positions_overlaps_another() {
    let all = [
        ("as measured", smoke_of(|_| ())),
        ("one text", smoke_of(|s| s.runs.iter_mut().for_each(|r| r.documents.truncate(1)))),
        ("one context", smoke_of(|s| s.runs.truncate(1))),
        ("all beyond the trained length", smoke_of(|s| s.header.trained_positions = 0)),
        ("no difference", {
            smoke_of(|s| {
                let same = s.runs.iter_mut().flat_map(|r| &mut r.documents);
                same.for_each(|d| (d.kl, d.top1, d.overlap, d.loss) = (0.0, 1.0, 50.0, d.stock_loss));
            })
        }),
        ("nothing in common", {
            smoke_of(|s| {
                s.runs.iter_mut().flat_map(|r| &mut r.documents).for_each(|d| (d.top1, d.overlap) = (0.0, 0.0))
            })
        }),
        ("numbers that nothing measures", {
            smoke_of(|s| {
                let mut sign = 1.0;
                for document in s.runs.iter_mut().flat_map(|r| &mut r.documents) {
                    (document.kl, document.loss, sign) = (1e307, sign * 1.7e308, -sign);
                }
            })
        }),
        ("many variants, long names, odd contexts", {
            smoke_of(|s| {
                stretch(&mut s.header);
                let many = twelve(&s.runs[0], |i, r| r.record.variant = long(i));
                let far: Vec<SmokeRun> = many.iter().cloned().map(|r| SmokeRun { ctx: r.ctx + 7777, ..r }).collect();
                s.runs = [many, far].concat();
            })
        }),
        ("positions", positions_of(|_| ())),
        ("one document", positions_of(|p| p.runs.iter_mut().for_each(|r| r.documents.truncate(1)))),
        ("one bucket", {
            positions_of(|p| {
                (p.ctx, p.bucket) = (p.bucket, p.bucket);
                p.runs.iter_mut().flat_map(|r| &mut r.documents).for_each(|d| d.losses.truncate(1));
            })
        }),
        ("many buckets, odd numbers", {
            positions_of(|p| {
                (p.ctx, p.bucket, p.header.trained_positions) = (999_999, 500, 777);
                p.runs.iter_mut().flat_map(|r| &mut r.documents).for_each(|d| d.losses = vec![1e9; 2000]);
            })
        }),
        ("many long variants", {
            positions_of(|p| {
                stretch(&mut p.header);
                p.runs = twelve(&p.runs[0], |i, r: &mut PositionRun| r.record.variant = long(i));
            })
        }),
    ];
    tidy(all);
}

#[test]
fn no_text_of_answers_overlaps_another() {
    let grid = |lengths: usize, depths: usize, variants: usize| {
        needle_of(move |a| {
            let one = a.cells[0].clone();
            let answer = one.answers[0].clone();
            a.cells.clear();
            for (v, l) in (0..variants).flat_map(|v| (0..lengths).map(move |l| (v, l))) {
                let mut cell = Cell { length: 1000 * (l + 1), ..one.clone() };
                cell.record.variant = long(v);
                let at = |d: usize| d as f64 / (depths - 1).max(1) as f64;
                // Some cells are missing.
                let run = (0..depths).filter(|d| (d + l + v) % 7 != 6);
                cell.answers =
                    run.map(|d| crate::eval::report::Answer { depth: Some(at(d)), ..answer.clone() }).collect();
                a.cells.push(cell);
            }
        })
    };
    let all = [
        ("as measured", ruler_of(|_| ())),
        ("one sample", ruler_of(|a| a.cells.iter_mut().for_each(|c| c.answers.truncate(1)))),
        ("one cell", ruler_of(|a| a.cells.truncate(1))),
        ("a cell that was not run", ruler_of(|a| drop(a.cells.remove(1)))),
        ("bytes that make no sense", ruler_of(|a| a.cells.iter_mut().for_each(|c| c.record.kv.dense_bytes = 0))),
        ("many lengths, long names", {
            ruler_of(|a| {
                stretch(&mut a.header);
                let one = a.cells.clone();
                let far = |k: usize| one.iter().cloned().map(move |c| Cell { length: 1000 * k + c.length, ..c });
                a.cells = (0..7).flat_map(far).collect();
                a.cells.iter_mut().for_each(|c| c.task = format!("a task whose name is rather long: {}", c.task));
            })
        }),
        ("many variants", {
            ruler_of(|a| {
                let task = a.cells[0].task.clone();
                let one: Vec<Cell> = a.cells.iter().filter(|c| c.task == task).cloned().collect();
                a.cells = twelve(&one[0], |i, c| c.record.variant = long(i));
            })
        }),
        ("a needle", needle_of(|_| ())),
        ("a needle beyond the trained length", needle_of(|a| a.header.trained_positions = a.cells[0].length)),
        ("one of everything", grid(1, 1, 1)),
        ("the usual grid", grid(8, 11, 6)),
        ("a fine grid", grid(30, 101, 2)),
        ("many maps", grid(3, 5, 20)),
        ("layers chosen in two ways", ruler_of(two_ways)),
        ("questions of a file", ruler_of(with_questions)),
    ];
    assert_eq!(all[12].1.as_ref().map(Vec::len).unwrap(), 3, "9 to a figure");
    tidy(all);
}

#[test]
fn no_text_of_layers_or_ablations_overlaps_another() {
    let all = [
        ("as measured", layers_of(|_| ())),
        ("no questions", {
            layers_of(|l| {
                let scores = l.single.iter_mut().map(|s| &mut s.score).chain(l.curve.iter_mut().map(|k| &mut k.score));
                scores.chain([&mut l.stock]).for_each(|s| s.answers.clear());
            })
        }),
        ("one text", {
            layers_of(|l| {
                let scores = l.single.iter_mut().map(|s| &mut s.score).chain(l.curve.iter_mut().map(|k| &mut k.score));
                scores.chain([&mut l.stock]).for_each(|s| (s.texts.truncate(1), s.answers.truncate(1)).0);
            })
        }),
        ("no curve", layers_of(|l| l.curve.clear())),
        ("no single layers", layers_of(|l| l.single.clear())),
        ("one of each", layers_of(|l| (l.single.truncate(1), l.curve.truncate(1)).0)),
        ("many layers, long names", {
            layers_of(|l| {
                stretch(&mut l.header);
                let one = l.single[0].clone();
                l.single = (0..126).map(|layer| crate::eval::report::LayerScore { layer, ..one.clone() }).collect();
                l.order = (0..126).collect();
                let one = l.curve[0].clone();
                let kept = |k| crate::eval::report::CurvePoint { dense: (0..k).collect(), ..one.clone() };
                l.curve = (0..126).map(kept).collect();
            })
        }),
        ("an ablation", ablation_of(|_| ())),
        ("one change", ablation_of(|a| a.changes.truncate(1))),
        ("one text", {
            ablation_of(|a| {
                let scores = a.changes.iter_mut().filter_map(|c| c.score.as_mut()).chain([&mut a.base]);
                scores.for_each(|s| (s.texts.truncate(1), s.answers.truncate(1)).0);
            })
        }),
        ("no questions", {
            ablation_of(|a| {
                a.changes
                    .iter_mut()
                    .filter_map(|c| c.score.as_mut())
                    .chain([&mut a.base])
                    .for_each(|s| s.answers.clear());
            })
        }),
        ("long names, and changes that were not measured", {
            ablation_of(|a| {
                stretch(&mut a.header);
                a.base.record.variant = long(40);
                let last = a.changes.len() - 1;
                for (i, change) in a.changes.iter_mut().enumerate() {
                    change.value = long(i);
                    change.summaries_per_query = 12345.678;
                    if i < last && i % 2 == 0 {
                        (change.same_as, change.score) = (Some(long(i)), None);
                    }
                }
            })
        }),
    ];
    tidy(all);
}

fn tidy<const N: usize>(all: [(&str, crate::Result<Vec<Figure>>); N]) {
    for (what, figures) in all {
        let figures = figures.unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(!figures.is_empty(), "{what}");
        for figure in figures {
            assert_tidy(&format!("{what}, {}", figure.name), &figure.scene);
        }
    }
}

/// The cells of the first task once more, as a task that asks questions of a file.
fn with_questions(answers: &mut Answers) {
    let task = answers.cells[0].task.clone();
    let more: Vec<Cell> = answers.cells.iter().filter(|c| c.task == task).cloned().collect();
    answers.cells.extend(more.into_iter().map(|c| Cell { task: "qa_1".into(), ..c }));
}

#[test]
fn the_mean_with_questions_stands_beside_the_one_without() {
    let texts = |figures: crate::Result<Vec<Figure>>| -> Vec<String> {
        let tasks = figures.unwrap().into_iter().find(|f| f.name == "tasks").unwrap();
        let text = |s| if let Shape::Text { text, .. } = s { Some(text) } else { None };
        tasks.scene.shapes.into_iter().filter_map(text).filter(|t| t.starts_with("mean")).collect()
    };
    let plain = texts(ruler_of(|_| ()));
    assert!(plain.contains(&"mean".into()) && !plain.iter().any(|t| t.starts_with("mean of")), "{plain:?}");
    let both = texts(ruler_of(with_questions));
    let of: Vec<&String> = both.iter().filter(|t| t.starts_with("mean of")).collect();
    assert!(of.len() == 2 && of[0] < of[1], "{both:?}");
}

/// The cells of variants that swap layers and evict nothing.
fn swapped(answers: &Answers) -> Vec<Cell> {
    answers.cells.iter().filter(|c| c.record.plan.is_some() && c.record.eviction.is_none()).cloned().collect()
}

/// `cell` as of another variant, whose plan `change` changes.
fn changed(cell: &Cell, variant: String, change: impl Fn(&mut RetrofitPlan)) -> Cell {
    let mut cell = Cell { record: VariantRecord { variant, ..cell.record.clone() }, ..cell.clone() };
    cell.record.plan.iter_mut().for_each(change);
    cell
}

/// All that the figure of score and bytes shows.
fn bytes_of(figures: &[Figure]) -> String {
    figures.iter().find(|f| f.name == "bytes").map(|f| format!("{:?}", f.scene)).unwrap_or_default()
}

/// Some layers kept, as two folders of plans say, besides all that is there.
fn two_ways(answers: &mut Answers) {
    let all = swapped(answers);
    for (folder, cell) in ["alone", "rounds"].iter().flat_map(|f| all.iter().map(move |c| (f, c))) {
        let variant = format!("retrofit:plan=plans/{folder}/dense-4.json,{}", cell.record.variant);
        answers.cells.push(changed(cell, variant, |p| p.layers.truncate(4)));
    }
}

#[test]
fn layers_chosen_in_two_ways_are_two_methods() {
    let bytes = bytes_of(&ruler_of(two_ways).unwrap());
    for key in ["kept dense: alone", "kept dense: rounds"] {
        assert!(bytes.contains(key), "no {key}");
    }
}

/// Two settings of exact recall of the same bytes and some layers kept, with recall and without, besides all that is there.
fn with_recall(answers: &mut Answers) {
    let all = swapped(answers);
    let one: Vec<&Cell> = all.iter().filter(|c| c.record.variant == all[0].record.variant).collect();
    for (name, recall, layers) in [
        ("recall", 2048, usize::MAX),
        ("recall:recall=512", 512, usize::MAX),
        ("recall:layers=0-3", 2048, 4),
        ("retrofit:layers=0-3", 0, 4),
    ] {
        answers.cells.extend(one.iter().map(|cell| {
            changed(cell, name.into(), |p| {
                p.settings.recall = recall;
                p.layers.truncate(layers);
            })
        }));
    }
}

#[test]
fn exact_recall_is_a_method_of_its_own() {
    let all = ruler_of(with_recall).unwrap();
    let bytes = bytes_of(&all);
    for text in ["\"exact recall\"", "window and summaries", "recall = recall:recall=512"] {
        assert!(bytes.contains(text), "no {text}");
    }
    // Two methods that keep layers, with a style each.
    for text in
        ["\"exact recall, some layers kept dense\"", "\"retrofit, some layers kept dense\"", "Series(4)", "Series(10)"]
    {
        assert!(bytes.contains(text), "no {text}");
    }
    tidy([("ruler with recall", Ok(all))]);
}

#[test]
fn files_without_anything_to_draw_get_one_error_that_names_the_file() {
    let cases = [
        (smoke_of(|s| s.runs.clear()), "smoke.json: is a smoke test without runs"),
        (smoke_of(|s| s.runs.iter_mut().for_each(|r| r.documents.clear())), "without runs"),
        (smoke_of(|s| s.runs[0].ctx = 0), "at context 0; a context is at least 1"),
        (smoke_of(|s| s.runs.extend(s.runs.clone())), "has two runs of"),
        (ruler_of(|a| a.cells.clear()), "ruler.json: holds no answers"),
        (needle_of(|a| a.cells.iter_mut().for_each(|c| c.answers.clear())), "needle.json: holds no answers"),
        (ruler_of(|a| a.cells.extend(a.cells.clone())), " twice"),
        (ruler_of(|a| a.cells[0].answers[0].score = 5.0), "a score of 5, which is not between 0 and 1"),
        (needle_of(|a| a.cells[0].answers[0].depth = Some(-1.0)), "a needle at depth -1"),
        (
            layers_of(|l| (l.single.clear(), l.curve.clear()).0),
            "layers.json: is a layer study without a measured layer",
        ),
        (ablation_of(|a| a.changes.clear()), "ablate.json: is an ablation without a change that was measured"),
        (ablation_of(|a| a.changes.iter_mut().for_each(|c| c.score = None)), "without a change that was measured"),
        (positions_of(|p| p.runs.clear()), "positions.json: holds no losses"),
        (positions_of(|p| p.bucket = 0), "a bucket or a context of 0"),
        (positions_of(|p| p.ctx = p.bucket), "more losses than the 1 buckets"),
        (positions_of(|p| p.runs.extend(p.runs.clone())), "two runs of one variant"),
    ];
    for (figures, words) in cases {
        let said = figures.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(said.starts_with("tests/fixtures/quality/") && said.contains(words), "`{said}` should say `{words}`");
    }
}

fn record(variant: &str, total: u64, peak: Option<u64>) -> VariantRecord {
    let kv = json!({"local_bytes": total, "summary_bytes": 0, "sink_bytes": 0, "total_bytes": total,
                    "dense_bytes": 64, "peak_bytes": peak});
    serde_json::from_value(json!({"variant": variant, "plan": null, "kv": kv})).unwrap()
}

#[test]
fn stock_has_the_same_style_in_any_order() {
    let of = |names: &[&str]| {
        let records: Vec<VariantRecord> = names.iter().map(|n| record(n, 1, None)).collect();
        variants(&records).into_iter().map(|(n, s)| (n.to_string(), s)).collect::<Vec<_>>()
    };
    let wanted = |all: &[(&str, usize)]| all.iter().map(|(n, s)| (n.to_string(), *s)).collect::<Vec<_>>();
    assert_eq!(of(&["stock", "a", "b", "a"]), wanted(&[("stock", 1), ("a", 0), ("b", 2)]));
    assert_eq!(of(&["a", "b", "stock"]), wanted(&[("a", 0), ("b", 2), ("stock", 1)]));
}

#[test]
fn counts_and_shares_have_short_labels() {
    assert_eq!(count([8, 8], "text"), "8 texts");
    assert_eq!(count([1], "text"), "1 text");
    assert_eq!(count([3, 8], "text"), "3 to 8 texts");
    assert_eq!(count([], "text"), "0 texts");
    assert_eq!(share_of(&[record("a", 4, None), record("b", 4, None)]).unwrap(), "0.0625×");
    assert_eq!(share_of(&[record("a", 4, Some(64)), record("b", 2, None)]).unwrap(), "1.00× to 0.0312×");
    assert_eq!(share_of(&[]), None);
}
