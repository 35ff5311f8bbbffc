//! What is measured: a checkpoint that was opened but not yet read, how it will be held, and what results say of both.

use super::bench::format::{Header, SCHEMA_VERSION};
use super::bench::machine::{machine, now};
use super::bench::prompt::Stream;
use super::variant::{self, Variant};
use crate::checkpoint::{Checkpoint, OnProgress, WeightDtype, WeightFormat};
use crate::cli::{human_bytes, short_count, weight_format, Bars, ModelArgs, Patch};
use crate::error::{Error, ErrorKind, Result};
use crate::weights::Weights;
use candle_core::Device;
use clap::Args;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What is measured.
#[derive(Debug, Clone, Args)]
pub struct TargetArgs {
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

/// A checkpoint on the device that it is for.
pub struct Target {
    args: TargetArgs,
    checkpoint: Checkpoint,
    /// Where --model names one.
    patch: Option<Patch>,
    hold: WeightFormat,
    /// Where it runs.
    pub device: Device,
}

impl Target {
    /// Opens what `args` name; weights are not read.
    ///
    /// # Errors
    /// A checkpoint that is not there or not understood.
    pub fn open(args: &TargetArgs, device: Device, progress: OnProgress) -> Result<Self> {
        let (checkpoint, patch) = open(args, progress)?;
        let hold = weight_format(args.model.dtype.parse::<WeightDtype>()?, &checkpoint, &device);
        Ok(Self { args: args.clone(), checkpoint, patch, hold, device })
    }

    /// What was opened.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// What it is run as, whatever the context.
    ///
    /// # Errors
    /// Those of [`variant::parse`].
    pub fn variants(&self) -> Result<Vec<Variant>> {
        self.parse_variants(None)
    }

    /// What it is run as at `ctx`, where a variant may be a share of a dense cache.
    ///
    /// # Errors
    /// Those of [`variant::parse`].
    pub fn variants_at(&self, ctx: usize) -> Result<Vec<Variant>> {
        self.parse_variants(Some(ctx))
    }

    fn parse_variants(&self, ctx: Option<usize>) -> Result<Vec<Variant>> {
        variant::parse(&self.args.variants, self.patch.as_ref().map(|p| &p.plan), &self.checkpoint.spec, ctx)
    }

    /// Refuses weights that cannot be held, before the first allocation fails and ends the process.
    ///
    /// # Errors
    /// Weights that take more than the machine, or the GPU, has.
    pub fn refuse_too_large(&self) -> Result<()> {
        let need = self.checkpoint.held(&self.hold).values().sum::<u64>();
        match crate::ops::memory_of(&self.device).filter(|memory| need > *memory) {
            None => Ok(()),
            Some(memory) => Err(Error::new(
                ErrorKind::Unsupported,
                self.checkpoint.identity.place(),
                format!("its weights take {}; there are {} of memory", human_bytes(need), human_bytes(memory)),
            )),
        }
    }

    /// At least `tokens` ids to read.
    ///
    /// # Errors
    /// Those of [`Stream::open`].
    pub fn stream(&self, tokens: usize, progress: OnProgress) -> Result<Stream> {
        let seed = self.args.random_weights.unwrap_or(0);
        Stream::open(&self.checkpoint, &self.args.texts, tokens, seed, progress)
    }

    /// Reads the weights, once for all variants and jobs.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn load(&self, progress: OnProgress) -> Result<Arc<Weights>> {
        Weights::load(&self.checkpoint, &self.hold, &self.device, progress)
    }

    /// Warns of contexts that the model was not trained for.
    pub fn warn_past_training(&self, bars: &Bars, contexts: &[usize]) {
        let trained = self.checkpoint.spec.max_positions;
        let past: Vec<_> = contexts.iter().filter(|c| **c > trained).map(|c| short_count(*c)).collect();
        if !past.is_empty() {
            let (past, trained) = (past.join(", "), short_count(trained));
            bars.warn(&format!("trained for {trained} positions: at {past} this is speed and memory only"));
        }
    }

    /// What results of a kind begin with.
    pub fn header(&self, kind: &str) -> Header {
        let given = self.args.model.model.as_deref().unwrap_or_default();
        let held = self.checkpoint.held(&self.hold);
        let most = held.iter().max_by_key(|(_, bytes)| **bytes).map_or(String::new(), |(name, _)| name.clone());
        Header {
            kind: kind.into(),
            schema_version: SCHEMA_VERSION,
            git_sha: env!("BFLY_GIT_SHA").into(),
            started: now(),
            command: std::env::args().collect(),
            machine: machine(&self.device),
            // A patch is not its base.
            model: self.args.random_weights.is_none().then(|| match self.patch.is_some() {
                true => self.checkpoint.identity.clone(),
                false => self.checkpoint.identity.as_given(given),
            }),
            name: display_name(given),
            random_weights: self.args.random_weights,
            parameters: self.checkpoint.parameters(),
            trained_positions: self.checkpoint.spec.max_positions,
            dtype: most,
            held,
            kv_dtype: self.hold.compute().as_str().into(),
            resumed: vec![],
        }
    }
}

fn open(args: &TargetArgs, progress: OnProgress) -> Result<(Checkpoint, Option<Patch>)> {
    let name = args.model.model.as_deref().unwrap_or_default();
    if let Some(seed) = args.random_weights {
        return Ok((Checkpoint::random(name, seed)?, None));
    }
    let (patch, options) = (Patch::open(name)?, args.model.open_options());
    let mut checkpoint = match &patch {
        Some(patch) => patch.base(&options, progress)?,
        None => Checkpoint::open(name, &options, progress)?,
    };
    if args.model.tie_embeddings {
        checkpoint.tie_embeddings()?;
    }
    Ok((checkpoint, patch))
}

/// A hub id as it is; of a path its last part without what says only what kind of file it is.
fn display_name(given: &str) -> String {
    let path = Path::new(given);
    if !path.exists() {
        return given.into();
    }
    let path = if path.file_name().is_some_and(|n| n == "config.json") { path.parent().unwrap_or(path) } else { path };
    let full = std::fs::canonicalize(path).unwrap_or_else(|_| path.into());
    let name = if full.is_dir() { full.file_name() } else { full.file_stem() };
    name.map_or_else(|| given.into(), |n| n.to_string_lossy().into_owned())
}
