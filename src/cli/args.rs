//! The flags of `bfly-retrofit`, in groups that other binaries share.

use super::{parse_bytes, parse_count, parse_size};
use crate::checkpoint::{OpenOptions, WeightDtype};
use crate::error::{Error, Result};
use crate::generate::Sampling;
use crate::retrofit::{FarPosition, Pool, Settings, WindowAlign};
use crate::selector::SELECTORS;
use clap::{ArgGroup, Args, Parser, Subcommand};
use std::path::PathBuf;

/// Reads long documents with a pretrained model in memory that does not grow.
///
/// Takes a Hugging Face checkpoint as it is, swaps its full-attention layers for compressed butterfly attention, and backs
/// them with a KV cache of fixed size. Text goes to stdout; progress and the memory ledger to stderr.
#[derive(Debug, Parser)]
#[command(
    name = "bfly-retrofit",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = EXAMPLES
)]
pub struct Cli {
    /// A subcommand instead of a run.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// The run.
    #[command(flatten)]
    pub run: RunArgs,
}

const EXAMPLES: &str = "\
Examples:
  # Continue a document in a fixed-size cache provisioned for 256k tokens
  bfly-retrofit --model Qwen/Qwen2.5-0.5B-Instruct --ctx 256k --prompt-file book.txt -n 64

  # The same model as it came, for comparison
  bfly-retrofit --model Qwen/Qwen2.5-0.5B-Instruct --ctx 32k --prompt-file book.txt --stock

  # Ask a question through the model's chat template, from a local GGUF file
  bfly-retrofit --model smollm2.gguf --chat --prompt 'What is a butterfly network?'

  # Keep layers 15 and 16 dense, save the setting as a patch, run the patch later
  bfly-retrofit --model smollm2.gguf --layers 0-14,17-29 --prompt 'Hello' --save my-patch
  bfly-retrofit --model my-patch --prompt-file book.txt";

/// What else the binary can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Everything a run takes.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Where weights come from and how they are held.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Context to provision, in tokens: 8192, 256k, 1M. Prompt and new tokens must fit [default: the model's trained length]
    #[arg(long, value_name = "TOKENS", value_parser = parse_size, help_heading = "Model")]
    pub ctx: Option<usize>,
    /// Butterfly attention.
    #[command(flatten)]
    pub retrofit: RetrofitArgs,
    /// What is read.
    #[command(flatten)]
    pub prompt: PromptArgs,
    /// How tokens are chosen.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Tokens to a prefill chunk [default: 512 on a CPU, 4096 on a GPU]
    #[arg(long, value_name = "TOKENS", value_parser = parse_size, help_heading = "Run")]
    pub prefill_chunk: Option<usize>,
    /// GPU memory that the run may take, such as 10G (10GiB, 2^30 bytes each; 10GB is 10^9): prefill chunks shrink to fit, which never
    /// changes the output
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, help_heading = "Run")]
    pub memory_budget: Option<u64>,
    /// Write the report as JSON.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub json: Option<PathBuf>,
    /// Write the logits of the prompt's last positions as safetensors: `logits` f32 [K, vocab] and `token_ids`.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub logits_out: Option<PathBuf>,
    /// How many positions of logits.
    #[arg(long, value_name = "K", default_value_t = 1, requires = "logits_out", help_heading = "Output")]
    pub logits_last: usize,
    /// Save the plan as a patch: a directory without weights that --model runs.
    #[arg(long, value_name = "DIR", conflicts_with = "stock", help_heading = "Output")]
    pub save: Option<PathBuf>,
    /// No progress and no ledger.
    #[arg(long, short, help_heading = "Output")]
    pub quiet: bool,
}

/// Where weights come from and how they are held.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Hub id, directory, GGUF file, or a patch made with --save.
    #[arg(long, value_name = "ID|DIR|FILE.gguf", required = true)]
    pub model: Option<String>,
    /// Branch, tag or commit of a hub repository.
    #[arg(long, value_name = "REV")]
    pub revision: Option<String>,
    /// Use only what is already downloaded.
    #[arg(long)]
    pub offline: bool,
    /// How weights are held. auto: quantised types as stored; the rest bf16 on a GPU, f32 on a CPU, or
    /// q8_0 where f32 would take more than half the memory.
    #[arg(long, value_name = "TYPE", default_value = "auto", value_parser = clap::builder::PossibleValuesParser::new(WeightDtype::NAMES))]
    pub dtype: String,
    /// Use the output matrix for the embedding too, where a GGUF file stores a tied model's one matrix twice.
    #[arg(long)]
    pub tie_embeddings: bool,
    /// auto, cpu, cuda or cuda:1.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// Threads [default: all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<std::num::NonZeroUsize>,
}

impl ModelArgs {
    /// Options for `Checkpoint::open`.
    pub fn open_options(&self) -> OpenOptions {
        OpenOptions { revision: self.revision.clone(), offline: self.offline, tie_embeddings: self.tie_embeddings }
    }

    /// Makes `--threads` hold; before anything runs in parallel.
    ///
    /// # Errors
    /// A pool that was started already.
    pub fn set_threads(&self) -> Result<()> {
        let Some(n) = self.threads else { return Ok(()) };
        // candle sizes its own pools by this variable; nothing has read it yet.
        std::env::set_var("RAYON_NUM_THREADS", n.to_string());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n.get()).build_global();
        pool.map_err(|e| Error::usage("--threads", e))
    }
}

fn partner_names() -> clap::builder::PossibleValuesParser {
    let value = |s: &&dyn crate::selector::Selector| clap::builder::PossibleValue::new(s.name()).help(s.about());
    SELECTORS.iter().map(value).collect::<Vec<_>>().into()
}

/// Butterfly attention: which layers, with what settings.
#[derive(Debug, Args)]
#[command(next_help_heading = "Retrofit")]
pub struct RetrofitArgs {
    /// Run the model as it came.
    #[arg(long, conflicts_with_all = ["layers", "plan", "block", "window", "window_align", "sink_tokens", "partner", "partner_count", "shift_unit", "pool", "summary_bias", "far_position"])]
    pub stock: bool,
    /// Layers to swap: all (every full-attention layer) or a list such as 0-14,17-29 [default: all]
    #[arg(long, value_name = "all|LIST")]
    pub layers: Option<String>,
    /// Read layers and settings from a plan; flags given here win.
    #[arg(long, value_name = "FILE")]
    pub plan: Option<PathBuf>,
    /// Tokens to a block [default: 128]
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    pub block: Option<usize>,
    /// Exact window in tokens, a whole number of blocks [default: 512]
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    pub window: Option<usize>,
    /// Left edge of the window; token is the published form, with holes, for comparison only [default: block]
    #[arg(long)]
    pub window_align: Option<WindowAlign>,
    /// First tokens that are always read exactly [default: 4]
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    pub sink_tokens: Option<usize>,
    /// Which earlier block's summary is read [default: causal_shift]
    #[arg(long, value_name = "RULE", value_parser = partner_names())]
    pub partner: Option<String>,
    /// Stages read at once [default: 1]
    #[arg(long, value_name = "K")]
    pub partner_count: Option<usize>,
    /// Distance of stage 0 in blocks [default: window blocks + 1]
    #[arg(long, value_name = "BLOCKS")]
    pub shift_unit: Option<usize>,
    /// Pool keys with or without their rotation [default: post-rope]
    #[arg(long)]
    pub pool: Option<Pool>,
    /// β: a summary's logit gains β ln(tokens pooled) [default: 0]
    #[arg(long, value_name = "BETA", allow_negative_numbers = true)]
    pub summary_bias: Option<f64>,
    /// Distance at which summaries are scored: their own, or at most the trained length [default: true]
    #[arg(long)]
    pub far_position: Option<FarPosition>,
}

impl RetrofitArgs {
    /// `base` with the flags that were given.
    pub fn settings(&self, base: Settings) -> Settings {
        Settings {
            block: self.block.unwrap_or(base.block),
            window: self.window.unwrap_or(base.window),
            window_align: self.window_align.unwrap_or(base.window_align),
            sink_tokens: self.sink_tokens.unwrap_or(base.sink_tokens),
            partner: self.partner.clone().unwrap_or(base.partner),
            partner_count: self.partner_count.unwrap_or(base.partner_count),
            shift_unit: self.shift_unit.or(base.shift_unit),
            pool: self.pool.unwrap_or(base.pool),
            summary_bias: self.summary_bias.unwrap_or(base.summary_bias),
            far_position: self.far_position.unwrap_or(base.far_position),
            seed: base.seed,
        }
    }
}

/// What is read.
#[derive(Debug, Args)]
#[command(next_help_heading = "Prompt")]
#[command(group = ArgGroup::new("source").required(true).args(["prompt", "prompt_file", "token_ids"]))]
pub struct PromptArgs {
    /// The prompt itself.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// A text file, or - for standard input.
    #[arg(long, value_name = "FILE|-")]
    pub prompt_file: Option<String>,
    /// A JSON array of token ids; needs no tokenizer.
    #[arg(long, value_name = "FILE", conflicts_with = "chat")]
    pub token_ids: Option<PathBuf>,
    /// Put the prompt into the model's own chat template.
    #[arg(long)]
    pub chat: bool,
    /// System message for the template.
    #[arg(long, value_name = "TEXT", requires = "chat", allow_hyphen_values = true)]
    pub system: Option<String>,
}

/// How tokens are chosen.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// At most so many new tokens.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    pub max_new_tokens: usize,
    /// Go on after the token that ends the text, so that exactly N tokens are made.
    #[arg(long)]
    pub ignore_eos: bool,
    /// 0 is greedy.
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Sample from the smallest set of tokens with this probability.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Sample from the K likeliest tokens.
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Seed of sampling and of the random partner rule [default: 0; a plan brings its own for the rule]
    #[arg(long)]
    pub seed: Option<u64>,
}

impl SamplingArgs {
    /// For the sampler.
    pub fn sampling(&self) -> Sampling {
        Sampling { temperature: self.temperature, top_p: self.top_p, top_k: self.top_k, seed: self.seed.unwrap_or(0) }
    }
}

impl PromptArgs {
    /// The prompt's text, for the two sources that have one.
    pub fn text(&self) -> Result<Option<String>> {
        let (text, place) = match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => (text.clone(), "--prompt".to_string()),
            (None, Some(file)) => {
                let mut bytes = vec![];
                let read = match file.as_str() {
                    "-" => std::io::Read::read_to_end(&mut std::io::stdin(), &mut bytes).map(|_| bytes),
                    path => std::fs::read(path),
                };
                let bytes = read.map_err(|e| Error::io(file, e))?;
                let text = String::from_utf8(bytes).map_err(|e| {
                    Error::format(file, format!("is not UTF-8 text: byte {} is invalid", e.utf8_error().valid_up_to()))
                })?;
                (text, format!("--prompt-file {file}"))
            }
            (None, None) => return Ok(None),
        };
        if text.is_empty() {
            return Err(Error::usage(place, "the prompt is empty"));
        }
        Ok(Some(text))
    }

    /// The ids of `--token-ids`.
    pub fn ids(&self) -> Result<Option<Vec<u32>>> {
        let Some(path) = &self.token_ids else { return Ok(None) };
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let ids: Vec<u32> = serde_json::from_str(&text)
            .map_err(|e| Error::format(path.display(), format!("is not a JSON array of token ids: {e}")))?;
        if ids.is_empty() {
            return Err(Error::usage(format!("--token-ids {}", path.display()), "the prompt is empty"));
        }
        Ok(Some(ids))
    }
}
