//! Flags and commands of `bfly-plot`.

use super::graph;
use super::kinds::draw;
use super::save::save;
use super::transforms;
use crate::cli::{note, parse_size, print};
use crate::error::Result;
use crate::eval::report::{KERNELS, LADDER};
use crate::retrofit::Settings;
use crate::selector::{Selector, SELECTORS};
use clap::builder::{PossibleValue, PossibleValuesParser};
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Draws figures from the results of bfly-bench, bfly-quality-smoke, bfly-char and bfly-transforms.
///
/// Every figure is written four times: as SVG and as PNG, for light and for dark pages. Files may be of any kind, which
/// is read from each; the subcommands ladder and kernels accept files of their kind alone. Training logs that are given
/// together are drawn in one figure, and so are sweeps of transforms.
#[derive(Debug, Parser)]
#[command(
    name = "bfly-plot",
    version,
    arg_required_else_help = true,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = EXAMPLES
)]
pub struct Cli {
    /// Kind of figure.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Files of any kind to draw.
    #[command(flatten)]
    pub files: FileArgs,
}

const EXAMPLES: &str = "\
Kinds of files and their figures:
  bfly-ladder            ratios to the best stock; time, memory and decode by context
  bfly-kernels           roofline
  bfly-smoke             distance from stock on text, by context
  bfly-answers           scores by task, and against KV bytes; heat maps of needle grids
  bfly-layers            sensitivity to each layer's swap; scores by layers kept dense
  bfly-ablation          paired differences of every setting from the base
  bfly-positions         loss by position
  bfly-char-log          log.jsonl of bfly-char train: bits per character by step, a line per log
  bfly-char-eval         bits per character by position; what a longer context gains
  bfly-char-recall       right letters by distance, and by set bits of the distance in chunks
  bfly-transforms-sweep  sweep.json of bfly-transforms sweep: error and seconds of every transform by size

Examples:
  # Files of any kind, compressed or not, into figures/
  bfly-plot results/2027-01-01-h200-ladder/raw/*.json results/2027-01-01-h200-quality/raw/*.json.gz

  # Time, memory and decode of a ladder by context, and its ratios to the best stock
  bfly-plot ladder ladder.json --out figures

  # The roofline of a kernel report
  bfly-plot kernels kernels.json

  # Training runs of the character model in one figure, named after their directories
  bfly-plot wide/log.jsonl deep/log.jsonl --out figures

  # What a trained character model makes of distance
  bfly-char eval --model wide corpus/ --held-out --window 64k --contexts 1k,7k,33k,64k --json eval.json
  bfly-char recall --model wide --json recall.json
  bfly-plot eval.json recall.json

  # Learned transforms on a CPU and on a GPU in the same figures
  bfly-plot cpu/sweep.json gpu/sweep.json

  # The factors of a learned transform
  bfly-plot factors dft16

  # The blocks that each block reads, and the reach through 24 layers
  bfly-plot graph --ctx 8k --window 512 --block 128 --partner causal_shift";

const FACTORS_EXAMPLE: &str = "\
Example:
  bfly-transforms learn --transform dft --n 16 --out dft16
  bfly-plot factors dft16 --out figures";

const COMPLETIONS_EXAMPLE: &str = "\
Example:
  bfly-plot completions bash > ~/.local/share/bash-completion/completions/bfly-plot";

/// A kind of figure.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// A ladder: ratios to the best stock, and time, memory and decode by context.
    #[command(after_help = "Example:\n  bfly-plot ladder ladder.json --out figures")]
    Ladder(FileArgs),
    /// Kernels: a roofline, with each case's share of its ceiling.
    #[command(after_help = "Example:\n  bfly-plot kernels kernels.json --out figures")]
    Kernels(FileArgs),
    /// The graph of a partner rule, stage by stage, and its reach; needs no results.
    #[command(after_help = "Example:\n  bfly-plot graph --ctx 8k --partner xor --layers 30 --out docs/figures")]
    Graph(GraphArgs),
    /// The factors of a learned transform as matrices, and their product.
    #[command(after_help = FACTORS_EXAMPLE)]
    Factors(FactorsArgs),
    /// Print a completion script for a shell.
    #[command(after_help = COMPLETIONS_EXAMPLE)]
    Completions {
        /// Shell that the script is for.
        shell: clap_complete::Shell,
    },
}

/// Files to draw, and the output directory.
#[derive(Debug, Args)]
pub struct FileArgs {
    /// Results of bfly-bench, bfly-quality-smoke, bfly-char and bfly-transforms, and logs of training, .gz or not;
    /// figures are named after their file, those of a log.jsonl after its directory, those of several logs `logs`, and
    /// those of several sweeps `sweeps`.
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,
    /// Output directory, created where it does not exist; earlier figures are replaced.
    #[arg(long, value_name = "DIR", default_value = "figures")]
    pub out: PathBuf,
}

/// Flags of `factors`.
#[derive(Debug, Args)]
pub struct FactorsArgs {
    /// Directory that bfly-transforms learn wrote, or its factors.safetensors; of at most 64 elements.
    #[arg(value_name = "DIR|FILE")]
    pub factors: PathBuf,
    /// Output directory, created where it does not exist; an earlier figure is replaced.
    #[arg(long, value_name = "DIR", default_value = "figures")]
    pub out: PathBuf,
}

fn partner_names() -> PossibleValuesParser {
    let value = |s: &&dyn Selector| PossibleValue::new(s.name()).help(s.about());
    SELECTORS.iter().map(value).collect::<Vec<_>>().into()
}

/// Flags of `graph`.
#[derive(Debug, Args)]
pub struct GraphArgs {
    /// Context in tokens, such as 8192 or 16k; it may have 2 to 512 blocks, and 64 are easy to read.
    #[arg(long, value_name = "TOKENS", default_value = "8k", value_parser = parse_size)]
    pub ctx: usize,
    /// Exact window in tokens, a multiple of --block.
    #[arg(long, value_name = "TOKENS", default_value = "512", value_parser = crate::cli::parse_count)]
    pub window: usize,
    /// Block size in tokens.
    #[arg(long, value_name = "TOKENS", default_value = "128", value_parser = parse_size)]
    pub block: usize,
    /// Attention sinks: the first tokens of the text, which are always read exactly.
    #[arg(long, value_name = "TOKENS", default_value = "4", value_parser = crate::cli::parse_count)]
    pub sink_tokens: usize,
    /// Partner rule, which selects the earlier blocks whose summaries a block reads.
    #[arg(long, value_name = "RULE", default_value = SELECTORS[0].name(), value_parser = partner_names())]
    pub partner: String,
    /// Number of stages read per layer.
    #[arg(long, value_name = "K", default_value_t = 1)]
    pub partner_count: usize,
    /// Distance of stage 0 in blocks [default: window blocks + 1, the first block outside the window]
    #[arg(long, value_name = "BLOCKS")]
    pub shift_unit: Option<usize>,
    /// Seed of the partner rule random; other rules ignore it.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Number of swapped layers, for the reach.
    #[arg(long, value_name = "N", default_value_t = 24, value_parser = clap::value_parser!(u16).range(1..=512))]
    pub layers: u16,
    /// Output directory, created where it does not exist; an earlier figure is replaced.
    #[arg(long, value_name = "DIR", default_value = "figures")]
    pub out: PathBuf,
}

impl GraphArgs {
    fn settings(&self) -> Settings {
        Settings {
            block: self.block,
            window: self.window,
            sink_tokens: self.sink_tokens,
            partner: self.partner.clone(),
            partner_count: self.partner_count,
            shift_unit: self.shift_unit,
            seed: self.seed,
            ..Settings::default()
        }
    }
}

/// Runs the command. Every file is read and drawn before the first figure is written; the paths of the figures go to
/// stdout, remarks to stderr.
///
/// # Errors
/// A file that cannot be read or drawn, or a directory that cannot be written.
pub fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        None => files(&cli.files, None),
        Some(Command::Ladder(args)) => files(args, Some(LADDER)),
        Some(Command::Kernels(args)) => files(args, Some(KERNELS)),
        Some(Command::Graph(args)) => {
            let figure = graph::figure(&args.settings(), args.ctx, args.layers.into())?;
            list(&save(&args.out, "graph", &[figure])?)
        }
        Some(Command::Factors(args)) => {
            let (stem, figure) = transforms::factors(&args.factors)?;
            list(&save(&args.out, &stem, &[figure])?)
        }
        // Handled by the binary, which has the clap command.
        Some(Command::Completions { .. }) => Ok(()),
    }
}

fn files(args: &FileArgs, wanted: Option<&str>) -> Result<()> {
    let drawn = draw(&args.files, wanted)?;
    for remark in drawn.iter().flat_map(|drawing| &drawing.notes) {
        note(format_args!("note: {remark}"));
    }
    drawn.iter().try_for_each(|drawing| list(&save(&args.out, &drawing.stem, &drawing.figures)?))
}

/// Prints the paths of the figures on stdout.
fn list(paths: &[PathBuf]) -> Result<()> {
    paths.iter().try_for_each(|path| print(format_args!("{}\n", path.display())))
}
