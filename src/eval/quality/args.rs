//! The flags of `bfly-quality-smoke`.

use super::{ablate, fidelity, join, layers, needle, positions, ruler, smoke};
use crate::error::Result;
use clap::{Parser, Subcommand};

/// Measures the quality of a retrofit against the stock model: next-token distributions and greedy text, on the same
/// tokens of real text.
///
/// Every figure is a mean over documents with its 95% confidence interval. --fail-below and --fail-above are gates for
/// CI: the exit code is 1 where a bound is missed, 2 where nothing could be measured.
#[derive(Debug, Parser)]
#[command(
    name = "bfly-quality-smoke",
    version,
    arg_required_else_help = true,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = EXAMPLES
)]
pub struct Cli {
    /// A measurement other than the smoke test.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Flags of the smoke test.
    #[command(flatten)]
    pub smoke: smoke::SmokeArgs,
}

const EXAMPLES: &str = "\
Examples:
  # The defaults against stock, up to the model's trained length
  bfly-quality-smoke --model qwen2.5-coder-0.5b.gguf --ctx 1k,4k,8k,16k,32k --out smoke.json

  # The defaults and other settings, on four documents
  bfly-quality-smoke --model MODEL --ctx 4k --documents 4 --variants retrofit,retrofit:window=1k,layers=0-11

  # In CI: exit code 1 where less than 90% of the likeliest tokens are stock's
  bfly-quality-smoke --model MODEL --ctx 2k --fail-below top1=0.9 --fail-above kl=0.1";

const RULER_EXAMPLES: &str = "\
Examples:
  # The eleven tasks that need no file, with stock and two retrofits; the same command resumes an interrupted run
  bfly-quality-smoke ruler --model MODEL --ctx 4k,8k --samples 50 \\
      --variants stock,retrofit,retrofit:window=1k --out ruler.json

  # Eviction rules, which must evict before they read the question
  bfly-quality-smoke ruler --model MODEL --ctx 8k --question-unseen \\
      --variants snapkv:budget=1k,keydiff:budget=1k --out unseen.json

  # A retrofit and an eviction rule at the same cache size
  bfly-quality-smoke ruler --model MODEL --ctx 8k --question-unseen \\
      --variants retrofit:kv=1/8,keydiff:kv=1/8 --out bytes.json

  # The three recall tasks, which are not RULER's and not in the default
  bfly-quality-smoke ruler --model MODEL --ctx 8k --tasks recall --chat --question-unseen --out recall.json

  # Six samples in parallel on one GPU
  bfly-quality-smoke ruler --model MODEL --ctx 32k --samples 50 --jobs 6 --out ruler.json

  # Write the prompts for another engine, and stop
  bfly-quality-smoke ruler --model MODEL --ctx 4k --tasks niah_single_2 --export niah.jsonl --export-only";

const FIDELITY_EXAMPLES: &str = "\
Examples:
  # What each size of key code costs on the answers of five tasks
  bfly-quality-smoke fidelity --model MODEL --ctx 32k --chat \\
      --variants stock,recall,recall:key-code=pair:2bit,recall:key-code=exact --out fidelity.json";

const NEEDLE_EXAMPLES: &str = "\
Examples:
  # Eleven depths at four lengths, three needles each
  bfly-quality-smoke needle --model MODEL --ctx 1k,2k,4k,8k --samples 3 --variants stock,retrofit --out needle.json";

const JOIN_EXAMPLES: &str = "\
Examples:
  # One GPU for each half of the tasks
  export RULER='bfly-quality-smoke ruler --model MODEL --ctx 32k'
  CUDA_VISIBLE_DEVICES=0 $RULER --tasks niah_single_1,niah_single_2 --out a.json &
  CUDA_VISIBLE_DEVICES=1 $RULER --tasks vt,cwe,fwe --out b.json; wait
  bfly-quality-smoke join a.json b.json --out ruler.json";

const LAYERS_EXAMPLES: &str = "\
Examples:
  # Rank layers by the loss on needle answers and write plans that keep the first K dense; four scores at a time
  bfly-quality-smoke layers --model MODEL --ctx 8k --jobs 4 --plans plans --out layers.json
  bfly-retrofit --model MODEL --plan plans/dense-4.json --prompt-file book.txt

  # Rank by swapping each layer alone: a third of the time, but it misses layers that compensate for each other
  bfly-quality-smoke layers --model MODEL --ctx 8k --rank alone --out alone.json

  # Rank by KL on text, without tasks
  bfly-quality-smoke layers --model MODEL --ctx 4k --tasks none --variants retrofit:window=1k

  # Rank by what exact recall of 512 tokens costs in decode steps; the plans mix dense layers and layers with recall
  bfly-quality-smoke layers --model MODEL --ctx 8k --rank-by text --variants recall:recall=512 --plans plans
  bfly-retrofit --model MODEL --plan plans/dense-2.json --prompt-file book.txt";

const ABLATE_EXAMPLES: &str = "\
Examples:
  # All settings, from the default retrofit
  bfly-quality-smoke ablate --model MODEL --ctx 4k --out ablate.json

  # Partner rules with small blocks, whose summaries take enough memory to narrow the window
  bfly-quality-smoke ablate --model MODEL --ctx 8k --axes partner --variants retrofit:block=16,partner-count=4

  # Exact recall: tokens fetched, key codes and estimates of the rest
  bfly-quality-smoke ablate --model MODEL --ctx 8k --axes recall,code,rest --variants recall --out recall.json";

const POSITIONS_EXAMPLES: &str = "\
Examples:
  # The loss up to 128k, beyond the trained length of 32k
  bfly-quality-smoke positions --model MODEL --ctx 128k --allow-extrapolation \\
      --variants stock,retrofit,retrofit:pool=pre-rope,far-position=clamp --out positions.json";

const COMPLETIONS_EXAMPLE: &str = "\
Example:
  bfly-quality-smoke completions bash > ~/.local/share/bash-completion/completions/bfly-quality-smoke";

/// A measurement other than the smoke test.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// RULER's tasks and three of recall, generated natively and scored by rules.
    #[command(after_help = RULER_EXAMPLES)]
    Ruler(Box<ruler::RulerArgs>),
    /// Next-token distributions over the stock model's own answers to tasks, against stock.
    #[command(after_help = FIDELITY_EXAMPLES)]
    Fidelity(Box<fidelity::FidelityArgs>),
    /// One needle over a grid of lengths and depths.
    #[command(after_help = NEEDLE_EXAMPLES)]
    Needle(Box<needle::NeedleArgs>),
    /// Join the answers of several processes into one file.
    #[command(after_help = JOIN_EXAMPLES)]
    Join(join::JoinArgs),
    /// Sensitivity of the model to swapping each layer; writes plans that keep the most sensitive layers dense.
    #[command(after_help = LAYERS_EXAMPLES)]
    Layers(Box<layers::LayersArgs>),
    /// One setting changed at a time, with paired differences; partner rules at the same allocated bytes.
    #[command(after_help = ABLATE_EXAMPLES)]
    Ablate(Box<ablate::AblateArgs>),
    /// The loss on the next token by position, within and beyond the trained length.
    #[command(after_help = POSITIONS_EXAMPLES)]
    Positions(Box<positions::PositionsArgs>),
    /// Print a completion script for a shell.
    #[command(after_help = COMPLETIONS_EXAMPLE)]
    Completions {
        /// Shell that the script is for.
        shell: clap_complete::Shell,
    },
}

/// Runs the subcommand, or the smoke test.
///
/// # Errors
/// See [`smoke::run`], [`ruler::run`], [`fidelity::run`], [`needle::run`], [`join::run`], [`layers::run`],
/// [`ablate::run`] and [`positions::run`].
pub fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        None => smoke::run(&cli.smoke),
        Some(Command::Ruler(args)) => ruler::run(args),
        Some(Command::Fidelity(args)) => fidelity::run(args),
        Some(Command::Needle(args)) => needle::run(args),
        Some(Command::Join(args)) => join::run(args),
        Some(Command::Layers(args)) => layers::run(args),
        Some(Command::Ablate(args)) => ablate::run(args),
        Some(Command::Positions(args)) => positions::run(args),
        // Handled by the binary, which has the clap command.
        Some(Command::Completions { .. }) => Ok(()),
    }
}
