//! A weight matrix in memory: dense, block-quantised or a product of butterfly factors.

use super::Factored;
use crate::error::{At, Error, Result};
use crate::ops;
use crate::storage::Storage;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

/// Bytes after the last block on a GPU, since kernels read whole words.
const PADDING: usize = 64;

/// A weight matrix `[out, in]`.
#[derive(Debug, Clone)]
pub enum Weight {
    /// A tensor of one element type.
    Dense(Tensor),
    /// Encoded rows that products decode as they go.
    Blocks(Blocks),
    /// Butterfly factors, in f32.
    Factored(Factored),
}

/// The encoded rows of a matrix, one after the other.
///
/// Besides GGML's formats these are, on a CPU, f16 and bf16 matrices, which candle's GEMM cannot multiply by f32.
#[derive(Debug, Clone)]
pub struct Blocks {
    storage: Storage,
    rows: usize,
    columns: usize,
    /// u8, on the device of the products.
    data: Tensor,
}

impl Blocks {
    /// Uploads `data`, `rows` encoded rows of `columns` elements.
    ///
    /// # Errors
    /// Data of another length; too little memory on the device.
    pub fn new(storage: Storage, (rows, columns): (usize, usize), mut data: Vec<u8>, device: &Device) -> Result<Self> {
        if !storage.fits(columns) || data.len() != rows * storage.row_bytes(columns) {
            let message = format!("{} bytes are not {rows} rows of {columns} elements in {storage}", data.len());
            return Err(Error::format("weight", message));
        }
        if !device.is_cpu() {
            data.resize(data.len() + PADDING, 0);
        }
        let length = data.len();
        let data = Tensor::from_vec(data, length, device).at("weight")?;
        Ok(Self { storage, rows, columns, data })
    }

    /// The encoding.
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// `(out, in)`.
    pub fn dims(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// Size of the encoded rows, bytes.
    pub fn bytes(&self) -> u64 {
        (self.rows * self.storage.row_bytes(self.columns)) as u64
    }

    /// The encoded rows as a u8 tensor, with padding after them on a GPU.
    pub(crate) fn data(&self) -> &Tensor {
        &self.data
    }

    /// Looks up rows `ids` on the CPU, in f32.
    fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        let view = ops::view(&self.data, "weight")?;
        let (data, ids) = (view.values()?, ids.to_vec1::<u32>()?);
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.rows) {
            return Err(Error::usage("embedding", format!("row {id} of {}", self.rows)));
        }
        let mut values = vec![0f32; ids.len() * self.columns];
        // One parallel region for all rows.
        values.par_chunks_mut(self.columns).zip(&ids).for_each(|(row, id)| {
            ops::dequantise(self.storage, data, *id as usize, self.columns, row);
        });
        Ok(Tensor::from_vec(values, (ids.len(), self.columns), &Device::Cpu)?)
    }
}

impl Weight {
    /// `(out, in)`.
    ///
    /// # Errors
    /// A dense tensor that is no matrix.
    pub fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(w) => w.dims2().at("weight"),
            Self::Blocks(w) => Ok(w.dims()),
            Self::Factored(w) => Ok(w.dims()),
        }
    }

    /// Size in memory, bytes.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Dense(w) => (w.elem_count() * w.dtype().size_in_bytes()) as u64,
            Self::Blocks(w) => w.bytes(),
            Self::Factored(w) => w.bytes(),
        }
    }

    /// Looks up rows `ids`.
    ///
    /// # Shapes
    /// `ids` u32 `[n]`; the result `[n, in]` in `dtype`.
    ///
    /// # Errors
    /// A row that does not exist (on a CPU); factors, of which no row can be read; a backend's failure.
    pub fn rows(&self, ids: &Tensor, dtype: DType) -> Result<Tensor> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Dense(w) if ids.device().is_cuda() => ops::on_gpu::gather(w, ids)?.to_dtype(dtype),
            Self::Dense(w) => w.index_select(ids, 0)?.to_dtype(dtype),
            #[cfg(feature = "cuda")]
            Self::Blocks(w) if ids.device().is_cuda() => return ops::on_gpu::gather_blocks(w, ids, dtype),
            Self::Blocks(w) => w.rows(ids)?.to_dtype(dtype),
            Self::Factored(_) => {
                return Err(Error::unsupported("embedding", "a factored matrix has no rows to look up"));
            }
        }
        .at("embedding")
    }
}
