//! `--device`, and the weight format on that device.

use crate::checkpoint::{Checkpoint, WeightDtype, WeightFormat};
use crate::error::{Error, Result};
use crate::ops::open_gpu;
use candle_core::Device;

/// Opens the device called `name`; `auto` is the first GPU where this build and the machine have one, the CPU
/// otherwise.
///
/// # Errors
/// `name` is not auto, cpu, cuda or cuda:INDEX; this build has no CUDA support; the driver or the GPU is missing.
pub fn open_device(name: &str) -> Result<Device> {
    match name {
        "cpu" => Ok(Device::Cpu),
        "auto" => Ok(open_gpu(0).unwrap_or(Device::Cpu)),
        "cuda" => open_gpu(0),
        other => match other.strip_prefix("cuda:").and_then(|i| i.parse().ok()) {
            Some(index) => open_gpu(index),
            None => Err(Error::usage("--device", format!("`{other}` is not auto, cpu, cuda or cuda:INDEX"))),
        },
    }
}

/// Resolves `--dtype` to the format of `checkpoint`'s weights on `device`.
pub fn weight_format(request: WeightDtype, checkpoint: &Checkpoint, device: &Device) -> WeightFormat {
    match device.is_cpu() {
        true => WeightFormat::new(request, checkpoint.f32_bytes(), crate::ops::machine_memory()),
        false => WeightFormat::for_gpu(request),
    }
}
