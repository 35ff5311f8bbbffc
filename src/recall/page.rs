//! `page`: the smallest and largest key of each channel over 16 tokens; a token's score is the largest that any key
//! within these bounds could have.
//!
//! Source: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference" (2024),
//! <https://arxiv.org/abs/2406.10774>.

use super::{HeadCode, HeadRows, KeyCode, KeyStatistics};
use half::f16;
use std::ops::Range;
use std::sync::Arc;

/// Tokens per page.
pub const PAGE: usize = 16;

/// The code's registration.
#[derive(Debug)]
pub struct Page;

impl KeyCode for Page {
    fn name(&self) -> &'static str {
        "page"
    }

    fn about(&self) -> &'static str {
        "bounds of the keys of each 16 tokens (Quest), for comparison"
    }

    fn bytes(&self, dim: usize, _: Option<f64>) -> usize {
        (4 * dim).div_ceil(PAGE)
    }

    fn fit(&self, keys: &KeyStatistics, _: Option<f64>) -> Arc<dyn HeadCode> {
        Arc::new(Bounds { dim: keys.mean.len() })
    }
}

/// A record holds `D` minima and then `D` maxima as f16.
#[derive(Debug)]
struct Bounds {
    dim: usize,
}

impl HeadCode for Bounds {
    fn bytes(&self) -> usize {
        Page.bytes(self.dim, None)
    }

    fn page(&self) -> usize {
        PAGE
    }

    fn encode(&self, keys: &[f32], codes: &mut [u8]) {
        for (keys, record) in keys.chunks(PAGE * self.dim).zip(codes.chunks_mut(PAGE * self.bytes())) {
            for c in 0..self.dim {
                let column = || keys[c..].iter().step_by(self.dim).copied();
                let bounds = [column().fold(f32::INFINITY, f32::min), column().fold(f32::NEG_INFINITY, f32::max)];
                for (part, x) in bounds.into_iter().enumerate() {
                    record[2 * (part * self.dim + c)..][..2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
                }
            }
        }
    }

    fn decode(&self, rows: &HeadRows, tokens: Range<usize>, decoded: &mut [f32]) {
        for (i, row) in tokens.zip(decoded.chunks_exact_mut(2 * self.dim)) {
            let bounds = rows.codes[i / PAGE * PAGE * self.bytes()..][..4 * self.dim].chunks_exact(2);
            row.iter_mut().zip(bounds).for_each(|(x, b)| *x = f16::from_le_bytes([b[0], b[1]]).to_f32());
        }
    }

    /// The largest product with a key within the bounds: `Σ_c min(q_c, 0) low_c + max(q_c, 0) high_c`.
    fn lift(&self, q: &[f32]) -> Vec<f32> {
        q.iter().map(|q| q.min(0.0)).chain(q.iter().map(|q| q.max(0.0))).collect()
    }

    fn scores(&self, queries: &[f32], rows: &HeadRows, tokens: Range<usize>, scores: &mut [Vec<f32>]) {
        let record = PAGE * self.bytes();
        let mut at = tokens.start;
        while at < tokens.end {
            let page = at / PAGE;
            let end = ((page + 1) * PAGE).min(tokens.end);
            let bounds = rows.codes[page * record..][..4 * self.dim].chunks_exact(2);
            let bounds: Vec<f32> = bounds.map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
            let (low, high) = bounds.split_at(self.dim);
            for (q, scores) in queries.chunks_exact(self.dim).zip(scores.iter_mut()) {
                let most = q.iter().zip(low.iter().zip(high)).map(|(q, (l, h))| (q * l).max(q * h)).sum::<f32>();
                scores.extend(std::iter::repeat_n(most, end - at));
            }
            at = end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_scores_no_less_than_its_keys_and_equals_a_lone_one() {
        let (dim, n) = (8, 40);
        let keys: Vec<f32> = (0..n * dim).map(|i| ((i * 7919 + 13) % 97) as f32 / 32.0 - 1.5).collect();
        let q: Vec<f32> = (0..dim).map(|i| (i as f32 - 3.0) / 4.0).collect();
        let code = Bounds { dim };
        let mut codes = vec![0; n.next_multiple_of(PAGE) * code.bytes()];
        code.encode(&keys, &mut codes);
        let mut scores = vec![vec![]];
        code.scores(&q, &HeadRows { codes: &codes, exact: &[] }, 5..n, &mut scores);
        for (i, got) in (5..n).zip(&scores[0]) {
            let want: f32 = q.iter().zip(&keys[i * dim..]).map(|(q, k)| q * k).sum();
            assert!(*got >= want - 1e-2, "token {i}: {got} below {want}");
        }
        let mut lone = vec![0; PAGE * code.bytes()];
        code.encode(&keys[..dim], &mut lone);
        let mut scores = vec![vec![]];
        code.scores(&q, &HeadRows { codes: &lone, exact: &[] }, 0..1, &mut scores);
        let want: f32 = q.iter().zip(&keys).map(|(q, k)| q * k).sum();
        assert!((scores[0][0] - want).abs() < 1e-2);
    }
}
