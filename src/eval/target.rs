//! The model under test: an opened checkpoint whose weights are not loaded yet, the format to load them in, and the
//! header that describes both in results.

use super::report::{beyond_trained, Header};
use super::texts::TextStream;
use super::variant::{self, Variant};
use crate::checkpoint::{Checkpoint, OnProgress, WeightDtype, WeightFormat};
use crate::cli::{human_bytes, note, prepare_recall, short_count, weight_format, Bars, ModelArgs, Patch};
use crate::error::{Error, ErrorKind, Result};
use crate::retrofit::Settings;
use crate::weights::Weights;
use candle_core::Device;
use clap::Args;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Flags that name the model under test, its variants and its prompts.
#[derive(Debug, Clone, Args)]
pub struct TargetArgs {
    /// Variants to run, comma-separated: stock; retrofit, or retrofit:KEY=VALUE,.. with the flags of bfly-retrofit as
    /// keys (window, sink-tokens, partner, layers, ..); an eviction rule to compare with, such as
    /// snapkv:budget=1024,window=64,kernel=5 or keydiff:budget=1024,block=128. A KEY=VALUE belongs to the method before
    /// it. May be repeated.
    #[arg(long, value_name = "LIST", default_value = "stock,retrofit")]
    pub variants: Vec<String>,
    /// Folder of documents that prompts are cut from, as scripts/fetch_texts.py writes it; a model without a tokenizer
    /// gets random ids instead.
    #[arg(long, value_name = "DIR", default_value = "texts")]
    pub texts: PathBuf,
    /// Source and format of the weights.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Initialise the weights randomly from this seed: --model is then a config.json, or a directory with one. The
    /// results are marked as valid for speed and memory only.
    #[arg(long, value_name = "SEED", help_heading = "Model")]
    pub random_weights: Option<u64>,
}

/// The model under test and its device.
pub struct Target {
    args: TargetArgs,
    checkpoint: Checkpoint,
    /// Patch that `--model` names, if it names one.
    patch: Option<Patch>,
    format: WeightFormat,
    /// Device that the model runs on.
    pub device: Device,
}

impl Target {
    /// Opens the checkpoint that `args` names, without reading its weights.
    ///
    /// # Errors
    /// A checkpoint that does not exist, is damaged, or is of an unsupported architecture.
    pub fn open(args: &TargetArgs, device: Device, progress: OnProgress) -> Result<Self> {
        let (checkpoint, patch) = open(args, progress)?;
        let format = weight_format(args.model.dtype.parse::<WeightDtype>()?, &checkpoint, &device);
        Ok(Self { args: args.clone(), checkpoint, patch, format, device })
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Parses `--variants` for any context; `kv=SHARE` and `question=exact` are refused.
    ///
    /// # Errors
    /// As [`variant::parse`].
    pub fn variants(&self) -> Result<Vec<Variant>> {
        self.without_questions(None)
    }

    /// Parses `--variants` for context `ctx`, at which `kv=SHARE` is a share of the dense cache; `question=exact` is
    /// refused.
    ///
    /// # Errors
    /// As [`variant::parse`].
    pub fn variants_at(&self, ctx: usize) -> Result<Vec<Variant>> {
        self.without_questions(Some(ctx))
    }

    /// Parses `--variants` like [`Target::variants_at`], for variants that answer questions: `question=exact` is
    /// accepted if questions are `unseen`, read after the context.
    ///
    /// # Errors
    /// As [`variant::parse`].
    pub fn answering_at(&self, ctx: usize, unseen: bool) -> Result<Vec<Variant>> {
        let variants = self.parse_variants(Some(ctx))?;
        if !unseen {
            let why = "makes no difference without --question-unseen: the whole prompt is read exactly";
            variant::refuse_exact_questions(&variants, why)?;
        }
        Ok(variants)
    }

    fn without_questions(&self, ctx: Option<usize>) -> Result<Vec<Variant>> {
        let variants = self.parse_variants(ctx)?;
        variant::refuse_exact_questions(&variants, "is a setting of ruler, fidelity and needle alone")?;
        Ok(variants)
    }

    fn parse_variants(&self, ctx: Option<usize>) -> Result<Vec<Variant>> {
        variant::parse(&self.args.variants, self.patch.as_ref().map(|p| &p.plan), &self.checkpoint.spec, ctx)
    }

    /// Refuses weights that are larger than the device's memory, before an allocation fails and ends the process.
    ///
    /// # Errors
    /// Weights that take more bytes than the machine, or the GPU, has.
    pub fn refuse_too_large(&self) -> Result<()> {
        let need = self.checkpoint.bytes_by_type(&self.format).values().sum::<u64>();
        match crate::ops::memory_of(&self.device).filter(|memory| need > *memory) {
            None => Ok(()),
            Some(memory) => Err(Error::new(
                ErrorKind::Unsupported,
                self.checkpoint.identity.place(),
                format!("its weights take {}; the device has {}", human_bytes(need), human_bytes(memory)),
            )),
        }
    }

    /// Returns whether `--model` is a patch with a calibration of exact recall.
    pub fn brings_calibration(&self) -> bool {
        self.patch.as_ref().and_then(Patch::calibration).is_some()
    }

    /// Opens a stream of at least `tokens` ids.
    ///
    /// # Errors
    /// As [`TextStream::open`].
    pub fn stream(&self, tokens: usize, progress: OnProgress) -> Result<TextStream> {
        let seed = self.args.random_weights.unwrap_or(0);
        TextStream::open(&self.checkpoint, &self.args.texts, tokens, seed, progress)
    }

    /// Loads the weights, once for all variants and jobs, and prepares exact recall where a variant `recalls`.
    ///
    /// # Errors
    /// As [`Weights::load`] and [`prepare_recall`].
    pub fn load(&self, recalls: Option<&Settings>, progress: OnProgress) -> Result<Arc<Weights>> {
        let weights = Weights::load(&self.checkpoint, &self.format, &self.device, progress)?;
        if let Some(settings) = recalls {
            let warn = |line: &str| note(format!("warning: {line}"));
            let report: (&dyn Fn(&str), OnProgress) = (&warn, progress);
            prepare_recall(&weights, &self.checkpoint, settings, None, self.patch.as_ref(), report)?;
        }
        Ok(weights)
    }

    /// Prints each warning about the files read so far, once.
    pub fn warn(&self, bars: &Bars) {
        self.checkpoint.take_warnings().iter().for_each(|w| bars.warn(w));
    }

    /// Prints the checkpoint's warnings, and one about contexts beyond the trained length, where only speed and memory
    /// are valid.
    pub fn warn_beyond_trained(&self, bars: &Bars, contexts: &[usize]) {
        self.warn(bars);
        let trained = self.checkpoint.spec.max_positions;
        if let Some(beyond) = beyond_trained(trained, contexts.iter().copied()) {
            let trained = short_count(trained);
            bars.warn(&format!("the model was trained for {trained} positions: at {beyond}, speed and memory only"));
        }
    }

    /// Returns the header of results of `kind`.
    pub fn header(&self, kind: &str) -> Header {
        let given = self.args.model.model.as_deref().unwrap_or_default();
        let held = self.checkpoint.bytes_by_type(&self.format);
        let most = held.iter().max_by_key(|(_, bytes)| **bytes).map_or(String::new(), |(name, _)| name.clone());
        Header {
            // The identity of a patched model is that of its base, which `given` does not name.
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

/// Display name of the model: a hub id unchanged, or the last part of a path without its extension.
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
