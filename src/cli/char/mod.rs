//! `bfly-char`: trains, continues and evaluates the native character model.

mod evaluate;
mod live;
mod native;
mod record;
mod setup;
mod train;
mod trained;

pub(super) use native::{character_model, run_character_model};

use super::{parse_count, SamplingArgs};
use crate::error::Result;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Trains and runs a causal butterfly language model over Latin-1 characters.
///
/// Every layer reads its own chunk of characters and one partner chunk, yet the last layer depends on the whole text that
/// the stages reach; a stream costs the same for every character. Trains on a GPU in bf16 or on a CPU in f32.
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

  # Continue a text with the model that the sources come with, or with one of your own
  bfly-char generate --prompt 'def main(' -n 200 --temperature 0.8
  bfly-char generate --model run --prompt 'It was a dark' -n 200 --temperature 0.8

  # Train on copy recall alone, then ask
  bfly-char train --mix recall:1 --out copier --preset micro --window 1k --steps 2000
  bfly-char recall --model copier

  # Bits per character of a text
  bfly-char eval --model run chapter.txt

  # Bits by position on held-out text, and what a longer context gains
  bfly-char eval --model run corpus/ --held-out --window 64k --contexts 1k,7k,33k,64k";

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
    /// Time characters of a stream after texts of several lengths.
    Stream(StreamArgs),
    /// Write the weights alone in bf16, in files of at most 16 MiB.
    Export(ExportArgs),
    /// Ask for marked values far back, and print the share of right letters by distance.
    Recall(RecallArgs),
}

/// Flags of `bfly-char train`.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Files, or directories whose files are all read: UTF-8 text; NUL separates documents. Characters that are not in
    /// Latin-1 become `?`. Documents are held out by their hash, 2 in 100 and at least one of two.
    #[arg(required_unless_present = "mix", value_name = "PATH")]
    pub texts: Vec<PathBuf>,
    /// Share of steps whose windows hold marked values and ask for them later, such as recall:0.1; these steps predict
    /// nothing else. Without texts every step is one of them.
    #[arg(long, value_name = "recall:SHARE", value_parser = parse_mix)]
    pub mix: Option<f64>,
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
    /// Projections of the MLP: dense, or factored, products of butterfly factors (docs/learned-transforms.md).
    #[arg(long, value_name = "FORM", default_value = "dense", value_parser = ["dense", "factored"])]
    pub mlp: String,
    /// Width of the MLP [default: the preset's, 8/3 of the channels]
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub mlp_width: Option<usize>,
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
    /// Keep only the input of each layer and compute the rest again, at a third more work: always, never, or auto, where
    /// the device's memory asks for it.
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = ["auto", "always", "never"])]
    pub rematerialise: String,
    /// Device: auto (the first GPU if there is one, else the CPU), cpu, cuda or cuda:INDEX. A GPU computes in bf16.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Seed of the weights and of the order of windows.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Go on from the last checkpoint in --out, with the same settings and texts.
    #[arg(long)]
    pub resume: bool,
    /// Start from the weights of a run or of one of its steps, with new moments: to go on with another window or text.
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    pub from: Option<PathBuf>,
    /// Write the first weights and what each step reads to DIR, for a comparison with another implementation.
    #[arg(long, value_name = "DIR", conflicts_with = "resume")]
    pub record: Option<PathBuf>,
    /// Print nothing but errors and warnings.
    #[arg(short, long)]
    pub quiet: bool,
}

/// A trained model and where it runs.
#[derive(Debug, Args)]
pub struct TrainedArgs {
    /// Directory of a run or of one of its steps, or hub id [default: the tiny model that the sources come with]
    #[arg(long, value_name = "DIR|ID")]
    pub model: Option<PathBuf>,
    /// Device: auto (the first GPU if there is one, else the CPU), cpu, cuda or cuda:INDEX. A GPU computes in bf16.
    #[arg(long, default_value = "auto")]
    pub device: String,
}

/// Flags of `bfly-char generate`.
#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// Model and device.
    #[command(flatten)]
    pub trained: TrainedArgs,
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
    /// Model and device.
    #[command(flatten)]
    pub trained: TrainedArgs,
    /// Texts in UTF-8, in Latin-1 alone; with --window also directories, as for training.
    #[arg(required = true, value_name = "PATH")]
    pub texts: Vec<PathBuf>,
    /// Evaluate windows of N characters by position, instead of each text as a whole.
    #[arg(long, value_name = "N", value_parser = parse_count)]
    pub window: Option<usize>,
    /// Windows to evaluate, at most.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub windows: usize,
    /// Also the bits of the same characters given contexts of these lengths, such as 1k,7k,33k,64k.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = parse_count)]
    pub contexts: Vec<usize>,
    /// Only the documents that training holds out.
    #[arg(long)]
    pub held_out: bool,
    /// Seed of the windows.
    #[arg(long, value_name = "N", default_value_t = 1 << 40)]
    pub seed: u64,
    /// Write every window's bits to FILE.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Flags of `bfly-char recall`.
#[derive(Debug, Args)]
pub struct RecallArgs {
    /// Model and device.
    #[command(flatten)]
    pub trained: TrainedArgs,
    /// Characters of a window: a multiple of the chunk.
    #[arg(long, value_name = "N", default_value = "1k", value_parser = parse_count)]
    pub window: usize,
    /// Hide the values in held-out windows of these texts, instead of random letters.
    #[arg(long, value_name = "PATH")]
    pub texts: Vec<PathBuf>,
    /// Write every value's place, distance and right letters to FILE.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Windows, of up to 8 values each.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub windows: usize,
    /// Seed of the windows; training uses those of --seed alone.
    #[arg(long, value_name = "N", default_value_t = 1 << 40)]
    pub seed: u64,
}

/// Flags of `bfly-char stream`.
#[derive(Debug, Args)]
pub struct StreamArgs {
    /// Model and device.
    #[command(flatten)]
    pub trained: TrainedArgs,
    /// Characters read before the timed ones; random letters.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1k,64k", value_parser = parse_count)]
    pub at: Vec<usize>,
    /// Characters timed.
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub count: usize,
    /// Write every character's seconds to FILE.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Flags of `bfly-char export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Directory of a run or of one of its steps.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Directory to make.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

fn parse_mix(text: &str) -> Result<f64, String> {
    let share = text.strip_prefix("recall:").and_then(|s| s.parse().ok()).filter(|s| *s > 0.0 && *s <= 1.0);
    share.ok_or_else(|| format!("{text:?} is not recall:SHARE with a share in (0, 1]"))
}

/// Runs a subcommand.
///
/// # Errors
/// As the subcommand says.
pub fn char(command: &CharCommand) -> Result<()> {
    match command {
        CharCommand::Train(args) => train::train(args),
        CharCommand::Generate(args) => trained::generate(args),
        CharCommand::Eval(args) => evaluate::eval(args),
        CharCommand::Stream(args) => trained::time_stream(args),
        CharCommand::Export(args) => trained::export(args),
        CharCommand::Recall(args) => trained::recall(args),
    }
}
