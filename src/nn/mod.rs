//! The layers between the mixers: linear, norm, rope, feed-forward. Plain data in, candle tensors through.

mod linear;
mod mlp;
mod norm;
mod rope;

pub use linear::{Linear, Weight};
pub use mlp::Mlp;
pub use norm::RmsNorm;
pub use rope::{Rope, RopeTable};
