//! Peak memory of a run.

use crate::cli::peak_memory;
use crate::ops::{device_memory, reset_peak};
use candle_core::{DType, Device, Tensor};

/// Grows the device allocator's pool to `peak` bytes in one allocation. Otherwise memory that
/// [`crate::ops::release_memory`] returned to the driver is allocated again, piece by piece, within a timed run.
pub fn reserve_memory(device: &Device, peak: u64) {
    if let Some(missing) = device_memory(device).and_then(|m| peak.checked_sub(m.used)).filter(|b| *b > 0) {
        // Where one allocation of this size fails, the run makes smaller ones.
        drop(Tensor::zeros(missing as usize, DType::U8, device));
        let _ = device.synchronize();
    }
}

/// Resets the peak that [`peak`] returns.
pub fn begin_peak(device: &Device) {
    match device.is_cpu() {
        // Resets VmHWM (proc(5)). Where the kernel refuses, the peak is that since the process started.
        true => drop(std::fs::write("/proc/self/clear_refs", "5")),
        false => reset_peak(device),
    }
}

/// Returns the peak memory since [`begin_peak`] in bytes, including memory allocated before it.
pub fn peak(device: &Device) -> u64 {
    match device.is_cpu() {
        true => peak_memory().unwrap_or(0),
        false => device_memory(device).map_or(0, |m| m.peak),
    }
}
