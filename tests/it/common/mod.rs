//! What the integration tests share: golden cases, models loaded in one line, comparisons.
#![allow(dead_code)] // Each test binary and each set of features uses its own part.

pub mod attention;
pub mod gguf;

use bfly::checkpoint::{Checkpoint, OpenOptions, WeightDtype, WeightFormat};
use bfly::generate::watch;
use bfly::method::Method;
use bfly::retrofit::{RetrofitPlan, Settings};
use bfly::run::Run;
use bfly::spec::ModelSpec;
use bfly::weights::Weights;
use candle_core::{DType, Device, Tensor};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

pub type Any<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// The package's folder: where it was built, unless the variable says that it was moved (scripts/gpu_tests.sh).
pub fn root() -> PathBuf {
    std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

pub fn golden_dir(name: &str) -> PathBuf {
    root().join("tests/fixtures/goldens").join(name)
}

/// Every golden case: the folders there, by name.
pub fn goldens() -> Any<Vec<String>> {
    let mut names = vec![];
    for entry in std::fs::read_dir(golden_dir(""))? {
        let entry = entry?;
        if entry.path().is_dir() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    assert!(names.len() >= 9, "only {names:?} are there");
    Ok(names)
}

/// Ids and logits that transformers recorded.
pub struct Golden(HashMap<String, Tensor>);

impl Golden {
    pub fn open(name: &str) -> Any<Self> {
        Ok(Self(candle_core::safetensors::load(golden_dir(name).join("golden.safetensors"), &Device::Cpu)?))
    }

    pub fn ids(&self, case: &str) -> Any<Vec<u32>> {
        Ok(self.0[case].to_dtype(DType::U32)?.to_vec1()?)
    }

    /// Of transformers' bf16 run.
    pub fn logits_bf16(&self, case: &str) -> Any<Tensor> {
        Ok(self.0[&format!("{case}_logits_bf16")].to_dtype(DType::F32)?)
    }

    pub fn logits(&self, case: &str) -> Any<Tensor> {
        Ok(self.0[&format!("{case}_logits")].to_dtype(DType::F32)?)
    }
}

/// A small input that was once read wrongly.
pub fn fault(name: &str) -> PathBuf {
    root().join("tests/fixtures/faults").join(name)
}

/// The one-layer model with a byte-level tokenizer, with `files` of its own beside or instead, in a directory that goes away with the
/// value.
pub fn tiny_model(files: &[(&str, &[u8])]) -> Any<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    for entry in std::fs::read_dir(fault("model"))? {
        let entry = entry?;
        std::fs::copy(entry.path(), dir.path().join(entry.file_name()))?;
    }
    for (name, content) in files {
        std::fs::write(dir.path().join(name), content)?;
    }
    Ok(dir)
}

pub fn open(model: &str) -> bfly::Result<Checkpoint> {
    Checkpoint::open(model, &OpenOptions::default(), &|_, _, _| ())
}

/// Weights, and how they are to be run.
#[derive(Clone)]
pub struct Model {
    pub weights: Arc<Weights>,
    pub method: Method,
    pub ctx: usize,
}

impl Model {
    /// A fresh run.
    pub fn run(&self) -> bfly::Result<Run> {
        Run::new(&self.weights, &self.method, self.ctx)
    }

    pub fn spec(&self) -> &ModelSpec {
        self.weights.spec()
    }

    /// The same weights by another method.
    pub fn by(&self, method: impl Into<Method>, ctx: usize) -> Self {
        Self { method: method.into(), ctx, ..self.clone() }
    }
}

/// Ids of three documents to calibrate exact recall on.
pub fn calibration_documents(vocab: usize) -> Vec<Vec<u32>> {
    (0..3u32).map(|d| (0..800u32).map(|i| (i * 7919 + d * 31 + i * i) % vocab as u32).collect()).collect()
}

/// The first GPU; `None`, said aloud, where there is none.
pub fn gpu(test: &str) -> Option<Device> {
    match bfly::ops::open_gpu(0) {
        Ok(device) => Some(device),
        Err(e) => {
            // scripts/gpu_tests.sh counts these lines.
            println!("SKIPPED {test}: {e}");
            None
        }
    }
}

/// Loads in f32 for `ctx` positions, with `settings` on every full layer if given.
pub fn load(checkpoint: &Checkpoint, settings: Option<&Settings>, ctx: usize) -> bfly::Result<Model> {
    let hold = WeightFormat::new(WeightDtype::As(bfly::storage::Storage::F32), 0, None);
    load_as(checkpoint, settings, ctx, &hold, &Device::Cpu)
}

/// Loads as `hold` says on `device`.
pub fn load_as(
    checkpoint: &Checkpoint,
    settings: Option<&Settings>,
    ctx: usize,
    hold: &WeightFormat,
    device: &Device,
) -> bfly::Result<Model> {
    let plan = settings.map(|s| RetrofitPlan::new(&checkpoint.spec, None, s.clone())).transpose()?;
    let weights = Weights::load(checkpoint, hold, device, &|_, _, _| ())?;
    Ok(Model { weights, method: plan.as_ref().into(), ctx })
}

pub fn load_golden(name: &str, settings: Option<&Settings>, ctx: usize) -> bfly::Result<Model> {
    let dir = golden_dir(name);
    load(&open(&dir.to_string_lossy())?, settings, ctx)
}

/// Logits of the last `last` positions, prefilled in chunks of `chunk`.
pub fn last_logits(model: &Model, ids: &[u32], chunk: usize, last: usize) -> bfly::Result<Tensor> {
    model.run()?.prefill(ids, chunk, last, &mut watch(|_| ()))
}

/// Largest difference, in standard deviations of `want`.
pub fn deviation(got: &Tensor, want: &Tensor) -> Any<f32> {
    let got = got.to_device(&Device::Cpu)?;
    let flat = want.flatten_all()?;
    let std = flat.var(0)?.sqrt()?.to_scalar::<f32>()?;
    Ok((&got - want)?.abs()?.max_all()?.to_scalar::<f32>()? / std)
}

/// A copy of a golden checkpoint with another configuration, in a directory that goes away with the value. Its layers are as many as
/// the configuration says, those of the golden over and over.
pub fn variant(name: &str, change: impl FnOnce(&mut serde_json::Value)) -> Any<tempfile::TempDir> {
    let dir = tempfile::tempdir()?;
    let golden: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(golden_dir(name).join("config.json"))?)?;
    let mut config = golden.clone();
    change(&mut config);
    std::fs::write(dir.path().join("config.json"), config.to_string())?;
    let (from, to) = (golden_dir(name).join("model.safetensors"), dir.path().join("model.safetensors"));
    match (golden["num_hidden_layers"].as_u64(), config["num_hidden_layers"].as_u64()) {
        (Some(stored), Some(wanted @ 1..=64)) if stored != wanted => {
            let mut tensors = std::collections::HashMap::new();
            for (name, tensor) in candle_core::safetensors::load(&from, &Device::Cpu)? {
                let parts = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
                let Some((layer, rest)) = parts else {
                    tensors.insert(name, tensor);
                    continue;
                };
                for i in (layer.parse()?..wanted).step_by(stored as usize) {
                    tensors.insert(format!("model.layers.{i}.{rest}"), tensor.clone());
                }
            }
            candle_core::safetensors::save(&tensors, to)?;
        }
        _ => drop(std::fs::copy(from, to)?),
    }
    Ok(dir)
}

/// A recorded fixture.
pub fn fixture(path: &str) -> Any<serde_json::Value> {
    let path = root().join("tests/fixtures").join(path);
    Ok(serde_json::from_str(&std::fs::read_to_string(path)?)?)
}

/// The path of a fault as `--model` takes it.
pub fn fault_model(path: &str) -> String {
    fault(path).to_string_lossy().into_owned()
}

/// The logits that `model` gives for the ids beside it, of the last position.
pub fn fault_logits(fault_name: &str, model: &str) -> Any<Tensor> {
    let ids = numbers(&fixture(&format!("faults/{fault_name}/ids.json"))?)?;
    let model = load(&open(model)?, None, ids.len())?;
    Ok(last_logits(&model, &ids, 512, 1)?)
}

/// Why `model` cannot be opened.
pub fn refusal(model: &str) -> Any<String> {
    Ok(open(model).err().ok_or("was accepted")?.to_string())
}

/// Token ids of a JSON array.
pub fn numbers(value: &serde_json::Value) -> Any<Vec<u32>> {
    Ok(serde_json::from_value(value.clone())?)
}

/// The GGUF file of a real model.
pub fn real_model(name: &str) -> Any<String> {
    let file = fixture(&format!("real/{name}.json"))?["gguf"].as_str().ok_or("fixture names no file")?.to_string();
    let path = root().join("models").join(file);
    match path.exists() {
        true => Ok(path.to_string_lossy().into_owned()),
        false => Err(format!("{} is missing: run scripts/fetch_models.py {name}", path.display()).into()),
    }
}

/// A callback that ends a generation after `most` tokens.
pub fn stop_after(most: usize) -> impl FnMut(u32) -> ControlFlow<()> {
    let mut count = 0;
    move |_| {
        count += 1;
        match count == most {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}
