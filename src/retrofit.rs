//! Retrofit plans: the layers to swap for butterfly attention and their settings, saved as JSON.

use crate::error::{At, Error, Result};
use crate::layout::MAX_CONTEXT;
use crate::ops::Window;
use crate::recall::KeyCodeChoice;
use crate::selector::{self, Grid};
use crate::spec::{AttentionKind, ModelSpec};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Alignment of the raw window's left edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "snake_case")]
pub enum WindowAlign {
    /// Aligned to a block: every past token is in the window or in a completed block left of it.
    Block,
    /// Exactly the last `window` tokens, as published: some tokens are neither in the window nor in a readable summary.
    Token,
}

/// Whether keys are averaged after or before rotation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "kebab-case")]
pub enum KeyPooling {
    /// Mean of rotated keys.
    PostRope,
    /// Mean of unrotated keys, rotated at the mean of their positions.
    PreRope,
}

/// Relative position at which a summary is scored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "snake_case")]
pub enum FarPosition {
    /// True relative position of the summary.
    True,
    /// True relative position, limited to the trained length; requires `--pool pre-rope`.
    Clamp,
}

/// Estimate of the values of tokens that exact recall does not fetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "snake_case")]
pub enum RestKind {
    /// Value codes of single tokens: 1/64 of the bytes of bf16 keys and values.
    Codes,
    /// Means of the values of blocks of `block` tokens.
    Means,
    /// No estimate: tokens that are not fetched have no weight.
    None,
}

/// How layers with exact recall read a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "snake_case")]
pub enum PrefillKind {
    /// Every token reads all earlier ones, from host memory: logits are the stock model's.
    Exact,
    /// Every token reads its window, sinks and block summaries: time is linear in the prompt's length, and keys and
    /// values of later layers differ from the stock model's.
    Butterfly,
}

/// What codes of exact recall decode to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "snake_case")]
pub enum CodeFit {
    /// Means, scales and codewords of the calibration.
    Calibration,
    /// The same refitted to the keys and values of the prompt, for no bytes per token.
    Text,
}

/// Tokens that each KV head fetches per decode step where recall is on and nothing else is said.
pub const DEFAULT_RECALL: usize = 2048;

/// Settings of butterfly attention and of exact recall.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Block size in tokens, `B`.
    pub block: usize,
    /// Raw window in tokens, `w · B`.
    pub window: usize,
    /// Alignment of the window's left edge.
    pub window_align: WindowAlign,
    /// Number of attention sinks, `S`: first positions that every query reads raw.
    pub sink_tokens: usize,
    /// Name of the selector rule.
    pub partner: String,
    /// Stages of the rule per layer.
    pub partner_count: usize,
    /// Distance of stage 0 in blocks; `w + 1` if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shift_unit: Option<usize>,
    /// Whether keys are averaged after or before rotation.
    pub pool: KeyPooling,
    /// `β` of the bias `β ln(count)` on a summary's logit.
    pub summary_bias: f64,
    /// Relative position at which summaries are scored.
    pub far_position: FarPosition,
    /// Seed of the `random` rule.
    pub seed: u64,
    /// Exact recall: tokens outside the window that each KV head fetches per decode step, `k`. With 0 the layer has no
    /// recall, and summaries instead.
    pub recall: usize,
    /// Key code that recall chooses tokens by, such as `pair:1bit`.
    pub key_code: String,
    /// Estimate of the values of tokens that recall does not fetch.
    pub rest: RestKind,
    /// What key codes of `pair` and value codes decode to.
    pub code_fit: CodeFit,
    /// How layers with recall read a prompt.
    pub prefill: PrefillKind,
    /// Swapped layers that have summaries instead of recall, ascending; the others recall.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub butterfly_layers: Vec<usize>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            block: 128,
            window: 512,
            window_align: WindowAlign::Block,
            sink_tokens: 4,
            partner: selector::SELECTORS[0].name().into(),
            partner_count: 1,
            shift_unit: None,
            pool: KeyPooling::PostRope,
            summary_bias: 0.0,
            far_position: FarPosition::True,
            seed: 0,
            recall: 0,
            key_code: "pair:1.5bit".into(),
            rest: RestKind::Codes,
            code_fit: CodeFit::Calibration,
            prefill: PrefillKind::Exact,
            butterfly_layers: vec![],
        }
    }
}

impl Settings {
    /// Returns the defaults of exact recall, chosen by measurement: docs/recall.md.
    pub fn recalling() -> Self {
        Self {
            recall: DEFAULT_RECALL,
            window: 64,
            window_align: WindowAlign::Token,
            code_fit: CodeFit::Text,
            ..Self::default()
        }
    }

    /// Returns the settings with a token-aligned window of whole blocks where means of blocks are read, which need it.
    pub fn widened(self) -> Self {
        let means = self.recall == 0 || self.rest == RestKind::Means || self.summarises();
        match means && self.window_align == WindowAlign::Token && self.block > 0 {
            true => Self { window: self.window.next_multiple_of(self.block), ..self },
            false => self,
        }
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// A setting is out of range, or settings contradict each other; the message names the flag.
    pub fn validate(&self) -> Result<()> {
        let fail = |flag: &str, message: String| Err(Error::usage(flag, message));
        if self.block == 0 || self.block > 1 << 20 {
            return fail("--block", format!("{} is not a block size; give 1 to 1048576 tokens", self.block));
        }
        for (flag, tokens) in [("--window", self.window), ("--sink-tokens", self.sink_tokens)] {
            if tokens > MAX_CONTEXT {
                return fail(flag, format!("{tokens} tokens are more than the longest context; give at most 16M"));
            }
        }
        // Exact recall alone knows windows that are not of whole blocks.
        let any = self.recall > 0 && self.window_align == WindowAlign::Token && !self.summarises();
        if !any && !self.window.is_multiple_of(self.block) {
            let below = self.window / self.block * self.block;
            let hint = format!("{} or {}", below, below + self.block);
            return fail(
                "--window",
                format!("{} is not a whole number of blocks of {}; try {hint}", self.window, self.block),
            );
        }
        if self.window_align == WindowAlign::Token && self.window == 0 {
            return fail("--window", "a token-aligned window of 0 excludes the query's own position".into());
        }
        if self.partner_count == 0 {
            return fail("--partner-count", "must be at least 1; use --partner local for no summaries".into());
        }
        if self.shift_unit.is_some_and(|unit| unit == 0 || unit > MAX_CONTEXT) {
            return fail("--shift-unit", format!("must be from 1 to {MAX_CONTEXT} blocks"));
        }
        if !self.summary_bias.is_finite() {
            return fail("--summary-bias", format!("{} is not a finite number", self.summary_bias));
        }
        if self.far_position == FarPosition::Clamp && self.pool == KeyPooling::PostRope {
            return fail(
                "--far-position",
                "clamp rotates summaries anew, which needs unrotated keys: add --pool pre-rope".into(),
            );
        }
        KeyCodeChoice::parse(&self.key_code)?;
        if self.recall > 0 {
            self.validate_recall()?;
        } else if !self.butterfly_layers.is_empty() {
            let message = "makes no difference: recall is 0, so that every swapped layer has block summaries";
            return fail("--butterfly-layers", message.into());
        }
        selector::find(&self.partner).map(|_| ())
    }

    /// Refuses settings that have no meaning under exact recall.
    fn validate_recall(&self) -> Result<()> {
        let plain = Self::default();
        let set = [
            ("--partner", self.partner != plain.partner),
            ("--partner-count", self.partner_count != plain.partner_count),
            ("--shift-unit", self.shift_unit.is_some()),
            ("--pool", self.pool != plain.pool),
            ("--summary-bias", self.summary_bias != plain.summary_bias),
            ("--far-position", self.far_position != plain.far_position),
        ];
        // The last block with a far position must be whole, since its mean is that of all its positions.
        if self.window_align == WindowAlign::Token && self.window < self.block && self.rest == RestKind::Means {
            let message = format!("{} tokens are less than a block, of which --rest means needs one", self.window);
            return Err(Error::usage("--window", message));
        }
        if let Some((flag, _)) = set.iter().find(|(_, set)| *set && !self.summarises()) {
            let message = "is a setting of block summaries, which exact recall replaces; add --recall 0 to use them, \
                           --butterfly-layers to use them in some layers, or --prefill butterfly to read the prompt by \
                           them";
            return Err(Error::usage(flag, message));
        }
        match self.recall > MAX_CONTEXT {
            true => Err(Error::usage("--recall", format!("{} tokens are more than the longest context", self.recall))),
            false => Ok(()),
        }
    }

    /// Returns whether layers read by block summaries although recall is on: some layers, or all of them the prompt.
    fn summarises(&self) -> bool {
        self.prefill == PrefillKind::Butterfly || !self.butterfly_layers.is_empty()
    }

    /// Returns the settings where exact recall is on.
    pub fn recalls(&self) -> Option<&Self> {
        Some(self).filter(|s| s.recall > 0)
    }

    /// Returns the context length up to which exact recall reads every token exactly, window, sinks and `k`: its layers
    /// are dense there.
    pub fn exact_tokens(&self) -> usize {
        self.near_rows().saturating_add(self.sink_tokens).saturating_add(self.recall)
    }

    /// Returns the window of raw positions that a query reads.
    pub fn raw_window(&self) -> Window {
        match self.window_align {
            WindowAlign::Block => Window::Blocks { block: self.block, count: self.window_blocks() },
            WindowAlign::Token => Window::Tokens(self.window),
        }
    }

    /// Returns the window in blocks, `w`.
    pub fn window_blocks(&self) -> usize {
        self.window / self.block
    }

    /// Returns the rows of the ring that a decode step of exact recall reads: its window.
    pub fn near_rows(&self) -> usize {
        match self.window_align {
            WindowAlign::Block => self.ring_rows(),
            WindowAlign::Token => self.window,
        }
    }

    /// Returns the rows of the local ring, `(w + 1) B`: the window and the query's own block.
    pub fn ring_rows(&self) -> usize {
        (self.window_blocks() + 1) * self.block
    }

    /// Returns the block grid of a context of `ctx` positions.
    pub fn grid(&self, ctx: usize) -> Grid {
        let window = self.window_blocks();
        Grid { blocks: ctx.div_ceil(self.block), window, unit: self.shift_unit.unwrap_or(window + 1), seed: self.seed }
    }

    /// Returns the number of pooled positions of block `n` (all but sinks).
    pub fn pooled_count(&self, n: usize) -> usize {
        self.block - self.sink_tokens.saturating_sub(n * self.block).min(self.block)
    }

    /// Returns the mean of the pooled positions of block `n`, at which a mean of unrotated keys is rotated.
    pub fn pooled_position(&self, n: usize) -> f32 {
        let first = (n * self.block).max(self.sink_tokens) as f64;
        let last = ((n + 1) * self.block - 1) as f64;
        ((first + last) / 2.0) as f32
    }
}

/// A retrofit plan: the swapped layers and their common settings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RetrofitPlan {
    /// Schema version: [`PLAN_VERSION`].
    pub schema_version: u32,
    /// Family of the model that the plan was made for.
    pub family: String,
    /// Number of layers of that model.
    pub model_layers: usize,
    /// Indices of the swapped layers, ascending.
    pub layers: Vec<usize>,
    /// Settings of all swapped layers.
    pub settings: Settings,
}

/// Schema version of plans that this build reads and writes.
pub const PLAN_VERSION: u32 = 1;

impl RetrofitPlan {
    /// Creates a plan for `spec`; `layers` of `None` swaps every full-attention layer.
    ///
    /// # Errors
    /// Those of [`RetrofitPlan::check`].
    pub fn new(spec: &ModelSpec, layers: Option<Vec<usize>>, mut settings: Settings) -> Result<Self> {
        let mut layers = layers.unwrap_or_else(|| spec.full_layers());
        for list in [&mut layers, &mut settings.butterfly_layers] {
            list.sort_unstable();
            list.dedup();
        }
        let plan = Self {
            schema_version: PLAN_VERSION,
            family: spec.family.clone(),
            model_layers: spec.layers.len(),
            layers,
            settings,
        };
        plan.check(spec)?;
        Ok(plan)
    }

    /// Checks the plan against the model `spec`.
    ///
    /// # Errors
    /// The settings are invalid; the plan is for another family or number of layers; its layers are empty, unsorted,
    /// out of range or not full-attention layers.
    pub fn check(&self, spec: &ModelSpec) -> Result<()> {
        self.settings.validate()?;
        if (self.family.as_str(), self.model_layers) != (&spec.family, spec.layers.len()) {
            return Err(Error::usage(
                "--plan",
                format!(
                    "made for {} with {} layers; this model is {} with {} layers",
                    self.family,
                    self.model_layers,
                    spec.family,
                    spec.layers.len()
                ),
            ));
        }
        if self.layers.is_empty() {
            return Err(Error::usage("--layers", "names no layer to swap; use --stock to run the unmodified model"));
        }
        let by_summaries = &self.settings.butterfly_layers;
        if [&self.layers, by_summaries].iter().any(|list| list.windows(2).any(|pair| pair[0] >= pair[1])) {
            return Err(Error::usage("--plan", "lists its layers out of order or twice"));
        }
        if let Some(l) = by_summaries.iter().find(|l| self.ordinal(**l).is_none()) {
            let message = format!("layer {l} is not swapped; swapped layers: {}", ranges(&self.layers));
            return Err(Error::usage("--butterfly-layers", message));
        }
        let full = spec.full_layers();
        match self.layers.iter().find(|l| !full.contains(l)) {
            None => Ok(()),
            Some(l) => {
                let why = match spec.attention().find(|(i, _)| i == l).map(|(_, a)| a.kind) {
                    Some(AttentionKind::Sliding { .. }) => "is a sliding-window layer and cannot be swapped",
                    _ => "is out of range",
                };
                Err(Error::usage("--layers", format!("layer {l} {why}; full-attention layers: {}", ranges(&full))))
            }
        }
    }

    /// Returns the index of `layer` among the swapped layers, if it is one.
    pub fn ordinal(&self, layer: usize) -> Option<usize> {
        self.layers.binary_search(&layer).ok()
    }

    /// Returns whether `layer` has exact recall.
    pub fn recalls(&self, layer: usize) -> bool {
        self.settings.recall > 0
            && self.ordinal(layer).is_some()
            && self.settings.butterfly_layers.binary_search(&layer).is_err()
    }

    /// Returns the index of `layer` among the layers that read by block summaries, if it is one: its stage follows from
    /// it.
    pub fn summary_ordinal(&self, layer: usize) -> Option<usize> {
        match self.settings.recall > 0 && self.settings.prefill == PrefillKind::Exact {
            true => self.settings.butterfly_layers.binary_search(&layer).ok(),
            false => self.ordinal(layer),
        }
    }

    /// Reads a plan.
    ///
    /// # Errors
    /// The file cannot be read, is malformed, has another schema version, or holds invalid settings.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).at(path.display())?;
        let plan: Self = serde_json::from_str(&text).map_err(|e| Error::format(path.display(), e))?;
        if plan.schema_version != PLAN_VERSION {
            let message =
                format!("is a plan of version {}; this build reads version {PLAN_VERSION}", plan.schema_version);
            return Err(Error::format(path.display(), message));
        }
        plan.settings.validate().map_err(|e| e.within(path.display()))?;
        Ok(plan)
    }
}

/// Formats sorted layer indices as a compact list such as `0-3, 5, 8-9`.
pub fn ranges(sorted: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = vec![];
    for &x in sorted {
        match parts.last_mut() {
            Some((_, end)) if *end + 1 == x => *end = x,
            _ => parts.push((x, x)),
        }
    }
    let show = |&(a, b): &(usize, usize)| if a == b { a.to_string() } else { format!("{a}-{b}") };
    parts.iter().map(show).collect::<Vec<_>>().join(", ")
}

/// Parses `all` (to `None`) or a list of layers such as `0-3,5`.
///
/// # Errors
/// The text is neither.
pub fn parse_layers(text: &str) -> Result<Option<Vec<usize>>> {
    if text == "all" {
        return Ok(None);
    }
    let bad = || Error::usage("--layers", format!("`{text}` is neither `all` nor a list such as 0-3,5"));
    let mut layers = vec![];
    for part in text.split(',').map(str::trim) {
        let (a, b) = part.split_once('-').unwrap_or((part, part));
        let (a, b): (usize, usize) = (a.trim().parse().map_err(|_| bad())?, b.trim().parse().map_err(|_| bad())?);
        if b < a || b > 1 << 16 {
            return Err(bad());
        }
        layers.extend(a..=b);
    }
    Ok(Some(layers))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layer_lists_parse_and_print() {
        assert_eq!(parse_layers("all").unwrap(), None);
        assert_eq!(parse_layers("0-2, 5").unwrap(), Some(vec![0, 1, 2, 5]));
        for bad in ["", "x", "3-1", "1-", "-1"] {
            assert!(parse_layers(bad).is_err(), "{bad}");
        }
        assert_eq!(ranges(&[0, 1, 2, 5, 8, 9]), "0-2, 5, 8-9");
    }

    #[test]
    fn sizes_beyond_any_context_are_refused_without_overflow() {
        for (window, sink_tokens, flag) in
            [(usize::MAX, 4, "--window"), (usize::MAX - 63, 4, "--window"), (0, usize::MAX, "--sink-tokens")]
        {
            let settings = Settings { block: 64, window, sink_tokens, ..Settings::default() };
            let error = settings.validate().unwrap_err().to_string();
            assert!(error.contains(flag) && error.contains("at most 16M"), "{error}");
        }
    }

    #[test]
    fn sinks_do_not_count_as_pooled_positions() {
        let s = Settings { block: 8, window: 16, sink_tokens: 10, ..Settings::default() };
        assert_eq!((0..3).map(|n| s.pooled_count(n)).collect::<Vec<_>>(), [0, 6, 8]);
        assert_eq!(s.pooled_position(1), 12.5);
        assert_eq!(s.pooled_position(2), 19.5);
    }
}
