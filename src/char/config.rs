//! Configuration of a character model: sizes, chunks and the partner of every layer; `config.json` beside the weights.

use crate::error::{Error, Result};
use crate::nn::FactoredShape;
use crate::ops::factored::scratch;
use crate::ops::pair::Partner;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// `model_type` in `config.json`.
pub const MODEL_TYPE: &str = crate::family::CHARACTER_MODEL;
/// Symbols: Latin-1.
pub const SYMBOLS: usize = 256;
/// The width of the gated MLP is rounded up to a multiple of this.
const WIDTH_STEP: usize = 32;

/// How a butterfly layer reads its partner chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PartnerForm {
    /// All keys and values.
    Raw,
    /// One mean key and value.
    Summary,
}

/// Which chunk is the partner at stage `s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pairing {
    /// Chunk `c - 2^s`.
    CausalShift,
    /// Chunk `c ^ 2^s`, both read in full, as published: no language model.
    Xor,
}

/// What the projections of the MLP are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MlpForm {
    /// Matrices.
    #[default]
    Dense,
    /// Products of butterfly factors ([`crate::nn::Factored`]).
    Factored,
}

impl MlpForm {
    fn is_dense(&self) -> bool {
        *self == Self::Dense
    }
}

/// A character model's configuration.
///
/// ```
/// use bfly::char::CharConfig;
/// let tiny = CharConfig::preset("tiny").unwrap();
/// assert_eq!(tiny.layers().len(), 53);
/// assert_eq!(tiny.reach(), 2563); // chunks
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CharConfig {
    /// Always [`MODEL_TYPE`].
    pub model_type: String,
    /// Channels of the residual stream, `d`.
    pub hidden_size: usize,
    /// Attention heads, `H`.
    pub num_attention_heads: usize,
    /// Channels of a head, `D`.
    pub head_dim: usize,
    /// Width of the gated MLP.
    pub intermediate_size: usize,
    /// What its projections are; not written where they are dense, as in configurations of before there was a choice.
    #[serde(default, skip_serializing_if = "MlpForm::is_dense")]
    pub mlp: MlpForm,
    /// Characters of a chunk, `B`.
    pub chunk: usize,
    /// Layers that read the chunk before, raw: before and after the butterfly layers.
    pub local_layers: [usize; 2],
    /// Stages of the butterfly layers, in order.
    pub stages: Vec<u32>,
    /// How butterfly layers read their partner.
    pub partner_form: PartnerForm,
    /// Which chunk is the partner.
    pub pairing: Pairing,
    /// Base of the rotary angles.
    pub rope_theta: f64,
    /// Added to the mean square of a norm.
    pub rms_norm_eps: f64,
}

impl CharConfig {
    /// The preset `full` (d 768, 12 heads), `small` (384, 6), `tiny` (128, 2) or `micro` (64, 1; chunk 16, six stages).
    ///
    /// # Errors
    /// Another name.
    pub fn preset(name: &str) -> Result<Self> {
        let (heads, chunk, stages) = match name {
            "full" => (12, 128, 9),
            "small" => (6, 128, 9),
            "tiny" => (2, 128, 9),
            "micro" => (1, 16, 6),
            _ => return Err(Error::usage("--preset", format!("{name:?} is none of full, small, tiny, micro"))),
        };
        let pass: Vec<u32> = (0..stages).collect();
        Ok(Self::new(heads, 64, chunk, [4, 4], pass.repeat(5)))
    }

    /// A configuration with `heads` heads of `dim` channels and a gated MLP of 8/3 of the width.
    pub fn new(heads: usize, dim: usize, chunk: usize, local_layers: [usize; 2], stages: Vec<u32>) -> Self {
        let d = heads * dim;
        Self {
            model_type: MODEL_TYPE.into(),
            hidden_size: d,
            num_attention_heads: heads,
            head_dim: dim,
            intermediate_size: (8 * d).div_ceil(3).next_multiple_of(WIDTH_STEP),
            mlp: MlpForm::Dense,
            chunk,
            local_layers,
            stages,
            partner_form: PartnerForm::Raw,
            pairing: Pairing::CausalShift,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
        }
    }

    /// Reads and checks `config.json`.
    ///
    /// # Errors
    /// A missing or malformed file, an unknown key, or a value out of range; each is named.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let config: Self = serde_json::from_str(&text).map_err(|e| Error::format(path.display(), e))?;
        config.check().map_err(|e| Error::format(path.display(), e))?;
        Ok(config)
    }

    /// Refuses values that make no model.
    ///
    /// # Errors
    /// The first such value, by key.
    pub fn check(&self) -> Result<()> {
        let refuse = |key: &str, why: String| Err(Error::format(key, why));
        if self.model_type != MODEL_TYPE {
            return refuse("model_type", format!("{:?} is not {MODEL_TYPE:?}", self.model_type));
        }
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("num_attention_heads", self.num_attention_heads),
            ("head_dim", self.head_dim),
            ("intermediate_size", self.intermediate_size),
            ("chunk", self.chunk),
        ];
        for (key, value) in sizes {
            if value == 0 || value > 1 << 20 {
                return refuse(key, format!("{value} is not in 1 ..= {}", 1 << 20));
            }
        }
        if !self.head_dim.is_multiple_of(2) {
            return refuse("head_dim", format!("{} is not even", self.head_dim));
        }
        if self.chunk * self.head_dim > 1 << 24 {
            return refuse("chunk", format!("{} characters of {} channels a head", self.chunk, self.head_dim));
        }
        if self.num_layers() == 0 || self.num_layers() > 4096 {
            return refuse("stages", format!("with local_layers, {} layers", self.num_layers()));
        }
        if let Some(stage) = self.stages.iter().find(|s| **s > 30) {
            return refuse("stages", format!("stage {stage} is beyond 30"));
        }
        if self.pairing == Pairing::Xor && self.partner_form == PartnerForm::Summary {
            return refuse("partner_form", "summary is not defined for xor pairing".into());
        }
        for (key, value) in [("rope_theta", self.rope_theta), ("rms_norm_eps", self.rms_norm_eps)] {
            if !(value.is_finite() && value > 0.0) {
                return refuse(key, format!("{value} is not positive"));
            }
        }
        Ok(())
    }

    /// Refuses a length, given by `flag`, that is not whole chunks.
    ///
    /// # Errors
    /// As said, with the chunk's size.
    pub fn check_whole(&self, flag: &str, characters: usize) -> Result<()> {
        if characters > 0 && characters.is_multiple_of(self.chunk) {
            return Ok(());
        }
        let message = format!("{characters} is not a multiple of the chunk, {} characters", self.chunk);
        Err(Error::usage(flag, message))
    }

    /// Number of layers.
    pub fn num_layers(&self) -> usize {
        self.local_layers[0] + self.stages.len() + self.local_layers[1]
    }

    /// The partner of every layer, first to last.
    pub fn layers(&self) -> Vec<Partner> {
        let butterfly = self.stages.iter().map(|s| match (self.pairing, self.partner_form) {
            (Pairing::Xor, _) => Partner::Xor(1 << s),
            (_, PartnerForm::Raw) => Partner::Shift(1 << s),
            (_, PartnerForm::Summary) => Partner::Summary(1 << s),
        });
        let local = |count| std::iter::repeat_n(Partner::Shift(1), count);
        local(self.local_layers[0]).chain(butterfly).chain(local(self.local_layers[1])).collect()
    }

    /// The largest `n` such that the last layer of a chunk depends on every one of the `n` chunks before it: each layer adds
    /// its distance or not, so that the sorted distances reach on as long as none exceeds what those before it reach by
    /// more than 1.
    pub fn reach(&self) -> usize {
        let mut distances: Vec<usize> = self.layers().iter().map(|l| l.distance()).collect();
        distances.sort_unstable();
        distances
            .iter()
            .fold((0, true), |(reach, on), d| if on && *d <= reach + 1 { (reach + d, true) } else { (reach, false) })
            .0
    }

    /// Shapes of the MLP's projections: gate and up, then down.
    fn projections(&self) -> [FactoredShape; 2] {
        let (d, wide) = (self.hidden_size, self.intermediate_size);
        [(wide, d), (d, wide)].map(|(outputs, inputs)| FactoredShape { outputs, inputs })
    }

    /// Elements of the weights that a character is multiplied with: those of products, the tied embedding once.
    pub fn products(&self) -> u64 {
        let (d, width) = (self.hidden_size, self.num_attention_heads * self.head_dim);
        let [wide, down] = self.projections().map(|p| match self.mlp {
            MlpForm::Dense => p.outputs * p.inputs,
            MlpForm::Factored => p.factors().iter().product(),
        });
        (self.num_layers() * (4 * d * width + 2 * wide + down) + SYMBOLS * d) as u64
    }

    /// Floating-point operations of a character's training step, a multiply-add being two: six for each element of
    /// [`Self::products`], and twelve channels of all heads for each key that it reads, of which its own chunk has half.
    /// What rematerialisation computes again is not counted.
    pub fn training_flops(&self) -> u64 {
        let keys = |layer: Partner| match layer {
            Partner::Summary(_) => self.chunk / 2 + 1,
            Partner::Shift(_) => self.chunk / 2 + self.chunk,
            Partner::Xor(_) => 2 * self.chunk,
        };
        let keys: usize = self.layers().into_iter().map(keys).sum();
        6 * self.products() + (12 * keys * self.num_attention_heads * self.head_dim) as u64
    }

    /// Bytes that training holds on a device at most, beside the batch: weights, moments, gradients and activations of
    /// `rows` characters computed at once, `element` bytes each.
    pub fn training_bytes(&self, rows: usize, element: usize, rematerialise: bool) -> u64 {
        let (d, width, wide) = (self.hidden_size, self.num_attention_heads * self.head_dim, self.intermediate_size);
        let parameters = self.products() as usize + (2 * self.num_layers() + 1) * d;
        // Weights, two moments, decay and gradient in f32, their successors in the optimiser's step, and the copy.
        let state = parameters * (4 * 9 + if element == 4 { 0 } else { element });
        // Two norms with their sums, queries, keys and values, attention's output, gate and up, and their product.
        let layer = rows * (element * (4 * d + 4 * width + 3 * wide) + 4 * (self.num_attention_heads + 2));
        // Gradients of a layer, of which the far queries' are f32, and the logits with theirs.
        let backward = rows * (element * (4 * d + 4 * width + 3 * wide) + 4 * width);
        // Of a factored projection also what is left out of its results, and sums of gradients.
        let stacks: usize = self.projections().map(|p| 2 * rows * element * p.stacked()).iter().sum();
        let backward = match self.mlp {
            MlpForm::Dense => backward,
            MlpForm::Factored => {
                backward + stacks + scratch(2 * self.projections()[0].factors().iter().product::<usize>()) as usize
            }
        };
        let ends = rows * (element * (3 * SYMBOLS + 2 * d) + 12);
        let kept =
            if rematerialise { self.num_layers() * rows * d * element + layer } else { self.num_layers() * layer };
        (state + kept + backward.max(ends)) as u64
    }

    /// Bytes of a stream's keys and values in elements of `element` bytes, allocated once: a raw layer at distance `δ` keeps
    /// `δ + 1` chunks, a layer with summaries one chunk and `δ` mean rows.
    pub fn stream_bytes(&self, element: usize) -> u64 {
        let rows = |layer: Partner| match layer {
            Partner::Summary(distance) => self.chunk + distance,
            other => (other.distance() + 1) * self.chunk,
        };
        let rows: u64 = self.layers().into_iter().map(|layer| rows(layer) as u64).sum();
        rows * 2 * (self.num_attention_heads * self.head_dim * element) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = 1024.0 * 1024.0;

    #[test]
    fn presets_have_the_published_sizes() -> Result<()> {
        let mib = |name: &str| Ok::<_, Error>((CharConfig::preset(name)?.stream_bytes(2) as f64 / MIB).round());
        assert_eq!([mib("full")?, mib("small")?, mib("tiny")?], [981.0, 491.0, 164.0]);
        // 13 stages reach a million characters.
        let stages = [(0..13).collect::<Vec<u32>>().repeat(3), (0..6).collect()].concat();
        let million = CharConfig { stages, ..CharConfig::preset("full")? };
        assert_eq!(
            (million.num_layers(), million.stream_bytes(2) >> 20, million.reach() * 128 > 1 << 20),
            (53, 9261, true)
        );
        let summaries = |name: &str| {
            let config = CharConfig { partner_form: PartnerForm::Summary, ..CharConfig::preset(name)? };
            Ok::<_, Error>((config.stream_bytes(2) as f64 / MIB).round())
        };
        assert_eq!([summaries("full")?, summaries("small")?, summaries("tiny")?], [30.0, 15.0, 5.0]);
        Ok(())
    }

    #[test]
    fn a_pass_reaches_every_chunk_before() {
        for stages in 1..10 {
            let pass = CharConfig::new(1, 64, 16, [0, 0], (0..stages).collect());
            assert_eq!(pass.reach(), (1 << stages) - 1);
        }
        assert_eq!(CharConfig::new(1, 64, 16, [0, 0], vec![0, 1, 4]).reach(), 3);
        assert_eq!(CharConfig::new(1, 64, 16, [0, 0], vec![1, 2]).reach(), 0);
    }

    #[test]
    fn an_unknown_key_and_a_wrong_value_are_named() -> Result<()> {
        let dir = tempfile::tempdir().map_err(|e| Error::io("temporary", e))?;
        let path = dir.path().join("config.json");
        let good = serde_json::to_value(CharConfig::preset("micro")?).map_err(|e| Error::format("json", e))?;
        for (key, value, want) in [
            ("window", serde_json::json!(3), "unknown field `window`"),
            ("head_dim", serde_json::json!(63), "head_dim: 63 is not even"),
            ("chunk", serde_json::json!(0), "chunk: 0 is not in"),
            ("stages", serde_json::json!([31]), "stages: stage 31"),
            ("chunk", serde_json::json!(1 << 20), "chunk: 1048576 characters of 64 channels"),
            ("model_type", serde_json::json!("llama"), "model_type: \"llama\""),
            ("rope_theta", serde_json::json!(-1.0), "rope_theta: -1 is not positive"),
        ] {
            let mut bad = good.clone();
            bad[key] = value;
            std::fs::write(&path, bad.to_string()).map_err(|e| Error::io(&path, e))?;
            let message = CharConfig::read(&path).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(message.contains(want) && message.contains("config.json"), "{message}");
        }
        Ok(())
    }
}
