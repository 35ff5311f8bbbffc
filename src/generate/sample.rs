//! Choosing the next token, with candle's sampler.

use crate::error::{At, Error, ErrorKind, Result};
use candle_core::Tensor;
use candle_transformers::generation::{LogitsProcessor, Sampling as Method};

/// The sampling flags.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f64,
    /// Nucleus: the smallest set of tokens with this probability.
    pub top_p: Option<f64>,
    /// Only the so many likeliest tokens.
    pub top_k: Option<usize>,
    /// Seed.
    pub seed: u64,
}

impl Sampling {
    /// Always the likeliest token.
    pub const GREEDY: Self = Self { temperature: 0.0, top_p: None, top_k: None, seed: 0 };
}

/// A seeded sampler.
pub struct Sampler {
    processor: LogitsProcessor,
    greedy: bool,
}

impl Sampler {
    /// Refuses settings out of range.
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

    /// Whether it always takes the likeliest token.
    pub fn is_greedy(&self) -> bool {
        self.greedy
    }

    /// # Shapes
    /// `logits [n, vocab]`; the last row is sampled.
    pub fn sample(&mut self, logits: &Tensor) -> Result<u32> {
        let last = logits.get(logits.dim(0)? - 1)?;
        // A sum is finite only where every term is.
        if !last.sum_all()?.to_scalar::<f32>()?.is_finite() {
            return Err(not_finite());
        }
        self.processor.sample(&last).at("sampling")
    }
}

/// Logits that nothing can be chosen from.
pub(super) fn not_finite() -> Error {
    Error::new(ErrorKind::NotFinite, "logits", "hold NaN or infinity; try --dtype f32, or check the weights")
}
