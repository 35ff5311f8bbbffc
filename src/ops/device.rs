//! Device handles: another stream on a device, and the device's name.

use crate::error::Result;
use candle_core::Device;

/// Returns another handle to `device`, with a new stream where it is a GPU.
///
/// # Errors
/// A GPU that cannot be opened again.
pub fn beside(device: &Device) -> Result<Device> {
    match device.location() {
        candle_core::DeviceLocation::Cuda { gpu_id } => open_gpu(gpu_id),
        _ => Ok(device.clone()),
    }
}

/// Opens GPU `index`.
///
/// # Errors
/// A build without CUDA support, no driver, or no such GPU.
#[cfg(not(feature = "cuda"))]
pub fn open_gpu(index: usize) -> Result<Device> {
    let message = format!("`cuda:{index}`: this build has no CUDA support (cargo feature `cuda`); use --device cpu");
    Err(crate::Error::unsupported("--device", message))
}

/// Opens GPU `index`.
///
/// # Errors
/// A build without CUDA support, no driver, or no such GPU.
#[cfg(feature = "cuda")]
pub fn open_gpu(index: usize) -> Result<Device> {
    super::cuda::open(index)
}

/// Returns `cpu`, or the GPU's name.
pub fn describe(device: &Device) -> String {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(gpu) = device {
        return gpu.cuda_stream().context().name().unwrap_or_else(|_| "cuda".into());
    }
    let _ = device;
    "cpu".into()
}
