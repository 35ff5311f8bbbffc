//! `exact`: no code, the exact keys are scored. The oracle that the codes are compared with.

use super::{HeadCode, HeadRows, KeyCode, KeyStatistics};
use std::ops::Range;
use std::sync::Arc;

/// The code's registration.
#[derive(Debug)]
pub struct Exact;

impl KeyCode for Exact {
    fn name(&self) -> &'static str {
        "exact"
    }

    fn about(&self) -> &'static str {
        "no code: scores every exact key, for comparison only"
    }

    fn bytes(&self, _: usize, _: Option<f64>) -> usize {
        0
    }

    fn fit(&self, keys: &KeyStatistics, _: Option<f64>) -> Arc<dyn HeadCode> {
        Arc::new(ExactKeys { dim: keys.mean.len() })
    }
}

#[derive(Debug)]
struct ExactKeys {
    dim: usize,
}

impl HeadCode for ExactKeys {
    fn bytes(&self) -> usize {
        0
    }

    fn encode(&self, _: &[f32], _: &mut [u8]) {}

    fn decode(&self, rows: &HeadRows, tokens: Range<usize>, decoded: &mut [f32]) {
        let keys = rows.exact[2 * tokens.start * self.dim..2 * tokens.end * self.dim].chunks_exact(2 * self.dim);
        decoded.chunks_exact_mut(self.dim).zip(keys).for_each(|(to, row)| to.copy_from_slice(&row[..self.dim]));
    }

    fn scores(&self, queries: &[f32], rows: &HeadRows, tokens: Range<usize>, scores: &mut [Vec<f32>]) {
        for (q, scores) in queries.chunks_exact(self.dim).zip(scores) {
            let keys = rows.exact[2 * tokens.start * self.dim..2 * tokens.end * self.dim].chunks_exact(2 * self.dim);
            scores.extend(keys.map(|row| q.iter().zip(row).map(|(q, k)| q * k).sum::<f32>()));
        }
    }
}
