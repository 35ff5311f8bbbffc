//! What `bfly-char train` starts from: texts, model, weights and the other ranks.

use super::TrainArgs;
use crate::char::{checkpoint, CharConfig, CharModel, Corpus, Mix, MlpForm, Pairing, PartnerForm};
use crate::char::{RecallTask, Rematerialise, Windows};
use crate::cli::{human_bytes, open_device, Bars};
use crate::error::{Error, ErrorKind, Result};
use crate::ops::{describe, memory_of};
use crate::train::launch::Place;
use crate::train::ranks::{Alone, Ranks};
use crate::train::{AdamW, AdamWSettings, Objective};
use candle_core::Device;
use std::collections::BTreeMap;

/// Texts and their windows.
pub(super) struct Data {
    pub corpus: Corpus,
    pub mix: Mix,
    pub held_out: Option<Mix>,
}

impl TrainArgs {
    pub(super) fn config(&self) -> Result<CharConfig> {
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
        if self.mlp == "factored" {
            config.mlp = MlpForm::Factored;
        }
        if let Some(width) = self.mlp_width {
            if !(1..=1 << 20).contains(&width) {
                return Err(Error::usage("--mlp-width", format!("{width} is not in 1 ..= {}", 1 << 20)));
            }
            config.intermediate_size = width;
        }
        config.check()?;
        config.check_whole("--window", self.window)?;
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
    pub(super) fn settings(&self, config: &CharConfig) -> Result<BTreeMap<String, String>> {
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

impl TrainArgs {
    /// Whether layers are rematerialised, and the bytes that training then takes at most.
    fn rematerialise(&self, config: &CharConfig, device: &Device) -> Result<(Rematerialise, u64)> {
        let element = if device.is_cpu() { 4 } else { 2 };
        let rows = self.micro_batch.min(self.batch) * self.window;
        let [whole, layers] = [false, true].map(|again| config.training_bytes(rows, element, again));
        let room = memory_of(device).unwrap_or(u64::MAX);
        // Libraries and the allocator take some.
        let fits = |bytes: u64| bytes < room - room / 10;
        let again = match self.rematerialise.as_str() {
            "always" => true,
            "never" => false,
            _ => !fits(whole),
        };
        let bytes = if again { layers } else { whole };
        if !fits(bytes) {
            let message = format!(
                "{rows} characters at once take {}{}, the device has {}: lower --micro-batch or --window",
                human_bytes(bytes),
                if again { " with layers rematerialised" } else { "" },
                human_bytes(room)
            );
            return Err(Error::new(ErrorKind::Memory, "--micro-batch", message));
        }
        Ok((if again { Rematerialise::Layers } else { Rematerialise::Nothing }, bytes))
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

impl TrainArgs {
    /// Reads the texts and cuts them into windows.
    pub(super) fn data(&self, bars: &Bars) -> Result<Data> {
        let corpus = if self.texts.is_empty() { Corpus::default() } else { Corpus::read(&self.texts)? };
        if corpus.replaced > 0 {
            bars.warn(&format!("{} characters are not in Latin-1 and were replaced", corpus.replaced));
        }
        let windows = |documents: &[Vec<u8>], seed| Windows::new(documents, self.window, seed);
        let text = (!self.texts.is_empty()).then(|| windows(&corpus.training, self.seed)).transpose()?;
        let recall =
            |seed| -> Result<_> { Ok((RecallTask::over(self.window, seed)?.denser(), self.mix.unwrap_or(1.0))) };
        let mix = Mix::new(text, self.mix.map(|_| recall(self.seed)).transpose()?, self.batch)?;
        let held_out = match self.texts.is_empty() {
            true => Some(Mix::new(None, Some(recall(!self.seed)?), self.batch)?),
            false => windows(&corpus.held_out, 0).ok().map(|w| Mix::new(Some(w), None, self.batch)).transpose()?,
        };
        if held_out.is_none() {
            bars.warn("no document of a window's length is held out: nothing to evaluate on");
        }
        Ok(Data { corpus, mix, held_out })
    }

    /// The model with its first weights or those of --from, or the run to resume.
    pub(super) fn start(
        &self,
        config: CharConfig,
        device: &Device,
        hash: &str,
        bars: &Bars,
    ) -> Result<(CharModel, AdamW)> {
        let settings = self.settings(&config)?;
        let (rematerialise, bytes) = self.rematerialise(&config, device)?;
        let again = if rematerialise == Rematerialise::Layers { ", layers rematerialised" } else { "" };
        bars.say(&format!("{}: at most {} for training{again}", describe(device), human_bytes(bytes)));
        let model = CharModel::new(config, rematerialise, device)?;
        let initial = match &self.from {
            Some(from) => {
                let dir = checkpoint::resolve(from)?;
                let theirs = checkpoint::config(&dir)?;
                if theirs != *model.config() {
                    let [theirs, own] = [&theirs, model.config()].map(|c| serde_json::to_string(c).unwrap_or_default());
                    let message = format!("{} is {theirs}, the run is to be {own}", dir.display());
                    return Err(Error::usage("--from", message));
                }
                bars.say(&format!("starts from {}, with new moments", dir.display()));
                checkpoint::weights(&dir, model.layout(), device)?
            }
            None => model.layout().initial(self.seed, device)?,
        };
        let mut optimiser = AdamW::new(model.layout(), initial, AdamWSettings::default())?;
        match (checkpoint::resolve(&self.out).ok(), self.resume) {
            (Some(dir), true) => {
                let was = checkpoint::state(&dir)?;
                check_same(&was, hash, &settings)?;
                checkpoint::resume(&dir, &model, &mut optimiser, was.step)?;
            }
            (None, true) => return Err(Error::usage("--resume", format!("{} has no checkpoint", self.out.display()))),
            (Some(dir), false) => {
                return Err(Error::usage("--out", format!("{} exists; go on with --resume", dir.display())));
            }
            (None, false) => std::fs::create_dir_all(&self.out).map_err(|e| Error::io(&self.out, e))?,
        }
        Ok((model, optimiser))
    }

    /// The device of this process, and its place among the ranks of the run.
    pub(super) fn ranks(&self) -> Result<(Device, Box<dyn Ranks>)> {
        let Some(place) = Place::of(|name| std::env::var(name).ok())? else {
            return Ok((open_device(&self.device)?, Box::new(Alone)));
        };
        let parts = self.batch.div_ceil(self.micro_batch);
        if !parts.is_multiple_of(place.count) {
            let message = format!(
                "{} windows in parts of {} are {parts}, which {} ranks cannot share evenly",
                self.batch, self.micro_batch, place.count
            );
            return Err(Error::usage("--batch, --micro-batch", message));
        }
        if self.record.is_some() {
            return Err(Error::usage("--record", "is of a run with one rank"));
        }
        join(place, &self.device)
    }
}

#[cfg(feature = "nccl")]
fn join(place: Place, device: &str) -> Result<(Device, Box<dyn Ranks>)> {
    let name = if device == "auto" { format!("cuda:{}", place.local) } else { device.to_string() };
    let (device, own) = (open_device(&name)?, place.rank);
    // A rank that waits for a lost one in NCCL cannot return.
    let lost = move |rank: usize| {
        crate::cli::note(format_args!("rank {own}: rank {rank} has ended, and so this one stops"));
        std::process::exit(1);
    };
    let ranks = crate::train::nccl::Nccl::join(place, &device, lost)?;
    Ok((device, Box::new(ranks)))
}

#[cfg(not(feature = "nccl"))]
fn join(place: Place, _: &str) -> Result<(Device, Box<dyn Ranks>)> {
    let message = format!("{} ranks are asked for; this build has no NCCL (cargo feature `nccl`)", place.count);
    Err(Error::unsupported("training", message))
}
