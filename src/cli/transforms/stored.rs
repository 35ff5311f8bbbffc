//! Factor files: `factors.safetensors`, with what a reader needs to know in its metadata.

use super::{FACTORS, RESULT};
use crate::error::{At, Error, Result};
use crate::ops::factored::{Plan, Shape, Step};
use crate::transforms::Product;
use candle_core::{Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Key of the metadata, whose value is [`Facts`] as JSON.
const METADATA: &str = "bfly-transform";

/// What the tensors of a factor file are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Facts {
    /// Name of the transform, or of the file that it was learned from.
    pub transform: String,
    /// Size.
    pub n: usize,
    /// Modules, left factor first.
    pub product: String,
    /// Whether factors are complex.
    pub complex: bool,
    /// Whether blocks share weights.
    pub tied: bool,
    /// Whether the transform is complex; of one that is not the real part of the product counts.
    pub complex_target: bool,
}

impl Facts {
    /// Size and field of the factors.
    pub fn shape(&self) -> Shape {
        Shape { size: self.n, complex: self.complex, tied: self.tied }
    }
}

/// A product as a file holds it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Stored {
    pub facts: Facts,
    /// Of each butterfly, in the order of application.
    factors: Vec<Vec<f32>>,
    permutations: Vec<Vec<u32>>,
}

impl Stored {
    /// A product of given parameters; see [`Facts`] for what they have to be.
    pub fn of(facts: Facts, product: &Product) -> Self {
        Self { facts, factors: product.factors().to_vec(), permutations: product.permuted() }
    }

    /// Reads a factor file, or that of a run's directory. A file without metadata needs the result.json beside it.
    ///
    /// # Errors
    /// A file that is missing or malformed; no such tensor, or one of another shape than the metadata says.
    pub fn read(path: &Path, flag: &str) -> Result<Self> {
        let file = if path.is_dir() { path.join(FACTORS) } else { path.to_path_buf() };
        let place = format!("{flag} {}", file.display());
        let bytes = std::fs::read(&file).at(&place)?;
        let malformed = |e: &dyn std::fmt::Display| Error::format(&place, format!("is no whole factor file: {e}"));
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| malformed(&e))?;
        let facts: Facts = match header.metadata().as_ref().and_then(|m| m.get(METADATA)) {
            Some(text) => serde_json::from_str(text).map_err(|e| malformed(&e))?,
            None => facts_of_run(&file.with_file_name(RESULT), &place)?,
        };
        let n = facts.n;
        if !n.is_power_of_two() || n < 2 || facts.product.chars().any(|c| !"BP".contains(c)) {
            return Err(malformed(&format!("it claims a product {:?} of {n} elements", facts.product)));
        }
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| malformed(&e))?;
        let words = |name: String, dtype: Dtype, len: usize| -> Result<Vec<[u8; 4]>> {
            let Ok(view) = tensors.tensor(&name) else {
                return Err(Error::tensor(&place, format!("has no tensor `{name}`")));
            };
            if view.dtype() != dtype || view.shape() != [len] {
                let (found, shape) = (view.dtype(), view.shape());
                let why =
                    format!("`{name}` is {found} {shape:?}; {:?} of {n} elements needs {dtype} [{len}]", facts.product);
                return Err(Error::tensor(&place, why));
            }
            Ok(view.data().as_chunks::<4>().0.to_vec())
        };
        let count = |letter: char| facts.product.chars().filter(|c| *c == letter).count();
        let (mut factors, mut permutations) = (vec![], vec![]);
        for i in 0..count('B') {
            let numbers = words(format!("butterfly.{i}"), Dtype::F32, facts.shape().butterfly_len())?;
            factors.push(numbers.into_iter().map(f32::from_le_bytes).collect());
        }
        for i in 0..count('P') {
            let index = words(format!("permutation.{i}"), Dtype::U32, n)?;
            permutations.push(index.into_iter().map(u32::from_le_bytes).collect());
        }
        Ok(Self { facts, factors, permutations })
    }

    /// The file's bytes: `butterfly.I` f32 and `permutation.I` u32 in the order of application, each named by its place
    /// among its kind.
    ///
    /// # Errors
    /// Out of memory.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let mut tensors: HashMap<String, Tensor> = HashMap::new();
        for (i, f) in self.factors.iter().enumerate() {
            tensors.insert(format!("butterfly.{i}"), Tensor::from_slice(f, f.len(), &Device::Cpu).at(FACTORS)?);
        }
        for (i, p) in self.permutations.iter().enumerate() {
            tensors.insert(format!("permutation.{i}"), Tensor::from_slice(p, p.len(), &Device::Cpu).at(FACTORS)?);
        }
        let facts = serde_json::to_string(&self.facts).map_err(|e| Error::format(FACTORS, e))?;
        let metadata = HashMap::from([(METADATA.to_string(), facts)]);
        safetensors::serialize(tensors, Some(metadata)).map_err(candle_core::Error::wrap).at(FACTORS)
    }

    /// Butterflies and permutations in the order of application.
    pub fn steps(&self) -> Vec<Step<'_, f32>> {
        let (mut factors, mut permutations) = (self.factors.iter(), self.permutations.iter());
        let step = |c: char| match c {
            'B' => factors.next().map(|f| Step::Butterfly(f)),
            _ => permutations.next().map(|p| Step::Permutation(p)),
        };
        self.facts.product.chars().rev().filter_map(step).collect()
    }

    /// The product for single vectors.
    ///
    /// # Errors
    /// A permutation with an index out of range.
    pub fn plan(&self) -> Result<Plan> {
        Plan::new(&self.facts.shape(), &self.steps())
    }
}

/// Facts from the result.json of a run that wrote no metadata yet.
fn facts_of_run(result: &PathBuf, place: &str) -> Result<Facts> {
    #[derive(Deserialize)]
    struct Run {
        transform: String,
        n: usize,
        settings: Modules,
    }
    #[derive(Deserialize)]
    struct Modules {
        product: String,
        complex: bool,
        tied: bool,
    }
    let Ok(json) = std::fs::read(result) else {
        let message = format!("has no metadata `{METADATA}`, and there is no {RESULT} beside it");
        return Err(Error::format(place, message));
    };
    let run: Run = serde_json::from_slice(&json).map_err(|e| Error::format(result.display(), e))?;
    let Modules { product, complex, tied } = run.settings;
    Ok(Facts { complex_target: run.transform == "dft", transform: run.transform, n: run.n, product, complex, tied })
}
