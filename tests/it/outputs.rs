//! Outputs lose nothing: what is written where, what is replaced, and what is left when a run is cut short.

use crate::common::*;
use serde_json::Value;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const BINARY: &str = env!("CARGO_BIN_EXE_bfly-retrofit");

/// A place for outputs.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Any<Self> {
        Ok(Self(tempfile::tempdir()?))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Names there, in order.
    fn names(&self) -> Any<Vec<String>> {
        let mut names: Vec<_> = std::fs::read_dir(self.0.path())?
            .map(|e| e.map(|e| e.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_, _>>()?;
        names.sort();
        Ok(names)
    }

    /// A shell's `script` there, in which `$B` is the binary with the tiny model and a prompt.
    fn shell(&self, script: &str) -> Any<Output> {
        let run = format!(
            "B() {{ '{BINARY}' --model '{}' --prompt hi -n 8 --ignore-eos \"$@\"; }}\n",
            fault("model").display()
        );
        let done =
            Command::new("timeout").args(["60", "bash", "-c"]).arg(run + script).current_dir(self.0.path()).output()?;
        assert_ne!(done.status.code(), Some(124), "{script} hangs");
        Ok(done)
    }
}

/// The tiny model with one prompt.
fn bfly(args: &[&str]) -> Any<Output> {
    let model = fault("model");
    Ok(Command::new(BINARY).arg("--model").arg(model).args(["--prompt", "hi", "-n", "2", "-q"]).args(args).output()?)
}

fn json(path: &Path) -> Any<Value> {
    Ok(serde_json::from_str(&std::fs::read_to_string(path)?)?)
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn stdout_is_the_report_s_text() -> Any {
    let place = Place::new()?;
    let out = Command::new(BINARY)
        .arg("--model")
        .arg(fault("stream-byte-pieces"))
        .args(["--prompt", "a", "-n", "20", "-q", "--json"])
        .arg(place.path("a.json"))
        .output()?;
    let text = json(&place.path("a.json"))?["text"].as_str().ok_or("no text")?.to_string();
    assert!(text.contains("bcd"), "{text}");
    assert_eq!(String::from_utf8(out.stdout)?, text + "\n");
    Ok(())
}

#[test]
fn a_stdout_that_cannot_be_written_is_an_error_and_the_report_is_kept() -> Any {
    let place = Place::new()?;
    let done = place.shell("B -q --json a.json > /dev/full; echo $?")?;
    assert_eq!(done.stdout, b"2\n");
    assert!(stderr(&done).contains("stdout: cannot be written: No space left"), "{}", stderr(&done));
    assert!(json(&place.path("a.json"))?["token_ids"].is_array());
    for command in ["--help", "completions bash", "--version"] {
        let done = place.shell(&format!("'{BINARY}' {command} > /dev/full; echo $?"))?;
        assert!(done.stdout == b"2\n" && !stderr(&done).contains("panicked"), "{command}: {}", stderr(&done));
    }
    Ok(())
}

#[test]
fn a_reader_of_stdout_that_leaves_costs_nothing_else() -> Any {
    let place = Place::new()?;
    let done = place.shell("B -q --json a.json | true; echo ${PIPESTATUS[0]}")?;
    assert_eq!((done.stdout.as_slice(), stderr(&done).as_str()), (&b"0\n"[..], ""));
    assert!(json(&place.path("a.json"))?["token_ids"].is_array());
    Ok(())
}

#[test]
fn a_stderr_that_cannot_be_written_is_no_failure() -> Any {
    let place = Place::new()?;
    for (to, name) in [("2> /dev/full", "a.json"), ("2> >(true)", "b.json"), ("2>&-", "c.json")] {
        let done = place.shell(&format!("B --json {name} {to} > /dev/null; echo $?"))?;
        assert_eq!(done.stdout, b"0\n", "{to}");
        assert!(place.path(name).exists(), "{to}");
    }
    let done = place.shell("B --ctx 3 2> /dev/full; echo $?")?;
    assert_eq!(done.stdout, b"2\n", "an error that nobody reads is one all the same");
    Ok(())
}

#[test]
fn outputs_go_through_pipes_and_into_devices() -> Any {
    let place = Place::new()?;
    let done = place.shell("mkfifo f; cat f > got & B -q --json f > text; wait; echo $?")?;
    assert_eq!(done.stdout, b"0\n", "{}", stderr(&done));
    assert_eq!(json(&place.path("got"))?["kind"], "retrofit");
    assert!(std::fs::symlink_metadata(place.path("f"))?.file_type().is_fifo(), "the pipe is still there");
    let done = place.shell("mkfifo g; cat g > tensors & B -q --logits-out g > /dev/null; wait")?;
    let tensors = candle_core::safetensors::load(place.path("tensors"), &candle_core::Device::Cpu)?;
    assert!(tensors.contains_key("logits"), "{}", stderr(&done));

    let link = place.path("null");
    std::os::unix::fs::symlink("/dev/null", &link)?;
    for target in ["/dev/null", "null"] {
        let done = place.shell(&format!("B -q --json {target} --logits-out {target} > /dev/null; echo $?"))?;
        assert_eq!(done.stdout, b"0\n", "{target}: {}", stderr(&done));
    }
    assert!(
        std::fs::symlink_metadata(&link)?.is_symlink() && std::fs::metadata("/dev/null")?.file_type().is_char_device()
    );
    let done = place.shell("B -q --json /dev/full > /dev/null; echo $?")?;
    assert!(
        done.stdout == b"2\n" && stderr(&done).contains("--json /dev/full: cannot be written"),
        "{}",
        stderr(&done)
    );
    Ok(())
}

#[test]
fn a_report_to_dev_stdout_follows_the_text() -> Any {
    let place = Place::new()?;
    for script in ["B -q --json /dev/stdout > both", "B -q --json /dev/stdout | cat > both"] {
        let done = place.shell(script)?;
        assert!(done.status.success(), "{script}: {}", stderr(&done));
        let both = std::fs::read_to_string(place.path("both"))?;
        let (text, report) = both.split_once("\n{").ok_or("no report")?;
        let report: Value = serde_json::from_str(&format!("{{{report}"))?;
        assert_eq!(report["text"], text, "{script}");
    }
    assert_eq!(place.names()?, ["both"]);
    Ok(())
}

#[test]
fn a_link_to_an_earlier_report_stays_a_link() -> Any {
    let place = Place::new()?;
    let (real, link) = (place.path("real.json"), place.path("link.json"));
    std::os::unix::fs::symlink("real.json", &link)?;
    for _ in 0..2 {
        assert!(bfly(&["--json", &link.to_string_lossy()])?.status.success());
        assert!(std::fs::symlink_metadata(&link)?.is_symlink());
        assert_eq!(json(&real)?["kind"], "retrofit");
    }
    Ok(())
}

#[test]
fn outputs_replace_earlier_ones_of_their_kind_and_nothing_else() -> Any {
    let model = tiny_model(&[("other.json", br#"{"kind": "ladder"}"#), ("half.json", b"{"), ("empty.json", b"")])?;
    let at = |name: &str| model.path().join(name).to_string_lossy().into_owned();
    for (flag, name, says) in [
        ("--json", "tokenizer.json", "only an earlier report is overwritten"),
        ("--json", "config.json", "only an earlier report is overwritten"),
        ("--json", "other.json", "`kind` of `retrofit`"),
        ("--json", "half.json", "only an earlier report is overwritten"),
        ("--json", "model.safetensors", "is not JSON"),
        ("--logits-out", "model.safetensors", "not a safetensors file of logits and token_ids alone"),
        ("--logits-out", "config.json", "only an earlier file of logits is overwritten"),
    ] {
        let before = std::fs::read(at(name))?;
        let done = bfly(&[flag, &at(name)])?;
        let message = stderr(&done);
        assert!(done.status.code() == Some(2) && message.contains(says) && message.contains(name), "{name}: {message}");
        assert_eq!(std::fs::read(at(name))?, before, "{name}");
    }
    for (flag, name) in [("--json", "a.json"), ("--json", "empty.json"), ("--logits-out", "a.safetensors")] {
        for _ in 0..2 {
            let done = bfly(&[flag, &at(name)])?;
            assert!(done.status.success(), "{flag} {name}: {}", stderr(&done));
        }
    }
    Ok(())
}

#[test]
fn two_outputs_do_not_go_to_one_file() -> Any {
    let place = Place::new()?;
    let done = place.shell("B -q --json out --logits-out ./out; echo $?")?;
    assert!(done.stdout == b"2\n" && stderr(&done).contains("another output of this run"), "{}", stderr(&done));
    assert!(place.names()?.is_empty());
    Ok(())
}

#[test]
fn saving_into_an_earlier_patch_touches_its_own_file_only() -> Any {
    let place = Place::new()?;
    let patch = place.path("patch");
    let save = |layers: &str| bfly(&["--layers", layers, "--save", &patch.to_string_lossy()]);
    assert!(save("0")?.status.success());
    std::fs::write(patch.join("notes.txt"), "keep me")?;
    std::fs::create_dir(patch.join("runs"))?;
    std::fs::write(patch.join("bfly.json"), std::fs::read_to_string(patch.join("bfly.json"))?.replace("[0]", "[ 0 ]"))?;
    assert!(save("all")?.status.success());
    assert_eq!(std::fs::read_to_string(patch.join("notes.txt"))?, "keep me");
    assert!(patch.join("runs").is_dir());
    assert_eq!(std::fs::read_dir(&patch)?.count(), 3, "nothing else is left there");
    std::fs::write(patch.join("bfly.json"), r#"{"mine": 1}"#)?;
    let refused = save("0")?;
    assert!(refused.status.code() == Some(2) && stderr(&refused).contains("is not a patch"), "{}", stderr(&refused));
    assert_eq!(std::fs::read_to_string(patch.join("bfly.json"))?, r#"{"mine": 1}"#);
    Ok(())
}

/// Ends a run in its prefill.
fn cut_short(signal: &str, place: &Place) -> Any<Output> {
    let text = "long ".repeat(40_000);
    std::fs::write(place.path("prompt.txt"), text)?;
    let child = Command::new(BINARY)
        .arg("--model")
        .arg(fault("model"))
        .args([
            "--prompt-file",
            "prompt.txt",
            "--ctx",
            "1M",
            "--stock",
            "--prefill-chunk",
            "64",
            "-n",
            "1",
            "--device",
            "cpu",
        ])
        .args(["--json", "a.json", "--logits-out", "a.safetensors"])
        .current_dir(place.0.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let begin = Instant::now();
    while place.names()?.len() < 3 && begin.elapsed() < Duration::from_secs(30) {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(place.names()?.len(), 3, "the prompt and two temporary files");
    std::thread::sleep(Duration::from_millis(200));
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status()?.success());
    Ok(child.wait_with_output()?)
}

#[test]
fn signals_leave_no_file_and_say_which_they_were() -> Any {
    // Under nohup a child ignores SIGHUP as this process does, and the run goes on.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|l| l.strip_prefix("SigIgn:")).unwrap_or("0").trim();
    let hang_up = (u64::from_str_radix(ignored, 16)? & 1 == 0).then_some(("-HUP", 129));
    for (signal, code) in [("-INT", 130), ("-TERM", 143)].into_iter().chain(hang_up) {
        let place = Place::new()?;
        let done = cut_short(signal, &place)?;
        assert_eq!(done.status.code(), Some(code), "{signal}: {}", stderr(&done));
        assert_eq!(place.names()?, ["prompt.txt"], "{signal}");
    }
    Ok(())
}

#[test]
fn a_prompt_may_begin_with_a_dash() -> Any {
    let run = |args: &[&str]| -> Any<(Option<i32>, String, usize)> {
        let place = Place::new()?;
        let report = place.path("a.json");
        let model = fault("model");
        let done = Command::new(BINARY)
            .arg("--model")
            .arg(model)
            .args(["-n", "0", "-q"])
            .args(args)
            .arg("--json")
            .arg(&report)
            .output()?;
        let tokens = json(&report).ok().and_then(|r| r["prompt_tokens"].as_u64()).unwrap_or(0);
        Ok((done.status.code(), stderr(&done), tokens as usize))
    };
    for text in ["- one", "-", "--", "-5 degrees", "---", "--no-such-flag", "-x", "- one --json"] {
        assert_eq!(run(&["--prompt", text])?, (Some(0), String::new(), text.len()), "{text}");
    }
    assert_eq!(run(&["--prompt=--quiet"])?.2, "--quiet".len());
    for flag in ["--stock", "--ctx=5", "-n", "-n5", "-q", "--help"] {
        let (code, message, _) = run(&["--prompt", flag])?;
        assert!(code == Some(2) && message.contains(&format!("--prompt={flag}")), "{flag}: {message}");
    }
    let (code, message, _) = run(&["--prompt"])?;
    assert!(code == Some(2) && message.contains("--prompt=--json"), "{message}");
    Ok(())
}
