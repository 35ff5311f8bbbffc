//! Device memory: total, allocated and peak.

use candle_core::Device;

/// Memory of a GPU as the driver's stream-ordered allocator counts it: weights, caches and activations, without the
/// workspaces of libraries such as cuBLAS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Size of the device's memory, bytes.
    pub total: u64,
    /// Currently allocated, bytes.
    pub used: u64,
    /// Peak since [`reset_peak`], bytes.
    pub peak: u64,
}

/// Size of the machine's memory, or of the GPU's, in bytes, if known.
pub fn memory_of(device: &Device) -> Option<u64> {
    match device.is_cpu() {
        true => machine_memory(),
        false => device_memory(device).map(|m| m.total),
    }
}

/// Size of the machine's memory in bytes, if known.
pub fn machine_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("MemTotal:"))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Formats a size in powers of two: `1.4 GiB`, `12.5 MiB`, `980 B`.
pub fn human_bytes(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.2} GiB")
}

/// Reads a GPU's memory counters; `None` on a CPU.
pub fn device_memory(device: &Device) -> Option<DeviceMemory> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(gpu) = device {
        use candle_core::cuda_backend::cudarc::driver::sys::CUmemPool_attribute as Attribute;
        let context = gpu.cuda_stream().context().clone();
        gpu.cuda_stream().synchronize().ok()?;
        return Some(DeviceMemory {
            total: context.total_mem().ok()? as u64,
            used: pool::get(gpu, Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
            peak: pool::get(gpu, Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
        });
    }
    let _ = device;
    None
}

/// Resets [`DeviceMemory`]'s peak.
pub fn reset_peak(device: &Device) {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(gpu) = device {
        use candle_core::cuda_backend::cudarc::driver::sys::CUmemPool_attribute as Attribute;
        let _ = gpu.cuda_stream().synchronize();
        pool::set(gpu, Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0);
    }
    let _ = device;
}

/// Returns freed memory to the driver, for other processes on the device.
pub fn release_memory(device: &Device) {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(gpu) = device {
        let _ = gpu.cuda_stream().synchronize();
        pool::trim(gpu);
    }
    let _ = device;
}

#[cfg(feature = "cuda")]
pub(super) mod pool {
    use candle_core::cuda_backend::cudarc::driver::{result, sys};
    use candle_core::cuda_backend::CudaDevice;

    fn of(gpu: &CudaDevice) -> Option<sys::CUmemoryPool> {
        // SAFETY: the device is open for as long as `gpu` lives.
        unsafe { result::device::get_mem_pool(gpu.cuda_stream().context().cu_device()) }.ok()
    }

    pub fn get(gpu: &CudaDevice, attribute: sys::CUmemPool_attribute) -> Option<u64> {
        let mut value = 0u64;
        // SAFETY: these attributes are 64-bit.
        unsafe { result::mem_pool::get_attribute(of(gpu)?, attribute, (&raw mut value).cast()) }.ok()?;
        Some(value)
    }

    pub fn trim(gpu: &CudaDevice) {
        if let Some(pool) = of(gpu) {
            // SAFETY: the pool belongs to the open device; a failure leaves it unchanged.
            let _ = unsafe { result::mem_pool::trim_to(pool, 0) };
        }
    }

    pub fn set(gpu: &CudaDevice, attribute: sys::CUmemPool_attribute, mut value: u64) {
        if let Some(pool) = of(gpu) {
            // SAFETY: these attributes are 64-bit; a failure leaves an old peak, which only makes the figure too large.
            let _ = unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut value).cast()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_read_well() {
        assert_eq!(human_bytes(980), "980 B");
        assert_eq!(human_bytes(13_107_200), "12.5 MiB");
        assert_eq!(human_bytes(3 << 29), "1.50 GiB");
    }
}
