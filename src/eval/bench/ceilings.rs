//! Ceilings of the machine, measured: copy bandwidth and matmul throughput, to which kernels and ladders are compared.

use crate::error::{At, Result};
use crate::eval::report::{median, Ceilings};
use candle_core::{DType, Device, Tensor};
use std::time::Instant;

/// Sizes of the copy and of the matrix product that measure the ceilings.
pub struct CeilingSizes {
    /// Bytes of the copied buffer.
    pub copy: usize,
    /// Rows and columns of the factors.
    pub matmul: usize,
}

impl CeilingSizes {
    /// Returns sizes that saturate `device`; `small` sizes do not, and serve tests and `--small`.
    pub fn of(device: &Device, small: bool) -> Self {
        match (device.is_cpu(), small) {
            (false, false) => Self { copy: 1 << 30, matmul: 8192 },
            (true, false) => Self { copy: 1 << 28, matmul: 2048 },
            (_, true) => Self { copy: 1 << 24, matmul: 256 },
        }
    }
}

/// Number of timed batches.
const CEILING_SAMPLES: usize = 10;
/// Copies or products per batch.
const BATCH: usize = 4;

/// Measures the ceilings of `device`: a copy within its memory and a square matrix product on random data, in bf16 on a
/// GPU and f32 on a CPU.
///
/// # Errors
/// Out of memory.
pub fn ceilings(device: &Device, sizes: &CeilingSizes) -> Result<Ceilings> {
    let dtype = if device.is_cpu() { DType::F32 } else { DType::BF16 };
    let random = |shape: (usize, usize)| Tensor::randn(0f32, 1.0, shape, device)?.to_dtype(dtype);
    let n = sizes.matmul;
    let (a, b) = (random((n, n)).at("ceilings")?, random((n, n)).at("ceilings")?);
    let matmul_s = samples(device, || a.matmul(&b)).at("ceilings: matmul")?;
    drop((a, b));
    let rows = sizes.copy / dtype.size_in_bytes() / 1024;
    let source = random((rows, 1024)).at("ceilings")?;
    let copy_s = samples(device, || source.copy()).at("ceilings: copy")?;
    let copy_bytes = (rows * 1024 * dtype.size_in_bytes()) as u64;
    let rate = |work: f64, s: &[f64]| work / median(s).unwrap_or(f64::INFINITY);
    Ok(Ceilings {
        copy_gb_s: rate(2.0 * copy_bytes as f64, &copy_s) / 1e9,
        copy_s,
        copy_bytes,
        matmul_tflop_s: rate(2.0 * (n as f64).powi(3), &matmul_s) / 1e12,
        matmul_s,
        matmul_size: n,
        matmul_dtype: format!("{dtype:?}").to_lowercase(),
    })
}

/// Returns the seconds per call of `f` for each of [`CEILING_SAMPLES`] batches, after an untimed one.
fn samples(device: &Device, f: impl Fn() -> candle_core::Result<Tensor>) -> candle_core::Result<Vec<f64>> {
    let batch = || {
        device.synchronize()?;
        let begin = Instant::now();
        for _ in 0..BATCH {
            std::hint::black_box(f()?);
        }
        device.synchronize()?;
        Ok(begin.elapsed().as_secs_f64() / BATCH as f64)
    };
    batch()?;
    (0..CEILING_SAMPLES).map(|_| batch()).collect()
}
