//! `pair`: bits given to pairs of channels that RoPE rotates together, by `E q² · Var k`.

use super::{HeadCode, HeadRows, KeyCode, KeyStatistics, ScalarCode};
use std::ops::Range;
use std::sync::Arc;

/// The code's registration.
#[derive(Debug)]
pub struct Pair;

impl KeyCode for Pair {
    fn name(&self) -> &'static str {
        "pair"
    }

    fn about(&self) -> &'static str {
        "scalar codes, with more bits for RoPE pairs that matter more to queries"
    }

    fn rates(&self) -> &'static [f64] {
        &[1.5, 2.0, 1.25, 1.0, 0.5]
    }

    fn follows_text(&self) -> bool {
        true
    }

    fn bytes(&self, dim: usize, rate: Option<f64>) -> usize {
        ((dim as f64 * rate.unwrap_or(1.5) / 8.0).ceil() as usize).max(1)
    }

    fn fit(&self, keys: &KeyStatistics, rate: Option<f64>) -> Arc<dyn HeadCode> {
        let weight: Vec<f32> = keys.query.iter().zip(&keys.deviation).map(|(q, d)| q * d * d).collect();
        let bytes = self.bytes(keys.mean.len(), rate);
        Arc::new(ScalarCode::fit(bytes, &keys.units, &keys.mean, &keys.deviation, &weight))
    }
}

impl HeadCode for ScalarCode {
    fn bytes(&self) -> usize {
        self.bytes
    }

    fn encode(&self, keys: &[f32], codes: &mut [u8]) {
        ScalarCode::encode(self, keys, codes);
    }

    fn scores(&self, queries: &[f32], rows: &HeadRows, tokens: Range<usize>, scores: &mut [Vec<f32>]) {
        let codes = &rows.codes[tokens.start * self.bytes..tokens.end * self.bytes];
        self.scan(queries, codes, scores);
    }

    fn decode(&self, rows: &HeadRows, tokens: Range<usize>, decoded: &mut [f32]) {
        ScalarCode::decode(self, &rows.codes[tokens.start * self.bytes..tokens.end * self.bytes], decoded);
    }

    fn scalar(&self) -> Option<&ScalarCode> {
        Some(self)
    }
}
