//! `bfly-char`: a run, its resumption, and bad input.

use crate::common::Any;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// A corpus of three documents and a place for runs.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Any<Self> {
        let place = Self(tempfile::tempdir()?);
        let texts = ["One fish, two fish, red fish, blue fish. ", "A rose is a rose is a rose. ", "Naïve café, 10 £. "];
        std::fs::create_dir(place.path("texts"))?;
        for (i, text) in texts.iter().enumerate() {
            std::fs::write(place.path(&format!("texts/{i}.txt")), text.repeat(20))?;
        }
        Ok(place)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn train(&self, run: &str, flags: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bfly-char"));
        command.arg("train").arg(self.path("texts")).arg("--out").arg(self.path(run));
        command.args(
            "--preset micro --stages 0,1 --window 64 --batch 3 --micro-batch 2 --warmup 2 --save-every 3".split(' '),
        );
        command.args(flags);
        command
    }

    fn run(&self, args: &[&str]) -> Any<Output> {
        Ok(Command::new(env!("CARGO_BIN_EXE_bfly-char")).current_dir(self.0.path()).args(args).output()?)
    }
}

fn success(output: Output) -> Any<String> {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    Ok(String::from_utf8(output.stdout)?)
}

/// The one line of an error.
fn refusal(output: Output) -> Any<String> {
    let stderr = String::from_utf8(output.stderr)?;
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    Ok(stderr.lines().find(|l| l.starts_with("error: ")).ok_or(format!("no error in {stderr:?}"))?.to_string())
}

fn weights(step: &Path) -> Any<(Vec<u8>, Vec<u8>)> {
    Ok((std::fs::read(step.join("model.safetensors"))?, std::fs::read(step.join("training.json"))?))
}

/// The log without speeds.
fn log(run: &Path) -> Any<Vec<(u64, f64)>> {
    let text = std::fs::read_to_string(run.join("log.jsonl"))?;
    let lines = text.lines().map(serde_json::from_str::<serde_json::Value>).collect::<Result<Vec<_>, _>>()?;
    Ok(lines
        .iter()
        .map(|l| (l["step"].as_u64().unwrap_or(0), l["bits_per_character"].as_f64().unwrap_or(f64::NAN)))
        .collect())
}

#[test]
fn a_killed_run_resumes_to_the_same_weights() -> Any {
    let place = Place::new()?;
    success(place.train("whole", &["--steps", "9"]).output()?)?;
    let (run, mut attempts) = (place.path("killed"), 0u64);
    while !run.join("step-00000009").exists() {
        attempts += 1;
        let resume: &[&str] = match std::fs::read_dir(&run)
            .map(|d| d.flatten().any(|e| e.file_name().to_string_lossy().starts_with("step-")))
        {
            Ok(true) => &["--steps", "9", "--resume"],
            _ => &["--steps", "9"],
        };
        let mut child = place.train("killed", resume).stderr(Stdio::null()).spawn()?;
        // Later and later, so that the run ends at some time.
        std::thread::sleep(Duration::from_millis(40 * attempts + 17 * (attempts * attempts % 7)));
        child.kill()?;
        child.wait()?;
        assert!(attempts < 200, "never ends");
    }
    assert_eq!(
        weights(&run.join("step-00000009"))?,
        weights(&place.path("whole/step-00000009"))?,
        "after {attempts} attempts"
    );
    assert_eq!(log(&run)?, log(&place.path("whole"))?);
    assert_eq!(log(&run)?.len(), 9);
    Ok(())
}

#[test]
fn a_factored_model_is_trained_resumed_exported_and_used() -> Any {
    let place = Place::new()?;
    let train = |run: &str, flags: &str| place.train(run, &flags.split(' ').collect::<Vec<_>>()).output();
    let form = "--mlp factored --mlp-width 40 --quiet";
    success(train("whole", &format!("--steps 6 {form}"))?)?;
    let cut = place.path("cut");
    std::fs::create_dir(&cut)?;
    std::fs::rename(place.path("whole/step-00000003"), cut.join("step-00000003"))?;
    success(train("cut", &format!("--steps 6 --resume {form}"))?)?;
    assert_eq!(weights(&cut.join("step-00000006"))?, weights(&place.path("whole/step-00000006"))?);
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(place.path("whole/step-00000006/config.json"))?)?;
    assert_eq!((config["mlp"].as_str(), config["intermediate_size"].as_u64()), (Some("factored"), Some(40)));
    let tensors =
        candle_core::safetensors::load(place.path("whole/step-00000006/model.safetensors"), &candle_core::Device::Cpu)?;
    assert_eq!(tensors["model.layers.0.mlp.gate_proj.factors"].dims(), [1, 768]);
    assert!(!tensors.keys().any(|name| name.contains("mlp") && name.ends_with(".weight")));

    success(place.run(&["export", "--model", "whole", "--out", "small"])?)?;
    let bits = |model: &str| -> Any<f64> {
        let line = success(place.run(&["eval", "--model", model, "texts/1.txt"])?)?;
        Ok(line.split_whitespace().nth(3).ok_or("no bits")?.parse()?)
    };
    let (exact, rounded) = (bits("whole")?, bits("small")?);
    assert!((exact - rounded).abs() < 0.02 * exact, "{rounded} where f32 has {exact}");
    let text =
        success(place.run(&["generate", "--model", "whole", "--prompt", "One f", "-n", "20", "--ignore-eos"])?)?;
    assert!(text.starts_with("One f") && text.chars().count() == 26, "{text:?}");

    let other = refusal(train("whole", "--steps 9 --resume --mlp-width 40")?)?;
    assert!(other.contains("model: is") && other.contains(r#""mlp":"factored""#), "{other}");
    let from = refusal(train("other", &format!("--steps 2 --from {}", place.path("small").display()))?)?;
    assert!(from.contains("--from: ") && from.contains("small is {") && from.contains(r#""mlp":"factored""#), "{from}");
    let path = place.path("small/config.json");
    let dense = std::fs::read_to_string(&path)?.replace("\"factored\"", "\"dense\"");
    std::fs::write(&path, dense)?;
    let said = refusal(place.run(&["generate", "--model", "small", "--prompt", "a"])?)?;
    let want = "has model.layers.0.mlp.gate_proj.factors where a model of this configuration has";
    assert!(said.contains("error: small: ") && said.contains(want), "{said}");
    let none = refusal(train("other", "--steps 2 --mlp-width 0")?)?;
    assert!(none.contains("--mlp-width: 0 is not in 1 ..= 1048576"), "{none}");
    assert!(String::from_utf8(train("other", "--steps 2 --mlp sparse")?.stderr)?
        .contains("[possible values: dense, factored]"));
    assert!(!place.path("other").exists(), "a refused run leaves a directory");
    // A dense model's configuration is as it was before there was a choice.
    success(train("dense", "--steps 1 --quiet")?)?;
    assert!(!std::fs::read_to_string(place.path("dense/step-00000001/config.json"))?.contains("mlp"));
    Ok(())
}

#[test]
fn a_trained_model_generates_and_evaluates() -> Any {
    let place = Place::new()?;
    success(place.train("run", &["--steps", "60", "--lr", "0.01", "--quiet"]).output()?)?;
    let log = log(&place.path("run"))?;
    assert!(log[0].1 > 7.0 && log[59].1 < 4.0, "{:?} to {:?}", log[0], log[59]);
    let text = success(place.run(&["generate", "--model", "run", "--prompt", "One f", "-n", "20", "--ignore-eos"])?)?;
    assert!(text.starts_with("One f") && text.chars().count() == 26, "{text:?}");
    let line = success(place.run(&["eval", "--model", "run", "texts/0.txt"])?)?;
    assert!(line.starts_with("texts/0.txt  820 characters  ") && line.ends_with(" bits a character\n"), "{line}");
    Ok(())
}

#[test]
fn copy_recall_trains_without_texts_and_is_reported_by_distance() -> Any {
    let place = Place::new()?;
    let flags =
        "train --mix recall:1 --out copier --preset micro --stages 0,1 --window 128 --batch 2 --warmup 1 --steps 3 -q";
    success(place.run(&flags.split(' ').collect::<Vec<_>>())?)?;
    let table = success(place.run(&["recall", "--model", "copier", "--window", "128", "--windows", "6"])?)?;
    let row = |name: &str| {
        table.lines().find(|l| l.starts_with(name)).map(|l| l.split_whitespace().map(String::from).collect::<Vec<_>>())
    };
    let all = row("all").ok_or_else(|| format!("no sum in {table}"))?;
    assert_eq!(all[1], "6", "{table}");
    let values = |l: &&str| l.contains("set bits").then(|| l.split_whitespace().nth(3)?.parse::<usize>().ok())?;
    assert_eq!(table.lines().filter_map(|l| values(&l)).sum::<usize>(), 6, "{table}");
    success(place.train("mixed", &["--steps", "2", "--mix", "recall:0.5"]).output()?)?;
    assert!(refusal(place.train("mixed", &["--steps", "3", "--resume"]).output()?)?.contains("--mix: is none"));
    let bad = place.run(&["train", "--mix", "recall:2", "--out", "x", "--steps", "1"])?;
    assert!(String::from_utf8(bad.stderr)?.contains("is not recall:SHARE"));
    assert!(refusal(
        place.run(&[
            "train", "--mix", "recall:1", "--out", "x", "--preset", "micro", "--window", "32", "--steps", "1"
        ])?
    )?
    .contains("a window of 32 holds"));
    Ok(())
}

#[test]
fn bad_input_is_refused_by_name() -> Any {
    let place = Place::new()?;
    success(place.train("run", &["--steps", "3"]).output()?)?;
    let again = |flags: &[&str]| -> Any<String> { refusal(place.train("run", flags).output()?) };
    assert!(again(&["--steps", "6"])?.contains("step-00000003 exists; go on with --resume"));
    let changed = again(&["--steps", "6", "--resume", "--lr", "0.5"])?;
    assert_eq!(changed, "error: --lr: is 0.5, the run to resume has 0.002");
    assert!(again(&["--steps", "6", "--resume", "--partner-form", "summary"])?.contains("model: is"));
    let window = |window: &str| -> Any<String> {
        refusal(
            place
                .run(&["train", "texts", "--out", "other", "--preset", "micro", "--steps", "6", "--window", window])?,
        )
    };
    assert!(window("65")?.contains("--window: 65 is not a multiple of the chunk, 16"));
    assert!(window("16k")?.contains("16384 characters are more than"));
    assert!(!place.path("other").exists(), "a refused run leaves a directory");
    std::fs::write(place.path("texts/0.txt"), "Another text.".repeat(90))?;
    assert!(again(&["--steps", "6", "--resume"])?.contains("the texts are not those"));

    std::fs::write(place.path("binary"), [b'a', 0xff, 0xfe])?;
    std::fs::write(place.path("empty"), [])?;
    let train = |text: &str| -> Any<String> { refusal(place.run(&["train", text, "--out", "new", "--steps", "1"])?) };
    assert_eq!(train("binary")?, "error: binary: is not UTF-8 text: byte 1 is invalid");
    assert_eq!(train("empty")?, "error: empty: has no text to train on");
    assert!(train("missing")?.contains("missing: No such file"));

    let generate = |model: &str, prompt: &str| -> Any<String> {
        refusal(place.run(&["generate", "--model", model, "--prompt", prompt])?)
    };
    assert!(generate("run", "a → b")?.contains("--prompt: character 3, line 1: '→' (U+2192) is not in Latin-1"));
    assert!(generate("texts", "a")?.contains("texts: is no character model"));
    let step = place.path("run/step-00000003");
    let whole = std::fs::read(step.join("model.safetensors"))?;
    std::fs::write(step.join("model.safetensors"), &whole[..whole.len() - 100])?;
    assert!(generate("run", "a")?.contains("model.safetensors"));
    std::fs::write(step.join("model.safetensors"), &whole)?;
    let config = std::fs::read_to_string(step.join("config.json"))?;
    std::fs::write(
        step.join("config.json"),
        config.replace("\"intermediate_size\": 192", "\"intermediate_size\": 64"),
    )?;
    let shape = generate("run", "a")?;
    assert!(shape.contains("gate_proj.weight is [192, 64], the configuration says [64, 64]"), "{shape}");
    Ok(())
}

#[test]
fn a_full_disk_keeps_the_checkpoint_before() -> Any {
    let place = Place::new()?;
    success(place.train("run", &["--steps", "3", "--quiet"]).output()?)?;
    let before = weights(&place.path("run/step-00000003"))?;
    // Files of at most 1 MiB, as if the disk were full then; the signal is ignored, so that writing fails.
    let train = place.train("run", &["--steps", "6", "--resume", "--quiet"]);
    let mut limited = Command::new("bash");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 1024; exec \"$@\"", "bash"]).arg(train.get_program());
    let error = limited.args(train.get_args()).output()?;
    let stderr = String::from_utf8(error.stderr)?;
    assert!(!error.status.success() && stderr.contains("safetensors"), "{stderr}");
    let left: Vec<String> = std::fs::read_dir(place.path("run"))?
        .map(|e| Ok(e?.file_name().to_string_lossy().into_owned()))
        .collect::<std::io::Result<_>>()?;
    assert!(left.iter().all(|n| n == "log.jsonl" || n == "step-00000003"), "{left:?}");
    assert_eq!(weights(&place.path("run/step-00000003"))?, before);
    success(place.train("run", &["--steps", "6", "--resume", "--quiet"]).output()?)?;
    assert_eq!(log(&place.path("run"))?.len(), 6);
    Ok(())
}

#[test]
fn an_exported_model_is_used_and_trained_on() -> Any {
    let place = Place::new()?;
    success(place.train("run", &["--steps", "6", "--quiet"]).output()?)?;
    success(place.run(&["export", "--model", "run", "--out", "small"])?)?;
    let bits = |model: &str| -> Any<f64> {
        let line = success(place.run(&["eval", "--model", model, "texts/1.txt"])?)?;
        Ok(line.split_whitespace().nth(3).ok_or("no bits")?.parse()?)
    };
    let (exact, rounded) = (bits("run")?, bits("small")?);
    assert!((exact - rounded).abs() < 0.02 * exact, "{rounded} where f32 has {exact}");
    let index: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(place.path("small/model.safetensors.index.json"))?)?;
    let files: std::collections::BTreeSet<&str> =
        index["weight_map"].as_object().ok_or("no map")?.values().filter_map(|f| f.as_str()).collect();
    for file in files {
        assert!(std::fs::metadata(place.path("small").join(file))?.len() <= 16 << 20, "{file}");
    }
    assert!(refusal(place.run(&["export", "--model", "run", "--out", "small"])?)?.contains("small exists"));
    let from = |run: &str, stages: &str| {
        let text = format!(
            "train texts --out {run} --preset micro --stages {stages} --window 128 --batch 2 --micro-batch 2 --steps 2 \
             --quiet --from small"
        );
        place.run(&text.split(' ').collect::<Vec<_>>())
    };
    success(from("longer", "0,1")?)?;
    let first = std::fs::read_to_string(place.path("longer/log.jsonl"))?;
    let lines: Vec<serde_json::Value> = first.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    assert_eq!((lines[0]["moments"].as_str(), &lines[1]["moments"]), (Some("new"), &serde_json::Value::Null));
    assert!(lines[0]["bits_per_character"].as_f64().ok_or("no bits")? < 7.0, "{first}");
    let other = refusal(from("other", "0,1,2")?)?;
    assert!(other.contains("--from: small is") && other.contains("[0,1]") && other.contains("[0,1,2]"), "{other}");
    Ok(())
}

#[test]
fn windows_are_evaluated_by_position_and_by_context() -> Any {
    let place = Place::new()?;
    std::fs::write(place.path("texts/long.txt"), "One fish, two fish, red fish, blue fish. ".repeat(100))?;
    success(place.train("run", &["--steps", "3", "--quiet"]).output()?)?;
    let flags = ["eval", "--model", "run", "texts", "--window", "2k", "--contexts", "128,1k", "--json", "eval.json"];
    let table = success(place.run(&flags)?)?;
    assert!(table.contains("0 to 32") && table.contains("1024 to 2048") && table.contains("gain"), "{table}");
    let json: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(place.path("eval.json"))?)?;
    let positions = json["positions"].as_array().ok_or("no positions")?;
    assert_eq!((positions.len(), &positions[0]), (7, &serde_json::json!([0, 32])));
    let rows = json["bits_by_context"].as_array().ok_or("no rows")?;
    assert!(!rows.is_empty() && rows.iter().all(|r| r.as_array().is_some_and(|r| r.len() == 2)), "{json}");
    let bits = json["bits_by_position"][0][1].as_f64().ok_or("no bits")?;
    assert!(bits > 1.0 && bits < 9.0, "{bits}");
    assert!(refusal(place.run(&["eval", "--model", "run", "texts", "--window", "100"])?)?.contains("--window: 100 is"));
    Ok(())
}

#[test]
fn the_retrofit_continues_a_text_with_a_character_model() -> Any {
    let place = Place::new()?;
    success(place.train("run", &["--steps", "3", "--quiet"]).output()?)?;
    let run = |model: &str, flags: &[&str]| -> Any<Output> {
        let mut retrofit = Command::new(env!("CARGO_BIN_EXE_bfly-retrofit"));
        retrofit.current_dir(place.0.path()).args(["--model", model, "--prompt", "One fish", "-n", "20", "--quiet"]);
        Ok(retrofit.args(flags).output()?)
    };
    let own = success(place.run(&["generate", "--model", "run", "--prompt", "One fish", "-n", "20"])?)?;
    for model in ["run", "run/step-00000003"] {
        assert_eq!(success(run(model, &[])?)?, own);
    }
    for (flags, named) in [
        (&["--stock"][..], "flags of butterfly attention and recall: not for a character model"),
        (&["--ctx", "64k"], "--ctx: not"),
        (&["--json", "report.json"], "--json: not"),
    ] {
        let said = refusal(run("run", flags)?)?;
        assert!(said.contains(named), "{said}");
    }
    assert!(!place.path("report.json").exists());
    Ok(())
}

#[test]
fn the_model_of_the_sources_continues_a_text_with_no_flag() -> Any {
    let place = Place::new()?;
    let text = success(place.run(&["generate", "--prompt", "import ", "-n", "40"])?)?;
    // Greedy: letters of a text, which an untrained model does not give.
    let letters = text.trim_end().chars().filter(|c| c.is_ascii_alphanumeric() || " ._\n".contains(*c)).count();
    assert!(text.starts_with("import ") && letters > 40, "{text:?}");
    let bits = success(place.run(&["eval", "texts/0.txt"])?)?;
    let bits: f64 = bits.split_whitespace().nth(3).ok_or("no bits")?.parse()?;
    assert!(bits < 2.0, "{bits} bits a character of English");
    Ok(())
}

#[test]
fn a_stream_is_timed_after_texts_of_several_lengths() -> Any {
    let place = Place::new()?;
    success(place.train("run", &["--steps", "3", "--quiet"]).output()?)?;
    let flags = ["stream", "--model", "run", "--at", "8,100", "--count", "5", "--json", "times.json"];
    let table = success(place.run(&flags)?)?;
    assert_eq!(table.lines().count(), 3, "{table}");
    let json: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(place.path("times.json"))?)?;
    let rows = json["streams"].as_array().ok_or("no streams")?;
    assert_eq!(rows.iter().map(|r| r["read"].as_u64()).collect::<Vec<_>>(), [Some(8), Some(100)]);
    for row in rows {
        let seconds = row["seconds"].as_array().ok_or("no seconds")?;
        assert!(seconds.len() == 5 && seconds.iter().all(|s| s.as_f64().is_some_and(|s| s > 0.0)), "{row}");
    }
    Ok(())
}

#[test]
fn several_ranks_are_refused_by_name_where_they_cannot_run() -> Any {
    let place = Place::new()?;
    let ranks = |count: &str| {
        let mut command = place.train("run", &["--steps", "3"]);
        let variables = [("RANK", "0"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29400")];
        command.envs(variables).env("WORLD_SIZE", count).output()
    };
    assert!(refusal(ranks("3")?)?.contains("3 windows in parts of 2 are 2, which 3 ranks cannot share evenly"));
    if cfg!(not(feature = "nccl")) {
        let output = ranks("2")?;
        let stderr = String::from_utf8(output.stderr)?;
        assert!(!output.status.success() && stderr.contains("no NCCL (cargo feature `nccl`)"), "{stderr}");
    }
    assert!(!place.path("run").exists(), "a refused run leaves a directory");
    Ok(())
}
