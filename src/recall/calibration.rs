//! Calibrations: what a model's key codes and value codes are fitted to, saved as `recall.safetensors`.

use super::{HeadCode, HeadMoments, KeyCodeChoice, ValueCode, SUB, WORDS};
use crate::error::{At, Error, ErrorKind, Result};
use crate::nn::Rope;
use crate::spec::{AttentionSpec, ModelSpec};
use candle_core::{DType, Device, Tensor};
use half::f16;
use rayon::prelude::*;
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

/// Key of the metadata with the version of the format, the number of sinks and the positions. One key: safetensors
/// writes several in no particular order.
const KEY: &str = "bfly_recall_calibration";
/// Version of calibrations for uniform positions.
const VERSION: u32 = 1;
/// Version of calibrations at natural positions: a build that rotates every calibration must not read them.
const NATURAL_VERSION: u32 = 2;

/// Value of the metadata.
#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    sink_tokens: usize,
    #[serde(default, skip_serializing_if = "Positions::is_uniform")]
    positions: Positions,
}

/// Positions that the moments of a calibration are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// Moments before rotation, which a run rotates to uniform positions of its context.
    #[default]
    Uniform,
    /// Moments after rotation at the positions of the calibration's texts, used as they are at any context; for
    /// comparisons.
    Natural,
}

impl Positions {
    fn is_uniform(&self) -> bool {
        *self == Self::Uniform
    }
}

/// Moments and codewords of every full-attention layer.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// One entry per layer of the model; `None` for layers that cannot recall.
    pub layers: Vec<Option<LayerCalibration>>,
    /// Number of first tokens of each document that were left out.
    pub sink_tokens: usize,
    /// Positions that the moments are for.
    pub positions: Positions,
}

/// Moments and codewords of one layer, by KV head.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerCalibration {
    /// Moments of keys and queries.
    pub heads: Vec<HeadMoments>,
    /// Codes of values.
    pub values: Vec<ValueCode>,
}

/// The codes of one layer in a context, by KV head.
#[derive(Debug, Clone)]
pub struct LayerTables {
    /// Key codes.
    pub keys: Vec<Arc<dyn HeadCode>>,
    /// Value codes.
    pub values: Vec<ValueCode>,
}

/// Names of the moments in the file, in the order of [`HeadMoments::parts`].
const MOMENTS: [&str; 5] = ["key_mean", "key_square", "key_cross", "query_square", "query_cross"];

impl HeadMoments {
    fn parts(&self) -> [&[f32]; 5] {
        [&self.key_mean, &self.key_square, &self.key_cross, &self.query_square, &self.query_cross]
    }
}

impl Calibration {
    /// Fits the codes of layer `layer`, which turns by `rope`, for a context of `ctx` positions: under
    /// [`Positions::Uniform`] keys are at uniform positions after the sinks and queries in the second half.
    ///
    /// # Errors
    /// Those of [`Calibration::check`]; the calibration lacks the layer.
    pub fn tables(&self, layer: usize, choice: &KeyCodeChoice, rope: &Rope, ctx: usize) -> Result<LayerTables> {
        self.check(choice)?;
        let found = self.layers.get(layer).and_then(Option::as_ref);
        let found =
            found.ok_or_else(|| Error::format("recall calibration", format!("has nothing on layer {layer}")))?;
        let (frequencies, amplitude) = rope.frequencies();
        let zeros = vec![0.0; frequencies.len()];
        let turn = match self.positions {
            Positions::Uniform => (frequencies, amplitude),
            // The amplitude, too, is in the moments.
            Positions::Natural => (zeros.as_slice(), 1.0),
        };
        let keys = |h: &HeadMoments| choice.fit(&h.rotated(turn, self.sink_tokens.min(ctx - 1)..ctx, ctx / 2..ctx));
        Ok(LayerTables { keys: found.heads.par_iter().map(keys).collect(), values: found.values.clone() })
    }

    /// Checks that codes of `choice` can be fitted to the calibration.
    ///
    /// # Errors
    /// A code that needs moments before rotation, and a calibration at natural positions.
    pub fn check(&self, choice: &KeyCodeChoice) -> Result<()> {
        match self.positions {
            Positions::Uniform => Ok(()),
            Positions::Natural => choice.check_natural(),
        }
    }

    /// Returns a calibration that knows nothing of the model: for contexts in which every token is read exactly, so that
    /// codes make no difference.
    pub fn neutral(spec: &ModelSpec, sink_tokens: usize) -> Self {
        let layer = |a: &AttentionSpec| {
            let (d, half) = (a.head_dim, spec.ropes[a.rope].dim / 2);
            let head = HeadMoments {
                key_mean: vec![0.0; d],
                key_square: vec![1.0; d],
                key_cross: vec![0.0; half],
                query_square: vec![1.0; d],
                query_cross: vec![0.0; half],
            };
            let values = ValueCode::new(d, vec![0.0; d.div_ceil(SUB) * WORDS * SUB]);
            LayerCalibration {
                heads: vec![head; a.kv_heads],
                values: values.into_iter().cycle().take(a.kv_heads).collect(),
            }
        };
        let mut layers = vec![None; spec.layers.len()];
        spec.full_attention().for_each(|(i, a)| layers[i] = Some(layer(a)));
        Self { layers, sink_tokens, positions: Positions::Uniform }
    }

    /// Returns the calibration as a safetensors file. Codewords are f16.
    ///
    /// # Errors
    /// None in practice: serialisation of valid tensors.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut tensors = BTreeMap::new();
        for (i, layer) in self.layers.iter().enumerate() {
            let Some(layer) = layer else { continue };
            let heads = layer.heads.len();
            for (m, name) in MOMENTS.into_iter().enumerate() {
                let all: Vec<f32> = layer.heads.iter().flat_map(|h| h.parts()[m]).copied().collect();
                let width = all.len() / heads.max(1);
                tensors.insert(format!("layers.{i}.{name}"), Tensor::from_vec(all, (heads, width), &Device::Cpu)?);
            }
            let words: Vec<f16> = layer.values.iter().flat_map(|v| v.codebook()).map(|x| f16::from_f32(*x)).collect();
            let parts = layer.values.first().map_or(0, ValueCode::bytes);
            let words = Tensor::from_vec(words, (heads, parts, WORDS, SUB), &Device::Cpu)?;
            tensors.insert(format!("layers.{i}.value_words"), words);
        }
        let version = if self.positions.is_uniform() { VERSION } else { NATURAL_VERSION };
        let header = Header { version, sink_tokens: self.sink_tokens, positions: self.positions };
        let header = serde_json::to_string(&header).map_err(|e| Error::format("recall calibration", e))?;
        let metadata = HashMap::from([(KEY.to_string(), header)]);
        safetensors::serialize(&tensors, Some(metadata)).map_err(candle_core::Error::wrap).at("recall.safetensors")
    }

    /// Reads a calibration for the model `spec`.
    ///
    /// # Errors
    /// The file cannot be read, is malformed, or was made for another model; the message names the tensor.
    pub fn load(path: &Path, spec: &ModelSpec) -> Result<Self> {
        let bytes = std::fs::read(path).at(path.display())?;
        Self::from_bytes(&bytes, spec).map_err(|e| e.within(path.display()))
    }

    /// Reads a calibration for the model `spec` from the bytes of a file.
    ///
    /// # Errors
    /// Those of [`Calibration::load`].
    pub fn from_bytes(bytes: &[u8], spec: &ModelSpec) -> Result<Self> {
        let malformed = |e: safetensors::SafeTensorError| Error::format("recall calibration", e);
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(malformed)?;
        let text = header.metadata().as_ref().and_then(|m| m.get(KEY)).cloned();
        let text = text.ok_or_else(|| Error::format("recall calibration", format!("its metadata has no `{KEY}`")))?;
        let Header { version, sink_tokens, positions } =
            serde_json::from_str(&text).map_err(|e| Error::format(format!("recall calibration: {KEY}"), e))?;
        if version != VERSION && version != NATURAL_VERSION {
            let message = format!("is of version {version}; this build reads versions {VERSION} and {NATURAL_VERSION}");
            return Err(Error::format("recall calibration", message));
        }
        let file = SafeTensors::deserialize(bytes).map_err(malformed)?;
        let mut layers: Vec<Option<LayerCalibration>> = vec![None; spec.layers.len()];
        let mut read = 0;
        for (i, a) in spec.full_attention() {
            let half = spec.ropes[a.rope].dim / 2;
            let (heads, parts) = (a.kv_heads, a.head_dim.div_ceil(SUB));
            let mut of = |name: &str, shape: &[usize]| {
                read += 1;
                numbers(&file, &format!("layers.{i}.{name}"), shape)
            };
            let mut moments = vec![];
            for name in MOMENTS {
                let width = if name.ends_with("cross") { half } else { a.head_dim };
                moments.push((of(name, &[heads, width])?, width));
            }
            let part = |m: usize, g: usize| moments[m].0[g * moments[m].1..][..moments[m].1].to_vec();
            let head = |g: usize| HeadMoments {
                key_mean: part(0, g),
                key_square: part(1, g),
                key_cross: part(2, g),
                query_square: part(3, g),
                query_cross: part(4, g),
            };
            let words = of("value_words", &[heads, parts, WORDS, SUB])?;
            let code = |words: &[f32]| ValueCode::new(a.head_dim, words.to_vec());
            let values: Option<Vec<_>> = words.chunks_exact(parts * WORDS * SUB).map(code).collect();
            let Some(values) = values else {
                return Err(Error::tensor(format!("layers.{i}.value_words"), "has the wrong number of codewords"));
            };
            layers[i] = Some(LayerCalibration { heads: (0..heads).map(head).collect(), values });
        }
        let known = |name: &str| {
            let layer = name.strip_prefix("layers.").and_then(|n| n.split('.').next()).and_then(|n| n.parse().ok());
            layer.is_some_and(|i: usize| layers.get(i).is_some_and(Option::is_some))
        };
        match file.names().iter().find(|n| !known(n)) {
            Some(name) => Err(Error::tensor(name, "belongs to no layer of this model that can recall")),
            None if file.len() != read => {
                Err(Error::format("recall calibration", format!("holds {} tensors, not {read}", file.len())))
            }
            None => Ok(Self { layers, sink_tokens, positions }),
        }
    }
}

/// Reads a tensor of f32 or f16 as finite f32 numbers.
fn numbers(file: &SafeTensors, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let view = file.tensor(name).map_err(|_| Error::tensor(name, "is missing"))?;
    if view.shape() != shape {
        return Err(Error::tensor(name, format!("has shape {:?}; this model needs {shape:?}", view.shape())));
    }
    let dtype = match view.dtype() {
        safetensors::Dtype::F32 => DType::F32,
        safetensors::Dtype::F16 => DType::F16,
        other => return Err(Error::tensor(name, format!("is of type {other:?}, not F32 or F16"))),
    };
    let tensor = Tensor::from_raw_buffer(view.data(), dtype, shape, &Device::Cpu).at(name)?;
    let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>().at(name)?;
    match values.iter().all(|x| x.is_finite()) {
        true => Ok(values),
        false => Err(Error::new(ErrorKind::NotFinite, name, "holds NaN or infinity")),
    }
}
