//! Ranks that are processes with a GPU each; sums run through NCCL.

use super::launch::Place;
use super::ranks::Ranks;
use super::rendezvous::{meet, Rendezvous};
use crate::error::{Error, ErrorKind, Result};
use candle_core::cuda_backend::cudarc::nccl::{Comm, Id, ReduceOp};
use candle_core::cuda_backend::{CudaDevice, CudaStorage, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{Device, Storage, Tensor};
use std::time::Duration;

/// How long ranks wait for each other at the start.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A rank of a run over several GPUs.
pub struct Nccl {
    place: Place,
    comm: Comm,
    gpu: CudaDevice,
    _rendezvous: Rendezvous,
}

// SAFETY: NCCL allows a communicator's use from any one thread at a time, and `Ranks` is not shared.
unsafe impl Send for Nccl {}

fn fail(e: impl std::fmt::Debug) -> Error {
    Error::new(ErrorKind::Backend, "NCCL", format!("{e:?}"))
}

impl Nccl {
    /// Joins the ranks of a run; `lost` is called with the number of a rank that died, while this one may be waiting for it.
    ///
    /// # Errors
    /// No GPU, ranks that do not come within a minute, or a failure of NCCL.
    pub fn join(place: Place, device: &Device, lost: impl Fn(usize) + Send + Sync + 'static) -> Result<Self> {
        let Device::Cuda(gpu) = device else {
            return Err(Error::unsupported("ranks", "several processes need a GPU each; give --device cuda or none"));
        };
        let made = || Ok(Id::new().map_err(fail)?.internal().iter().map(|c| *c as u8).collect());
        let (token, rendezvous) = meet(&place, TIMEOUT, made, lost)?;
        let bytes: [u8; 128] = token.try_into().map_err(|_| fail("an id of another size"))?;
        let id = Id::uninit(bytes.map(|b| b as std::ffi::c_char));
        gpu.cuda_stream().context().bind_to_thread().map_err(fail)?;
        let comm = Comm::from_rank(gpu.cuda_stream(), place.rank, place.count, id).map_err(fail)?;
        Ok(Self { place, comm, gpu: gpu.clone(), _rendezvous: rendezvous })
    }
}

impl Ranks for Nccl {
    fn rank(&self) -> usize {
        self.place.rank
    }

    fn count(&self) -> usize {
        self.place.count
    }

    fn sum(&self, vector: Tensor) -> Result<Tensor> {
        let (storage, layout) = vector.storage_and_layout();
        let (Storage::Cuda(cuda), Some((start, end))) = (&*storage, layout.contiguous_offsets()) else {
            return Err(fail("a vector that is not contiguous on a GPU"));
        };
        let CudaStorageSlice::F32(slice) = &cuda.slice else {
            return Err(fail("a vector that is not f32"));
        };
        // SAFETY: NCCL writes all of it before anything later on the one stream reads it.
        let mut sum = unsafe { self.gpu.alloc::<f32>(end - start) }?;
        self.comm.all_reduce(&slice.slice(start..end), &mut sum, &ReduceOp::Sum).map_err(fail)?;
        let sum = CudaStorage::wrap_cuda_slice(sum, self.gpu.clone());
        Ok(Tensor::from_storage(Storage::Cuda(sum), vector.shape().clone(), BackpropOp::none(), false))
    }

    fn sum_numbers(&self, numbers: [f64; 2]) -> Result<[f64; 2]> {
        let own = self.gpu.clone_htod(&numbers[..])?;
        let mut sum = self.gpu.alloc_zeros::<f64>(2)?;
        self.comm.all_reduce(&own, &mut sum, &ReduceOp::Sum).map_err(fail)?;
        let sum = self.gpu.clone_dtoh(&sum)?;
        <[f64; 2]>::try_from(sum).map_err(fail)
    }
}
