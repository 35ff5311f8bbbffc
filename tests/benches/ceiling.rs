//! What this machine's GEMM library and memory reach: the ceilings that figures are read against. Prints JSON.

use candle_core::{Device, Tensor};
use std::time::Instant;

fn main() -> candle_core::Result<()> {
    let n = 2048;
    let a = Tensor::randn(0f32, 1.0, (n, n), &Device::Cpu)?;
    let b = Tensor::randn(0f32, 1.0, (n, n), &Device::Cpu)?;
    let mut samples = vec![];
    for i in 0..12 {
        let start = Instant::now();
        let c = a.matmul(&b.t()?)?;
        let s = start.elapsed().as_secs_f64();
        assert!(c.get(0)?.get(0)?.to_scalar::<f32>()?.is_finite());
        if i >= 2 {
            samples.push(2.0 * (n * n * n) as f64 / s / 1e9);
        }
    }
    samples.sort_by(f64::total_cmp);
    // One pass over 1 GiB that no cache holds, every core reading its share: what decode can hope for.
    let big = vec![1f32; 1 << 28];
    let mut reads = vec![];
    for _ in 0..5 {
        let start = Instant::now();
        let total: f64 = std::thread::scope(|scope| {
            let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
            let parts: Vec<_> = big
                .chunks(big.len().div_ceil(threads))
                .map(|c| scope.spawn(move || c.chunks(64).map(|x| x.iter().sum::<f32>() as f64).sum::<f64>()))
                .collect();
            parts.into_iter().map(|p| p.join().unwrap_or(f64::NAN)).sum()
        });
        assert_eq!(total, big.len() as f64);
        reads.push(4.0 * big.len() as f64 / start.elapsed().as_secs_f64() / 1e9);
    }
    reads.sort_by(f64::total_cmp);
    println!(
        "{}",
        serde_json::json!({
            "gemm": "candle f32 matmul (gemm crate), 2048 x 2048 x 2048, second operand transposed",
            "gemm_gflop_s": samples,
            "gemm_gflop_s_median": samples[samples.len() / 2],
            "read_gb_s": reads,
            "read_gb_s_median": reads[reads.len() / 2],
        })
    );
    Ok(())
}
