//! Where weights come from: a hub id, a Hugging Face directory, a GGUF file, or a seed; all read as named tensors.
//!
//! Names are Hugging Face's throughout; `gguf` translates. A tensor is read in row chunks, checked for NaN, brought into
//! the form it is held in ([`WeightFormat`]) and only then is the next one touched.

mod chat_template;
mod detokenizer;
mod gguf;
pub mod gguf_keys;
mod gguf_tokenizer;
#[cfg(feature = "hub")]
mod hub;
mod identity;
mod random;
mod rows;
mod safetensors;
mod special_tokens;
mod stored;
mod tokenizer;
mod weight_format;

pub use chat_template::ChatTemplate;
pub use detokenizer::Detokenizer;
pub use identity::Identity;
#[cfg(feature = "eval")]
pub(crate) use random::splitmix;
pub use tokenizer::Text;
pub use weight_format::{WeightDtype, WeightFormat};

use crate::error::{At, Error, ErrorKind, Result};
use crate::family::{self, Family, Naming, PLAIN};
use crate::nn::Weight;
use crate::spec::{Config, ModelSpec};
use crate::storage::Storage;
use crate::tensors::{Role, Schema, TensorSpec};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Told how far a stage is: what is read, units done, units in all.
pub type OnProgress<'a> = &'a (dyn Fn(&str, u64, u64) + Sync);

/// A stored tensor.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Name in the file.
    pub name: String,
    /// Shape, outermost first.
    pub shape: Vec<usize>,
    /// Encoding, or the name of one that cannot be read.
    pub storage: Result<Storage, String>,
}

enum Store {
    Shards(safetensors::Shards),
    Gguf(Box<gguf::Gguf>),
    Random(random::Random),
}

/// How to find a checkpoint.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Branch, tag or commit of a hub repository.
    pub revision: Option<String>,
    /// Use only what is cached.
    pub offline: bool,
    /// Embed with the output matrix: [`Checkpoint::tie_embeddings`].
    pub tie_embeddings: bool,
}

/// An open checkpoint: configuration read, weights still in their files.
pub struct Checkpoint {
    /// What it is, for reports and patches.
    pub identity: Identity,
    /// The configuration.
    pub config: Config,
    /// What the model is built from.
    pub spec: ModelSpec,
    /// Every tensor that the model asks for.
    pub schema: Schema,
    /// The family that reads it.
    pub family: &'static Family,
    store: Store,
    /// How this file spells tensor names.
    naming: Naming,
    dir: PathBuf,
    /// Warnings, and how many of them have been given out.
    warnings: Mutex<(Vec<String>, usize)>,
}

impl Checkpoint {
    /// Opens `model`: a `.gguf` file, a directory, or a hub id (`owner/name`, or `owner/name/file.gguf`).
    pub fn open(model: &str, options: &OpenOptions, progress: OnProgress) -> Result<Self> {
        let mut checkpoint = Self::find(model, options, progress)?;
        if options.tie_embeddings {
            checkpoint.tie_embeddings()?;
        }
        Ok(checkpoint)
    }

    fn find(model: &str, options: &OpenOptions, progress: OnProgress) -> Result<Self> {
        let path = Path::new(model);
        if path.is_dir() {
            return Self::from_dir(path, Identity::directory(path));
        }
        if path.is_file() {
            return Self::from_gguf(path, Identity::file(path));
        }
        if model.ends_with(".gguf") && !hub_like(model) || model.starts_with(['.', '/', '~']) {
            return Err(Error::new(ErrorKind::Io, model, "no such file or directory"));
        }
        Self::from_hub(model, options, progress)
    }

    #[cfg(feature = "hub")]
    fn from_hub(model: &str, options: &OpenOptions, progress: OnProgress) -> Result<Self> {
        let (path, identity) = hub::fetch(model, options, progress)?;
        match path.extension().is_some_and(|e| e == "gguf") {
            true => Self::from_gguf(&path, identity),
            false => Self::from_dir(&path, identity),
        }
    }

    #[cfg(not(feature = "hub"))]
    fn from_hub(model: &str, _: &OpenOptions, _: OnProgress) -> Result<Self> {
        Err(Error::new(
            ErrorKind::Io,
            model,
            "no such file or directory, and this build has no hub support (feature `hub`)",
        ))
    }

    fn from_dir(dir: &Path, identity: Identity) -> Result<Self> {
        let path = dir.join("config.json");
        if !path.exists() {
            let message = "has no config.json; for a GGUF file give its path, or owner/name/file.gguf on the hub";
            return Err(Error::new(ErrorKind::Io, dir.display(), message));
        }
        let config = read_config(&path)?;
        let mut warnings = vec![];
        let store = Store::Shards(safetensors::Shards::open(dir, &mut warnings)?);
        Self::assemble(config, store, dir.into(), identity, warnings)
    }

    /// A model of the shape that `model` describes, with weights drawn from `seed`: a `config.json`, or a directory that holds
    /// one. For speed and memory; its text is noise.
    ///
    /// # Errors
    /// No configuration there, or one that cannot be read.
    pub fn random(model: &str, seed: u64) -> Result<Self> {
        let given = Path::new(model);
        let path = if given.is_dir() { given.join("config.json") } else { given.into() };
        if !path.is_file() || path.extension().is_none_or(|e| e != "json") {
            let message = "holds no config.json; random weights need one, or a directory with one";
            return Err(Error::new(ErrorKind::Io, model, message));
        }
        let config = read_config(&path)?;
        let dir: PathBuf = path.parent().unwrap_or(Path::new(".")).into();
        let identity = Identity::directory(&dir);
        let (family, decoder) = family::read(&config)?;
        let spec = (family.spec)(&decoder)?;
        let store = Store::Random(random::Random::new(&path, &config, &Schema::new(&spec), seed)?);
        Self::assemble(config, store, dir, identity, vec![])
    }

    fn from_gguf(path: &Path, identity: Identity) -> Result<Self> {
        let file = gguf::Gguf::open(path)?;
        let (config, warnings) = gguf_keys::config(&file)?;
        let dir = path.parent().unwrap_or(Path::new(".")).into();
        Self::assemble(config, Store::Gguf(Box::new(file)), dir, identity, warnings)
    }

    fn assemble(config: Config, store: Store, dir: PathBuf, identity: Identity, warnings: Vec<String>) -> Result<Self> {
        let (family, decoder) = family::read(&config)?;
        let mut spec = (family.spec)(&decoder)?;
        store.add_stored_biases(&mut spec);
        let spec = spec.validate(config.origin())?;
        let schema = Schema::new(&spec);
        let mut checkpoint = Self {
            identity,
            config,
            spec,
            schema,
            family,
            store,
            naming: PLAIN,
            dir,
            warnings: Mutex::new((warnings, 0)),
        };
        checkpoint.match_tensors()?;
        Ok(checkpoint)
    }

    /// Uses the output matrix as the embedding too, where a file stores a tied model's one matrix twice (GGUF files quantise
    /// the two copies differently). A model that is tied already stays as it is.
    ///
    /// # Errors
    /// Matrices that are not copies of one another: the model is not a tied one.
    pub fn tie_embeddings(&mut self) -> Result<()> {
        let Some(head) = self.schema.head.clone() else { return Ok(()) };
        let rows = 0..self.spec.vocab.min(64);
        let sample = |t: &TensorSpec| rows::decode(self, self.expect(t)?, rows.clone(), self.spec.hidden);
        let (output, embed) = (sample(&head)?, sample(&self.schema.embed)?);
        let square = |x: f32| x as f64 * x as f64;
        let apart: f64 = output.iter().zip(&embed).map(|(a, b)| square(a - b)).sum();
        let size: f64 = output.iter().map(|a| square(*a)).sum();
        if apart > 0.25 * size {
            let message = "the output matrix is no copy of the embedding: this model is not tied";
            return Err(Error::usage("--tie-embeddings", message));
        }
        self.spec.tied = true;
        self.schema = Schema { embed: head, head: None, ..self.schema.clone() };
        Ok(())
    }

    /// The text side: tokenizer, template and stop tokens.
    ///
    /// # Errors
    /// No tokenizer, or a damaged one.
    pub fn text(&self) -> Result<Text> {
        let text = self.read_text()?;
        text.warnings().iter().for_each(|w| self.warn(w.clone()));
        Ok(text)
    }

    /// Adds a warning for [`Checkpoint::take_warnings`].
    fn warn(&self, warning: String) {
        if let Ok(mut warnings) = self.warnings.lock() {
            if !warnings.0.contains(&warning) {
                warnings.0.push(warning);
            }
        }
    }

    /// What a user should know of the files read so far; each warning is given out once.
    pub fn take_warnings(&self) -> Vec<String> {
        let Ok(mut warnings) = self.warnings.lock() else { return vec![] };
        let (all, told) = &mut *warnings;
        let from = std::mem::replace(told, all.len());
        all[from..].to_vec()
    }

    fn read_text(&self) -> Result<Text> {
        match &self.store {
            Store::Shards(_) => Text::from_dir(&self.dir, &self.config),
            Store::Gguf(file) => Text::from_gguf(file),
            Store::Random(_) if self.has_text() => Text::from_dir(&self.dir, &self.config),
            Store::Random(random) => Err(Error::new(
                ErrorKind::Tokenizer,
                random.path().display(),
                "random weights come without a tokenizer, and no tokenizer.json is beside the configuration",
            )),
        }
    }

    /// Whether a tokenizer comes with the weights.
    pub fn has_text(&self) -> bool {
        matches!(self.store, Store::Gguf(_)) || self.dir.join("tokenizer.json").exists()
    }

    /// Parameters that the configuration asks for.
    pub fn parameters(&self) -> u64 {
        self.schema.iter().fold(0, |sum: u64, t| sum.saturating_add(t.elements()))
    }

    /// Files whose bytes identify the weights.
    pub fn files(&self) -> Vec<PathBuf> {
        match &self.store {
            Store::Gguf(file) => file.paths().map(PathBuf::from).collect(),
            Store::Shards(shards) => {
                std::iter::once(self.dir.join("config.json")).chain(shards.paths().map(PathBuf::from)).collect()
            }
            Store::Random(random) => vec![random.path().into()],
        }
    }

    /// Bytes of the matrices if all were f32.
    pub fn f32_bytes(&self) -> u64 {
        self.schema.matrices().filter(|t| self.info(t).is_some()).map(|t| 4 * t.elements()).sum()
    }

    /// Bytes of all matrices by the type that `format` would hold them in.
    pub fn held(&self, format: &WeightFormat) -> BTreeMap<String, u64> {
        let mut bytes = BTreeMap::new();
        for t in self.schema.matrices() {
            let stored = self.info(t).and_then(|i| i.storage.clone().ok());
            let target = format.resolve(stored.unwrap_or(Storage::F32), t.shape[1]);
            let sum: &mut u64 = bytes.entry(target.to_string()).or_default();
            *sum = sum.saturating_add((t.shape[0] as u64).saturating_mul(target.row_bytes(t.shape[1]) as u64));
        }
        bytes
    }

    /// A matrix in the form that `format` says.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape, of an unknown type, or holds NaN or infinity.
    pub fn matrix(&self, tensor: &TensorSpec, format: &WeightFormat, device: &Device) -> Result<Weight> {
        let info = self.expect(tensor)?;
        match &self.store {
            Store::Random(random) => random.matrix(self, info, format, device),
            _ => rows::load_matrix(self, info, self.interleaved_rows(tensor), format, device),
        }
    }

    /// A vector in f32.
    ///
    /// # Errors
    /// As [`Checkpoint::matrix`].
    pub fn vector(&self, tensor: &TensorSpec, device: &Device) -> Result<Tensor> {
        let info = self.expect(tensor)?;
        let len = tensor.shape[0];
        if let Store::Random(random) = &self.store {
            return Tensor::from_vec(random.vector(tensor), len, device).at(&tensor.name);
        }
        let mut values = rows::decode(self, info, 0..1, len)?;
        let stores_difference = self.family.norm_plus_one && matches!(self.store, Store::Shards(_));
        if stores_difference && tensor.role == Role::Norm {
            values.iter_mut().for_each(|v| *v += 1.0);
        }
        let values = rows::in_order(values, self.interleaved_rows(tensor));
        Tensor::from_vec(values, len, device).at(&tensor.name)
    }

    /// Refuses a vector that products need in `dtype` and that it cannot hold.
    ///
    /// # Errors
    /// As [`Checkpoint::matrix`].
    pub fn fits(&self, tensor: &TensorSpec, dtype: DType) -> Result<()> {
        let Some(target) = Storage::of_tensor(dtype).filter(|s| *s != Storage::F32) else { return Ok(()) };
        let values = self.vector(tensor, &Device::Cpu)?.to_vec1::<f32>()?;
        rows::encode(self, self.expect(tensor)?, target, &values, (0, values.len())).map(drop)
    }

    /// Rows per head where the file interleaves the halves of each.
    fn interleaved_rows(&self, tensor: &TensorSpec) -> Option<usize> {
        let interleaves = matches!(self.store, Store::Gguf(_)) && self.family.gguf.interleaved_qk;
        tensor.rotary_rows.filter(|_| interleaves)
    }

    fn expect(&self, tensor: &TensorSpec) -> Result<&TensorInfo> {
        let full = self.stored_name(tensor);
        let Some(info) = self.info(tensor) else {
            let near = self.nearest(&full).map_or(String::new(), |n| format!("; the file has `{n}`"));
            return Err(Error::tensor(self.identity.place(), format!("tensor `{full}` is missing{near}")));
        };
        if info.shape != tensor.shape {
            return Err(Error::tensor(
                self.identity.place(),
                format!("tensor `{full}` has shape {:?}; the configuration asks for {:?}", info.shape, tensor.shape),
            ));
        }
        Ok(info)
    }

    /// The name that the file has for it.
    fn stored_name(&self, tensor: &TensorSpec) -> String {
        match &self.store {
            Store::Gguf(_) => tensor.gguf.clone(),
            Store::Shards(_) => self.naming.apply(&tensor.name),
            Store::Random(_) => tensor.name.clone(),
        }
    }

    /// The stored name with the longest common end, if that holds at least the last three parts: points at a misnaming.
    fn nearest(&self, name: &str) -> Option<String> {
        let Store::Shards(shards) = &self.store else { return None };
        let common = |n: &str| n.rsplit('.').zip(name.rsplit('.')).take_while(|(a, b)| a == b).count();
        shards.names().max_by_key(|n| common(n)).filter(|n| common(n) >= 3).map(String::from)
    }

    fn info(&self, tensor: &TensorSpec) -> Option<&TensorInfo> {
        let name = self.stored_name(tensor);
        match &self.store {
            Store::Shards(s) => s.info(&name),
            Store::Gguf(g) => g.info(&name),
            Store::Random(r) => r.info(&name),
        }
    }

    fn read(&self, info: &TensorInfo, start: u64, length: usize) -> Result<Vec<u8>> {
        match &self.store {
            Store::Shards(s) => s.read(&info.name, start, length),
            Store::Gguf(g) => g.read_stored(&info.name, start, length),
            Store::Random(r) => r.read(&info.name, start, length),
        }
    }
}

fn read_config(path: &Path) -> Result<Config> {
    let text = std::fs::read_to_string(path).at(path.display())?;
    let value = serde_json::from_str(&text).map_err(|e| Error::format(path.display(), e))?;
    Config::new(path.display().to_string(), value)
}

fn hub_like(model: &str) -> bool {
    model.matches('/').count() >= 2
}
