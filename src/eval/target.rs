//! The model under test: a checkpoint that is opened but not yet read, the format that its weights will be held in, and
//! what results say of both.

use super::report::{beyond_trained, Header};
use super::texts::TextStream;
use super::variant::{self, Variant};
use crate::checkpoint::{Checkpoint, OnProgress, WeightDtype, WeightFormat};
use crate::cli::{human_bytes, short_count, weight_format, Bars, ModelArgs, Patch};
use crate::error::{Error, ErrorKind, Result};
use crate::weights::Weights;
use candle_core::Device;
use clap::Args;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Flags that name the model under test, its variants and its prompts.
#[derive(Debug, Clone, Args)]
pub struct TargetArgs {
    /// Variants to run: stock, retrofit, retrofit:KEY=VALUE,.. with keys as the flags of bfly-retrofit (window,
    /// sink-tokens, partner, layers, ...), and to compare with snapkv:budget=1024,window=64,kernel=5 or
    /// keydiff:budget=1024,block=128. A KEY=VALUE belongs to the name with a colon before it. May be repeated.
    #[arg(long, value_name = "LIST", default_value = "stock,retrofit")]
    pub variants: Vec<String>,
    /// Folder of the prompt's documents, as scripts/fetch_texts.py lays them out; a model without a tokenizer gets
    /// random ids instead.
    #[arg(long, value_name = "DIR", default_value = "texts")]
    pub texts: PathBuf,
    /// Source and format of the weights.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Draw the weights from a seed: --model is then a config.json, or a directory with one. The results say that only
    /// speed and memory mean anything.
    #[arg(long, value_name = "SEED", help_heading = "Model")]
    pub random_weights: Option<u64>,
}

/// The model under test, on the device that it runs on.
pub struct Target {
    args: TargetArgs,
    checkpoint: Checkpoint,
    /// The patch that --model names, if it names one.
    patch: Option<Patch>,
    format: WeightFormat,
    /// Device that it runs on.
    pub device: Device,
}

impl Target {
    /// Opens the checkpoint that `args` name; weights are not read.
    ///
    /// # Errors
    /// A checkpoint that does not exist or is not understood.
    pub fn open(args: &TargetArgs, device: Device, progress: OnProgress) -> Result<Self> {
        let (checkpoint, patch) = open(args, progress)?;
        let format = weight_format(args.model.dtype.parse::<WeightDtype>()?, &checkpoint, &device);
        Ok(Self { args: args.clone(), checkpoint, patch, format, device })
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The variants that `--variants` names, for any context.
    ///
    /// # Errors
    /// Those of [`variant::parse`].
    pub fn variants(&self) -> Result<Vec<Variant>> {
        self.parse_variants(None)
    }

    /// The variants that `--variants` names at `ctx`, where a variant may be given as a share of a dense cache.
    ///
    /// # Errors
    /// Those of [`variant::parse`].
    pub fn variants_at(&self, ctx: usize) -> Result<Vec<Variant>> {
        self.parse_variants(Some(ctx))
    }

    fn parse_variants(&self, ctx: Option<usize>) -> Result<Vec<Variant>> {
        variant::parse(&self.args.variants, self.patch.as_ref().map(|p| &p.plan), &self.checkpoint.spec, ctx)
    }

    /// Refuses weights that are larger than the memory, before an allocation fails and ends the process.
    ///
    /// # Errors
    /// Weights that take more bytes than the machine, or the GPU, has.
    pub fn refuse_too_large(&self) -> Result<()> {
        let need = self.checkpoint.held(&self.format).values().sum::<u64>();
        match crate::ops::memory_of(&self.device).filter(|memory| need > *memory) {
            None => Ok(()),
            Some(memory) => Err(Error::new(
                ErrorKind::Unsupported,
                self.checkpoint.identity.place(),
                format!("its weights take {}; there are {} of memory", human_bytes(need), human_bytes(memory)),
            )),
        }
    }

    /// A stream of at least `tokens` ids.
    ///
    /// # Errors
    /// Those of [`TextStream::open`].
    pub fn stream(&self, tokens: usize, progress: OnProgress) -> Result<TextStream> {
        let seed = self.args.random_weights.unwrap_or(0);
        TextStream::open(&self.checkpoint, &self.args.texts, tokens, seed, progress)
    }

    /// Loads the weights, once for all variants and jobs.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn load(&self, progress: OnProgress) -> Result<Arc<Weights>> {
        Weights::load(&self.checkpoint, &self.format, &self.device, progress)
    }

    /// Prints the warnings of the files read so far, each once.
    pub fn warn(&self, bars: &Bars) {
        self.checkpoint.take_warnings().iter().for_each(|w| bars.warn(w));
    }

    /// Warns of what the checkpoint warns of, and of contexts beyond the trained length, where only speed and memory mean anything.
    pub fn warn_beyond_trained(&self, bars: &Bars, contexts: &[usize]) {
        self.warn(bars);
        let trained = self.checkpoint.spec.max_positions;
        if let Some(beyond) = beyond_trained(trained, contexts.iter().copied()) {
            let trained = short_count(trained);
            bars.warn(&format!("trained for {trained} positions: at {beyond} this is speed and memory only"));
        }
    }

    /// The header of results of `kind`.
    pub fn header(&self, kind: &str) -> Header {
        let given = self.args.model.model.as_deref().unwrap_or_default();
        let held = self.checkpoint.held(&self.format);
        let most = held.iter().max_by_key(|(_, bytes)| **bytes).map_or(String::new(), |(name, _)| name.clone());
        Header {
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
            kv_dtype: self.format.compute().as_str().into(),
            ..Header::new(kind, &self.device)
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

/// The model's name for people: a hub id as it is, or the last part of a path without its extension.
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
