//! Operators, one per file: a reference, the CPU path checked against it, and (later) a CUDA launcher.

mod attention;
mod blocks;
mod gated;
mod gemm;
mod matvec;
mod simd;
mod summaries;
mod view;

pub use attention::{attend, reference, AttentionArgs, FarArgs, FarRow, Past, Window};
pub use gated::gated;
pub(crate) use matvec::{has_blocks, matvec, widen, Rows};
pub use summaries::{pool_blocks, Pooled, RunningMean};
pub(crate) use view::{view, View};
