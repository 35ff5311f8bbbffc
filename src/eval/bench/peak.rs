//! How much of the device's memory a run takes at most.

use crate::cli::peak_memory;
use crate::ops::{device_memory, reset_peak};
use candle_core::{DType, Device, Tensor};

/// Takes memory from the driver in one piece until the allocator holds `peak` bytes, and leaves it with the allocator:
/// memory that [`crate::ops::release_memory`] gave back would otherwise be taken again piece by piece within a timed
/// run.
pub fn take_memory(device: &Device, peak: u64) {
    if let Some(missing) = device_memory(device).and_then(|m| peak.checked_sub(m.used)).filter(|b| *b > 0) {
        // Where it cannot be had in one piece, the run will try in smaller ones.
        drop(Tensor::zeros(missing as usize, DType::U8, device));
        let _ = device.synchronize();
    }
}

/// Starts a new high-water mark of memory.
pub fn begin_peak(device: &Device) {
    match device.is_cpu() {
        // Resets VmHWM (proc(5)). Where that is refused the mark is the process's since its start.
        true => drop(std::fs::write("/proc/self/clear_refs", "5")),
        false => reset_peak(device),
    }
}

/// The most bytes held since [`begin_peak`], including those held before it.
pub fn peak(device: &Device) -> u64 {
    match device.is_cpu() {
        true => peak_memory().unwrap_or(0),
        false => device_memory(device).map_or(0, |m| m.peak),
    }
}
