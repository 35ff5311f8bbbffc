//! Checkpoints: weights for use, and the optimiser's state to go on from.
//!
//! A run's directory holds `step-00001000/` with `config.json`, `model.safetensors` (f32, by parameter), and, to resume,
//! `training.safetensors` (moments) and `training.json`. A step's directory is complete or absent: it is written under a
//! temporary name, synced and renamed.

use super::{CharConfig, CharModel};
use crate::error::{At, Error, Result};
use crate::train::{AdamW, Layout, Objective};
use candle_core::{safetensors, Device, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Steps kept in a run's directory.
const KEPT: usize = 2;
const CONFIG: &str = "config.json";
const MODEL: &str = "model.safetensors";
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
    if partial.exists() {
        std::fs::remove_dir_all(&partial).map_err(|e| Error::io(&partial, e))?;
    }
    std::fs::create_dir_all(&partial).map_err(|e| Error::io(&partial, e))?;
    let written = write_step(&partial, model, optimiser, state);
    if written.is_err() {
        let _ = std::fs::remove_dir_all(&partial);
    }
    written?;
    if complete.exists() {
        std::fs::remove_dir_all(&complete).map_err(|e| Error::io(&complete, e))?;
    }
    std::fs::rename(&partial, &complete).map_err(|e| Error::io(&complete, e))?;
    sync(run)?;
    let steps = steps(run)?;
    for old in &steps[..steps.len().saturating_sub(KEPT)] {
        std::fs::remove_dir_all(old).map_err(|e| Error::io(old, e))?;
    }
    Ok(complete)
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

fn named(layout: &Layout, flat: &Tensor) -> Result<HashMap<String, Tensor>> {
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

/// Reads the weights as one vector.
///
/// # Errors
/// A missing, unknown or misshapen tensor, or one that is not finite; a truncated file.
pub fn weights(dir: &Path, layout: &Layout, device: &Device) -> Result<Tensor> {
    let path = dir.join(MODEL);
    let mut tensors = safetensors::load(&path, &Device::Cpu).at(path.display())?;
    let mut parts = vec![];
    for (p, _) in layout.iter() {
        let missing = || Error::tensor(path.display(), format!("lacks {}", p.name));
        let tensor = tensors.remove(&p.name).ok_or_else(missing)?;
        if tensor.dims() != p.shape {
            let message = format!("{} is {:?}, the configuration says {:?}", p.name, tensor.dims(), p.shape);
            return Err(Error::tensor(path.display(), message));
        }
        let values: Vec<f32> = tensor
            .flatten_all()
            .and_then(|t| t.to_dtype(candle_core::DType::F32)?.to_vec1())
            .at(format!("{}: {}", path.display(), p.name))?;
        if !values.iter().all(|x| x.is_finite()) {
            return Err(Error::new(crate::ErrorKind::NotFinite, path.display(), format!("{} is not finite", p.name)));
        }
        parts.extend(values);
    }
    if let Some(name) = tensors.keys().min() {
        return Err(Error::tensor(path.display(), format!("holds {name}, which the model does not have")));
    }
    Tensor::from_vec(parts, layout.len(), device).at(path.display())
}

/// Restores the optimiser from a step's directory; returns what the run was.
///
/// # Errors
/// A missing or damaged file, or moments of another model.
pub fn resume(dir: &Path, model: &CharModel, optimiser: &mut AdamW) -> Result<TrainingState> {
    let device = optimiser.weights().device().clone();
    let path = dir.join(TRAINING);
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let state: TrainingState = serde_json::from_str(&text).map_err(|e| Error::format(path.display(), e))?;
    let path = dir.join(MOMENTS);
    let mut moments = safetensors::load(&path, &device).at(path.display())?;
    let mut take =
        |name: &str| moments.remove(name).ok_or_else(|| Error::tensor(path.display(), format!("lacks {name:?}")));
    let (mean, square) = (take("mean")?, take("square")?);
    let weights = weights(dir, model.layout(), &device)?;
    optimiser.restore(model.layout(), weights, mean, square, state.step)?;
    Ok(state)
}
