//! bfly-bench: ladders with variants and peers, resuming, random weights, largest contexts, kernels, and bad input.

mod kernels;
mod ladder;
mod max_context;
mod peers;
mod prompts;
mod random;
mod resume;

use crate::common::*;
use assert_cmd::Command;
use bfly::checkpoint::{Checkpoint, WeightDtype, WeightFormat};
use bfly::eval::report::{hash, read, Kernels, Ladder, LadderRun, KERNELS, LADDER};
use bfly::eval::texts::TextStream;
use bfly::generate::{watch, Request, Sampler, Sampling};
use bfly::retrofit::Settings;
use bfly::storage::{Ggml, Storage};
use bfly::tensors::TensorSpec;
use bfly::weights::Weights;
use candle_core::Device;
use serde_json::{json, Value};
use std::path::{Path, PathBuf};

/// A place for a ladder's file, and the flags that most tests share: a tiny checkpoint without a tokenizer, on the CPU.
struct Place {
    dir: tempfile::TempDir,
    model: String,
}

/// The retrofit that these short contexts can hold.
const RETROFIT: &str = "retrofit:block=16,window=32";

impl Place {
    fn new() -> Any<Self> {
        Ok(Self { dir: tempfile::tempdir()?, model: golden_dir("qwen2").to_string_lossy().into_owned() })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn out(&self) -> PathBuf {
        self.path("ladder.json")
    }

    fn ladder(&self, flags: &[&str]) -> Command {
        let mut command = bench("ladder");
        command.args(["--model", &self.model, "--device", "cpu", "--threads", "1", "--decode", "8"]);
        command.arg("--out").arg(self.out()).args(flags);
        command
    }

    /// Runs it and reads what it wrote.
    fn run_ladder(&self, flags: &[&str]) -> Any<Ladder> {
        self.ladder(flags).assert().success();
        Ok(read(&self.out(), LADDER)?)
    }

    /// Runs it where it must refuse: one error, nothing on stdout, and the file as it was.
    fn refuses(&self, flags: &[&str], says: &[&str]) {
        let before = std::fs::read(self.out()).ok();
        refused(&mut self.ladder(flags), says);
        assert!(std::fs::read(self.out()).ok() == before, "{flags:?} touched the file");
    }

    /// Rewrites the file.
    fn edit(&self, change: impl FnOnce(&mut Value)) -> Any {
        let mut value = serde_json::from_str(&std::fs::read_to_string(self.out())?)?;
        change(&mut value);
        Ok(std::fs::write(self.out(), value.to_string())?)
    }
}

fn bench(command: &str) -> Command {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_bfly-bench"));
    bench.arg(command);
    bench
}

fn refused(command: &mut Command, says: &[&str]) {
    let out = command.output().expect("the binary runs");
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(2), "{stderr}");
    assert!(!stderr.contains("panicked") && out.stdout.is_empty(), "{stderr}");
    assert_eq!(stderr.lines().filter(|l| l.starts_with("error:")).count(), 1, "{stderr}");
    for word in says {
        assert!(stderr.contains(word), "should say `{word}`: {stderr}");
    }
}

/// The command of the fake peer.
fn peer(args: &str) -> String {
    format!("python3 {}/tests/fixtures/bench/peer.py {args}", env!("CARGO_MANIFEST_DIR"))
}

fn run<'a>(ladder: &'a Ladder, variant: &str, ctx: usize) -> &'a LadderRun {
    ladder.runs.iter().find(|r| r.variant == variant && r.ctx == ctx).expect("the ladder has the run")
}

/// The first ids that the tiny checkpoint is given.
fn prompt(tokens: usize) -> Any<Vec<u32>> {
    let checkpoint = open(&golden_dir("qwen2").to_string_lossy())?;
    Ok(TextStream::open(&checkpoint, Path::new("none"), tokens, 0, &|_, _, _| ())?.ids)
}
