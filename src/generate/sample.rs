//! Sampling of the next token, with candle's sampler.

use crate::error::{At, Error, ErrorKind, Result};
use candle_core::Tensor;
use candle_transformers::generation::{LogitsProcessor, Sampling as Method};

/// Sampling settings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Temperature; 0 is greedy decoding.
    pub temperature: f64,
    /// Nucleus sampling: restricts to the smallest set of tokens whose probabilities sum to this value.
    pub top_p: Option<f64>,
    /// Restricts to this number of most likely tokens.
    pub top_k: Option<usize>,
    /// Seed of the random number generator.
    pub seed: u64,
}

impl Sampling {
    /// Greedy decoding.
    pub const GREEDY: Self = Self { temperature: 0.0, top_p: None, top_k: None, seed: 0 };
}

/// A seeded sampler.
pub struct Sampler {
    processor: LogitsProcessor,
    greedy: bool,
}

impl Sampler {
    /// Creates a sampler.
    ///
    /// # Errors
    /// A setting is out of range.
    pub fn new(s: Sampling) -> Result<Self> {
        if !(s.temperature.is_finite() && s.temperature >= 0.0) {
            return Err(Error::usage(
                "--temperature",
                format!("{} is not a temperature; give 0 or more", s.temperature),
            ));
        }
        if let Some(p) = s.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            return Err(Error::usage("--top-p", format!("{p} is not in (0, 1]")));
        }
        if s.top_k == Some(0) {
            return Err(Error::usage("--top-k", "must be at least 1"));
        }
        let temperature = s.temperature;
        let method = match (temperature > 0.0, s.top_k, s.top_p) {
            (false, _, _) => Method::ArgMax,
            (true, None, None) => Method::All { temperature },
            (true, Some(k), None) => Method::TopK { k, temperature },
            (true, None, Some(p)) => Method::TopP { p, temperature },
            (true, Some(k), Some(p)) => Method::TopKThenTopP { k, p, temperature },
        };
        let greedy = matches!(method, Method::ArgMax);
        Ok(Self { processor: LogitsProcessor::from_sampling(s.seed, method), greedy })
    }

    /// Whether it always returns the most likely token.
    pub fn is_greedy(&self) -> bool {
        self.greedy
    }

    /// Samples a token from the last row of `logits`.
    ///
    /// # Shapes
    /// `logits [n, vocab]`.
    ///
    /// # Errors
    /// The row holds NaN or infinity.
    pub fn sample(&mut self, logits: &Tensor) -> Result<u32> {
        let last = logits.get(logits.dim(0)? - 1)?;
        // A sum is finite only where every term is.
        if !last.sum_all()?.to_scalar::<f32>()?.is_finite() {
            return Err(not_finite());
        }
        self.processor.sample(&last).at("sampling")
    }
}

/// Returns the error for logits with NaN or infinity.
pub(super) fn not_finite() -> Error {
    Error::new(ErrorKind::NotFinite, "logits", "hold NaN or infinity; try --dtype f32, or check the weights")
}
