//! Command-line flags of `bfly-retrofit`, in argument groups that the other binaries reuse.

use super::{parse_bytes, parse_count, parse_size};
use crate::checkpoint::{OpenOptions, WeightDtype};
use crate::error::{Error, Result};
use crate::generate::Sampling;
use crate::recall::Positions;
use crate::retrofit::{parse_layers, CodeFit, FarPosition, KeyPooling, PrefillKind, RestKind, Settings, WindowAlign};
use crate::selector::SELECTORS;
use clap::{ArgGroup, Args, Parser, Subcommand};
use std::path::PathBuf;

/// Runs a pretrained model on long documents with a KV cache of fixed size.
///
/// Loads an unmodified Hugging Face or GGUF checkpoint, replaces its full-attention layers by compressed butterfly
/// attention (exact window, attention sinks, block summaries) and generates. Generated text goes to stdout; progress,
/// warnings and the memory ledger go to stderr. During decode the first Ctrl-C ends the text and keeps the ledger and
/// the report; the second ends the process. Exit codes: 0 on success, 2 on an error, 128 + N when signal N ends the
/// process.
#[derive(Debug, Parser)]
#[command(
    name = "bfly-retrofit",
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = EXAMPLES
)]
pub struct Cli {
    /// Subcommand to execute instead of a run.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Flags of a run.
    #[command(flatten)]
    pub run: RunArgs,
}

const EXAMPLES: &str = "\
Examples:
  # Continue a document, with a fixed-size cache allocated for 256k tokens
  bfly-retrofit --model Qwen/Qwen2.5-0.5B-Instruct --ctx 256k --prompt-file book.txt -n 64

  # Run the unmodified model for comparison
  bfly-retrofit --model Qwen/Qwen2.5-0.5B-Instruct --ctx 32k --prompt-file book.txt --stock

  # Ask a question through the chat template of a local GGUF file
  bfly-retrofit --model smollm2.gguf --chat --prompt 'What is a butterfly network?'

  # Keep layers 15 and 16 dense, save the plan as a patch, run the patch later
  bfly-retrofit --model smollm2.gguf --layers 0-14,17-29 --prompt 'Hello' --save my-patch
  bfly-retrofit --model my-patch --prompt-file book.txt

  # Stay below 10 GiB of GPU memory and write every measured figure as JSON
  bfly-retrofit --model Qwen/Qwen2.5-0.5B-Instruct --ctx 128k --prompt-file book.txt --memory-budget 10G --json run.json";

/// Subcommands of `bfly-retrofit`.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)]
pub enum Command {
    /// Calibrate exact recall on a model, and save plan and calibration as a patch.
    ///
    /// Reads 32k tokens once. A run without a patch does the same by itself, with the bundled texts, and keeps the
    /// result in the user's cache directory.
    #[command(after_help = CALIBRATE_EXAMPLES)]
    Calibrate(CalibrateArgs),
    /// Print a completion script for a shell.
    Completions {
        /// Shell to print the script for.
        shell: clap_complete::Shell,
    },
}

const CALIBRATE_EXAMPLES: &str = "\
Examples:
  # Calibrate on the bundled prose and code
  bfly-retrofit calibrate --model smollm2.gguf --out smollm2-recall

  # Calibrate on your own documents, for a context of 128k
  bfly-retrofit calibrate --model Qwen/Qwen2.5-0.5B-Instruct --ctx 128k --texts reports/ --out reports-recall

  # Calibrate at natural positions, to compare with the above
  bfly-retrofit calibrate --model smollm2.gguf --positions natural --out smollm2-natural";

/// Flags of `calibrate`.
#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// Checkpoint, weight type and device.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Default context length of runs of the patch, in tokens [default: the model's trained length]
    #[arg(long, value_name = "TOKENS", value_parser = parse_size, help_heading = "Model")]
    pub ctx: Option<usize>,
    /// Settings of the patch's plan.
    #[command(flatten)]
    pub retrofit: RetrofitArgs,
    /// Folder of text files to calibrate on, in order of name [default: bundled prose and code]
    #[arg(long, value_name = "DIR", help_heading = "Calibration")]
    pub texts: Option<PathBuf>,
    /// Positions at which keys and queries are measured
    ///
    /// uniform stores their moments before rotation, and each run rotates them to uniform positions of its own context.
    /// natural, which is for comparisons, joins the documents, reads them in texts of the trained length and stores
    /// moments after rotation at the tokens' own positions, which runs use as they are at any context; qpq cannot.
    #[arg(long, value_enum, default_value_t, help_heading = "Calibration")]
    pub positions: Positions,
    /// Directory to write the patch to: a new one, or an earlier patch.
    #[arg(long, value_name = "PATCH", help_heading = "Output")]
    pub out: PathBuf,
    /// Print no progress; warnings and errors remain.
    #[arg(long, short, help_heading = "Output")]
    pub quiet: bool,
}

/// Flags of a run.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Checkpoint, weight type and device.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Context length to allocate the KV cache for, in tokens: 8192, 256k, 1M [default: the model's trained length]
    ///
    /// Prompt and new tokens must fit in it; k is 1024 and M is 1024 k, at most 16M. Which summaries a block reads
    /// depends on it, so other values may give other text. A patch brings its own default.
    #[arg(long, value_name = "TOKENS", value_parser = parse_size, help_heading = "Model")]
    pub ctx: Option<usize>,
    /// Butterfly attention settings.
    #[command(flatten)]
    pub retrofit: RetrofitArgs,
    /// Source of the prompt.
    #[command(flatten)]
    pub prompt: PromptArgs,
    /// Sampling settings.
    #[command(flatten)]
    pub sampling: SamplingArgs,
    /// Tokens per prefill chunk; affects speed and memory only [default: 512 on a CPU, 4096 on a GPU]
    #[arg(long, value_name = "TOKENS", value_parser = parse_size, help_heading = "Run")]
    pub prefill_chunk: Option<usize>,
    /// Upper limit on the run's GPU memory, such as 10G; prefill chunks shrink to fit
    ///
    /// Weights and cache count too. 10G and 10GiB are 10 * 2^30 bytes, 10GB is 10 * 10^9. Smaller chunks do not change
    /// the output; the run is refused if even the smallest chunk does not fit.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, help_heading = "Run")]
    pub memory_budget: Option<u64>,
    /// Write the run's report (settings, timings, memory, token ids) as JSON.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub json: Option<PathBuf>,
    /// Write the logits of the prompt's last positions as safetensors: `logits` f32 [K, vocab] and `token_ids`.
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub logits_out: Option<PathBuf>,
    /// Number of last prompt positions whose logits --logits-out writes.
    #[arg(long, value_name = "K", default_value_t = 1, requires = "logits_out", help_heading = "Output")]
    pub logits_last: usize,
    /// Save plan and context length as a patch: a directory without weights that --model accepts.
    #[arg(long, value_name = "DIR", conflicts_with = "stock", help_heading = "Output")]
    pub save: Option<PathBuf>,
    /// Print no progress and no memory ledger; warnings and errors remain.
    #[arg(long, short, help_heading = "Output")]
    pub quiet: bool,
}

/// Checkpoint, weight type and device.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    /// Checkpoint: hub id, directory, GGUF file, or a patch made with --save
    ///
    /// A hub id is owner/name, or owner/name/file.gguf. A directory is in Hugging Face's layout (config.json,
    /// safetensors, tokenizer.json). Of a split GGUF file, give any part.
    #[arg(long, value_name = "ID|DIR|FILE.gguf", required = true)]
    pub model: Option<String>,
    /// Branch, tag or commit of a hub repository [default: main]
    #[arg(long, value_name = "REV")]
    pub revision: Option<String>,
    /// Use only files in the local hub cache; HF_HUB_OFFLINE=1 does the same.
    #[arg(long)]
    pub offline: bool,
    /// Type of the weight matrices in memory
    ///
    /// auto keeps quantised types as stored and converts the rest to bf16 on a GPU and to f32 on a CPU, or to q8_0
    /// where f32 would take more than half of the machine's memory. native keeps every type as stored, except that a
    /// GPU runs dense types as bf16. On a GPU, f32 and f16 set the type of activations, keys and values too (otherwise
    /// bf16).
    #[arg(long, value_name = "TYPE", default_value = "auto", value_parser = clap::builder::PossibleValuesParser::new(WeightDtype::NAMES))]
    pub dtype: String,
    /// Use the output matrix as the embedding too, for a tied model whose GGUF file stores both; saves memory.
    #[arg(long)]
    pub tie_embeddings: bool,
    /// Device: auto (the first GPU if there is one, else the CPU), cpu, cuda or cuda:INDEX.
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<std::num::NonZeroUsize>,
}

impl ModelArgs {
    /// Returns the options for `Checkpoint::open`.
    pub fn open_options(&self) -> OpenOptions {
        OpenOptions { revision: self.revision.clone(), offline: self.offline, tie_embeddings: self.tie_embeddings }
    }

    /// Applies `--threads` to the process's thread pools; must be called before anything runs in parallel.
    ///
    /// # Errors
    /// The thread pool has been started already.
    pub fn set_threads(&self) -> Result<()> {
        let Some(n) = self.threads else { return Ok(()) };
        // candle reads this variable when it creates its own pools, which it does at first use.
        std::env::set_var("RAYON_NUM_THREADS", n.to_string());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n.get()).build_global();
        pool.map_err(|e| Error::usage("--threads", e))
    }
}

fn partner_names() -> clap::builder::PossibleValuesParser {
    let value = |s: &&dyn crate::selector::Selector| clap::builder::PossibleValue::new(s.name()).help(s.about());
    SELECTORS.iter().map(value).collect::<Vec<_>>().into()
}

/// Butterfly attention: the layers to swap and their settings.
#[derive(Debug, Default, PartialEq, Args)]
#[command(next_help_heading = "Retrofit")]
pub struct RetrofitArgs {
    /// Run the unmodified model with dense attention.
    #[arg(long, conflicts_with_all = ["layers", "plan", "block", "window", "window_align", "sink_tokens", "partner", "partner_count", "shift_unit", "pool", "summary_bias", "far_position", "recall", "key_code", "rest", "code_fit", "prefill", "butterfly_layers"])]
    pub stock: bool,
    /// Layers to swap: all (every full-attention layer) or a list such as 0-14,17-29 [default: all]
    #[arg(long, value_name = "all|LIST")]
    pub layers: Option<String>,
    /// Read layers and settings from a plan (JSON) or a patch of the same model; the other flags of this group override
    /// it.
    #[arg(long, value_name = "FILE|PATCH")]
    pub plan: Option<PathBuf>,
    /// Block size in tokens; one summary stands for one block [default: 128]
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    pub block: Option<usize>,
    /// Exact local window in tokens [default: 64; 128 where block means are read; 512 with --recall 0]
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    pub window: Option<usize>,
    /// Alignment of the window's left edge: with block a query also reads the rest of its own block exactly [default:
    /// token; block with --recall 0]
    #[arg(long)]
    pub window_align: Option<WindowAlign>,
    /// Attention sinks: number of first tokens that every query reads exactly [default: 4]
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    pub sink_tokens: Option<usize>,
    /// Rule that chooses the earlier blocks whose summaries a block reads [default: causal_shift]
    #[arg(long, value_name = "RULE", value_parser = partner_names())]
    pub partner: Option<String>,
    /// Stages of the rule per layer; each adds at most one summary per query, except under `all` [default: 1]
    #[arg(long, value_name = "K")]
    pub partner_count: Option<usize>,
    /// Distance of stage 0 in blocks; it doubles per stage [default: window blocks + 1, the nearest block left of the
    /// window]
    #[arg(long, value_name = "BLOCKS")]
    pub shift_unit: Option<usize>,
    /// Whether keys are averaged after or before RoPE [default: post-rope]
    #[arg(long)]
    pub pool: Option<KeyPooling>,
    /// β in the bias β ln(pooled tokens) on a summary's logit; 0 weighs a summary like one token [default: 0]
    #[arg(long, value_name = "BETA", allow_negative_numbers = true)]
    pub summary_bias: Option<f64>,
    /// Relative position at which summaries are scored [default: true]
    #[arg(long)]
    pub far_position: Option<FarPosition>,
    /// Exact recall: tokens outside the window that each KV head fetches per decode step; 0 turns recall off, for block
    /// summaries instead [default: 2048]
    #[arg(long, value_name = "TOKENS", value_parser = parse_count)]
    pub recall: Option<usize>,
    /// Code of the keys that recall chooses tokens by, with its size in bits per channel
    ///
    /// pair:1.5bit, pair:2bit, pair:1.25bit, pair:1bit, pair:1/2bit; qpq:2bit, qpq:1bit, qpq:1/2bit; scalar2, page and
    /// exact are for comparison [default: pair:1.5bit]
    #[arg(long, value_name = "CODE[:SIZE]")]
    pub key_code: Option<String>,
    /// Estimate of the values of tokens that recall does not fetch [default: codes]
    #[arg(long)]
    pub rest: Option<RestKind>,
    /// What the codes of keys and values decode to: text refits them to the prompt, which is closer to the stock model;
    /// calibration saves their second set of tables, 1/200 of a dense cache at 32k [default: text]
    #[arg(long)]
    pub code_fit: Option<CodeFit>,
    /// How layers with recall read the prompt: exact reads all earlier tokens, butterfly the window and block summaries
    /// only, which is faster and loses quality [default: exact]
    #[arg(long)]
    pub prefill: Option<PrefillKind>,
    /// Swapped layers that do not recall but read window and block summaries, which is faster and smaller, and forgets:
    /// a list such as 3,5-7 [default: none]
    #[arg(long, value_name = "LIST", value_parser = layer_list)]
    pub butterfly_layers: Option<LayerList>,
}

/// A list of layers.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerList(Vec<usize>);

fn layer_list(text: &str) -> Result<LayerList, String> {
    let bad = || format!("`{text}` is not a list of layers such as 3,5-7");
    parse_layers(text).ok().flatten().map(LayerList).ok_or_else(bad)
}

impl RetrofitArgs {
    /// Returns the settings of these flags without a plan: exact recall, unless `--recall 0` turns it off.
    pub fn without_plan(&self) -> Settings {
        let base = if self.recall == Some(0) { Settings::default() } else { Settings::recalling() };
        self.settings(base)
    }

    /// Returns `base`, overridden by the flags that are set.
    pub fn settings(&self, base: Settings) -> Settings {
        let settings = Settings {
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
            recall: self.recall.unwrap_or(base.recall),
            key_code: self.key_code.clone().unwrap_or(base.key_code),
            rest: self.rest.unwrap_or(base.rest),
            code_fit: self.code_fit.unwrap_or(base.code_fit),
            prefill: self.prefill.unwrap_or(base.prefill),
            butterfly_layers: self.butterfly_layers.as_ref().map_or(base.butterfly_layers, |list| list.0.clone()),
            seed: base.seed,
        };
        match self.window {
            Some(_) => settings,
            None => settings.widened(),
        }
    }
}

/// Source of the prompt.
#[derive(Debug, Args)]
#[command(next_help_heading = "Prompt")]
#[command(group = ArgGroup::new("source").required(true).args(["prompt", "prompt_file", "token_ids"]))]
pub struct PromptArgs {
    /// Prompt text.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub prompt: Option<String>,
    /// Read the prompt from a UTF-8 text file, or from standard input for -.
    #[arg(long, value_name = "FILE|-")]
    pub prompt_file: Option<String>,
    /// Read the prompt's token ids from a JSON array, such as [1, 9906]; needs no tokenizer.
    #[arg(long, value_name = "FILE", conflicts_with = "chat")]
    pub token_ids: Option<PathBuf>,
    /// Apply the model's chat template to the prompt.
    #[arg(long)]
    pub chat: bool,
    /// System message for the chat template.
    #[arg(long, value_name = "TEXT", requires = "chat", allow_hyphen_values = true)]
    pub system: Option<String>,
}

/// Sampling settings.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Maximum number of new tokens.
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    pub max_new_tokens: usize,
    /// Do not stop at an end-of-sequence token: generate exactly N tokens.
    #[arg(long)]
    pub ignore_eos: bool,
    /// Sampling temperature; 0 is greedy decoding.
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f64,
    /// Nucleus sampling: sample from the smallest set of tokens whose probabilities sum to P, 0 < P <= 1.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    pub top_p: Option<f64>,
    /// Sample from the K most likely tokens.
    #[arg(long, value_name = "K")]
    pub top_k: Option<usize>,
    /// Seed of sampling and of the random partner rule [default: 0; a plan or patch stores its own for the rule]
    #[arg(long)]
    pub seed: Option<u64>,
}

impl SamplingArgs {
    /// Returns the sampler's settings.
    pub fn sampling(&self) -> Sampling {
        Sampling { temperature: self.temperature, top_p: self.top_p, top_k: self.top_k, seed: self.seed.unwrap_or(0) }
    }
}

impl PromptArgs {
    /// Reads the text of `--prompt` or `--prompt-file`; `None` for `--token-ids`.
    ///
    /// # Errors
    /// A file that cannot be read or is not UTF-8; an empty prompt.
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

    /// Reads the ids of `--token-ids`, if given.
    ///
    /// # Errors
    /// A file that cannot be read or is not a JSON array of token ids; an empty array.
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
