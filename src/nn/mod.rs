//! The layers between the mixers: linear (dense, quantised or factored), RMS norm, rotary embedding, feed-forward.

mod factored;
mod linear;
mod mlp;
mod norm;
mod rope;
mod weight;

pub use factored::{Factored, FactoredShape};
pub use linear::Linear;
pub use mlp::Mlp;
pub use norm::RmsNorm;
pub use rope::{Rope, RopeTable};
pub use weight::{Blocks, Weight};
