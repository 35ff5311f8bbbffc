//! Training: optimiser, schedule and loop for any model whose parameters lie in one flat vector.

mod adam;
mod adamw;
pub mod launch;
mod layout;
#[cfg(feature = "nccl")]
pub mod nccl;
pub mod ranks;
pub mod rendezvous;
mod schedule;
mod steps;

use rand::{rngs::StdRng, SeedableRng};

pub use adam::Adam;
pub use adamw::{AdamW, AdamWSettings};
pub use layout::{Init, Layout, Parameter};
pub use schedule::Schedule;
pub use steps::{Objective, Partials, TrainStep, Trainer};

/// A generator for the `index`-th parameter, epoch or window under `seed`, independent of the others.
pub(crate) fn random(seed: u64, index: u64) -> StdRng {
    StdRng::seed_from_u64(seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}
