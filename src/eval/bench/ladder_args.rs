//! The flags of `ladder`.

use crate::cli::{at_least_one, parse_bytes, parse_size};
use crate::error::{Error, Result};
use crate::eval::target::TargetArgs;
use clap::Args;
use std::path::PathBuf;

/// The flags of `ladder`.
#[derive(Debug, Args)]
pub struct LadderArgs {
    /// Contexts to run; each holds a prompt and the new tokens after it.
    #[arg(long, value_name = "LIST", default_value = "32k,64k,128k,256k,512k,1M", value_delimiter = ',',
          value_parser = parse_size)]
    pub ctx: Vec<usize>,
    /// Command of another engine, which speaks the protocol of integrations/transformers/README.md. May be repeated.
    #[arg(long = "peer", value_name = "COMMAND")]
    pub peers: Vec<String>,
    /// Timed runs of each variant and peer, interleaved; two where one takes over 30 s.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = at_least_one)]
    pub repeats: usize,
    /// New tokens per run.
    #[arg(long, value_name = "TOKENS", default_value_t = 64, value_parser = at_least_one)]
    pub decode: usize,
    /// Tokens to a prefill chunk.
    #[arg(long, value_name = "TOKENS", default_value = "4096", value_parser = parse_size)]
    pub prefill_chunk: usize,
    /// Memory that a run may take, such as 10G (GiB; GB is 10^9): prefill chunks shrink to fit, and a run that takes more
    /// is recorded as out of memory.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub memory_budget: Option<u64>,
    /// Write the results to FILE.json after every run, compressed where the name ends in .gz. An earlier file of the
    /// same ladder is taken up where it was cut off.
    #[arg(long, value_name = "FILE.json")]
    pub out: PathBuf,
    /// Show no progress, only warnings and the table.
    #[arg(long, short)]
    pub quiet: bool,
    /// Model, variants and prompt. (The last field, since the heading of its last group holds for whatever follows.)
    #[command(flatten)]
    pub target: TargetArgs,
}

impl LadderArgs {
    /// The contexts, rising, each once.
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
