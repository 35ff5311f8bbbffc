//! Rows of keys and values in page-locked host memory, which a GPU reads in place over PCIe.

use crate::error::{At, Error, ErrorKind, Result};
use candle_core::cuda_backend::cudarc::driver::{sys, PinnedHostSlice};
use candle_core::{DType, Device, Tensor};

/// Keys and values `[rows, G, D]` in pinned host memory.
#[derive(Debug)]
pub struct HostRows {
    k: PinnedHostSlice<u8>,
    v: PinnedHostSlice<u8>,
    dims: (usize, usize, usize),
    dtype: DType,
}

impl HostRows {
    /// Copies `k` and `v` into pinned memory that GPU `device` can read.
    ///
    /// # Shapes
    /// `k`, `v` `[rows, G, D]`.
    ///
    /// # Errors
    /// Tensors that differ in shape or type, a device that is not a GPU, or a limit on locked memory that is too low.
    pub fn of(k: &Tensor, v: &Tensor, device: &Device) -> Result<Self> {
        let Device::Cuda(gpu) = device else {
            return Err(Error::unsupported("host rows", "only a GPU reads pinned host memory"));
        };
        if k.dims() != v.dims() || k.dtype() != v.dtype() {
            return Err(Error::new(ErrorKind::Backend, "host rows", "keys and values differ in shape or type"));
        }
        let context = gpu.cuda_stream().context().clone();
        let pinned = |x: &Tensor| -> Result<PinnedHostSlice<u8>> {
            let mut bytes = vec![];
            x.to_device(&Device::Cpu)?.write_bytes(&mut bytes)?;
            let failed =
                |e| Error::new(ErrorKind::Memory, "host rows", format!("{} bytes cannot be locked: {e}", bytes.len()));
            // SAFETY: every byte is written before anything reads it.
            let slice =
                unsafe { context.alloc_pinned_with_flags::<u8>(bytes.len().max(1), sys::CU_MEMHOSTALLOC_PORTABLE) };
            let mut slice = slice.map_err(failed)?;
            slice.as_mut_slice().map_err(failed)?[..bytes.len()].copy_from_slice(&bytes);
            Ok(slice)
        };
        Ok(Self { k: pinned(k)?, v: pinned(v)?, dims: k.dims3()?, dtype: k.dtype() })
    }

    /// `(rows, G, D)`.
    pub fn dims(&self) -> (usize, usize, usize) {
        self.dims
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Returns copies of keys and values as CPU tensors.
    ///
    /// # Errors
    /// A failure of the driver.
    pub fn to_tensors(&self) -> Result<(Tensor, Tensor)> {
        let tensor = |slice: &PinnedHostSlice<u8>| -> Result<Tensor> {
            let bytes = slice.as_slice().map_err(candle_core::Error::wrap).at("host rows")?;
            let (rows, g, d) = self.dims;
            let count = rows * g * d * self.dtype.size_in_bytes();
            Tensor::from_raw_buffer(&bytes[..count], self.dtype, &[rows, g, d], &Device::Cpu).at("host rows")
        };
        Ok((tensor(&self.k)?, tensor(&self.v)?))
    }

    /// Addresses of keys and values, which unified addressing makes the same on host and device.
    pub(crate) fn addresses(&self) -> Result<(u64, u64)> {
        let at = |slice: &PinnedHostSlice<u8>| slice.as_ptr().map(|p| p as u64).map_err(candle_core::Error::wrap);
        Ok((at(&self.k).at("host rows")?, at(&self.v).at("host rows")?))
    }
}
