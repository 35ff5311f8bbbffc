//! The flags of `bfly-bench`.

use super::kernel::{self, KernelArgs};
use super::ladder;
use super::ladder_args::LadderArgs;
use super::max_context::{self, MaxContextArgs};
use crate::error::Result;
use clap::{Parser, Subcommand};

/// Measures speed and memory: stock, retrofits and other engines on the same prompts, the largest context of each
/// within a memory budget, and single kernels against the machine's copy and matmul rates.
#[derive(Debug, Parser)]
#[command(name = "bfly-bench", version, arg_required_else_help = true, after_help = EXAMPLES)]
pub struct Cli {
    /// Measurement to make.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  # Stock and retrofit, interleaved, from 32k to 1M tokens; the same command resumes an interrupted ladder
  bfly-bench ladder --model qwen2.5-coder-0.5b.gguf --dtype bf16 --out ladder.json

  # The largest context of each in 10 and in 24 GiB
  bfly-bench fit --model qwen2.5-coder-0.5b.gguf --dtype bf16 --memory-budget 10G,24G --out fit.json

  # Every kernel against the machine's copy and matmul rates
  bfly-bench kernel --out kernels.json

  # Figures of a ladder and of kernels
  bfly-plot ladder.json kernels.json";

const LADDER_EXAMPLES: &str = "\
Examples:
  # The published ladder: stock and retrofit, 32k to 1M, five runs each
  bfly-bench ladder --model qwen2.5-coder-0.5b.gguf --dtype bf16 --out ladder.json

  # Other settings next to the defaults
  bfly-bench ladder --model MODEL --variants stock,retrofit,retrofit:window=1024,layers=0-3,7 --out ladder.json

  # HF transformers in the same ladder, on the same token ids
  bfly-bench ladder --model DIR --peer 'python3 integrations/transformers/peer.py --model DIR' --out ladder.json

  # The cost in speed of a 10 GiB limit: prefill chunks shrink to fit
  bfly-bench ladder --model MODEL --memory-budget 10G --out budget.json

  # A model shape with random weights, from its config.json alone
  bfly-bench ladder --model shapes/qwen2.5-7b/config.json --random-weights 1 --ctx 32k,256k --out shape.json";

const FIT_EXAMPLES: &str = "\
Examples:
  # The largest contexts of stock and retrofit in 10 and in 24 GiB, each verified by a run that reads 64k tokens
  bfly-bench fit --model MODEL --memory-budget 10G,24G --out fit.json

  # A model shape with random weights, in 4 bits
  bfly-bench fit --model shapes/qwen3-4b --random-weights 1 --dtype q4_0 --memory-budget 10G,24G --out fit.json

  # Another window, searched up to 4M tokens, with the whole context read
  bfly-bench fit --model MODEL --memory-budget 24G --variants retrofit,retrofit:window=4k --most 4M --read 4194296 \
      --out fit.json";

const KERNEL_EXAMPLES: &str = "\
Examples:
  # All kernels
  bfly-bench kernel --out kernels.json

  # Two kernels on a CPU, on small shapes
  bfly-bench kernel --kernel attention_prefill,gated --device cpu --small";

const COMPLETIONS_EXAMPLE: &str = "\
Example:
  bfly-bench completions bash > ~/.local/share/bash-completion/completions/bfly-bench";

/// A measurement.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// End-to-end runs over rising contexts: variants and peers take turns, and every timed run is saved.
    #[command(after_help = LADDER_EXAMPLES)]
    Ladder(Box<LadderArgs>),
    /// The largest context of every variant within memory budgets: computed, then verified by a run.
    #[command(after_help = FIT_EXAMPLES)]
    Fit(Box<MaxContextArgs>),
    /// Single kernels: TFLOP/s and GB/s against ceilings measured in the same process.
    #[command(after_help = KERNEL_EXAMPLES)]
    Kernel(KernelArgs),
    /// Print a completion script for a shell.
    #[command(after_help = COMPLETIONS_EXAMPLE)]
    Completions {
        /// Shell that the script is for.
        shell: clap_complete::Shell,
    },
}

/// Runs the subcommand.
///
/// # Errors
/// See [`ladder::run`], [`max_context::run`] and [`kernel::run`].
pub fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        Command::Ladder(args) => ladder::run(args),
        Command::Fit(args) => max_context::run(args),
        Command::Kernel(args) => kernel::run(args),
        // Handled by the binary, which has the clap command.
        Command::Completions { .. } => Ok(()),
    }
}
