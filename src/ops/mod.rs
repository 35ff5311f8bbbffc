//! Operators, one per file: a reference, the CPU path checked against it, and a CUDA launcher.

mod attention;
mod blocks;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod delta;
mod device;
pub mod factored;
mod gated;
mod gemm;
mod heads;
#[cfg(feature = "cuda")]
mod host_rows;
mod matvec;
mod memory;
mod norm;
pub mod pair;
pub mod recall;
mod select;
mod simd;
mod summaries;
pub mod training;
mod view;

#[cfg(feature = "cuda")]
pub(crate) use attention::decode;
#[cfg(feature = "cuda")]
pub use attention::RunningAttention;
pub use attention::{
    attend, merge as merge_attention, reference, Attended, AttentionArgs, FarRow, KeyValues, RowList, Segment, Store,
    StoreRows, Window, NO_ROW,
};
#[cfg(test)]
pub(crate) use blocks::affine::tests as affine_tests;
#[cfg(feature = "cuda")]
pub(crate) use delta::cuda as delta_gpu;
#[cfg(feature = "cuda")]
pub use delta::cuda::{delta as delta_on_gpu, GpuDelta};
pub(crate) use delta::scratch as delta_scratch;
pub use delta::{delta, delta_reference, DeltaArgs, DeltaLayer, DeltaState};
pub use device::{beside, describe, open_gpu};
pub use gated::gated;
#[cfg(feature = "eval")]
pub(crate) use gemm::multiply_vector;
pub(crate) use gemm::{multiply_transposed, multiply_transposed_parallel, Strided};
pub use heads::{prepare_heads, rope_table, HeadNorm};
#[cfg(feature = "cuda")]
pub use host_rows::HostRows;
#[cfg(feature = "cuda")]
pub(crate) use matvec::{
    cuda::{self as on_gpu, quantised_row},
    dequantise::{quantised_rows, rows_to_a_part},
};
pub(crate) use matvec::{dequantise, matvec, Rows};
pub use memory::{device_memory, human_bytes, machine_memory, memory_of, release_memory, reset_peak, DeviceMemory};
pub use norm::add_norm;
pub use select::highest_rows;
pub use summaries::{pool_blocks, Pooled, RunningMean};
pub(crate) use view::{view, View};
