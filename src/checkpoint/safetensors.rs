//! safetensors directories: one file, or shards listed in `model.safetensors.index.json`.
//!
//! Each file's header is read once. A tensor's bytes are mapped only while that tensor is read, which keeps the
//! resident memory of a load at one tensor's size.

use super::{mlx, TensorInfo};
use crate::error::{At, Error, Result};
use crate::storage::Storage;
use memmap2::MmapOptions;
use safetensors::tensor::{Dtype, SafeTensorError, SafeTensors};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

struct Entry {
    file: usize,
    offset: u64,
    info: TensorInfo,
    /// Of a quantised matrix, its other tensors.
    parts: Option<mlx::Parts>,
}

/// The safetensors files of a directory and their tensors by name.
pub struct Shards {
    files: Vec<(PathBuf, File)>,
    mlx: bool,
    /// Scales and biases of quantised matrices.
    parts: BTreeMap<String, Entry>,
    entries: BTreeMap<String, Entry>,
}

impl Shards {
    /// Reads the headers of all shards in `dir`; appends to `warnings`.
    ///
    /// # Errors
    /// A file is missing, truncated or malformed; two shards store the same tensor.
    pub fn open(dir: &Path, warnings: &mut Vec<String>) -> Result<Self> {
        let mut shards = Self { files: vec![], mlx: false, parts: BTreeMap::new(), entries: BTreeMap::new() };
        for path in shard_paths(dir, warnings)? {
            shards.add(path)?;
        }
        Ok(shards)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        let place = path.display().to_string();
        let file = File::open(&path).at(&place)?;
        let length = file.metadata().at(&place)?.len();
        // SAFETY: the map is read-only and dropped before this function ends. Another process that truncates the file
        // meanwhile can cause a fault, as with every memory-mapped checkpoint.
        let map = unsafe { MmapOptions::new().map(&file) }.at(&place)?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| {
            let what = match e {
                SafeTensorError::MetadataIncompleteBuffer => "truncated, or its header is wrong",
                _ => "not a safetensors file",
            };
            Error::format(&place, format!("{what}: {e}"))
        })?;
        let start = 8 + header as u64;
        let needed = start.saturating_add(metadata.data_len() as u64);
        if needed > length {
            return Err(Error::format(
                &place,
                format!("truncated: the header describes {needed} bytes, the file has {length}"),
            ));
        }
        self.mlx |= metadata.metadata().as_ref().and_then(|m| m.get("format")).is_some_and(|f| f == "mlx");
        let index = self.files.len();
        for (name, tensor) in metadata.tensors() {
            let info = TensorInfo {
                name: name.clone(),
                shape: tensor.shape.clone(),
                // A reason to refuse only when this tensor is asked for: checkpoints may hold unused buffers.
                storage: stored(tensor.dtype).ok_or_else(|| format!("dtype {:?}", tensor.dtype)),
            };
            let offset = start + tensor.data_offsets.0 as u64;
            if let Some(other) = self.entries.insert(name.clone(), Entry { file: index, offset, info, parts: None }) {
                let other = self.files[other.file].0.display();
                return Err(Error::tensor(&place, format!("tensor `{name}` is stored in {other} too")));
            }
        }
        self.files.push((path, file));
        Ok(())
    }

    /// Returns the stored tensor called `name`.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.entries.get(name).map(|e| &e.info)
    }

    /// Returns whether MLX wrote the files, which differ from Hugging Face's in what they store of a model.
    pub fn are_mlx(&self) -> bool {
        self.mlx
    }

    /// Returns the names of all stored tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Reads `length` bytes of tensor `name`, from byte `start` on.
    ///
    /// # Errors
    /// The tensor is missing; its file cannot be mapped.
    pub fn read(&self, name: &str, start: u64, length: usize) -> Result<Vec<u8>> {
        let entry = self.entries.get(name).ok_or_else(|| Error::tensor(name, "missing"))?;
        match &entry.parts {
            None => self.stored(entry, start, length),
            Some(parts) => parts.read(name, (start, length), |part, start, length| {
                let entry = self.entries.get(part).or(self.parts.get(part));
                self.stored(entry.ok_or_else(|| Error::tensor(part, "missing"))?, start, length)
            }),
        }
    }

    /// Replaces the tensors of a quantised matrix by one.
    pub(super) fn replace(&mut self, info: TensorInfo, parts: mlx::Parts) {
        for name in parts.names() {
            if let Some(entry) = self.entries.remove(name) {
                self.parts.insert(name.into(), entry);
            }
        }
        if let Some(entry) = self.entries.get_mut(&info.name) {
            (entry.info, entry.parts) = (info, Some(parts));
        }
    }

    fn stored(&self, entry: &Entry, start: u64, length: usize) -> Result<Vec<u8>> {
        let (path, file) = &self.files[entry.file];
        // SAFETY: the map is read-only and dropped at once; for truncation by another process see `add`.
        let map = unsafe { MmapOptions::new().offset(entry.offset + start).len(length).map(file) };
        Ok(map.at(path.display())?.to_vec())
    }

    /// Returns all values of tensor `name` in f32, however stored.
    ///
    /// # Errors
    /// Those of [`Shards::read`]; a type that holds no weights.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.entries.get(name).ok_or_else(|| Error::tensor(name, "missing"))?;
        let unknown = |why: String| Error::unsupported(name, format!("{why} is not supported for weights"));
        let (stored, count) = (entry.info.storage.clone().map_err(unknown)?, entry.info.shape.iter().product());
        super::rows::to_f32(stored, self.read(name, 0, stored.row_bytes(count))?, count).at(name)
    }

    /// Returns the paths of all files.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|(p, _)| p.as_path())
    }
}

fn stored(dtype: Dtype) -> Option<Storage> {
    match dtype {
        Dtype::F32 => Some(Storage::F32),
        Dtype::F16 => Some(Storage::F16),
        Dtype::BF16 => Some(Storage::BF16),
        _ => None,
    }
}

/// Returns `model.safetensors`, which transformers prefers, or the shards that the index lists.
fn shard_paths(dir: &Path, warnings: &mut Vec<String>) -> Result<Vec<PathBuf>> {
    let single = dir.join("model.safetensors");
    let index = dir.join("model.safetensors.index.json");
    if single.exists() {
        // MLX writes an index of the one file.
        if index.exists() && indexed(dir, &index).ok().is_none_or(|files| files != [single.clone()]) {
            warnings.push(format!("{}: model.safetensors is used; the shards of the index are ignored", dir.display()));
        }
        return Ok(vec![single]);
    }
    if index.exists() {
        return indexed(dir, &index);
    }
    Err(Error::new(
        crate::ErrorKind::Io,
        dir.display(),
        "has neither model.safetensors nor model.safetensors.index.json",
    ))
}

/// Returns the files of `dir` that an index names.
fn indexed(dir: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let place = index.display().to_string();
    let text = std::fs::read_to_string(index).at(&place)?;
    let value: serde_json::Value = serde_json::from_str(&text).map_err(|e| Error::format(&place, e))?;
    let map = value["weight_map"].as_object().ok_or_else(|| Error::format(&place, "has no `weight_map`"))?;
    let mut names = BTreeSet::new();
    for (tensor, file) in map {
        let file = file.as_str().filter(|f| !f.contains(['/', '\\']));
        let file =
            file.ok_or_else(|| Error::format(&place, format!("`{tensor}` is not mapped to a file of this directory")))?;
        names.insert(dir.join(file));
    }
    Ok(names.into_iter().collect())
}
