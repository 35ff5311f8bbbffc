//! What the device's memory holds: totals and the allocator's own high-water mark.

use candle_core::Device;

/// Memory of a GPU, as the driver's stream-ordered allocator counts it (weights, caches and activations; not what libraries
/// such as cuBLAS take for themselves).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Of the whole device.
    pub total: u64,
    /// Allocated now.
    pub used: u64,
    /// Most that was allocated at once since [`reset_peak`].
    pub peak: u64,
}

/// Bytes of memory of the machine, or of the GPU, where that can be read.
pub fn memory_of(device: &Device) -> Option<u64> {
    match device.is_cpu() {
        true => crate::checkpoint::machine_memory(),
        false => device_memory(device).map(|m| m.total),
    }
}

/// The state of a GPU's memory; `None` on a CPU.
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

/// Starts a new high-water mark.
pub fn reset_peak(device: &Device) {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(gpu) = device {
        use candle_core::cuda_backend::cudarc::driver::sys::CUmemPool_attribute as Attribute;
        let _ = gpu.cuda_stream().synchronize();
        pool::set(gpu, Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0);
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

    pub fn set(gpu: &CudaDevice, attribute: sys::CUmemPool_attribute, mut value: u64) {
        if let Some(pool) = of(gpu) {
            // SAFETY: these attributes are 64-bit. A pool that refuses keeps its setting, which costs accuracy alone.
            let _ = unsafe { result::mem_pool::set_attribute(pool, attribute, (&raw mut value).cast()) };
        }
    }
}
