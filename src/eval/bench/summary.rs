//! Medians, and rates that follow from them.

use super::format::{Kv, ReadBytes, Run, Sample, Summary};
use crate::cache::Cache;
use crate::error::Result;
use crate::layout::Layout;
use candle_core::DType;
use std::ops::Range;

/// The middle of `values`, or the mean of the middle two.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = sorted.get(sorted.len() / 2)?;
    let lower = sorted.get(sorted.len().checked_sub(1)? / 2)?;
    Some((lower + upper) / 2.0)
}

/// The smallest value that `share` of all values do not exceed.
pub fn percentile(values: &[f64], share: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// Medians over a run's samples, and what follows from them; `None` without samples.
pub fn summary(run: &Run) -> Option<Summary> {
    let of = |f: fn(&Sample) -> f64| median(&run.samples.iter().map(f).collect::<Vec<_>>());
    let steps: Vec<f64> = run.samples.iter().flat_map(|s| s.inter_token_s.iter().copied()).collect();
    let (p50, p95) = (median(&steps).unwrap_or(0.0), percentile(&steps, 0.95).unwrap_or(0.0));
    let per = |amount: f64, seconds: f64| if seconds > 0.0 { amount / seconds } else { 0.0 };
    let prefill_s = of(|s| s.prefill_s)?;
    Some(Summary {
        prefill_s,
        ttft_s: of(|s| s.ttft_s)?,
        end_to_end_s: of(|s| s.end_to_end_s)?,
        inter_token_p50_s: p50,
        inter_token_p95_s: p95,
        prefill_tok_s: per(run.prompt_tokens as f64, prefill_s),
        decode_tok_s: per(1.0, p50),
        decode_gb_s: run.read_per_token.filter(|_| p50 > 0.0).map(|r| (r.weights as f64 + r.kv) / p50 / 1e9),
        peak_device_bytes: run.samples.iter().map(|s| s.peak_device_bytes).max()?,
    })
}

/// Whether all samples gave the same tokens.
pub fn deterministic(samples: &[Sample]) -> Option<bool> {
    let (first, rest) = samples.split_first()?;
    (!rest.is_empty()).then(|| rest.iter().all(|s| s.tokens_sha256 == first.tokens_sha256))
}

/// What a cache holds, by pool.
pub fn kv(cache: &Cache) -> Kv {
    let (bytes, peak) = (cache.capacity_bytes(), cache.peak_bytes().total());
    Kv {
        local_bytes: bytes.local,
        summary_bytes: bytes.summary,
        sink_bytes: bytes.sink,
        total_bytes: bytes.total(),
        dense_bytes: cache.dense_bytes(),
        peak_bytes: (peak != bytes.total()).then_some(peak),
    }
}

/// What one new token reads, as a mean over those at `positions`: the weights, and every key and value that its queries may see, each
/// once per KV head ([`Layout::bytes_read`]).
pub fn read_per_token(layout: &Layout, positions: Range<usize>, weights: u64, dtype: DType) -> Result<ReadBytes> {
    let count = positions.len().max(1) as f64;
    Ok(ReadBytes { weights, kv: layout.bytes_read(positions, dtype)? as f64 / count })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::eviction::EvictionPlan;
    use crate::retrofit::{RetrofitPlan, Settings};

    #[test]
    fn medians_and_percentiles_are_those_of_the_definition() {
        let medians = [&[][..], &[3.0], &[4.0, 1.0], &[9.0, 1.0, 2.0]].map(median);
        assert_eq!(medians, [None, Some(3.0), Some(2.5), Some(2.0)]);
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!((percentile(&hundred, 0.95), percentile(&[], 0.5)), (Some(95.0), None));
    }

    #[test]
    fn a_token_reads_its_window_sinks_and_summaries() {
        // Four full layers of 2 KV heads of 8.
        let spec = Checkpoint::random("tests/fixtures/goldens/qwen2", 0).unwrap().spec;
        let row = 2 * 2 * 8 * 4;
        let read = |plan: Option<&RetrofitPlan>, positions| {
            read_per_token(&Layout::new(&spec, plan, 1024).unwrap(), positions, 99, DType::F32).unwrap()
        };
        // Positions 100 and 101 read 101 and 102 keys.
        assert_eq!(read(None, 100..102), ReadBytes { weights: 99, kv: 4.0 * row as f64 * 101.5 });
        let settings = Settings { block: 16, window: 32, sink_tokens: 4, partner: "all".into(), ..Settings::default() };
        let plan = RetrofitPlan::new(&spec, Some(vec![2]), settings).unwrap();
        // Position 100 is the fifth of block 6: window from block 4 on, 37 keys; 4 sinks; blocks 0 to 3, all with a summary.
        let want = row as f64 * (3.0 * 101.0 + (37 + 4 + 4) as f64);
        assert_eq!(read(Some(&plan), 100..101).kv, want);
        // Within the first window there are neither sinks to add nor summaries.
        assert_eq!(read(Some(&plan), 20..21).kv, row as f64 * 4.0 * 21.0);
        // Sinks that fill block 0 leave it without a summary.
        let settings = Settings { sink_tokens: 16, ..plan.settings };
        let plan = RetrofitPlan::new(&spec, Some(vec![2]), settings).unwrap();
        assert_eq!(read(Some(&plan), 100..101).kv, row as f64 * (3.0 * 101.0 + (37 + 16 + 3) as f64));
        // All four layers read what was kept of the 100 before, and the new tokens.
        let plan = EvictionPlan::new("snapkv", 60, &[("window", 8)]).unwrap();
        let layout = Layout::new(&spec, &plan, 1024).unwrap();
        let read = read_per_token(&layout, 100..102, 99, DType::F32).unwrap();
        assert_eq!(read.kv, row as f64 * 4.0 * 61.5);
    }
}
