//! `--device`: which device, and how weights are held on it.

use crate::checkpoint::{Checkpoint, Held, HoldAs};
use crate::error::{Error, Result};
use candle_core::Device;

/// Opens what `--device` names. `auto` is the first GPU where this build and the machine have one, the CPU otherwise.
///
/// # Errors
/// A name that is none of auto, cpu, cuda and cuda:INDEX; a GPU without support in this build, without a driver, or absent.
pub fn open_device(name: &str) -> Result<Device> {
    match name {
        "cpu" => Ok(Device::Cpu),
        "auto" => Ok(gpu(0).unwrap_or(Device::Cpu)),
        "cuda" => gpu(0),
        other => match other.strip_prefix("cuda:").and_then(|i| i.parse().ok()) {
            Some(index) => gpu(index),
            None => Err(Error::usage("--device", format!("`{other}` is not auto, cpu, cuda or cuda:INDEX"))),
        },
    }
}

#[cfg(not(feature = "cuda"))]
fn gpu(index: usize) -> Result<Device> {
    let message = format!("`cuda:{index}`: this build has no CUDA support (cargo feature `cuda`); use --device cpu");
    Err(Error::unsupported("--device", message))
}

#[cfg(feature = "cuda")]
fn gpu(index: usize) -> Result<Device> {
    crate::ops::cuda::open(index)
}

/// `device` once more, with a stream of its own where it is a GPU.
///
/// # Errors
/// A GPU that cannot be opened again.
pub fn beside(device: &Device) -> Result<Device> {
    match device.location() {
        candle_core::DeviceLocation::Cuda { gpu_id } => gpu(gpu_id),
        _ => Ok(device.clone()),
    }
}

/// How `checkpoint`'s weights are held on `device`.
pub fn hold_as(request: Held, checkpoint: &Checkpoint, device: &Device) -> HoldAs {
    match device.is_cpu() {
        true => HoldAs::new(request, checkpoint.f32_bytes(), crate::ops::machine_memory()),
        false => HoldAs::for_gpu(request),
    }
}

/// `cpu`, or the GPU's name.
pub fn describe(device: &Device) -> String {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(gpu) = device {
        return gpu.cuda_stream().context().name().unwrap_or_else(|_| "cuda".into());
    }
    let _ = device;
    "cpu".into()
}
