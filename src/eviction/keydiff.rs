//! `keydiff`: keeps the keys least similar to the mean key (KeyDiff, Park et al. 2025, arXiv:2504.15364).
//!
//! ```text
//! k̂_i = k_i / |k_i|        μ = mean_i k̂_i        score_i = - k̂_i · μ / |μ|
//! ```
//!
//! over the cached tokens of the KV head. Scores need keys only, so the prompt is processed in blocks: a block's
//! queries read the kept tokens and the block itself, then all but `budget` tokens are evicted. Memory is `budget +
//! block` rows for any length.
//!
//! Differences from the paper. Blocks start at multiples of `block`, so that one-shot prefill, chunked prefill and
//! token-by-token decode give the same result; the paper's blocks are its prefill chunks. Decode too evicts when a
//! block is complete, where the paper evicts after every token: the rows are allocated anyway, and a captured decode
//! step stays valid until an eviction. At the end of the context the block in progress is cut to the budget, like the
//! paper's last block.

use super::{Eviction, EvictionPlan, RuleSetting, ScoreArgs, When};
use crate::error::Result;
use crate::layout::LayerPlan;
use candle_core::{DType, Tensor, D};

const BLOCK: RuleSetting = RuleSetting { name: "block", default: 128, about: "positions between evictions" };
/// Added to norms, so that a key of zeros does not divide by 0.
const TINY: f64 = 1e-12;

#[derive(Debug)]
pub(super) struct KeyDiff;

impl Eviction for KeyDiff {
    fn name(&self) -> &'static str {
        "keydiff"
    }

    fn about(&self) -> &'static str {
        "keeps the keys least similar to the mean key, after every block"
    }

    fn settings(&self) -> &'static [RuleSetting] {
        &[BLOCK]
    }

    fn check(&self, _: &EvictionPlan) -> Result<()> {
        Ok(())
    }

    fn when(&self, plan: &EvictionPlan) -> When {
        When::EveryBlock(plan.setting(&BLOCK))
    }

    fn scores(&self, _: &EvictionPlan, args: &ScoreArgs) -> Result<Tensor> {
        let keys = args.keys.to_dtype(DType::F32)?;
        let (count, kv_heads, dim) = keys.dims3()?;
        let unit = keys.broadcast_div(&(keys.sqr()?.sum_keepdim(D::Minus1)?.sqrt()? + TINY)?)?;
        // A matrix product, since candle's mean over rows computes an index per element. The anchor's length cancels.
        let sum =
            Tensor::ones((1, count), DType::F32, keys.device())?.matmul(&unit.reshape((count, kv_heads * dim))?)?;
        let anchor = (sum.reshape((1, kv_heads, dim))? / count as f64)?;
        let anchor = anchor.broadcast_div(&(anchor.sqr()?.sum_keepdim(D::Minus1)?.sqrt()? + TINY)?)?;
        Ok(unit.broadcast_mul(&anchor)?.sum(D::Minus1)?.neg()?.t()?.contiguous()?)
    }

    fn scratch(&self, _: &EvictionPlan, rows: usize, layer: &LayerPlan) -> u64 {
        // Alive at once, in f32: keys, their squares or unit vectors, the products.
        3 * 4 * (rows * layer.kv_heads * layer.head_dim) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn scores_are_those_of_the_definition(
            count in 1usize..200, g in 1usize..5, d in prop_oneof![Just(8usize), Just(10), Just(64)], shift in -1f32..1.0,
        ) {
            let keys = (Tensor::randn(0f32, 1.0, (count, g, d), &Device::Cpu).unwrap() + shift as f64).unwrap();
            let plan = EvictionPlan::new("keydiff", 4, &[]).unwrap();
            let got = KeyDiff.scores(&plan, &ScoreArgs { keys: &keys, queries: None, scale: 1.0 }).unwrap().to_vec2::<f32>().unwrap();
            let k = keys.to_vec3::<f32>().unwrap();
            prop_assert_eq!(got.len(), g);
            for (head, got) in got.iter().enumerate() {
                let row = |i: usize| k[i][head].iter().map(|x| *x as f64).collect::<Vec<f64>>();
                let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
                let mut mean = vec![0f64; d];
                for i in 0..count {
                    let (x, n) = (row(i), norm(&row(i)));
                    mean.iter_mut().zip(x).for_each(|(m, x)| *m += x / n / count as f64);
                }
                prop_assert_eq!(got.len(), count);
                for (i, got) in got.iter().enumerate() {
                    let x = row(i);
                    let dot: f64 = x.iter().zip(&mean).map(|(a, b)| a * b).sum();
                    let want = -dot / norm(&x) / norm(&mean);
                    prop_assert!((*got as f64 - want).abs() < 1e-4, "head {head}, token {i}: {got}, not {want}");
                }
            }
        }
    }

    #[test]
    fn a_key_of_zeros_has_a_finite_score() {
        let keys = Tensor::new(&[[[0f32, 0.0]], [[1.0, 0.0]]], &Device::Cpu).unwrap();
        let plan = EvictionPlan::new("keydiff", 1, &[]).unwrap();
        let scores = KeyDiff.scores(&plan, &ScoreArgs { keys: &keys, queries: None, scale: 1.0 }).unwrap();
        assert_eq!(scores.to_vec2::<f32>().unwrap(), [[0.0, -1.0]]);
    }
}
