//! Sampling of the next token.

use crate::error::{Error, ErrorKind, Result};
use candle_core::{Tensor, D};
use rand::distr::{weighted::WeightedIndex, Distribution};
use rand::{rngs::StdRng, SeedableRng};

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
    settings: Sampling,
    rng: StdRng,
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
        Ok(Self { settings: s, rng: StdRng::seed_from_u64(s.seed) })
    }

    /// Whether it always returns the most likely token.
    pub fn is_greedy(&self) -> bool {
        self.settings.temperature == 0.0
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
        if self.is_greedy() {
            return Ok(last.argmax(D::Minus1)?.to_scalar()?);
        }
        let candidates = candidates(&last.to_vec1()?, &self.settings);
        let weights = WeightedIndex::new(candidates.iter().map(|c| c.1));
        let weights = weights.map_err(|e| Error::new(ErrorKind::Backend, "sampling", e.to_string()))?;
        Ok(candidates[weights.sample(&mut self.rng)].0)
    }
}

/// Returns the tokens that `settings` allow, with weights proportional to their probabilities: the top `k`, and of their
/// renormalised distribution the nucleus, which is the order of transformers and llama.cpp.
///
/// Source: <https://arxiv.org/abs/1904.09751> (nucleus sampling).
fn candidates(logits: &[f32], settings: &Sampling) -> Vec<(u32, f64)> {
    // Equal logits stand in the order of their ids, so that a seed's tokens do not depend on the sort.
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let mut tokens: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
    if let Some(k) = settings.top_k.filter(|k| *k < tokens.len()) {
        tokens.select_nth_unstable_by(k, order);
        tokens.truncate(k);
    }
    if settings.top_k.is_some() || settings.top_p.is_some() {
        tokens.sort_unstable_by(order);
    }
    let highest = tokens.iter().map(|t| t.1).fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| (f64::from(logit - highest) / settings.temperature).exp();
    let mut weighted: Vec<(u32, f64)> = tokens.into_iter().map(|(id, logit)| (id, weight(logit))).collect();
    if let Some(p) = settings.top_p {
        let (total, mut sum) = (weighted.iter().map(|t| t.1).sum::<f64>(), 0.0);
        let above = weighted.iter().position(|t| {
            sum += t.1;
            sum >= p * total
        });
        weighted.truncate(above.map_or(weighted.len(), |last| last + 1));
    }
    weighted
}

/// Returns the error for logits with NaN or infinity.
pub(super) fn not_finite() -> Error {
    Error::new(ErrorKind::NotFinite, "logits", "hold NaN or infinity; try --dtype f32, or check the weights")
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    const SAMPLED: Sampling = Sampling { temperature: 0.7, top_p: None, top_k: None, seed: 7 };

    #[test]
    fn candidates_are_the_top_k_and_then_the_nucleus_of_what_is_left() {
        // Probabilities 0.4, 0.3, 0.2, 0.1 at temperature 1, at shuffled ids.
        let logits = [0.2f32, 0.4, 0.1, 0.3].map(f32::ln);
        let ids = |top_k, top_p| {
            let settings = Sampling { temperature: 1.0, top_k, top_p, seed: 0 };
            candidates(&logits, &settings).into_iter().map(|c| c.0).collect::<Vec<_>>()
        };
        assert_eq!(ids(None, None), [0, 1, 2, 3]);
        assert_eq!(ids(Some(2), None), [1, 3]);
        assert_eq!(ids(Some(9), None), [1, 3, 0, 2]);
        assert_eq!(ids(None, Some(0.39)), [1]);
        assert_eq!(ids(None, Some(0.69)), [1, 3]);
        assert_eq!(ids(None, Some(0.71)), [1, 3, 0]);
        // Of the top two, the first has 0.4 / 0.7 = 0.57: enough for 0.5, which is more than its 0.4 of the whole.
        assert_eq!(ids(Some(2), Some(0.5)), [1]);
        assert_eq!(ids(None, Some(1.0)).len(), 4);
    }

    #[test]
    fn tokens_appear_as_often_as_their_probabilities_say() -> Result<()> {
        let logits = Tensor::new(&[[1f32, 0.0, 2.0, -1.0, 1.5]], &Device::Cpu)?;
        let weights = candidates(&logits.get(0)?.to_vec1()?, &SAMPLED);
        let total: f64 = weights.iter().map(|w| w.1).sum();
        let (mut sampler, mut seen, draws) = (Sampler::new(SAMPLED)?, [0usize; 5], 20_000);
        for _ in 0..draws {
            seen[sampler.sample(&logits)? as usize] += 1;
        }
        for (id, weight) in weights {
            let (p, got) = (weight / total, seen[id as usize] as f64 / draws as f64);
            // Five standard errors.
            assert!((got - p).abs() < 5.0 * (p * (1.0 - p) / draws as f64).sqrt(), "token {id}: {got}, not {p}");
        }
        Ok(())
    }

    #[test]
    fn a_seed_repeats_its_tokens_and_the_coldest_temperature_is_greedy() -> Result<()> {
        let logits = Tensor::randn(0f32, 1.0, (2, 1000), &Device::Cpu)?;
        let draw = |settings| -> Result<Vec<u32>> {
            let mut sampler = Sampler::new(settings)?;
            (0..20).map(|_| sampler.sample(&logits)).collect()
        };
        assert_eq!(draw(SAMPLED)?, draw(SAMPLED)?);
        assert_ne!(draw(SAMPLED)?, draw(Sampling { seed: 8, ..SAMPLED })?);
        let greedy = draw(Sampling::GREEDY)?;
        assert_eq!(draw(Sampling { temperature: f64::MIN_POSITIVE, ..SAMPLED })?, greedy);
        assert_eq!(draw(Sampling { top_k: Some(1), ..SAMPLED })?, greedy);
        Ok(())
    }
}
