//! Training: optimiser, schedule and loop for any model whose parameters lie in one flat vector.

mod adamw;
mod layout;
mod schedule;
mod steps;

pub use adamw::{AdamW, AdamWSettings};
pub use layout::{Init, Layout, Parameter};
pub use schedule::Schedule;
pub use steps::{Objective, Partials, TrainStep, Trainer};
