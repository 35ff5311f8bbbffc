//! Checkpoints: weights for use, and the optimiser's state to go on from.
//!
//! A run's directory holds `step-00001000/` with `config.json`, `model.safetensors` (f32, by parameter), and, to resume,
//! `training.safetensors` (moments) and `training.json`. A step's directory is complete or absent: it is written under a
//! temporary name, synced and renamed. The compact form holds weights alone, bf16 in shards with an index as on the hub.

use super::{CharConfig, CharModel};
use crate::checkpoint::Shards;
use crate::error::{At, Error, Result};
use crate::train::{AdamW, Layout, Objective};
use candle_core::{safetensors, DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

/// Steps kept in a run's directory.
const KEPT: usize = 2;
const CONFIG: &str = "config.json";
const MODEL: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const MOMENTS: &str = "training.safetensors";
const TRAINING: &str = "training.json";

/// What a resumed run must agree with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingState {
    /// Steps done.
    pub step: u64,
    /// SHA-256 of the corpus.
    pub corpus: String,
    /// Settings by flag, as text.
    pub settings: std::collections::BTreeMap<String, String>,
}

/// Writes the checkpoint of a step and removes older ones.
///
/// # Errors
/// A file that cannot be written, such as on a full disk; earlier checkpoints stay.
pub fn save(run: &Path, model: &CharModel, optimiser: &AdamW, state: &TrainingState) -> Result<PathBuf> {
    let name = format!("step-{:08}", state.step);
    let (partial, complete) = (run.join(format!(".{name}.partial")), run.join(&name));
    fill(&partial, |dir| write_step(dir, model, optimiser, state))?;
    // Of a run that went on from an earlier step: it is moved away, not removed, until the new one is in its place.
    let old = run.join(format!(".{name}.old"));
    if complete.exists() {
        let _ = std::fs::remove_dir_all(&old);
        std::fs::rename(&complete, &old).map_err(|e| Error::io(&complete, e))?;
    }
    std::fs::rename(&partial, &complete).map_err(|e| Error::io(&complete, e))?;
    sync(run)?;
    let _ = std::fs::remove_dir_all(&old);
    let steps = steps(run)?;
    for old in &steps[..steps.len().saturating_sub(KEPT)] {
        std::fs::remove_dir_all(old).map_err(|e| Error::io(old, e))?;
    }
    Ok(complete)
}

/// Makes a temporary directory, without what a killed process left there, and removes it where `write` fails.
fn fill(partial: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if partial.exists() {
        std::fs::remove_dir_all(partial).map_err(|e| Error::io(partial, e))?;
    }
    std::fs::create_dir_all(partial).map_err(|e| Error::io(partial, e))?;
    let written = write(partial);
    if written.is_err() {
        let _ = std::fs::remove_dir_all(partial);
    }
    written
}

fn write_step(dir: &Path, model: &CharModel, optimiser: &AdamW, state: &TrainingState) -> Result<()> {
    let (mean, square) = optimiser.moments();
    let moments = HashMap::from([("mean", mean.clone()), ("square", square.clone())]);
    let weights = named(model.layout(), optimiser.weights())?;
    safetensors::save(&weights, dir.join(MODEL)).at(dir.join(MODEL).display())?;
    safetensors::save(&moments, dir.join(MOMENTS)).at(dir.join(MOMENTS).display())?;
    for (name, text) in
        [(CONFIG, serde_json::to_string_pretty(model.config())), (TRAINING, serde_json::to_string_pretty(state))]
    {
        let text = text.map_err(|e| Error::format(name, e))?;
        std::fs::write(dir.join(name), text).map_err(|e| Error::io(dir.join(name), e))?;
    }
    for name in [MODEL, MOMENTS, CONFIG, TRAINING] {
        sync(&dir.join(name))?;
    }
    sync(dir)
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::io(path, e))
}

/// The parameters by name.
pub(crate) fn named(layout: &Layout, flat: &Tensor) -> Result<HashMap<String, Tensor>> {
    layout.iter().map(|(p, start)| Ok((p.name.clone(), Layout::part(flat, start, &p.shape)?))).collect()
}

/// Complete steps of a run, earliest first.
fn steps(run: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(run).map_err(|e| Error::io(run, e))?;
    let mut steps: Vec<PathBuf> = entries.filter_map(|e| e.ok().map(|e| e.path())).collect();
    steps.retain(|p| p.is_dir() && p.file_name().is_some_and(|n| n.to_string_lossy().starts_with("step-")));
    steps.sort();
    Ok(steps)
}

/// The directory with the weights of `path`: itself, or its last step.
///
/// # Errors
/// Neither has any.
pub fn resolve(path: &Path) -> Result<PathBuf> {
    if path.join(CONFIG).exists() {
        return Ok(path.into());
    }
    match if path.is_dir() { steps(path)?.pop() } else { None } {
        Some(step) => Ok(step),
        None => Err(Error::usage(path.display(), "is no character model: it has no config.json and no step-N")),
    }
}

/// Reads `config.json` of a directory from [`resolve`].
///
/// # Errors
/// As of [`CharConfig::read`].
pub fn config(dir: &Path) -> Result<CharConfig> {
    CharConfig::read(&dir.join(CONFIG))
}

/// Bytes of a shard of the compact form, at most, unless one tensor is larger.
const SHARD: usize = 16 << 20;
/// Bytes of a tensor's entry in a shard's header, at most, beside its name.
const ENTRY: usize = 128;

/// Writes weights alone in bf16, for use or to start another run from: shards of at most 16 MiB and their index.
///
/// # Errors
/// A directory that exists, or a file that cannot be written: nothing is left then.
pub fn export(dir: &Path, config: &CharConfig, layout: &Layout, weights: &Tensor) -> Result<()> {
    if dir.exists() {
        return Err(Error::usage("--out", format!("{} exists", dir.display())));
    }
    let name = dir.file_name().ok_or_else(|| Error::usage("--out", "names no directory"))?.to_string_lossy();
    let partial = dir.with_file_name(format!(".{name}.partial"));
    fill(&partial, |partial| write_shards(partial, config, layout, weights))?;
    std::fs::rename(&partial, dir).map_err(|e| Error::io(dir, e))
}

fn write_shards(dir: &Path, config: &CharConfig, layout: &Layout, weights: &Tensor) -> Result<()> {
    let weights = weights.to_device(&Device::Cpu).and_then(|w| w.to_dtype(DType::BF16)).at("weights")?;
    let (mut shards, mut size) = (vec![HashMap::new()], 0);
    for (p, start) in layout.iter() {
        let own = 2 * p.len() + p.name.len() + ENTRY;
        if size > 0 && size + own > SHARD - ENTRY {
            shards.push(HashMap::new());
            size = 0;
        }
        size += own;
        if let Some(shard) = shards.last_mut() {
            shard.insert(p.name.clone(), Layout::part(&weights, start, &p.shape)?);
        }
    }
    let (count, mut map) = (shards.len(), std::collections::BTreeMap::new());
    for (i, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{count:05}.safetensors", i + 1);
        safetensors::save(shard, dir.join(&file)).at(dir.join(&file).display())?;
        sync(&dir.join(&file))?;
        map.extend(shard.keys().map(|name| (name.clone(), file.clone())));
    }
    let index = serde_json::json!({ "metadata": { "total_size": 2 * layout.len() }, "weight_map": map });
    for (name, text) in [(CONFIG, serde_json::to_string_pretty(config)), (INDEX, serde_json::to_string_pretty(&index))]
    {
        let text = text.map_err(|e| Error::format(name, e))?;
        std::fs::write(dir.join(name), text).map_err(|e| Error::io(dir.join(name), e))?;
        sync(&dir.join(name))?;
    }
    sync(dir)
}

/// The name that a matrix has in the other form: its elements, or its butterfly factors.
fn other_form(name: &str) -> Option<String> {
    let forms = [(".weight", ".factors"), (".factors", ".weight")];
    forms.iter().find_map(|(own, other)| Some(format!("{}{other}", name.strip_suffix(own)?)))
}

/// Reads the weights as one vector.
///
/// # Errors
/// A missing, unknown or misshapen tensor, or one that is not finite; a truncated file.
pub fn weights(dir: &Path, layout: &Layout, device: &Device) -> Result<Tensor> {
    let mut warnings = vec![];
    let shards = Shards::open(dir, &mut warnings)?;
    if let Some(warning) = warnings.pop() {
        return Err(Error::format(dir.display(), warning));
    }
    let refuse = |message: String| Err(Error::tensor(dir.display(), message));
    let mut parts = vec![];
    for (p, _) in layout.iter() {
        let Some(info) = shards.info(&p.name) else {
            let other = other_form(&p.name).filter(|name| shards.info(name).is_some());
            return refuse(match other {
                Some(other) => format!("has {other} where a model of this configuration has {}", p.name),
                None => format!("lacks {}", p.name),
            });
        };
        if info.shape != p.shape {
            return refuse(format!("{} is {:?}, the configuration says {:?}", p.name, info.shape, p.shape));
        }
        let values = shards.values(&p.name).map_err(|e| e.within(dir.display()))?;
        if !values.iter().all(|x| x.is_finite()) {
            return Err(Error::new(crate::ErrorKind::NotFinite, dir.display(), format!("{} is not finite", p.name)));
        }
        parts.extend(values);
    }
    let known: BTreeSet<&str> = layout.iter().map(|(p, _)| p.name.as_str()).collect();
    if let Some(name) = shards.names().find(|name| !known.contains(name)) {
        return refuse(format!("holds {name}, which the model does not have"));
    }
    Tensor::from_vec(parts, layout.len(), device).at(dir.display())
}

/// What the run of a step's directory was.
///
/// # Errors
/// A missing or damaged file.
pub fn state(dir: &Path) -> Result<TrainingState> {
    let path = dir.join(TRAINING);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    serde_json::from_str(&text).map_err(|e| Error::format(path.display(), e))
}

/// Restores the optimiser from a step's directory, after `steps` steps.
///
/// # Errors
/// A missing or damaged file, or weights or moments of another model.
pub fn resume(dir: &Path, model: &CharModel, optimiser: &mut AdamW, steps: u64) -> Result<()> {
    let device = optimiser.weights().device().clone();
    let path = dir.join(MOMENTS);
    let mut moments = safetensors::load(&path, &device).at(path.display())?;
    let mut take =
        |name: &str| moments.remove(name).ok_or_else(|| Error::tensor(path.display(), format!("lacks {name:?}")));
    let (mean, square) = (take("mean")?, take("square")?);
    let weights = weights(dir, model.layout(), &device)?;
    optimiser.restore(model.layout(), weights, mean, square, steps)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::char::Rematerialise;

    #[test]
    fn shards_are_within_their_size_with_headers_and_are_read_back() -> Result<()> {
        let place = tempfile::tempdir().at("a directory")?;
        let dir = place.path().join("tiny");
        let model = CharModel::new(CharConfig::preset("tiny")?, Rematerialise::Nothing, &Device::Cpu)?;
        let weights = model.layout().initial(1, &Device::Cpu)?;
        export(&dir, model.config(), model.layout(), &weights)?;
        let files = std::fs::read_dir(&dir).at("files")?.filter_map(|f| f.ok()?.metadata().ok());
        let sizes: Vec<u64> = files.map(|f| f.len()).filter(|n| *n > 1 << 20).collect();
        assert!(sizes.len() == 2 && sizes.iter().all(|n| *n <= SHARD as u64), "{sizes:?}");
        let read: Vec<f32> = super::weights(&dir, model.layout(), &Device::Cpu)?.to_vec1().at("weights")?;
        let rounded = weights.to_dtype(DType::BF16).and_then(|w| w.to_dtype(DType::F32)?.to_vec1::<f32>());
        assert_eq!(read, rounded.at("weights")?);
        Ok(())
    }
}
