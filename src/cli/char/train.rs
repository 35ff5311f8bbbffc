//! `bfly-char train`.

use super::TrainArgs;
use crate::char::{checkpoint, Batch, CharConfig, CharModel, Corpus, Mix, Pairing, PartnerForm};
use crate::char::{RecallTask, Rematerialise, Windows};
use crate::cli::{Bars, Output};
use crate::error::{Error, Result};
use crate::train::{AdamW, AdamWSettings, Objective, Schedule, TrainStep, Trainer};
use candle_core::{Device, Tensor};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

impl TrainArgs {
    fn config(&self) -> Result<CharConfig> {
        let mut config = CharConfig::preset(&self.preset)?;
        if let Some(stages) = &self.stages {
            config.stages.clone_from(stages);
        }
        if self.partner_form == "summary" {
            config.partner_form = PartnerForm::Summary;
        }
        if self.pairing == "xor" {
            config.pairing = Pairing::Xor;
        }
        config.check()?;
        if self.window == 0 || !self.window.is_multiple_of(config.chunk) {
            let message = format!("{} is not a multiple of the chunk, {} characters", self.window, config.chunk);
            return Err(Error::usage("--window", message));
        }
        for (flag, value) in [("--batch", self.batch), ("--micro-batch", self.micro_batch), ("--steps", self.steps)] {
            if value == 0 {
                return Err(Error::usage(flag, "must be at least 1"));
            }
        }
        if !(self.lr.is_finite() && self.lr > 0.0) {
            return Err(Error::usage("--lr", format!("{} is not a learning rate", self.lr)));
        }
        Ok(config)
    }

    /// What a resumed run must agree with. More steps are another schedule, which is allowed.
    fn settings(&self, config: &CharConfig) -> Result<BTreeMap<String, String>> {
        let config = serde_json::to_string(config).map_err(|e| Error::format("configuration", e))?;
        let numbers = [("--window", self.window), ("--batch", self.batch), ("--micro-batch", self.micro_batch)];
        let mut all: BTreeMap<_, _> = numbers.map(|(k, v)| (k.to_string(), v.to_string())).into();
        all.insert("--lr".into(), self.lr.to_string());
        all.insert("--mix".into(), self.mix.map_or("none".into(), |share| format!("recall:{share}")));
        all.insert("--warmup".into(), self.warmup.to_string());
        all.insert("--seed".into(), self.seed.to_string());
        all.insert("model".into(), config);
        Ok(all)
    }
}

/// Refuses to resume a run with other settings or text; names what changed.
fn check_same(was: &checkpoint::TrainingState, corpus: &str, settings: &BTreeMap<String, String>) -> Result<()> {
    for (flag, now) in settings {
        let before = was.settings.get(flag).map_or("not set", String::as_str);
        if before != now {
            return Err(Error::usage(flag, format!("is {now}, the run to resume has {before}")));
        }
    }
    if was.corpus != corpus {
        return Err(Error::usage("--resume", "the texts are not those that the run was trained on"));
    }
    Ok(())
}

pub(super) fn train(args: &TrainArgs) -> Result<()> {
    let (config, bars) = (args.config()?, Bars::new(args.quiet));
    if config.pairing == Pairing::Xor {
        bars.warn("xor pairs read later characters: the result is no language model");
    }
    let corpus = if args.texts.is_empty() { Corpus::default() } else { Corpus::read(&args.texts)? };
    if corpus.replaced > 0 {
        bars.warn(&format!("{} characters are not in Latin-1 and were replaced", corpus.replaced));
    }
    let windows = |documents: &[Vec<u8>], seed| Windows::new(documents, args.window, seed);
    let text = (!args.texts.is_empty()).then(|| windows(&corpus.training, args.seed)).transpose()?;
    let recall = |seed| -> Result<_> { Ok((RecallTask::over(args.window, seed)?, args.mix.unwrap_or(1.0))) };
    let mut mix = Mix::new(text, args.mix.map(|_| recall(args.seed)).transpose()?)?;
    let held_out = match args.texts.is_empty() {
        true => Some(Mix::new(None, Some(recall(!args.seed)?))?),
        false => windows(&corpus.held_out, 0).ok().map(|w| Mix::new(Some(w), None)).transpose()?,
    };
    if held_out.is_none() {
        bars.warn("no document of a window's length is held out: nothing to evaluate on");
    }
    let remat = if args.rematerialise { Rematerialise::Layers } else { Rematerialise::Nothing };
    let model = CharModel::new(config, remat, &Device::Cpu)?;
    let settings = args.settings(model.config())?;
    let initial = model.layout().initial(args.seed, &Device::Cpu)?;
    let mut optimiser = AdamW::new(model.layout(), initial, AdamWSettings::default())?;
    let existing = checkpoint::resolve(&args.out).ok();
    match (&existing, args.resume) {
        (Some(dir), true) => {
            let was = checkpoint::resume(dir, &model, &mut optimiser)?;
            check_same(&was, &corpus.hash, &settings)?;
        }
        (None, true) => return Err(Error::usage("--resume", format!("{} has no checkpoint", args.out.display()))),
        (Some(dir), false) => {
            return Err(Error::usage("--out", format!("{} exists; go on with --resume", dir.display())));
        }
        (None, false) => std::fs::create_dir_all(&args.out).map_err(|e| Error::io(&args.out, e))?,
    }
    bars.say(&format!(
        "{} parameters; {} characters to train on, {} held out; stages reach {} characters",
        model.layout().len(),
        corpus.training.iter().map(Vec::len).sum::<usize>(),
        corpus.held_out.iter().map(Vec::len).sum::<usize>(),
        model.config().reach() * model.config().chunk,
    ));
    let mut log = Log::open(&args.out.join("log.jsonl"), optimiser.steps())?;
    let schedule = Schedule { peak: args.lr, floor: args.lr / 10.0, warmup: args.warmup, steps: args.steps as u64 };
    let mut trainer = Trainer::new(model, optimiser, schedule);
    let (start, first) = (Instant::now(), trainer.optimiser().steps());
    for step in first..args.steps as u64 {
        let batches: Vec<Batch> = (0..args.batch)
            .step_by(args.micro_batch)
            .map(|at| mix.batch(step * args.batch as u64 + at as u64, args.micro_batch.min(args.batch - at)))
            .collect();
        let predicted = batches.iter().map(Batch::predicted).sum();
        let done = trainer.step(&batches, predicted)?;
        let rate = ((step + 1 - first) as usize * args.batch * args.window) as f64 / start.elapsed().as_secs_f64();
        let last = done.step == args.steps as u64;
        let held_out = match &held_out {
            Some(_) if !last && done.step % args.eval_every.max(1) != 0 => None,
            Some(w) => Some(evaluate(trainer.objective(), trainer.optimiser().weights(), w, args.micro_batch)?),
            None => None,
        };
        log.write(&done, rate, held_out)?;
        bars.show("steps", done.step, args.steps as u64);
        if let Some(bits) = held_out {
            let bits_now = done.loss / std::f64::consts::LN_2;
            bars.say(&format!(
                "step {}: {bits_now:.3} bits a character, held out {bits:.3}, {rate:.0} characters/s",
                done.step
            ));
        }
        if last || done.step % args.save_every.max(1) == 0 {
            let state =
                checkpoint::TrainingState { step: done.step, corpus: corpus.hash.clone(), settings: settings.clone() };
            let dir = checkpoint::save(&args.out, trainer.objective(), trainer.optimiser(), &state)?;
            bars.say(&format!("saved {}", dir.display()));
        }
    }
    Ok(())
}

/// Windows that an evaluation reads.
const EVALUATED: usize = 32;

/// Bits per character of held-out windows.
fn evaluate(model: &CharModel, weights: &Tensor, windows: &Mix, at_once: usize) -> Result<f64> {
    let (mut windows, mut sum, mut count) = (windows.clone(), 0f64, 0);
    for at in (0..EVALUATED).step_by(at_once) {
        let batch = windows.batch(at as u64, at_once.min(EVALUATED - at));
        sum += model.losses(weights, &batch)?.iter().map(|l| f64::from(*l)).sum::<f64>();
        count += batch.predicted();
    }
    Ok(sum / count as f64 / std::f64::consts::LN_2)
}

/// `log.jsonl`: one object a step.
struct Log(std::fs::File, PathBuf);

impl Log {
    /// Opens the log and removes what is beyond `steps`: of a run that ended after its last checkpoint.
    fn open(path: &Path, steps: u64) -> Result<Self> {
        let fail = |e| Error::io(path, e);
        let old = if path.exists() { std::fs::read_to_string(path).map_err(fail)? } else { String::new() };
        let kept = old.lines().filter(|line| {
            let step = serde_json::from_str::<serde_json::Value>(line).ok().and_then(|v| v["step"].as_u64());
            step.is_some_and(|step| step <= steps)
        });
        let kept: String = kept.flat_map(|line| [line, "\n"]).collect();
        Output::reserve(path, "--out")?.write(kept.as_bytes())?;
        Ok(Self(std::fs::OpenOptions::new().append(true).open(path).map_err(fail)?, path.into()))
    }

    fn write(&mut self, s: &TrainStep, rate: f64, held_out: Option<f64>) -> Result<()> {
        let bits = s.loss / std::f64::consts::LN_2;
        let mut line = serde_json::json!({
            "step": s.step, "bits_per_character": bits, "gradient_norm": s.norm, "learning_rate": s.rate,
            "characters_per_second": rate,
        });
        if let Some(bits) = held_out {
            line["held_out_bits_per_character"] = bits.into();
        }
        writeln!(self.0, "{line}").map_err(|e| Error::io(&self.1, e))
    }
}
