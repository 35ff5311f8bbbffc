//! `bfly-plot`: every figure from JSON alone, and one clear error for what cannot be drawn.
use crate::common::Any;
use assert_cmd::Command;
use bfly::eval::plot::render::DETAIL;
use bfly::eval::plot::theme::{Ink, LINE, MARKER, SAMPLE, THEMES};
use serde_json::{json, Value};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

fn plot() -> Command {
    Command::new(env!("CARGO_BIN_EXE_bfly-plot"))
}

fn fixture(name: &str) -> PathBuf {
    Path::new("tests/fixtures/bench").join(name)
}

fn value(name: &str) -> Any<Value> {
    Ok(serde_json::from_str(&std::fs::read_to_string(fixture(name))?)?)
}

/// Names in `dir`, sorted.
fn names(dir: &Path) -> Any<Vec<String>> {
    let mut names = vec![];
    for entry in std::fs::read_dir(dir)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// Draws `content` under the name `stem.json` and returns where the figures are.
fn draw(stem: &str, content: &Value) -> Any<TempDir> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join(format!("{stem}.json"));
    std::fs::write(&file, content.to_string())?;
    plot().arg(&file).arg("--out").arg(dir.path().join("out")).assert().success();
    Ok(dir)
}

fn svg(dir: &TempDir, name: &str) -> Any<String> {
    Ok(std::fs::read_to_string(dir.path().join("out").join(name))?)
}

fn circles(svg: &str, radius: f64) -> usize {
    let r = (radius * f64::from(DETAIL)).round();
    svg.lines().filter(|l| l.starts_with("<circle") && l.contains(&format!(" r=\"{r}\""))).count()
}

fn ok(run: &Value) -> bool {
    run["status"] == "ok"
}

#[test]
fn every_figure_comes_in_both_themes_and_formats() -> Any {
    for (name, figures) in [("ladder", vec!["ratio", "time", "memory", "decode"]), ("kernels", vec!["roofline"])] {
        let dir = draw(name, &value(&format!("{name}.json"))?)?;
        let out = dir.path().join("out");
        let mut wanted = vec![];
        for figure in figures {
            for (theme, paper) in [("light", "#FFFFFF"), ("dark", "#0D1117")] {
                let stem = format!("{name}-{figure}-{theme}");
                let svg = svg(&dir, &format!("{stem}.svg"))?;
                assert!(svg.starts_with("<svg width=\"800\"") && svg.trim_end().ends_with("</svg>"), "{stem}");
                let paper = format!("fill=\"{paper}\"");
                assert!(svg.lines().find(|l| l.starts_with("<rect")).is_some_and(|l| l.contains(&paper)), "{stem}");
                let png = std::fs::read(out.join(format!("{stem}.png")))?;
                assert_eq!(&png[..8], b"\x89PNG\r\n\x1a\n", "{stem}");
                assert_eq!(png[16..20], 1600u32.to_be_bytes(), "{stem}: width");
                assert!(png.len() > 20_000, "{stem} is empty: {} bytes", png.len());
                wanted.extend([format!("{stem}.png"), format!("{stem}.svg")]);
            }
        }
        wanted.sort();
        assert_eq!(names(&out)?, wanted, "all of them and nothing half-written");
    }
    Ok(())
}

#[test]
fn a_ladders_figures_name_everything() -> Any {
    let dir = draw("ladder", &value("ladder.json")?)?;
    let common = [
        "random weights: speed and memory only",
        "Synthetic-0.5B, 494M parameters",
        "weights bf16, KV bf16",
        "synthetic",
        "prefill chunk 4k",
        "beyond the trained length (128k): speed and memory only",
        "× did not fit: bfly stock at 1M (out of memory); transformers sdpa at 1M (out of memory).",
        "context, tokens",
    ];
    let own: [(&str, &[&str]); 4] = [
        ("ratio", &["end-to-end time", "peak device memory", "KV capacity", "no stock fits", "1 = the better stock"]),
        ("time", &["Prefill, seconds", "End to end, seconds", "bfly retrofit", "bfly stock", "transformers sdpa"]),
        ("memory", &["Peak device memory, GiB", "KV cache, GiB", "the device has 32.0 GiB"]),
        ("decode", &["Median time between tokens, milliseconds", "95th percentile", "did not fit"]),
    ];
    for (figure, words) in own {
        let svg = svg(&dir, &format!("ladder-{figure}-light.svg"))?.replace('\n', " ");
        for word in common.iter().chain(words) {
            assert!(svg.contains(word), "{figure} lacks `{word}`");
        }
        for ctx in ["32k", "64k", "128k", "256k", "512k", "1M"] {
            assert!(svg.contains(&format!("> {ctx} <")), "{figure} lacks the label {ctx}");
        }
    }
    Ok(())
}

#[test]
fn nothing_measured_is_left_out_of_a_ladders_figures() -> Any {
    let ladder = value("ladder.json")?;
    let runs = ladder["runs"].as_array().ok_or("runs")?;
    let dir = draw("ladder", &ladder)?;
    let samples = |keep: &dyn Fn(&Value) -> bool| -> usize {
        runs.iter().filter(|r| keep(r)).filter_map(|r| r["samples"].as_array()).map(Vec::len).sum()
    };
    let of = |variant: &str| runs.iter().filter(|r| ok(r) && r["variant"] == variant).count();
    let (retrofit, others) = (of("retrofit"), of("stock") + of("sdpa"));
    assert_eq!((samples(&|_| true), retrofit, others), (48, 6, 10));
    // The legend shows three dots for samples, and each series' marker once.
    for (figure, panels) in [("time", 2), ("memory", 1), ("decode", 1)] {
        let svg = svg(&dir, &format!("ladder-{figure}-light.svg"))?;
        assert_eq!(circles(&svg, SAMPLE), panels * samples(&|_| true) + 3, "{figure}: dots");
        // KV has a panel in `memory`, with markers and without dots.
        let kv = if figure == "memory" { (retrofit, others) } else { (0, 0) };
        assert_eq!(circles(&svg, MARKER), panels * retrofit + kv.0 + 1, "{figure}: the retrofit's markers");
        assert_eq!(svg.matches("<polygon").count(), panels * others + kv.1 + 2, "{figure}: the stocks' markers");
    }
    // Each line has a stroke between neighbours and one in the legend; a run that did not fit is two strokes and a
    // name.
    let time = svg(&dir, "ladder-time-light.svg")?;
    for (i, (engine, variant)) in [("bfly", "retrofit"), ("bfly", "stock"), ("transformers", "sdpa")].iter().enumerate()
    {
        let (r, g, b) = THEMES[0].rgb(Ink::Series(i));
        let ink = format!(" stroke=\"#{r:02X}{g:02X}{b:02X}\" stroke-width=\"{}\"", LINE * f64::from(DETAIL));
        let strokes = time.lines().filter(|l| l.starts_with("<polyline") && l.contains(&ink)).count();
        let missed = runs.iter().filter(|r| r["variant"] == *variant && !ok(r)).count();
        assert_eq!(strokes, 2 * (of(variant) - 1 + 2 * missed) + 1, "strokes of {variant}");
        let named = time.lines().filter(|l| *l == format!("{engine} {variant}")).count();
        assert_eq!(named, 1 + 2 * missed, "{variant} is named in the legend and beside its crosses");
    }
    let ratio = svg(&dir, "ladder-ratio-light.svg")?;
    let compared = samples(&|r| r["variant"] == "retrofit" && r["ctx"] != 1 << 20);
    assert_eq!(circles(&ratio, SAMPLE), 2 * compared + 3, "time and memory");
    assert_eq!(circles(&ratio, MARKER), 5 + 1);
    assert_eq!(ratio.matches("<polygon").count(), 2 * (5 + 1));
    Ok(())
}

#[test]
fn real_weights_within_the_trained_length_come_without_warnings() -> Any {
    let mut ladder = value("ladder.json")?;
    ladder["random_weights"] = Value::Null;
    ladder["trained_positions"] = json!(1 << 20);
    let dir = draw("ladder", &ladder)?;
    for figure in ["ratio", "time", "memory", "decode"] {
        let svg = svg(&dir, &format!("ladder-{figure}-dark.svg"))?;
        assert!(!svg.contains("speed and memory only"), "{figure}");
    }
    Ok(())
}

#[test]
fn variants_have_a_ratio_each_and_ladders_without_stock_say_so() -> Any {
    let mut ladder = value("ladder.json")?;
    let runs = ladder["runs"].as_array_mut().ok_or("runs")?;
    let mut more: Vec<Value> = runs.iter().filter(|r| r["variant"] == "retrofit").cloned().collect();
    more.iter_mut().for_each(|r| r["variant"] = "retrofit:window=1024".into());
    runs.extend(more);
    let dir = draw("ladder", &ladder)?;
    let second = svg(&dir, "ladder-ratio-2-light.svg")?;
    assert!(second.contains("bfly retrofit:window=1024: time over the fastest"), "{second}");

    let alone: Vec<Value> = value("ladder.json")?["runs"]
        .as_array()
        .ok_or("runs")?
        .iter()
        .filter(|r| r["variant"] == "retrofit")
        .cloned()
        .collect();
    ladder["runs"] = alone.into();
    let file = dir.path().join("alone.json");
    std::fs::write(&file, ladder.to_string())?;
    let out = plot().arg(&file).arg("--out").arg(dir.path().join("alone")).output()?;
    let said = String::from_utf8(out.stderr)?;
    assert!(out.status.success() && said.contains("no ratios for retrofit"), "{said}");
    assert!(!dir.path().join("alone/alone-ratio-light.svg").exists());
    assert!(dir.path().join("alone/alone-time-light.svg").exists());
    Ok(())
}

#[test]
fn what_an_engine_does_not_report_is_said() -> Any {
    let mut ladder = value("ladder.json")?;
    for run in ladder["runs"].as_array_mut().ok_or("runs")? {
        run["kv_bytes"] = Value::Null;
        run["samples"].as_array_mut().ok_or("samples")?.iter_mut().for_each(|s| s["peak_device_bytes"] = 0.into());
    }
    let dir = draw("ladder", &ladder)?;
    let memory = svg(&dir, "ladder-memory-light.svg")?;
    assert!(memory.contains("KV cache not reported: transformers sdpa.") && memory.contains("not reported by any run"));
    assert!(svg(&dir, "ladder-ratio-light.svg")?.contains("No ratio of peak device memory: not reported"));
    Ok(())
}

#[test]
fn a_stock_that_was_given_up_is_marked_where_it_failed_and_beyond() -> Any {
    let mut ladder = value("ladder.json")?;
    let runs = ladder["runs"].as_array_mut().ok_or("runs")?;
    runs.retain(|r| r["ctx"] != 1 << 20 || r["variant"] == "retrofit");
    for run in runs.iter_mut().filter(|r| r["ctx"] == 1 << 19 && r["variant"] != "retrofit") {
        (run["status"], run["samples"]) = ("out of memory".into(), json!([]));
    }
    let dir = draw("ladder", &ladder)?;
    let ratio = svg(&dir, "ladder-ratio-light.svg")?;
    assert!(ratio.contains("bfly stock at 512k (out of memory; not tried beyond)"), "{ratio}");
    let grey = THEMES[0].rgb(Ink::Series(5));
    let ink = format!(" stroke=\"#{:02X}{:02X}{:02X}\"", grey.0, grey.1, grey.2);
    let strokes = ratio.lines().filter(|l| l.starts_with("<polyline") && l.contains(&ink)).count();
    assert_eq!(strokes, 4, "crosses at 512k and at 1M");
    Ok(())
}

#[test]
fn a_roofline_shows_every_case_and_both_ceilings() -> Any {
    let report = value("kernels.json")?;
    let dir = draw("kernels", &report)?;
    let svg = svg(&dir, "kernels-roofline-light.svg")?;
    for word in ["copy 4,000 GB/s", "matmul 790 TFLOP/s (bf16, 8192 × 8192)", "FLOP per byte", "TFLOP/s", "100%"] {
        assert!(svg.contains(word), "lacks `{word}`");
    }
    let cases = report["kernels"].as_array().ok_or("kernels")?;
    let with_flop = cases.iter().filter(|k| k["flop"] != 0.0).count();
    for case in cases {
        let name = format!("{} · {}", case["kernel"].as_str().unwrap_or(""), case["case"].as_str().unwrap_or(""));
        assert!(svg.contains(&name), "lacks `{name}`");
    }
    for (i, case) in (1..).zip(cases) {
        // Once beside the bar, once beside the point; the numbers 1 and 5 are ticks too, so at least.
        let times = svg.lines().filter(|l| *l == i.to_string()).count();
        let least = 1 + usize::from(case["flop"] != 0.0);
        assert!(times >= least, "case {i} is numbered {times} times");
    }
    assert_eq!((cases.len(), with_flop), (9, 8));
    assert!(svg.contains("not on the roofline: 9."), "a case without work is named");
    Ok(())
}

#[test]
fn a_graph_shows_every_stage_and_the_reach() -> Any {
    let dir = tempfile::tempdir()?;
    plot().arg("graph").arg("--out").arg(dir.path()).assert().success();
    let wanted = ["graph-causal_shift-dark.png", "graph-causal_shift-dark.svg", "graph-causal_shift-light.png"];
    assert_eq!(names(dir.path())?[..3], wanted);
    let svg = std::fs::read_to_string(dir.path().join("graph-causal_shift-light.svg"))?;
    for word in ["stage 0: b − 5", "stage 1: b − 10", "stage 2: b − 20", "stage 3: b − 40", "N = 64 blocks of 128"]
    {
        assert!(svg.contains(word), "lacks `{word}`");
    }
    assert!(svg.replace('\n', " ").contains("Reach: 100% of the 63 earlier blocks"), "the reach");
    // One square per edge: 59 + 54 + 44 + 24 blocks have a partner at these offsets.
    let squares = svg.lines().filter(|l| l.starts_with("<rect") && l.contains("#DA6600")).count();
    assert_eq!(squares, 59 + 54 + 44 + 24 + 1, "edges and the legend");
    let flags = ["--partner", "xor", "--ctx", "64k", "--window", "0", "--partner-count", "2", "--layers", "3"];
    plot().arg("graph").args(flags).arg("--out").arg(dir.path()).assert().success();
    let svg = std::fs::read_to_string(dir.path().join("graph-xor-dark.svg"))?;
    assert!(svg.contains("stage 8") && svg.contains("2 stages per layer"), "{}", &svg[..600]);
    Ok(())
}

#[test]
fn quality_is_drawn_from_any_mix_of_files_and_names_everything() -> Any {
    let dir = tempfile::tempdir()?;
    let files = ["smoke", "ruler", "needle", "layers", "ablate", "positions"];
    let files = files.map(|name| format!("tests/fixtures/quality/{name}.json"));
    plot().args(&files).arg("--out").arg(dir.path()).assert().success();
    let figures: [(&str, &[&str]); 8] = [
        ("smoke-smoke", &["KL from stock, nats", "Same likeliest token as stock, %", "Loss added", "context, tokens"]),
        ("ruler-tasks", &["niah_single_1", "mean", "mean score, %", "stock · KV 1.00× of dense", "samples per task"]),
        ("ruler-bytes", &["1/64", "sinks + window", "snapkv", "hollow: after eviction", "relative to dense"]),
        ("needle-needle", &["0%", "50%", "100%", "mean score of a cell", "Down: depth of the needle"]),
        ("layers-layers", &["Loss added on expected answers, nats", "KL from stock on text, nats", "layer"]),
        ("layers-curve", &["KV cache, % of dense", "layers kept dense", "Answers wholly right, %"]),
        (
            "ablate-ablation",
            &["partner rule", "KL on text, nats", "Loss on answers, nats", "summaries", "the interval holds 0"],
        ),
        ("positions-positions", &["Loss on the next token, nats", "position, tokens", "KV 1.00× of dense"]),
    ];
    for (figure, words) in figures {
        for theme in ["light", "dark"] {
            let svg = std::fs::read_to_string(dir.path().join(format!("{figure}-{theme}.svg")))?.replace('\n', " ");
            // Every figure but the needle's shows intervals; that one says them beside its maps.
            let interval = if figure == "needle-needle" { "% [" } else { "95% interval" };
            for word in words.iter().chain(&["parameters · weights", interval]) {
                assert!(svg.contains(word), "{figure} lacks `{word}`");
            }
            let png = std::fs::read(dir.path().join(format!("{figure}-{theme}.png")))?;
            assert_eq!(png[16..20], 1600u32.to_be_bytes(), "{figure}: width");
        }
    }
    assert_eq!(names(dir.path())?.len(), 4 * figures.len(), "all of them and nothing half-written");
    Ok(())
}

#[test]
fn a_needles_cells_and_a_tasks_dots_are_all_drawn() -> Any {
    let read = |name: &str| -> Any<Value> {
        Ok(serde_json::from_str(&std::fs::read_to_string(format!("tests/fixtures/quality/{name}.json"))?)?)
    };
    let needle = read("needle")?;
    // Depths at which all needles were found, or none.
    let depths = |cell: &Value| -> usize {
        let mut scores: std::collections::BTreeMap<String, Vec<f64>> = Default::default();
        for answer in cell["answers"].as_array().into_iter().flatten() {
            scores.entry(answer["depth"].to_string()).or_default().push(answer["score"].as_f64().unwrap_or(0.5));
        }
        scores.values().filter(|s| s.iter().all(|x| *x == 0.0) || s.iter().all(|x| *x == 1.0)).count()
    };
    let cells: usize = needle["cells"].as_array().ok_or("cells")?.iter().map(depths).sum();
    let found = svg(&draw("needle", &needle)?, "needle-needle-light.svg")?;
    // The legend's scale has an end of each colour.
    let (none, all) = (THEMES[0].rgb(Ink::Heat(0)), THEMES[0].rgb(Ink::Heat(100)));
    let filled = |(r, g, b): (u8, u8, u8)| {
        let ink = format!("#{r:02X}{g:02X}{b:02X}");
        found.lines().filter(|l| l.starts_with("<rect") && l.contains(&ink)).count()
    };
    assert_eq!(filled(none) + filled(all), cells + 2, "cells and the legend");

    let ruler = read("ruler")?;
    let tasks = svg(&draw("ruler", &ruler)?, "ruler-tasks-light.svg")?;
    let cells = ruler["cells"].as_array().ok_or("cells")?;
    let own: Vec<&Value> = cells.iter().filter(|c| c["variant"] == "retrofit").collect();
    let mut lengths: Vec<u64> = own.iter().filter_map(|c| c["length"].as_u64()).collect();
    lengths.sort_unstable();
    lengths.dedup();
    // One circle per cell of the first retrofit, one per mean over all tasks, one in the legend.
    let asked: std::collections::BTreeSet<String> = cells.iter().map(|c| c["task"].to_string()).collect();
    let at = |length: u64| own.iter().filter(|c| c["length"].as_u64() == Some(length)).count();
    let whole = lengths.iter().filter(|l| at(**l) == asked.len()).count();
    assert_eq!(circles(&tasks, MARKER), own.len() + whole + 1);
    Ok(())
}

#[test]
fn logs_of_a_character_model_share_a_figure_and_its_measurements_have_their_own() -> Any {
    let dir = tempfile::tempdir()?;
    let mut files = vec![];
    for run in ["wide", "deep"] {
        let path = dir.path().join(run).join("log.jsonl");
        std::fs::create_dir_all(dir.path().join(run))?;
        let line = |step: u32| json!({"step": step, "bits_per_character": 8.0 / f64::from(step)}).to_string() + "\n";
        std::fs::write(&path, (1..=50).map(line).collect::<String>())?;
        files.push(path);
    }
    let eval = json!({
        "kind": "bfly-char-eval", "schema_version": 1, "git_sha": "0", "command": ["bfly-char", "eval"],
        "device": "cpu", "corpus": "00", "window": 2048, "positions": [[0, 1024], [1024, 2048]],
        "bits_by_position": [[2.5, 2.0], [2.4, 2.1]], "contexts": [1024, 2048], "segment": 1024,
        "bits_by_context": [[2.2, 2.0], [2.3, 2.0]],
    });
    let recall = json!({
        "kind": "bfly-char-recall", "schema_version": 1, "git_sha": "0", "command": ["bfly-char", "recall"],
        "window": 1024, "chunk": 16, "columns": ["place", "distance", "letters_right_of_16"],
        "values": [[755, 396, 11], [898, 874, 9], [445, 236, 16]],
    });
    for (name, content) in [("eval", eval), ("recall", recall)] {
        files.push(dir.path().join(format!("{name}.json")));
        std::fs::write(&files[files.len() - 1], content.to_string())?;
    }
    let out = dir.path().join("out");
    plot().args(&files).arg("--out").arg(&out).assert().success();
    let figures: [(&str, &[&str]); 4] = [
        ("eval-contexts", &["gain over a context of 1k", "Gain, bits per character", "context, characters"]),
        ("eval-positions", &["Bits per character", "position, characters", "95% interval"]),
        ("logs-training", &["wide", "deep", "optimiser step"]),
        ("recall-recall", &["distance, characters", "set bits of the distance in chunks", "chance: 1 letter in 26"]),
    ];
    assert_eq!(names(&out)?.len(), 4 * figures.len());
    for (figure, words) in figures {
        let svg = svg(&dir, &format!("{figure}-light.svg"))?.replace('\n', " ");
        for word in words {
            assert!(svg.contains(word), "{figure} lacks `{word}`");
        }
    }
    plot().arg(&files[0]).arg("--out").arg(&out).assert().success();
    assert!(out.join("wide-training-light.svg").exists(), "one log is named after its directory");
    let twice = files[0].to_string_lossy();
    refused(&[&twice, &twice, "--out", &out.to_string_lossy()], &["log.jsonl", "is given twice"])
}

#[test]
fn factors_of_a_learned_transform_are_drawn_with_their_product() -> Any {
    let dir = tempfile::tempdir()?;
    let run = dir.path().join("had8");
    let mut learn = Command::new(env!("CARGO_BIN_EXE_bfly-transforms"));
    learn.args(["learn", "-q", "--device", "cpu", "--transform", "hadamard", "--n", "8", "--out"]);
    learn.arg(&run).assert().success();
    let out = dir.path().join("out");
    plot().arg("factors").arg(&run).arg("--out").arg(&out).assert().success();
    assert_eq!(names(&out)?.len(), 4);
    let drawn = svg(&dir, "had8-factors-light.svg")?;
    for word in ["Hadamard as a product", "B₃", "blocks of 8", "B₁", "permutation", "=", "28 real weights", "max 0.354"]
    {
        assert!(drawn.contains(word), "lacks `{word}`");
    }
    // All entries of a Hadamard matrix are as large: each row of the product is one rectangle across all columns.
    let (r, g, b) = THEMES[0].rgb(Ink::Heat(100));
    let full = format!("fill=\"#{r:02X}{g:02X}{b:02X}\"");
    let width = |l: &str| l.split_once(" width=\"").and_then(|(_, w)| w.split('"').next()?.parse::<f64>().ok());
    let side = 4.0 * (760.0 / 5.0 - 24.0);
    let rows = drawn.lines().filter(|l| l.starts_with("<rect") && l.contains(&full));
    assert_eq!(rows.filter(|l| width(l).is_some_and(|w| (w - side).abs() < 3.0)).count(), 8);
    std::fs::write(run.join("factors.safetensors"), "{}")?;
    let (run, out) = (run.to_string_lossy(), out.to_string_lossy());
    refused(&["factors", &run, "--out", &out], &["had8/factors.safetensors", "is no whole factor file"])?;
    refused(&["factors", "absent", "--out", &out], &["factors absent", "No such file"])
}

/// Runs `args`, which must fail with one line that holds every word.
fn refused(args: &[&str], words: &[&str]) -> Any {
    let out = plot().args(args).output()?;
    let said = String::from_utf8(out.stderr)?;
    assert_eq!(out.status.code(), Some(2), "{args:?}: {said}");
    assert!(said.starts_with("error: ") && said.lines().count() == 1, "{args:?}: {said}");
    assert!(!said.contains("panicked"), "{said}");
    for word in words {
        assert!(said.contains(word), "{args:?} should say `{word}`: {said}");
    }
    assert!(out.stdout.is_empty(), "nothing is drawn: {}", String::from_utf8_lossy(&out.stdout));
    Ok(())
}

#[test]
fn what_cannot_be_drawn_gets_one_clear_error_and_no_figure() -> Any {
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let out = at("out");
    let whole = std::fs::read_to_string(fixture("ladder.json"))?;
    let with = |key: &str, v: Value| -> Any<String> {
        let mut ladder: Value = serde_json::from_str(&whole)?;
        ladder[key] = v;
        Ok(ladder.to_string())
    };
    let mut kernels = value("kernels.json")?;
    kernels["kernels"] = json!([]);
    let mut impossible = value("kernels.json")?;
    impossible["kernels"][0]["samples_s"] = json!([0.0]);
    let empty = |kind: &str, list: &str| -> Any<String> {
        let path = format!("tests/fixtures/quality/{kind}.json");
        let mut file: Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
        file[list] = json!([]);
        Ok(file.to_string())
    };
    let step = json!({"step": 1, "bits_per_character": 8.0});
    let cases: [(&str, String, &[&str]); 19] = [
        ("half.json", whole[..whole.len() / 2].into(), &["is not a whole JSON file"]),
        ("empty.json", String::new(), &["is not a whole JSON file"]),
        ("version.json", with("schema_version", json!(99))?, &["has schema version 99; this build reads 1"]),
        (
            "other.json",
            with("kind", json!("bfly-quality"))?,
            &[
                "is of kind `bfly-quality`",
                "bfly-ladder",
                "bfly-smoke",
                "bfly-layers",
                "bfly-ablation",
                "bfly-positions",
            ],
        ),
        ("fit.json", with("kind", json!("bfly-fit"))?, &["is of kind `bfly-fit`; there are figures for `bfly-ladder`"]),
        ("kindless.json", "{}".into(), &["is of kind `none`"]),
        ("array.json", "[1]".into(), &["array.json"]),
        ("runs.json", with("runs", json!([]))?, &["is a ladder without runs"]),
        ("field.json", with("dtype", json!(7))?, &["expected a string"]),
        ("smoke.json", empty("smoke", "runs")?, &["is a smoke test without runs"]),
        ("ruler.json", empty("ruler", "cells")?, &["holds no answers"]),
        ("ablate.json", empty("ablate", "changes")?, &["without a change that was measured"]),
        ("positions.json", empty("positions", "runs")?, &["holds no losses"]),
        ("none.json", kernels.to_string(), &["is a report without kernels"]),
        ("empty.jsonl", String::new(), &["is a training log without steps"]),
        ("twice.jsonl", format!("{step}\n{step}\n"), &["line 2 is of step 1, after step 1"]),
        ("key.json", json!({"kind": "bfly-char-eval", "schema_version": 1}).to_string(), &["missing field"]),
        ("old.json", json!({"kind": "bfly-char-recall"}).to_string(), &["has schema version none"]),
        ("zero.json", impossible.to_string(), &["attention_prefill (dense causal)", "not above 0 seconds"]),
    ];
    for (name, content, words) in cases {
        std::fs::write(dir.path().join(name), content)?;
        refused(&[&at(name), "--out", &out], &[&[name], words].concat())?;
    }
    refused(&[&at("absent.json"), "--out", &out], &["absent.json", "No such file"])?;
    let ladder = fixture("ladder.json").to_string_lossy().into_owned();
    refused(
        &["kernels", &ladder, "--out", &out],
        &["ladder.json", "is of kind `bfly-ladder`; expected `bfly-kernels`"],
    )?;
    // A bad file among good ones: nothing is drawn at all.
    refused(&[&ladder, &at("half.json"), "--out", &out], &["half.json"])?;
    std::fs::copy(fixture("ladder.json"), at("ladder.json"))?;
    refused(&[&ladder, &at("ladder.json"), "--out", &out], &["another file is also called ladder"])?;
    refused(&["graph", "--ctx", "1M", "--out", &out], &["--ctx", "8192 blocks of 128"])?;
    refused(&["graph", "--window", "500", "--out", &out], &["--window", "whole number of blocks"])?;
    assert!(!Path::new(&out).exists(), "nothing was written");
    Ok(())
}

#[test]
fn places_that_cannot_be_written_to_are_named_and_left_clean() -> Any {
    let dir = tempfile::tempdir()?;
    let ladder = fixture("ladder.json").to_string_lossy().into_owned();
    let file = dir.path().join("a-file");
    std::fs::write(&file, "")?;
    let below = file.join("figures").to_string_lossy().into_owned();
    refused(&[&ladder, "--out", &below], &["--out", "a-file/figures", "cannot be created"])?;
    // The first figure's place is taken by a directory: its temporary file goes away again.
    let out = dir.path().join("out");
    std::fs::create_dir_all(out.join("ladder-ratio-light.svg"))?;
    refused(&[&ladder, "--out", &out.to_string_lossy()], &["ladder-ratio-light.svg", "cannot be written"])?;
    assert_eq!(names(&out)?, ["ladder-ratio-light.svg"]);
    Ok(())
}

#[test]
fn help_shows_examples_every_subcommand_and_completions() -> Any {
    let help = String::from_utf8(plot().arg("--help").output()?.stdout)?;
    for kind in ["ladder", "kernels", "smoke", "answers", "layers", "ablation", "positions", "char-log", "char-eval"] {
        assert!(help.contains(&format!("  bfly-{kind} ")), "help lacks the kind {kind}");
    }
    for word in ["Examples:", "ladder", "kernels", "graph", "factors", "completions", "--out", "[default: figures]"] {
        assert!(help.contains(word), "help lacks `{word}`");
    }
    let graph = String::from_utf8(plot().args(["graph", "--help"]).output()?.stdout)?;
    for word in ["--ctx", "--window", "--block", "--partner", "--partner-count", "--layers", "--out", "bit_reversal"] {
        assert!(graph.contains(word), "help of graph lacks `{word}`");
    }
    let script = plot().args(["completions", "bash"]).output()?;
    assert!(script.status.success() && String::from_utf8(script.stdout)?.contains("bfly-plot"));
    Ok(())
}
