//! `bfly-char`: trains, continues and evaluates the native character model.

use super::{parse_count, print, Bars, SamplingArgs};
use crate::char::{checkpoint, decode, encode, Batch, CharConfig, CharModel, Corpus, Pairing, PartnerForm};
use crate::char::{Rematerialise, Stream, Windows, END_OF_TEXT};
use crate::error::{At, Error, ErrorKind, Result};
use crate::generate::Sampler;
use crate::train::{AdamW, AdamWSettings, Objective, Schedule, TrainStep, Trainer};
use candle_core::{Device, Tensor};
use clap::{Args, Parser, Subcommand};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Trains and runs a causal butterfly language model over Latin-1 characters.
///
/// Every layer reads its own chunk of characters and one partner chunk, yet the last layer depends on the whole text that
/// the stages reach; a stream costs the same for every character. Runs on a CPU in f32.
#[derive(Debug, Parser)]
#[command(name = "bfly-char", version, after_help = EXAMPLES)]
pub struct CharCli {
    /// What to do.
    #[command(subcommand)]
    pub command: CharCommand,
}

const EXAMPLES: &str = "\
Examples:
  # Train the smallest model on a directory of texts
  bfly-char train books/ --out run --preset micro --window 1k --steps 500

  # Go on after an interruption, to more steps
  bfly-char train books/ --out run --preset micro --window 1k --steps 1000 --resume

  # Continue a text
  bfly-char generate --model run --prompt 'It was a dark' -n 200 --temperature 0.8

  # Bits per character of a text
  bfly-char eval --model run chapter.txt";

/// Subcommands of `bfly-char`.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)]
pub enum CharCommand {
    /// Train a model on texts.
    Train(TrainArgs),
    /// Continue a text, character by character.
    Generate(GenerateArgs),
    /// Print the bits per character of texts.
    Eval(EvalArgs),
}

/// Flags of `bfly-char train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Files, or directories whose files are all read: UTF-8 text; NUL separates documents. Characters that are not in
    /// Latin-1 become `?`. Documents are held out by their hash, 2 in 100 and at least one of two.
    #[arg(required = true, value_name = "PATH")]
    pub texts: Vec<PathBuf>,
    /// Directory of checkpoints and of the log, log.jsonl.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Sizes: full (d 768), small (384), tiny (128) or micro (64, chunks of 16).
    #[arg(long, value_name = "NAME", default_value = "tiny")]
    pub preset: String,
    /// Stages of the butterfly layers, such as 0,1,2,0,1,2 [default: the preset's]
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub stages: Option<Vec<u32>>,
    /// How butterfly layers read the partner chunk: raw or summary.
    #[arg(long, value_name = "FORM", default_value = "raw", value_parser = ["raw", "summary"])]
    pub partner_form: String,
    /// Partner of chunk c at stage s: shift (c - 2^s), or xor (c ^ 2^s, the published form, which reads the future).
    #[arg(long, value_name = "RULE", default_value = "shift", value_parser = ["shift", "xor"])]
    pub pairing: String,
    /// Characters of a training window: a multiple of the chunk.
    #[arg(long, value_name = "N", default_value = "4k", value_parser = parse_count)]
    pub window: usize,
    /// Windows of an optimiser step.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub batch: usize,
    /// Windows computed at once; the gradients of a step are summed.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub micro_batch: usize,
    /// Optimiser steps in all.
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub steps: usize,
    /// Largest learning rate.
    #[arg(long, value_name = "RATE", default_value_t = 2e-3)]
    pub lr: f64,
    /// Steps of the linear warm-up.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub warmup: u64,
    /// Steps between checkpoints.
    #[arg(long, value_name = "N", default_value_t = 500)]
    pub save_every: u64,
    /// Steps between evaluations on held-out text.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub eval_every: u64,
    /// Keep only the input of each layer and compute the rest again: less memory, a third more work.
    #[arg(long)]
    pub rematerialise: bool,
    /// Seed of the weights and of the order of windows.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Go on from the last checkpoint in DIR.
    #[arg(long)]
    pub resume: bool,
    /// Print nothing but errors and warnings.
    #[arg(short, long)]
    pub quiet: bool,
}

/// Flags of `bfly-char generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// Directory of a run or of one of its steps.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Text to continue, in Latin-1.
    #[arg(long, value_name = "TEXT", default_value = "", allow_hyphen_values = true)]
    pub prompt: String,
    /// Length and sampling.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Print time and memory to stderr.
    #[arg(long)]
    pub stats: bool,
}

/// Flags of `bfly-char eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Directory of a run or of one of its steps.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Texts in UTF-8, in Latin-1 alone.
    #[arg(required = true, value_name = "FILE")]
    pub texts: Vec<PathBuf>,
}

/// Runs a subcommand.
///
/// # Errors
/// As the subcommand says.
pub fn char(command: &CharCommand) -> Result<()> {
    match command {
        CharCommand::Train(args) => train(args),
        CharCommand::Generate(args) => generate(args),
        CharCommand::Eval(args) => eval(args),
    }
}

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

fn train(args: &TrainArgs) -> Result<()> {
    let (config, bars) = (args.config()?, Bars::new(args.quiet));
    if config.pairing == Pairing::Xor {
        bars.warn("xor pairs read later characters: the result is no language model");
    }
    let corpus = Corpus::read(&args.texts)?;
    if corpus.replaced > 0 {
        bars.warn(&format!("{} characters are not in Latin-1 and were replaced", corpus.replaced));
    }
    let mut windows = Windows::new(&corpus.training, args.window, args.seed)?;
    let held_out =
        (!corpus.held_out.is_empty()).then(|| Windows::new(&corpus.held_out, args.window, 0)).and_then(Result::ok);
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
            .map(|at| windows.batch(step * args.batch as u64 + at as u64, args.micro_batch.min(args.batch - at)))
            .collect();
        let done = trainer.step(&batches, args.batch * args.window)?;
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

/// Windows of held-out text that an evaluation reads, at most.
const EVALUATED: usize = 32;

/// Bits per character of held-out windows.
fn evaluate(model: &CharModel, weights: &Tensor, windows: &Windows, at_once: usize) -> Result<f64> {
    let (mut windows, mut sum, mut count) = (windows.clone(), 0f64, 0);
    let all = windows.per_epoch().min(EVALUATED);
    for at in (0..all).step_by(at_once) {
        let batch = windows.batch(at as u64, at_once.min(all - at));
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
        std::fs::write(path, kept).map_err(fail)?;
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

/// The model and weights of a directory.
fn open(path: &Path) -> Result<(CharModel, Tensor)> {
    let dir = checkpoint::resolve(path)?;
    let model = CharModel::new(checkpoint::config(&dir)?, Rematerialise::Nothing, &Device::Cpu)?;
    let weights = checkpoint::weights(&dir, model.layout(), &Device::Cpu)?;
    Ok((model, weights))
}

fn generate(args: &GenerateArgs) -> Result<()> {
    let (model, weights) = open(&args.model)?;
    let prompt = encode(&args.prompt, "--prompt")?;
    let (mut sampler, mut stream) = (Sampler::new(args.sampling.sampling())?, Stream::new(&model, &weights)?);
    let mut logits = stream.read(END_OF_TEXT)?;
    for symbol in &prompt {
        logits = stream.read(*symbol)?;
    }
    print(&args.prompt)?;
    let start = Instant::now();
    let mut made = 0;
    while made < args.sampling.max_new_tokens {
        let row = Tensor::new(logits.as_slice(), &Device::Cpu).and_then(|l| l.unsqueeze(0));
        let row = row.at("logits")?;
        let symbol = u8::try_from(sampler.sample(&row)?)
            .map_err(|_| Error::new(ErrorKind::Backend, "sampling", "a symbol beyond Latin-1"))?;
        if symbol == END_OF_TEXT && !args.sampling.ignore_eos {
            break;
        }
        print(decode(&[symbol]))?;
        logits = stream.read(symbol)?;
        made += 1;
    }
    print("\n")?;
    if args.stats {
        let each = start.elapsed().as_secs_f64() * 1e3 / made.max(1) as f64;
        let bytes = super::human_bytes(stream.bytes());
        super::note(format_args!(
            "{made} characters, {each:.2} ms each; {bytes} of keys and values, whatever the length"
        ));
    }
    Ok(())
}

fn eval(args: &EvalArgs) -> Result<()> {
    let (model, weights) = open(&args.model)?;
    for path in &args.texts {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let symbols = encode(&text, &path.display().to_string())?;
        if symbols.is_empty() {
            return Err(Error::usage(path.display(), "is empty"));
        }
        let batch = Batch::documents(&[&symbols], model.config().chunk);
        let nats: f64 = model.losses(&weights, &batch)?.iter().map(|l| f64::from(*l)).sum();
        let bits = nats / std::f64::consts::LN_2 / symbols.len() as f64;
        print(format!("{}  {} characters  {bits:.4} bits a character\n", path.display(), symbols.len()))?;
    }
    Ok(())
}
