//! The machine of a measurement (device, driver, memory) and the current time.

use super::header::Machine;
use crate::ops::{describe, memory_of};
use candle_core::Device;
use std::time::{SystemTime, UNIX_EPOCH};

/// Describes `device`.
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

/// Returns the version of the NVIDIA driver from its kernel module.
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

/// Returns the current time, RFC 3339 in UTC.
pub fn now() -> String {
    rfc3339(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()))
}

/// Formats `seconds` since 1970, with days converted to dates as in Hinnant's `civil_from_days`
/// (<https://howardhinnant.github.io/date_algorithms.html>).
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
