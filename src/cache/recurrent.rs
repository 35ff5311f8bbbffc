//! State of a recurrent layer: of constant size, whatever was read.

#[cfg(feature = "cuda")]
use crate::error::ErrorKind;
use crate::error::{Error, Result};
use crate::ops::{delta, DeltaArgs, DeltaState};
#[cfg(feature = "cuda")]
use crate::ops::{delta_on_gpu, GpuDelta};
use crate::spec::DeltaSpec;
use candle_core::{Device, Tensor};

/// State of a Gated DeltaNet layer.
#[derive(Debug)]
pub struct Recurrent {
    state: Held,
    bytes: u64,
}

#[derive(Debug)]
enum Held {
    Cpu(DeltaState),
    #[cfg(feature = "cuda")]
    Gpu(GpuDelta),
}

impl Recurrent {
    /// The state before the first token.
    ///
    /// # Errors
    /// Heads that the device's kernels do not take; too little memory.
    pub fn new(spec: &DeltaSpec, device: &Device) -> Result<Self> {
        let state = match device {
            Device::Cpu => Held::Cpu(DeltaState::new(spec)),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => Held::Gpu(GpuDelta::new(spec, device)?),
            _ => return Err(Error::unsupported("Gated DeltaNet", "runs on a CPU or CUDA")),
        };
        Ok(Self { state, bytes: 4 * spec.state_len() as u64 })
    }

    /// Computes a chunk and moves on by it; see [`delta`].
    ///
    /// # Errors
    /// Those of [`delta`].
    pub(crate) fn forward(&mut self, args: &DeltaArgs) -> Result<Tensor> {
        match &mut self.state {
            Held::Cpu(state) => delta(args, state),
            #[cfg(feature = "cuda")]
            Held::Gpu(state) => delta_on_gpu(args, state),
        }
    }

    /// The state on a GPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn on_gpu(&self) -> Option<&GpuDelta> {
        match &self.state {
            Held::Gpu(state) => Some(state),
            Held::Cpu(_) => None,
        }
    }

    /// Becomes a copy of `other`.
    ///
    /// # Errors
    /// A state on another device; too little memory.
    pub fn copy_from(&mut self, other: &Self) -> Result<()> {
        match (&mut self.state, &other.state) {
            (Held::Cpu(to), Held::Cpu(from)) => to.clone_from(from),
            #[cfg(feature = "cuda")]
            (Held::Gpu(to), Held::Gpu(from)) => *to = from.copy()?,
            #[cfg(feature = "cuda")]
            _ => return Err(Error::new(ErrorKind::Backend, "cache", "states on different devices")),
        }
        Ok(())
    }

    /// Returns the allocated bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}
