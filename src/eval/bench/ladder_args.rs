//! The flags of `ladder`.

use crate::cli::{at_least_one, parse_bytes, parse_size};
use crate::error::{Error, Result};
use crate::eval::target::TargetArgs;
use clap::Args;
use std::path::PathBuf;

/// The flags of `ladder`.
#[derive(Debug, Args)]
pub struct LadderArgs {
    /// Contexts to run in tokens, comma-separated; a context is the prompt and the --decode new tokens.
    #[arg(long, value_name = "LIST", default_value = "32k,64k,128k,256k,512k,1M", value_delimiter = ',',
          value_parser = parse_size)]
    pub ctx: Vec<usize>,
    /// Shell command of another engine to time in the same ladder, with the protocol of
    /// integrations/transformers/README.md. May be repeated.
    #[arg(long = "peer", value_name = "COMMAND")]
    pub peers: Vec<String>,
    /// Timed runs of each variant and peer at each context, interleaved; at most 2 where a run takes over 30 s.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one)]
    pub repeats: usize,
    /// New tokens per run, generated greedily; end-of-text tokens do not stop generation.
    #[arg(long, value_name = "TOKENS", default_value_t = 64, value_parser = at_least_one)]
    pub decode: usize,
    /// Prefill chunk in tokens: more use more memory for activations, fewer run slower.
    #[arg(long, value_name = "TOKENS", default_value = "4096", value_parser = parse_size)]
    pub prefill_chunk: usize,
    /// Memory limit of a run, such as 10G (GiB; 10GB is 10^9 bytes): prefill chunks shrink to fit, and a run that takes
    /// more is recorded as out of memory [default: none]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub memory_budget: Option<u64>,
    /// Write the results to FILE.json after every run, gzip-compressed where the name ends in .gz. An existing file of
    /// the same ladder is resumed.
    #[arg(long, value_name = "FILE.json")]
    pub out: PathBuf,
    /// Print no progress, only warnings and the table.
    #[arg(long, short)]
    pub quiet: bool,
    /// Model, variants and prompt.
    // Last, since clap puts all flags after a group under that group's help heading.
    #[command(flatten)]
    pub target: TargetArgs,
}

impl LadderArgs {
    /// Returns the contexts in rising order without duplicates.
    ///
    /// # Errors
    /// A context without room for a prompt.
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
