//! `keydiff`: keys that point away from the others stay (KeyDiff, Park et al. 2025, arXiv:2504.15364).
//!
//! ```text
//! k̂_i = k_i / |k_i|        μ = mean_i k̂_i        score_i = - k̂_i · μ / |μ|
//! ```
//!
//! over the tokens that the KV head holds. Scores need keys alone, so the prompt is read in blocks: a block's queries read what
//! was kept and the block itself, and then all but `budget` tokens go. Memory is `budget + block` rows whatever the text.
//!
//! Two things differ from the paper. Blocks lie at multiples of `block` of the text, however it is fed, so that one-shot, chunked
//! and token-by-token reading give the same; the paper's blocks are its prefill chunks. And decode evicts when a block is complete
//! too, where the paper evicts after every token: the rows for that are allocated in any case, and a step captured on a GPU serves
//! until then. When the context is over, the block in progress is cut to the budget, as the paper's last block is.

use super::{Eviction, EvictionPlan, Seen, Setting, When};
use crate::error::Result;
use crate::layout::LayerPlan;
use candle_core::{DType, Tensor, D};

const BLOCK: Setting = Setting { name: "block", default: 128, about: "positions from one eviction to the next" };
/// Keeps a key of zeros from dividing by them.
const TINY: f64 = 1e-12;

#[derive(Debug)]
pub(super) struct KeyDiff;

impl Eviction for KeyDiff {
    fn name(&self) -> &'static str {
        "keydiff"
    }

    fn about(&self) -> &'static str {
        "keys least like the mean key, after every block"
    }

    fn settings(&self) -> &'static [Setting] {
        &[BLOCK]
    }

    fn check(&self, _: &EvictionPlan) -> Result<()> {
        Ok(())
    }

    fn when(&self, plan: &EvictionPlan) -> When {
        When::EveryBlock(plan.setting(&BLOCK))
    }

    fn scores(&self, _: &EvictionPlan, seen: &Seen) -> Result<Tensor> {
        let keys = seen.keys.to_dtype(DType::F32)?;
        let (count, kv_heads, dim) = keys.dims3()?;
        let unit = keys.broadcast_div(&(keys.sqr()?.sum_keepdim(D::Minus1)?.sqrt()? + TINY)?)?;
        // A product: candle's own mean over rows goes through an index per element. Its length does not matter.
        let sum =
            Tensor::ones((1, count), DType::F32, keys.device())?.matmul(&unit.reshape((count, kv_heads * dim))?)?;
        let anchor = (sum.reshape((1, kv_heads, dim))? / count as f64)?;
        let anchor = anchor.broadcast_div(&(anchor.sqr()?.sum_keepdim(D::Minus1)?.sqrt()? + TINY)?)?;
        Ok(unit.broadcast_mul(&anchor)?.sum(D::Minus1)?.neg()?.t()?.contiguous()?)
    }

    fn scratch(&self, _: &EvictionPlan, rows: usize, layer: &LayerPlan) -> u64 {
        // In f32 at most: keys, their squares or directions, the products.
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
            let got = KeyDiff.scores(&plan, &Seen { keys: &keys, queries: None, scale: 1.0 }).unwrap().to_vec2::<f32>().unwrap();
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
    fn a_key_of_zeros_has_a_score() {
        let keys = Tensor::new(&[[[0f32, 0.0]], [[1.0, 0.0]]], &Device::Cpu).unwrap();
        let plan = EvictionPlan::new("keydiff", 1, &[]).unwrap();
        let scores = KeyDiff.scores(&plan, &Seen { keys: &keys, queries: None, scale: 1.0 }).unwrap();
        assert_eq!(scores.to_vec2::<f32>().unwrap(), [[0.0, -1.0]]);
    }
}
