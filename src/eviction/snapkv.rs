//! `snapkv`: keeps the tokens that the context's last queries attend to (SnapKV, Li et al. 2024, arXiv:2404.14469).
//!
//! ```text
//! a_i = mean over the last W queries and the group's query heads of softmax_i(scale · q · k_i), causal, over all keys
//! score_i = (a_{i-h} + .. + a_{i+h}) / (2 h + 1),  h = (kernel - 1) / 2,  a = 0 outside of the tokens before the window
//! ```
//!
//! The window itself always stays. Until the end of the context every layer is dense, so peak memory is that of the
//! stock model plus a copy of one layer's kept rows; later tokens (a question, new tokens) are all kept.
//!
//! Differences from the paper. The paper selects per query head and repeats keys and values for that; here a KV head
//! keeps one set, by the mean over its query heads, since repeated heads would need a larger cache than the other
//! methods'. The paper evicts at the end of the prompt, question included; [`crate::run::Run::compress`] can mark an
//! earlier end, so that the question is unseen. The paper evicts layer by layer in one pass over the prompt; chunked
//! prefill keeps all layers until the end.

use super::{Eviction, EvictionPlan, RuleSetting, ScoreArgs, When};
use crate::error::{Error, ErrorKind, Result};
use crate::layout::LayerPlan;
use candle_core::{DType, Device, Tensor};

const WINDOW: RuleSetting =
    RuleSetting { name: "window", default: 64, about: "observation window: last queries that score, always kept" };
const KERNEL: RuleSetting =
    RuleSetting { name: "kernel", default: 5, about: "width of the average pooling of scores, odd" };
/// Logits computed at a time.
const SLAB: usize = 4 << 20;

#[derive(Debug)]
pub(super) struct SnapKv;

impl Eviction for SnapKv {
    fn name(&self) -> &'static str {
        "snapkv"
    }

    fn about(&self) -> &'static str {
        "keeps the tokens that the last queries attend to, once, at the end of the context"
    }

    fn settings(&self) -> &'static [RuleSetting] {
        &[WINDOW, KERNEL]
    }

    fn check(&self, plan: &EvictionPlan) -> Result<()> {
        let (window, kernel) = (plan.setting(&WINDOW), plan.setting(&KERNEL));
        if plan.budget <= window {
            let message = format!("{} leaves no token besides the observation window of {window}", plan.budget);
            return Err(Error::usage("budget", message));
        }
        if kernel.is_multiple_of(2) {
            return Err(Error::usage("kernel", format!("{kernel} is even; give an odd pooling width")));
        }
        Ok(())
    }

    fn when(&self, _: &EvictionPlan) -> When {
        When::Once
    }

    fn observes(&self, plan: &EvictionPlan) -> usize {
        plan.setting(&WINDOW)
    }

    fn scores(&self, plan: &EvictionPlan, args: &ScoreArgs) -> Result<Tensor> {
        let missing = || Error::new(ErrorKind::Backend, "snapkv", "the last queries are missing");
        let queries = args.queries.ok_or_else(missing)?;
        let ((count, kv_heads, dim), (window, heads, _)) = (args.keys.dims3()?, queries.dims3()?);
        let (before, group) = (count.checked_sub(window).ok_or_else(missing)?, heads / kv_heads);
        let mask = causal(window, group, args.keys.device())?;
        let of_head = |head: usize| {
            let keys = args.keys.narrow(1, head, 1)?.squeeze(1)?.contiguous()?.to_dtype(DType::F32)?;
            let q = queries.narrow(1, head * group, group)?.contiguous()?.to_dtype(DType::F32)?;
            let q = (q.reshape((window * group, dim))? * args.scale as f64)?;
            let mean = mean_attention(&q, &keys, &mask, SLAB / count)?;
            pooled(&mean.narrow(0, 0, before)?, plan.setting(&KERNEL))
        };
        let scores = Tensor::stack(&(0..kv_heads).map(of_head).collect::<Result<Vec<_>>>()?, 0)?;
        let stays = Tensor::full(f32::INFINITY, (kv_heads, window), scores.device())?;
        Ok(Tensor::cat(&[scores, stays], 1)?)
    }

    fn scratch(&self, plan: &EvictionPlan, rows: usize, layer: &LayerPlan) -> u64 {
        let queries = plan.setting(&WINDOW) * layer.heads / layer.kv_heads;
        // Alive at once: logits in two parts, concatenated, and their softmax; one head's keys in two types; sums; all
        // heads' scores twice.
        let slab = SLAB.clamp(rows, rows * queries.max(1));
        4 * (3 * slab + 2 * rows * layer.head_dim + (6 + 2 * layer.kv_heads) * rows + queries * plan.setting(&WINDOW))
            as u64
    }
}

/// Returns the mean over rows of `softmax(q kᵀ + mask)`, `[count]`, computed `step` rows at a time. `mask [R, W]`
/// applies to the last `W` keys.
fn mean_attention(q: &Tensor, keys: &Tensor, mask: &Tensor, step: usize) -> Result<Tensor> {
    let ((rows, _), (count, _), window) = (q.dims2()?, keys.dims2()?, mask.dim(1)?);
    let before = count - window;
    let (old, own) = (keys.narrow(0, 0, before)?.t()?, keys.narrow(0, before, window)?.t()?);
    let mut sum = Tensor::zeros((1, count), DType::F32, keys.device())?;
    let step = step.clamp(1, rows);
    for at in (0..rows).step_by(step) {
        let n = step.min(rows - at);
        let q = q.narrow(0, at, n)?;
        let logits = Tensor::cat(&[q.matmul(&old)?, (q.matmul(&own)? + mask.narrow(0, at, n)?)?], 1)?;
        let weights = candle_nn::ops::softmax_last_dim(&logits)?;
        // A product with ones, since candle's sum over rows computes an index per element.
        sum = (sum + Tensor::ones((1, n), DType::F32, keys.device())?.matmul(&weights)?)?;
    }
    Ok((sum / rows as f64)?.squeeze(0)?)
}

/// Returns the causal mask within the window, 0 or minus infinity, `[W · group, W]`: rows ordered by query, then head.
fn causal(window: usize, group: usize, device: &Device) -> Result<Tensor> {
    let rows = (0..window * group).map(|r| r / group);
    let mask = rows.flat_map(|i| (0..window).map(move |j| if j <= i { 0.0 } else { f32::NEG_INFINITY }));
    Ok(Tensor::from_iter(mask, device)?.reshape((window * group, window))?)
}

/// Average-pools `scores` with width `kernel` and stride 1, zero-padded.
fn pooled(scores: &Tensor, kernel: usize) -> Result<Tensor> {
    let (half, n) = (kernel / 2, scores.dim(0)?);
    let wide = scores.pad_with_zeros(0, half, half)?;
    let mut sum = wide.narrow(0, 0, n)?;
    for i in 1..kernel {
        sum = (sum + wide.narrow(0, i, n)?)?;
    }
    Ok((sum / kernel as f64)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn pooling_pads_with_zeros() {
        let of = |scores: &[f32], kernel| {
            pooled(&Tensor::new(scores, &Device::Cpu).unwrap(), kernel).unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(of(&[3.0, 0.0, 0.0, 6.0], 3), [1.0, 1.0, 2.0, 2.0]);
        assert_eq!(of(&[1.0, 2.0], 1), [1.0, 2.0]);
        assert_eq!(of(&[5.0], 9), [5.0 / 9.0]);
    }

    /// The definition, token by token, in f64.
    fn naive(keys: &Tensor, queries: &Tensor, scale: f32, kernel: usize, head: usize) -> Vec<f64> {
        let (k, q) = (keys.to_vec3::<f32>().unwrap(), queries.to_vec3::<f32>().unwrap());
        let (count, window, group) = (k.len(), q.len(), q[0].len() / k[0].len());
        let mut mean = vec![0f64; count];
        for (i, q) in q.iter().enumerate() {
            for q in &q[head * group..(head + 1) * group] {
                let dot = |k: &[f32]| k.iter().zip(q).map(|(a, b)| *a as f64 * *b as f64).sum::<f64>() * scale as f64;
                let seen = &k[..=count - window + i];
                let weights: Vec<f64> = seen.iter().map(|k| dot(&k[head]).exp()).collect();
                let total: f64 = weights.iter().sum();
                mean.iter_mut().zip(weights).for_each(|(m, w)| *m += w / total / (window * group) as f64);
            }
        }
        let old = &mean[..count - window];
        let at = |i: isize| usize::try_from(i).ok().and_then(|i| old.get(i)).copied().unwrap_or(0.0);
        let half = kernel as isize / 2;
        (0..old.len() as isize).map(|i| (i - half..=i + half).map(at).sum::<f64>() / kernel as f64).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn scores_are_those_of_the_definition(
            before in 1usize..150, window in 1usize..20, g in 1usize..4, group in 1usize..5,
            d in prop_oneof![Just(8usize), Just(10), Just(64)], half in 0usize..5,
        ) {
            let normal = |n, heads| Tensor::randn(0f32, 1.0, (n, heads, d), &Device::Cpu).unwrap();
            let (keys, queries) = (normal(before + window, g), normal(window, g * group));
            let (scale, kernel) = (0.5, 2 * half + 1);
            let plan = EvictionPlan::new("snapkv", 99, &[("window", window), ("kernel", kernel)]).unwrap();
            let got = SnapKv.scores(&plan, &ScoreArgs { keys: &keys, queries: Some(&queries), scale }).unwrap().to_vec2::<f32>().unwrap();
            prop_assert_eq!(got.len(), g);
            for (head, got) in got.iter().enumerate() {
                let want = naive(&keys, &queries, scale, kernel, head);
                prop_assert!(got[before..].iter().all(|x| *x == f32::INFINITY) && got.len() == before + window);
                for (i, (got, want)) in got.iter().zip(want).enumerate() {
                    prop_assert!((*got as f64 - want).abs() < 1e-5, "head {head}, token {i}: {got}, not {want}");
                }
            }
        }
    }

    #[test]
    fn the_number_of_rows_at_a_time_changes_nothing() {
        let normal = |rows| Tensor::randn(0f32, 1.0, (rows, 8usize), &Device::Cpu).unwrap();
        let (q, keys, mask) = (normal(12), normal(40), causal(4, 3, &Device::Cpu).unwrap());
        let mean = |step| mean_attention(&q, &keys, &mask, step).unwrap().to_vec1::<f32>().unwrap();
        let whole = mean(12);
        assert!((whole.iter().sum::<f32>() - 1.0).abs() < 1e-5, "weights of a query sum to 1");
        for step in [0, 1, 5, 99] {
            let off = mean(step).iter().zip(&whole).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-6, "{step} rows at a time: {off:.1e} off");
        }
    }
}
