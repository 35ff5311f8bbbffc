//! The machine: what it is, what it reaches, and how much memory a run took of it.

use super::format::{Ceilings, Machine};
use super::summary::median;
use crate::cli::{describe, peak_memory};
use crate::error::{At, Result};
use crate::ops::{device_memory, memory_of, reset_peak};
use candle_core::{DType, Device, Tensor};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// What `device` is.
pub fn machine(device: &Device) -> Machine {
    Machine {
        device: match device.is_cpu() {
            true => processor().unwrap_or_else(|| "cpu".into()),
            false => describe(device),
        },
        driver: (!device.is_cpu()).then(driver).flatten(),
        compute_capability: compute_capability(device),
        memory_bytes: memory_of(device).unwrap_or(0),
    }
}

fn processor() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().into())
}

/// Version of the NVIDIA driver, from what its kernel module says.
fn driver() -> Option<String> {
    let version = |text: String| text.split_whitespace().find(|w| is_version(w)).map(String::from);
    ["/sys/module/nvidia/version", "/proc/driver/nvidia/version"]
        .iter()
        .find_map(|path| std::fs::read_to_string(path).ok().and_then(version))
}

fn is_version(word: &str) -> bool {
    word.contains('.') && word.split('.').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
}

fn compute_capability(device: &Device) -> Option<String> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(gpu) = device {
        let (major, minor) = gpu.cuda_stream().context().compute_capability().ok()?;
        return Some(format!("{major}.{minor}"));
    }
    let _ = device;
    None
}

/// Takes memory from the driver in one piece until the allocator has `peak` bytes, and keeps it for what comes next: what
/// [`crate::ops::release_memory`] gave back would otherwise be taken again piece by piece within a timed run.
pub fn take_memory(device: &Device, peak: u64) {
    if let Some(missing) = device_memory(device).and_then(|m| peak.checked_sub(m.used)).filter(|b| *b > 0) {
        // Where it cannot be had in one piece, the run will try in smaller ones.
        drop(Tensor::zeros(missing as usize, DType::U8, device));
        let _ = device.synchronize();
    }
}

/// Starts a new high-water mark.
pub fn begin_peak(device: &Device) {
    match device.is_cpu() {
        // Resets VmHWM (proc(5)). Where that is refused the mark is the process's since its start.
        true => drop(std::fs::write("/proc/self/clear_refs", "5")),
        false => reset_peak(device),
    }
}

/// The highest since [`begin_peak`], what was there already included.
pub fn peak(device: &Device) -> u64 {
    match device.is_cpu() {
        true => peak_memory().unwrap_or(0),
        false => device_memory(device).map_or(0, |m| m.peak),
    }
}

/// How large the products and copies are that ceilings are taken from.
pub struct CeilingSizes {
    /// Bytes of the copied buffer.
    pub copy: usize,
    /// Rows and columns of the factors.
    pub matmul: usize,
}

impl CeilingSizes {
    /// Large enough for a device's own limits to show.
    pub fn of(device: &Device, small: bool) -> Self {
        match (device.is_cpu(), small) {
            (false, false) => Self { copy: 1 << 30, matmul: 8192 },
            (true, false) => Self { copy: 1 << 28, matmul: 2048 },
            (_, true) => Self { copy: 1 << 24, matmul: 256 },
        }
    }
}

const CEILING_SAMPLES: usize = 10;
/// Copies or products between two looks at the clock.
const BATCH: usize = 4;

/// Measures what `device` reaches: a copy within its memory and a square matrix product on random data, in bf16 on a GPU
/// and f32 on a CPU.
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

/// Seconds of each of ten batches, per call.
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

/// Now, as RFC 3339 in UTC.
pub fn now() -> String {
    rfc3339(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()))
}

/// Days to dates as in Hinnant's `civil_from_days` (<https://howardhinnant.github.io/date_algorithms.html>).
fn rfc3339(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        // date -u -d @SECONDS +%FT%TZ
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (4_102_444_800, "2100-01-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(seconds), text);
        }
    }

    #[test]
    fn versions_are_told_from_words() {
        let line =
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder@U16)";
        assert_eq!(line.split_whitespace().find(|w| is_version(w)), Some("570.86.15"));
        assert!(!is_version("x86_64") && !is_version("550.") && !is_version("."));
    }
}
