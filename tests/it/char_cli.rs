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
