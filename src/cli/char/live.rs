//! What a training run shows and writes while it goes on: a live line, and `log.jsonl`.

use crate::char::CharConfig;
use crate::cli::{human_bytes, Bars, Output};
use crate::error::{Error, Result};
use crate::ops::{describe, device_memory};
use crate::train::TrainStep;
use candle_core::Device;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Dense bf16 operations per second by the makers' data sheets; a GPU's name contains the first part.
const PEAKS: &[(&str, f64)] =
    &[("H200", 989e12), ("H100", 989e12), ("A100", 312e12), ("L40S", 362e12), ("RTX 4090", 165e12)];

/// The speed of a run; evaluations and checkpoints do not count.
pub(super) struct Live {
    device: Device,
    /// Operations of a character, over the number of devices.
    flops: f64,
    peak: Option<f64>,
    first: Duration,
    spent: Duration,
    steps: u32,
}

impl Live {
    pub fn new(device: &Device, config: &CharConfig, ranks: usize) -> Self {
        let name = describe(device);
        let peak = PEAKS.iter().find(|(part, _)| name.contains(part)).map(|(_, peak)| *peak);
        let (first, spent) = Default::default();
        Self {
            device: device.clone(),
            flops: config.training_flops() as f64 / ranks as f64,
            peak,
            first,
            spent,
            steps: 0,
        }
    }

    /// Counts a step that began at `start`.
    pub fn step(&mut self, start: Instant) {
        self.spent += start.elapsed();
        if self.steps == 0 {
            self.first = self.spent;
        }
        self.steps += 1;
    }

    /// Characters per second of steps of `characters` each, without the first, in which kernels are loaded.
    pub fn rate(&self, characters: usize) -> f64 {
        let (steps, spent) = match self.steps {
            0 | 1 => (self.steps, self.spent),
            more => (more - 1, self.spent - self.first),
        };
        f64::from(steps) * characters as f64 / spent.as_secs_f64().max(1e-9)
    }

    /// Loss, speed, share of the device's peak (MFU) and memory.
    pub fn line(&self, done: &TrainStep, characters: usize) -> String {
        let (bits, rate) = (done.loss / std::f64::consts::LN_2, self.rate(characters));
        let speed = match self.peak {
            Some(peak) => format!(", MFU {:.1}%", 100.0 * rate * self.flops / peak),
            None => format!(", {:.2} TFLOP/s", rate * self.flops / 1e12),
        };
        let memory = device_memory(&self.device).map_or(String::new(), |m| format!(", {}", human_bytes(m.peak)));
        format!("{bits:.3} bits a character, {rate:.0} characters/s{speed}{memory}")
    }

    /// Shows the live line.
    pub fn show(&self, bars: &Bars, done: &TrainStep, characters: usize, steps: u64) {
        bars.show_with("steps", done.step, steps, &self.line(done, characters));
    }
}

/// `log.jsonl`: one object a step.
pub(super) struct Log {
    file: std::fs::File,
    path: PathBuf,
    /// Whether the moments are new though the weights are not: said with the first step.
    from: bool,
}

impl Log {
    /// Opens the log and removes what is beyond `steps`: of a run that ended after its last checkpoint.
    pub fn open(path: &Path, steps: u64, from: bool) -> Result<Self> {
        let fail = |e| Error::io(path, e);
        let old = if path.exists() { std::fs::read_to_string(path).map_err(fail)? } else { String::new() };
        let kept = old.lines().filter(|line| {
            let step = serde_json::from_str::<serde_json::Value>(line).ok().and_then(|v| v["step"].as_u64());
            step.is_some_and(|step| step <= steps)
        });
        let kept: String = kept.flat_map(|line| [line, "\n"]).collect();
        Output::reserve(path, "--out")?.write(kept.as_bytes())?;
        let file = std::fs::OpenOptions::new().append(true).open(path).map_err(fail)?;
        Ok(Self { file, path: path.into(), from: from && steps == 0 })
    }

    /// Writes step `s`; `recall` says that it predicted letters to recall alone.
    pub fn write(
        &mut self,
        s: &TrainStep,
        recall: bool,
        (characters, rate): (usize, f64),
        held_out: Option<f64>,
    ) -> Result<()> {
        let bits = s.loss / std::f64::consts::LN_2;
        let mut line = serde_json::json!({
            "step": s.step, "bits_per_character": bits, "gradient_norm": s.norm, "learning_rate": s.rate,
            "characters": s.step * characters as u64, "characters_per_second": rate,
        });
        if recall {
            line["task"] = "recall".into();
        }
        if let Some(bits) = held_out {
            line["held_out_bits_per_character"] = bits.into();
        }
        if std::mem::take(&mut self.from) {
            line["moments"] = "new".into();
        }
        writeln!(self.file, "{line}").map_err(|e| Error::io(&self.path, e))
    }
}
