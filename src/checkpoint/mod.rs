//! Checkpoint loading: a hub id, a Hugging Face directory, a GGUF file or random weights, all read as named tensors.
//!
//! Tensor names are Hugging Face's; [`crate::tensors`] maps them to GGUF names. A tensor is read in row chunks, checked
//! for NaN and converted to its type in memory ([`WeightFormat`]); tensors are loaded one after another.

mod chat_template;
mod detokenizer;
mod gguf;
pub mod gguf_keys;
mod gguf_tokenizer;
#[cfg(feature = "hub")]
mod hub;
mod identity;
mod mlx;
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
pub(crate) use random::splitmix;
pub(crate) use safetensors::Shards;
pub use tokenizer::TextTokenizer;
pub use weight_format::{WeightDtype, WeightFormat};

use crate::error::{At, Error, ErrorKind, Result};
use crate::family::{self, Family, Naming, Quantisation, PLAIN};
use crate::nn::Weight;
use crate::spec::{Config, ModelSpec};
use crate::storage::Storage;
use crate::tensors::{Order, Role, Schema, TensorSpec};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Progress callback: name of the stage, units done, total units.
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
    Random(random::RandomWeights),
}

/// Options of [`Checkpoint::open`].
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Branch, tag or commit of a hub repository.
    pub revision: Option<String>,
    /// Use only files in the local hub cache.
    pub offline: bool,
    /// Call [`Checkpoint::tie_embeddings`] after opening.
    pub tie_embeddings: bool,
}

/// An open checkpoint: the configuration is read, the weights are still in their files.
pub struct Checkpoint {
    /// Origin of the checkpoint, for reports and patches.
    pub identity: Identity,
    /// Configuration, as stored.
    pub config: Config,
    /// Model specification read from the configuration.
    pub spec: ModelSpec,
    /// Tensors that the model needs.
    pub schema: Schema,
    /// Model family.
    pub family: &'static Family,
    store: Store,
    /// Prefixes of this file's tensor names.
    naming: Naming,
    dir: PathBuf,
    /// Warnings, and how many of them [`Checkpoint::take_warnings`] has returned.
    warnings: Mutex<(Vec<String>, usize)>,
}

impl Checkpoint {
    /// Opens `model`: a `.gguf` file, a directory, or a hub id (`owner/name`, or `owner/name/file.gguf`).
    ///
    /// # Errors
    /// No such file or repository; a configuration that is missing, malformed or not supported; a tensor that is
    /// missing, has another shape than the configuration says, or would be left unread.
    pub fn open(model: &str, options: &OpenOptions, progress: OnProgress) -> Result<Self> {
        let mut checkpoint = Self::find(model, options, progress)?;
        if options.tie_embeddings {
            checkpoint.tie_embeddings()?;
        }
        Ok(checkpoint)
    }

    fn find(model: &str, options: &OpenOptions, progress: OnProgress) -> Result<Self> {
        let (path, identity) = locate(model, options, progress)?;
        match path.is_dir() {
            true => Self::from_dir(&path, identity),
            false => Self::from_gguf(&path, identity),
        }
    }

    fn from_dir(dir: &Path, identity: Identity) -> Result<Self> {
        let path = dir.join("config.json");
        if !path.exists() {
            let message = "has no config.json; for a GGUF file give its path, or owner/name/file.gguf on the hub";
            return Err(Error::new(ErrorKind::Io, dir.display(), message));
        }
        let config = read_config(&path)?;
        let mut warnings = vec![];
        let mut shards = safetensors::Shards::open(dir, &mut warnings)?;
        if let Some(settings) = Quantisation::read(&config)? {
            mlx::join(&mut shards, &settings).map_err(|e| e.within(dir.display()))?;
        }
        let store = Store::Shards(shards);
        Self::assemble(config, store, dir.into(), identity, warnings)
    }

    /// Returns a checkpoint with random weights for the configuration `model` (a `config.json`, or a directory with
    /// one), to measure speed and memory; its text is noise.
    ///
    /// # Errors
    /// The configuration is missing, malformed or not supported.
    pub fn random(model: &str, seed: u64) -> Result<Self> {
        let given = Path::new(model);
        let path = if given.is_dir() { given.join("config.json") } else { given.into() };
        if !path.is_file() || path.extension().is_none_or(|e| e != "json") {
            let message = "holds no config.json; for random weights give a config.json or a directory with one";
            return Err(Error::new(ErrorKind::Io, model, message));
        }
        let config = read_config(&path)?;
        let dir: PathBuf = path.parent().unwrap_or(Path::new(".")).into();
        let identity = Identity::directory(&dir);
        let (family, decoder) = family::read(&config)?;
        let spec = (family.spec)(&decoder)?;
        let store = Store::Random(random::RandomWeights::new(&path, &config, &Schema::new(&spec), seed)?);
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

    /// Tokens that stand for the features of an image or video, each with the configuration's key.
    pub fn placeholders(&self) -> Vec<(u32, &'static str)> {
        let id = |key: &'static str| Some((self.config.get(key)?.as_u64()? as u32, key));
        ["image_token_id", "image_token_index", "video_token_id"].into_iter().filter_map(id).collect()
    }

    /// Uses the output matrix as the embedding too, for a tied model whose file stores both (GGUF files quantise the
    /// two copies differently). Does nothing if the file stores one matrix.
    ///
    /// # Errors
    /// The two matrices are not copies of one another (squared error above a quarter over the first rows): the model is
    /// not tied.
    pub fn tie_embeddings(&mut self) -> Result<()> {
        let Some(head) = self.schema.head.clone() else { return Ok(()) };
        let rows = 0..self.spec.vocab.min(64);
        let sample = |t: &TensorSpec| rows::decode(self, self.expect(t)?, rows.clone(), self.spec.hidden);
        let (output, embed) = (sample(&head)?, sample(&self.schema.embed)?);
        let square = |x: f32| x as f64 * x as f64;
        let apart: f64 = output.iter().zip(&embed).map(|(a, b)| square(a - b)).sum();
        let size: f64 = output.iter().map(|a| square(*a)).sum();
        if apart > 0.25 * size {
            let message = "the output matrix is not a copy of the embedding: this model is not tied";
            return Err(Error::usage("--tie-embeddings", message));
        }
        self.spec.tied = true;
        self.schema = Schema { embed: head, head: None, ..self.schema.clone() };
        Ok(())
    }

    /// Reads the tokenizer with its chat template and stop tokens.
    ///
    /// # Errors
    /// The tokenizer is missing, malformed or not supported.
    pub fn tokenizer(&self) -> Result<TextTokenizer> {
        let tokenizer = self.read_tokenizer()?;
        tokenizer.warnings().iter().for_each(|w| self.warn(w.clone()));
        Ok(tokenizer)
    }

    /// Adds a warning for [`Checkpoint::take_warnings`].
    fn warn(&self, warning: String) {
        if let Ok(mut warnings) = self.warnings.lock() {
            if !warnings.0.contains(&warning) {
                warnings.0.push(warning);
            }
        }
    }

    /// Returns the warnings about the files read so far that no earlier call has returned.
    pub fn take_warnings(&self) -> Vec<String> {
        let Ok(mut warnings) = self.warnings.lock() else { return vec![] };
        let (all, returned) = &mut *warnings;
        let from = std::mem::replace(returned, all.len());
        all[from..].to_vec()
    }

    fn read_tokenizer(&self) -> Result<TextTokenizer> {
        match &self.store {
            Store::Shards(_) => TextTokenizer::from_dir(&self.dir, &self.config),
            Store::Gguf(file) => TextTokenizer::from_gguf(file),
            Store::Random(_) if self.has_tokenizer() => TextTokenizer::from_dir(&self.dir, &self.config),
            Store::Random(random) => Err(Error::new(
                ErrorKind::Tokenizer,
                random.path().display(),
                "random weights come without a tokenizer, and the configuration's directory has no tokenizer.json",
            )),
        }
    }

    /// Whether the checkpoint has a tokenizer.
    pub fn has_tokenizer(&self) -> bool {
        matches!(self.store, Store::Gguf(_)) || self.dir.join("tokenizer.json").exists()
    }

    /// Returns whether value head `h` of a recurrent layer has key head `h mod K`, as llama.cpp's converter orders them.
    pub fn tiles_value_heads(&self) -> bool {
        matches!(self.store, Store::Gguf(_))
    }

    /// Returns the number of parameters, a tied matrix counted once.
    pub fn parameters(&self) -> u64 {
        self.schema.iter().fold(0, |sum: u64, t| sum.saturating_add(t.elements()))
    }

    /// Returns the files that a content hash covers: configuration and weights.
    pub fn files(&self) -> Vec<PathBuf> {
        match &self.store {
            Store::Gguf(file) => file.paths().map(PathBuf::from).collect(),
            Store::Shards(shards) => {
                std::iter::once(self.dir.join("config.json")).chain(shards.paths().map(PathBuf::from)).collect()
            }
            Store::Random(random) => vec![random.path().into()],
        }
    }

    /// Returns the size of all matrices in f32, in bytes.
    pub fn f32_bytes(&self) -> u64 {
        self.schema.matrices().filter(|t| self.info(t).is_some()).map(|t| 4 * t.elements()).sum()
    }

    /// Returns the size of all matrices in memory under `format`, in bytes by weight type.
    pub fn bytes_by_type(&self, format: &WeightFormat) -> BTreeMap<String, u64> {
        let mut bytes = BTreeMap::new();
        for t in self.schema.matrices() {
            let stored = self.info(t).and_then(|i| i.storage.clone().ok());
            let target = format.resolve(stored.unwrap_or(Storage::F32), t.shape[1]);
            let sum: &mut u64 = bytes.entry(target.to_string()).or_default();
            *sum = sum.saturating_add((t.shape[0] as u64).saturating_mul(target.row_bytes(t.shape[1]) as u64));
        }
        bytes
    }

    /// Loads a matrix in the type that `format` resolves to.
    ///
    /// # Errors
    /// The tensor is missing, has another shape than `tensor`, is of an unknown type, or holds NaN or infinity.
    pub fn matrix(&self, tensor: &TensorSpec, format: &WeightFormat, device: &Device) -> Result<Weight> {
        let info = self.expect(tensor)?;
        match &self.store {
            Store::Random(random) => random.matrix(self, (tensor, info), self.order(tensor), format, device),
            _ => rows::load_matrix(self, info, self.order(tensor), format, device),
        }
    }

    /// Loads a vector in f32.
    ///
    /// # Errors
    /// Those of [`Checkpoint::matrix`].
    pub fn vector(&self, tensor: &TensorSpec, device: &Device) -> Result<Tensor> {
        let info = self.expect(tensor)?;
        let len = tensor.shape.iter().product();
        if let Store::Random(random) = &self.store {
            let values = random.vector(tensor);
            return Tensor::from_vec(values, tensor.elements() as usize, device).at(&tensor.name);
        }
        let mut values = rows::decode(self, info, 0..1, len)?;
        // GGUF files and MLX's store the sum.
        let stores_difference = self.family.norm_plus_one && matches!(&self.store, Store::Shards(s) if !s.are_mlx());
        if stores_difference && tensor.role == Role::Norm {
            values.iter_mut().for_each(|v| *v += 1.0);
        }
        if tensor.role == Role::Rate && matches!(self.store, Store::Shards(_)) {
            values.iter_mut().for_each(|v| *v = -v.exp());
        }
        let values = rows::in_order(values, self.order(tensor));
        let len = values.len();
        Tensor::from_vec(values, len, device).at(&tensor.name)
    }

    /// Checks that the values of a vector are finite in `dtype`, the type in which products use it.
    ///
    /// # Errors
    /// Those of [`Checkpoint::matrix`]; a value too large for `dtype`.
    pub fn fits(&self, tensor: &TensorSpec, dtype: DType) -> Result<()> {
        let Some(target) = Storage::of_tensor(dtype).filter(|s| *s != Storage::F32) else { return Ok(()) };
        let values = self.vector(tensor, &Device::Cpu)?.to_vec1::<f32>()?;
        rows::encode(self, self.expect(tensor)?, target, &values, (0, values.len())).map(drop)
    }

    /// Returns the order of a tensor's rows, where they are not read as they lie.
    fn order(&self, tensor: &TensorSpec) -> Option<Order> {
        let heads = tensor.heads?;
        let interleaved = matches!(self.store, Store::Gguf(_)) && self.family.gguf.interleaved_qk && heads.rotated > 0;
        let as_they_lie = !interleaved && heads.stored == heads.dim && [0, heads.dim].contains(&heads.rotated);
        (!as_they_lie).then_some(Order { heads, interleaved })
    }

    fn expect(&self, tensor: &TensorSpec) -> Result<&TensorInfo> {
        let full = self.stored_name(tensor);
        let Some(info) = self.info(tensor) else {
            let near = self.nearest(&full).map_or(String::new(), |n| format!("; the file has `{n}`"));
            return Err(Error::tensor(self.identity.place(), format!("tensor `{full}` is missing{near}")));
        };
        // A convolution is [C, 1, n], [C, n, 1] or [C, n] by the kind of file, in the same order.
        let plain = |shape: &[usize]| match tensor.role {
            Role::Conv => shape.iter().copied().filter(|n| *n != 1).collect(),
            _ => shape.to_vec(),
        };
        if plain(&info.shape) != plain(&tensor.shape) {
            return Err(Error::tensor(
                self.identity.place(),
                format!("tensor `{full}` has shape {:?}; the configuration requires {:?}", info.shape, tensor.shape),
            ));
        }
        Ok(info)
    }

    /// Returns the tensor's name in the file.
    fn stored_name(&self, tensor: &TensorSpec) -> String {
        match &self.store {
            Store::Gguf(_) => tensor.gguf.clone(),
            Store::Shards(_) => self.naming.apply(&tensor.name),
            Store::Random(_) => tensor.name.clone(),
        }
    }

    /// Returns the stored name that shares the most trailing parts with `name`, at least three, to hint at a misnamed
    /// tensor.
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

/// Returns the directory of `model`, a directory or a hub id (`owner/name`), whose files are fetched first.
///
/// # Errors
/// No such directory or repository; a file.
pub fn directory(model: &str, options: &OpenOptions, progress: OnProgress) -> Result<PathBuf> {
    let path = locate(model, options, progress)?.0;
    match path.is_dir() {
        true => Ok(path),
        false => Err(Error::new(ErrorKind::Io, model, "is a file, where a directory is read")),
    }
}

/// Finds the file or directory of `model` here or on the hub.
fn locate(model: &str, options: &OpenOptions, progress: OnProgress) -> Result<(PathBuf, Identity)> {
    let path = Path::new(model);
    if path.is_dir() {
        return Ok((path.into(), Identity::directory(path)));
    }
    if path.is_file() {
        return Ok((path.into(), Identity::file(path)));
    }
    if model.ends_with(".gguf") && !hub_like(model) || model.starts_with(['.', '/', '~']) {
        return Err(Error::new(ErrorKind::Io, model, "no such file or directory"));
    }
    from_hub(model, options, progress)
}

#[cfg(feature = "hub")]
fn from_hub(model: &str, options: &OpenOptions, progress: OnProgress) -> Result<(PathBuf, Identity)> {
    hub::fetch(model, options, progress)
}

#[cfg(not(feature = "hub"))]
fn from_hub(model: &str, _: &OpenOptions, _: OnProgress) -> Result<(PathBuf, Identity)> {
    Err(Error::new(
        ErrorKind::Io,
        model,
        "no such file or directory, and this build has no hub support (rebuild with feature `hub`)",
    ))
}

fn read_config(path: &Path) -> Result<Config> {
    let text = std::fs::read_to_string(path).at(path.display())?;
    let value = serde_json::from_str(&text).map_err(|e| Error::format(path.display(), e))?;
    Config::new(path.display().to_string(), value)
}

fn hub_like(model: &str) -> bool {
    model.matches('/').count() >= 2
}
