//! bfly: long contexts in memory that does not grow.

pub mod cache;
pub mod checkpoint;
pub mod cli;
mod error;
pub mod family;
pub mod generate;
pub mod mixer;
pub mod model;
pub mod nn;
pub mod ops;
pub mod retrofit;
pub mod selector;
pub mod spec;

pub use error::{At, Error, ErrorKind, Result};
