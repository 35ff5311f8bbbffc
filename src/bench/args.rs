//! The flags of `bfly-bench`.

use super::{fit, kernel, ladder};
use crate::cli::{parse_bytes, parse_size, short_count, ModelArgs};
use crate::error::{Error, Result};
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Measures: the same prompts through stock and retrofit (and other engines) in turns, how far each gets in so much memory, and
/// kernels against what the machine itself reaches.
#[derive(Debug, Parser)]
#[command(name = "bfly-bench", version, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Cli {
    /// What is measured.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  # Stock and retrofit side by side from 32k to 1M tokens; taken up again where it was cut off
  bfly-bench ladder --model qwen2.5-coder-0.5b.gguf --dtype bf16 --out ladder.json

  # The largest context of each in 10 and in 24 GB
  bfly-bench fit --model qwen2.5-coder-0.5b.gguf --dtype bf16 --memory-budget 10G,24G --out fit.json

  # Every kernel against the machine's own copy and matmul
  bfly-bench kernel --out kernels.json

  # Figures of a ladder and of kernels
  bfly-plot ladder.json kernels.json";

const LADDER_EXAMPLES: &str = "\
Examples:
  # The ladder as published: stock and retrofit, 32k to 1M, five runs each
  bfly-bench ladder --model qwen2.5-coder-0.5b.gguf --dtype bf16 --out ladder.json

  # Other settings beside the defaults
  bfly-bench ladder --model MODEL --variants stock,retrofit,retrofit:window=1024,layers=0-3,7 --out ladder.json

  # HF transformers in the same run, on the same ids
  bfly-bench ladder --model DIR --peer 'python3 integrations/transformers/peer.py --model DIR' --out ladder.json

  # What 10 GB cost in speed: prefill chunks shrink to fit
  bfly-bench ladder --model MODEL --memory-budget 10G --out budget.json

  # A shape whose weights are not at hand
  bfly-bench ladder --model shapes/qwen2.5-7b/config.json --random-weights 1 --ctx 32k,256k --out shape.json";

const FIT_EXAMPLES: &str = "\
Examples:
  # The largest contexts of stock and retrofit in 10 and in 24 GB, each verified by a run that reads 64k tokens
  bfly-bench fit --model MODEL --memory-budget 10G,24G --out fit.json

  # A shape whose weights are not at hand, in 4 bits
  bfly-bench fit --model shapes/qwen3-4b --random-weights 1 --dtype q4_0 --memory-budget 10G,24G --out fit.json

  # Other settings, searched up to 4M tokens, each read to its end
  bfly-bench fit --model MODEL --memory-budget 24G --variants retrofit,retrofit:window=4k --most 4M --read 4194296 \
      --out fit.json";

const KERNEL_EXAMPLES: &str = "\
Examples:
  # All of them
  bfly-bench kernel --out kernels.json

  # Two of them, on a CPU, on small shapes
  bfly-bench kernel --kernel attention_prefill,gated --device cpu --small";

/// What is measured.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// End-to-end runs over rising contexts: every variant and peer in turns, every sample kept.
    #[command(after_help = LADDER_EXAMPLES)]
    Ladder(Box<LadderArgs>),
    /// The largest context of every variant within memory budgets: found by arithmetic, then verified by a run.
    #[command(after_help = FIT_EXAMPLES)]
    Fit(Box<FitArgs>),
    /// Single kernels: TFLOP/s and GB/s against ceilings measured in the same process.
    #[command(after_help = KERNEL_EXAMPLES)]
    Kernel(KernelArgs),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// What is measured.
#[derive(Debug, Clone, Args)]
pub struct SubjectArgs {
    /// What is run: stock, retrofit, retrofit:KEY=VALUE,.. with keys as the flags of bfly-retrofit (window, sink-tokens,
    /// partner, layers, ...), and to compare with snapkv:budget=1024,window=64,kernel=5 or keydiff:budget=1024,block=128. A
    /// KEY=VALUE belongs to the name with a colon before it. May be repeated.
    #[arg(long, value_name = "LIST", default_value = "stock,retrofit")]
    pub variants: Vec<String>,
    /// Documents of the prompt, as scripts/fetch_texts.py lays them out. Not read where the model has no tokenizer: then the
    /// prompt is random ids.
    #[arg(long, value_name = "DIR", default_value = "texts")]
    pub texts: PathBuf,
    /// Where weights come from and how they are held.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Weights drawn from a seed: --model is then a config.json, or a directory with one. Speed and memory only, and the
    /// results say so.
    #[arg(long, value_name = "SEED", help_heading = "Model")]
    pub random_weights: Option<u64>,
}

/// A ladder to climb.
#[derive(Debug, Args)]
pub struct LadderArgs {
    /// Contexts, each of a prompt and the new tokens after it.
    #[arg(long, value_name = "LIST", default_value = "32k,64k,128k,256k,512k,1M", value_delimiter = ',',
          value_parser = parse_size)]
    pub ctx: Vec<usize>,
    /// Another engine, as a command that speaks the protocol of integrations/transformers/README.md. May be repeated.
    #[arg(long = "peer", value_name = "COMMAND")]
    pub peers: Vec<String>,
    /// Timed runs of each, interleaved; two where one takes over 30 s.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one)]
    pub repeats: usize,
    /// New tokens per run.
    #[arg(long, value_name = "TOKENS", default_value_t = 64, value_parser = at_least_one)]
    pub decode: usize,
    /// Tokens to a prefill chunk.
    #[arg(long, value_name = "TOKENS", default_value = "4096", value_parser = parse_size)]
    pub prefill_chunk: usize,
    /// Memory that a run may take, such as 10G: prefill chunks shrink to fit, and a run that does not fit is recorded so.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub memory_budget: Option<u64>,
    /// The results, written anew after every run. An earlier file of the same ladder is taken up where it was cut off.
    #[arg(long, value_name = "FILE.json")]
    pub out: PathBuf,
    /// No progress, only warnings and the table.
    #[arg(long, short)]
    pub quiet: bool,
    /// Model, variants and prompt; last, since the heading of its last group holds for whatever follows.
    #[command(flatten)]
    pub subject: SubjectArgs,
}

impl LadderArgs {
    /// The contexts, rising.
    ///
    /// # Errors
    /// One without room for a prompt.
    pub fn contexts(&self) -> Result<Vec<usize>> {
        let mut contexts = self.ctx.clone();
        contexts.sort_unstable();
        contexts.dedup();
        match contexts.first().filter(|c| **c <= self.decode) {
            None => Ok(contexts),
            Some(ctx) => {
                let message =
                    format!("{ctx} leaves no room for a prompt before the {} tokens of --decode", self.decode);
                Err(Error::usage("--ctx", message))
            }
        }
    }
}

/// Budgets to fill.
#[derive(Debug, Args)]
pub struct FitArgs {
    /// Memory that a run may take: weights, cache, activations. One or more, such as 10G,24G.
    #[arg(long, value_name = "LIST", required = true, value_delimiter = ',', value_parser = parse_bytes)]
    pub memory_budget: Vec<u64>,
    /// Largest context that is considered; all are whole multiples of 1k.
    #[arg(long, value_name = "TOKENS", default_value = "1M", value_parser = parse_size)]
    pub most: usize,
    /// Tokens that the verifying run reads, or as many as the context that was found has room for. What the cache takes does
    /// not depend on it [default: 64k, or what --most has room for]
    #[arg(long, value_name = "TOKENS", value_parser = parse_size)]
    pub read: Option<usize>,
    /// New tokens that it makes after them.
    #[arg(long, value_name = "TOKENS", default_value_t = 8, value_parser = at_least_one)]
    pub decode: usize,
    /// Tokens to a prefill chunk, where the budget has room for as many; 128 are enough to fit.
    #[arg(long, value_name = "TOKENS", default_value = "4096", value_parser = parse_size)]
    pub prefill_chunk: usize,
    /// The results, written anew after every run; an earlier file is replaced.
    #[arg(long, value_name = "FILE.json")]
    pub out: PathBuf,
    /// No progress, only warnings and the table.
    #[arg(long, short)]
    pub quiet: bool,
    /// Model, variants and prompt; last, since the heading of its last group holds for whatever follows.
    #[command(flatten)]
    pub subject: SubjectArgs,
}

impl FitArgs {
    /// The budgets, rising.
    pub fn budgets(&self) -> Vec<u64> {
        let mut budgets = self.memory_budget.clone();
        budgets.sort_unstable();
        budgets.dedup();
        budgets
    }

    /// The largest context that is considered, and the most tokens that a run reads.
    ///
    /// # Errors
    /// Flags that leave no context to consider, or no room for a prompt or for what is to be read.
    pub fn limits(&self) -> Result<(usize, usize)> {
        let (least, most) = (short_count(fit::STEP), self.most / fit::STEP * fit::STEP);
        if most == 0 {
            let message = format!("{} is less than {least}, the smallest context that is considered", self.most);
            return Err(Error::usage("--most", message));
        }
        if self.decode >= fit::STEP {
            let message = format!(
                "{} tokens leave no room for a prompt in {least}, the smallest context that is considered",
                self.decode
            );
            return Err(Error::usage("--decode", message));
        }
        let room = most - self.decode;
        match self.read.filter(|read| *read > room) {
            None => Ok((most, self.read.unwrap_or(room.min(DEFAULT_READ)))),
            Some(read) => {
                let (decode, most) = (self.decode, short_count(most));
                Err(Error::usage(
                    "--read",
                    format!("{read} tokens and the {decode} of --decode are more than --most {most}"),
                ))
            }
        }
    }
}

/// `--read` where it is not given.
const DEFAULT_READ: usize = 64 << 10;

/// Kernels to time.
#[derive(Debug, Args)]
pub struct KernelArgs {
    /// Which [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::builder::PossibleValuesParser::new(kernel::NAMES))]
    pub kernel: Vec<String>,
    /// Shapes that a CPU runs in a moment.
    #[arg(long)]
    pub small: bool,
    /// Element type [default: bf16, on a CPU f32]
    #[arg(long, value_name = "TYPE", value_parser = ["bf16", "f16", "f32"])]
    pub dtype: Option<String>,
    /// auto, cpu, cuda or cuda:1.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Samples of each; one is the mean of a few launches.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = at_least_one)]
    pub samples: usize,
    /// Where the results go, as JSON.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// No progress, only the table.
    #[arg(long, short)]
    pub quiet: bool,
}

/// Parses a whole number from 1 up.
pub(crate) fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) | Err(_) => Err("not a whole number from 1 up".into()),
        Ok(n) => Ok(n),
    }
}

/// Runs it.
///
/// # Errors
/// See [`ladder::run`], [`fit::run`] and [`kernel::run`].
pub fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        Command::Ladder(args) => ladder::run(args),
        Command::Fit(args) => fit::run(args),
        Command::Kernel(args) => kernel::run(args),
        // Needs the command itself, which the binary has.
        Command::Completions { .. } => Ok(()),
    }
}
