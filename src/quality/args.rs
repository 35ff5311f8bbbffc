//! The flags of `bfly-quality-smoke`.

use super::{ablate, join, layers, needle, positions, ruler, smoke};
use crate::bench::args::{at_least_one, SubjectArgs};
use crate::bench::subject::Subject;
use crate::bench::variant::Variant;
use crate::checkpoint::OnProgress;
use crate::cli::{open_device, parse_size, short_count, Bars, ModelArgs};
use crate::error::{Error, Result};
use crate::retrofit::RetrofitPlan;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Measures what a retrofit keeps: distributions and greedy text against the model as it came, on the same tokens of real text.
///
/// Every figure is a mean over documents with its 95% interval. With --fail-below and --fail-above it guards a CI: it ends with 1
/// where a figure is missed, with 2 where it could not be measured.
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
    /// Another measurement.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The smoke test.
    #[command(flatten)]
    pub smoke: SmokeArgs,
}

const EXAMPLES: &str = "\
Examples:
  # The defaults against stock, as far as the model goes
  bfly-quality-smoke --model qwen2.5-coder-0.5b.gguf --ctx 1k,4k,8k,16k,32k --out smoke.json

  # Other settings beside them, on four documents
  bfly-quality-smoke --model MODEL --ctx 4k --documents 4 --variants retrofit,retrofit:window=1k,layers=0-11

  # In a CI: ends with 1 where less than nine in ten likeliest tokens are kept
  bfly-quality-smoke --model MODEL --ctx 2k --fail-below top1=0.9 --fail-above kl=0.1";

const RULER_EXAMPLES: &str = "\
Examples:
  # The eleven tasks that need no file, stock and two retrofits, taken up again where it was cut off
  bfly-quality-smoke ruler --model MODEL --ctx 4k,8k --samples 50 --variants stock,retrofit,retrofit:window=1k --out ruler.json

  # Other methods, which must choose what they keep before they know the question
  bfly-quality-smoke ruler --model MODEL --ctx 8k --question-unseen --variants snapkv:budget=1k,keydiff:budget=1k --out unseen.json

  # At the same bytes
  bfly-quality-smoke ruler --model MODEL --ctx 8k --question-unseen --variants retrofit:kv=1/8,keydiff:kv=1/8 --out bytes.json

  # Six samples side by side on one GPU
  bfly-quality-smoke ruler --model MODEL --ctx 32k --samples 50 --jobs 6 --out ruler.json

  # The same prompts for another engine
  bfly-quality-smoke ruler --model MODEL --ctx 4k --tasks niah_single_2 --export niah.jsonl --export-only";

const NEEDLE_EXAMPLES: &str = "\
Examples:
  # Eleven depths at four lengths, three needles each
  bfly-quality-smoke needle --model MODEL --ctx 1k,2k,4k,8k --samples 3 --variants stock,retrofit --out needle.json";

const JOIN_EXAMPLES: &str = "\
Examples:
  # A GPU for each half of the tasks
  CUDA_VISIBLE_DEVICES=0 bfly-quality-smoke ruler --model MODEL --ctx 32k --tasks niah_single_1,niah_single_2 --out a.json &
  CUDA_VISIBLE_DEVICES=1 bfly-quality-smoke ruler --model MODEL --ctx 32k --tasks vt,cwe,fwe --out b.json; wait
  bfly-quality-smoke join a.json b.json --out ruler.json";

const LAYERS_EXAMPLES: &str = "\
Examples:
  # Which layers do the answers of needles need? Plans that keep the first of them; four settings at a time on one GPU
  bfly-quality-smoke layers --model MODEL --ctx 8k --jobs 4 --plans plans --out layers.json
  bfly-retrofit --model MODEL --plan plans/dense-4.json --prompt-file book.txt

  # What does each layer do alone? A third of the time, but layers can stand in for each other, and then all look harmless
  bfly-quality-smoke layers --model MODEL --ctx 8k --rank alone --out alone.json

  # By text alone
  bfly-quality-smoke layers --model MODEL --ctx 4k --tasks none --variants retrofit:window=1k";

const ABLATE_EXAMPLES: &str = "\
Examples:
  # Everything, from the defaults
  bfly-quality-smoke ablate --model MODEL --ctx 4k --out ablate.json

  # Partner rules with small blocks, where summaries take a share of the bytes that is worth a window
  bfly-quality-smoke ablate --model MODEL --ctx 8k --axes partner --variants retrofit:block=16,partner-count=4";

const POSITIONS_EXAMPLES: &str = "\
Examples:
  # Does the loss stay what it is beyond 32k?
  bfly-quality-smoke positions --model MODEL --ctx 128k --allow-extrapolation \\
      --variants stock,retrofit,retrofit:pool=pre-rope,far-position=clamp --out positions.json";

/// What is measured.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// RULER's tasks, made natively and scored by its rules.
    #[command(after_help = RULER_EXAMPLES)]
    Ruler(Box<ruler::RulerArgs>),
    /// One needle over a grid of lengths and depths.
    #[command(after_help = NEEDLE_EXAMPLES)]
    Needle(Box<needle::NeedleArgs>),
    /// Answers that several processes gave side by side, as one file.
    #[command(after_help = JOIN_EXAMPLES)]
    Join(join::JoinArgs),
    /// Which layers the model cannot do without; writes plans that keep them.
    #[command(after_help = LAYERS_EXAMPLES)]
    Layers(Box<layers::LayersArgs>),
    /// One setting changed at a time, partner rules at the same allocated bytes, differences paired.
    #[command(after_help = ABLATE_EXAMPLES)]
    Ablate(Box<ablate::AblateArgs>),
    /// The loss on the next token by position, beyond the trained length too.
    #[command(after_help = POSITIONS_EXAMPLES)]
    Positions(Box<positions::PositionsArgs>),
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// What is judged, and on what.
#[derive(Debug, Args)]
pub struct JudgedArgs {
    /// What is run: stock, retrofit, retrofit:KEY=VALUE,.. with keys as the flags of bfly-retrofit (window, sink-tokens,
    /// partner, layers, ...), plan=FILE, or kv=1/16 for the window with which the cache takes that share of a dense one; snapkv,
    /// keydiff with budget=N or kv=1/16. A KEY=VALUE belongs to the method before it. May be repeated.
    #[arg(long, value_name = "LIST", default_value = "retrofit")]
    pub variants: Vec<String>,
    /// Documents, as scripts/fetch_texts.py lays them out. Not read where the model has no tokenizer: then texts are random ids.
    #[arg(long, value_name = "DIR", default_value = "texts")]
    pub texts: PathBuf,
    /// Tokens to a prefill chunk.
    #[arg(long, value_name = "TOKENS", default_value = "4096", value_parser = parse_size)]
    pub prefill_chunk: usize,
    /// Go beyond the positions that the model was trained for; the results say so.
    #[arg(long)]
    pub allow_extrapolation: bool,
    /// No progress, only warnings and the table.
    #[arg(long, short)]
    pub quiet: bool,
    /// Where weights come from and how they are held.
    #[command(flatten)]
    pub model: ModelArgs,
}

impl JudgedArgs {
    /// Opens the checkpoint; weights are not read.
    ///
    /// # Errors
    /// A device or a checkpoint that is not there, or weights that cannot be held.
    pub fn open(&self, progress: OnProgress) -> Result<Subject> {
        self.model.set_threads()?;
        let device = open_device(&self.model.device)?;
        let args = SubjectArgs {
            variants: self.variants.clone(),
            texts: self.texts.clone(),
            model: self.model.clone(),
            random_weights: None,
        };
        let subject = Subject::open(&args, device, progress)?;
        subject.refuse_too_large(1)?;
        Ok(subject)
    }

    /// The one retrofit that --variants names.
    ///
    /// # Errors
    /// None, several, or a variant of another kind.
    pub fn one_retrofit(&self, subject: &Subject, ctx: usize) -> Result<(Variant, RetrofitPlan)> {
        let mut variants = subject.variants_at(ctx)?;
        let one = variants.pop().filter(|_| variants.is_empty());
        one.and_then(|v| v.plan.clone().map(|plan| (v, plan)))
            .ok_or_else(|| Error::usage("--variants", "one retrofit is studied; name one"))
    }

    /// Refuses contexts that the model was not trained for, or warns of them where that is allowed.
    ///
    /// # Errors
    /// The first context that is too long.
    pub fn check_trained(&self, subject: &Subject, contexts: &[usize], bars: &Bars) -> Result<()> {
        let trained = subject.checkpoint().spec.max_positions;
        let past: Vec<_> = contexts.iter().filter(|c| **c > trained).map(|c| short_count(*c)).collect();
        if past.is_empty() {
            return Ok(());
        }
        let (past, trained) = (past.join(", "), short_count(trained));
        if !self.allow_extrapolation {
            let message =
                format!("{past}: the model was trained for {trained} positions; --allow-extrapolation goes beyond");
            return Err(Error::usage("--ctx", message));
        }
        bars.warn(&format!("trained for {trained} positions: {past} is extrapolated"));
        Ok(())
    }
}

/// A smoke test.
#[derive(Debug, Args)]
pub struct SmokeArgs {
    /// Contexts, each of a text and the new tokens after it.
    #[arg(long, value_name = "LIST", default_value = "1k,4k,8k", value_delimiter = ',', value_parser = parse_size)]
    pub ctx: Vec<usize>,
    /// Documents at most; those too short for a context are left out there [default: all]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub documents: Option<usize>,
    /// Last positions of each text that distributions are compared at.
    #[arg(long, value_name = "K", default_value_t = 256, value_parser = at_least_one)]
    pub positions: usize,
    /// New tokens of greedy text after each.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one)]
    pub greedy: usize,
    /// Bounds from below; the help names the metrics of [`super::gate::METRICS`].
    #[arg(long, value_name = "METRIC=VALUE", help = super::gate::help())]
    pub fail_below: Vec<String>,
    /// The same for a metric above a value, such as kl=0.1.
    #[arg(long, value_name = "METRIC=VALUE")]
    pub fail_above: Vec<String>,
    /// The results, as JSON with every document.
    #[arg(long, value_name = "FILE.json")]
    pub out: Option<PathBuf>,
    /// What is judged; last, since the heading of its last group holds for whatever follows.
    #[command(flatten)]
    pub judged: JudgedArgs,
}

impl SmokeArgs {
    /// The contexts, rising.
    ///
    /// # Errors
    /// One that is too short for the positions and the new tokens.
    pub fn contexts(&self) -> Result<Vec<usize>> {
        let mut contexts = self.ctx.clone();
        contexts.sort_unstable();
        contexts.dedup();
        let least = self.positions + self.greedy;
        match contexts.iter().find(|c| **c <= least) {
            None => Ok(contexts),
            Some(c) => {
                let message = format!(
                    "{c} has no room for {} positions and {} new tokens after them",
                    self.positions, self.greedy
                );
                Err(Error::usage("--ctx", message))
            }
        }
    }
}

/// Runs it.
///
/// # Errors
/// See [`smoke::run`], [`ruler::run`], [`needle::run`], [`join::run`], [`layers::run`], [`ablate::run`] and [`positions::run`].
pub fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        None => smoke::run(&cli.smoke),
        Some(Command::Ruler(args)) => ruler::run(args),
        Some(Command::Needle(args)) => needle::run(args),
        Some(Command::Join(args)) => join::run(args),
        Some(Command::Layers(args)) => layers::run(args),
        Some(Command::Ablate(args)) => ablate::run(args),
        Some(Command::Positions(args)) => positions::run(args),
        // Needs the command itself, which the binary has.
        Some(Command::Completions { .. }) => Ok(()),
    }
}
