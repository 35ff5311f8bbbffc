//! Exact recall: a few bytes per token on the device choose which exact keys and values a decode step fetches.
//!
//! A key code stores each token's key in a few bytes; a query turns them into scores by tables of 256 entries, one table
//! per byte. A value code estimates the values of the tokens that are not fetched.

mod lloyd;
mod scalar;
mod value;

pub use scalar::{Field, ScalarCode};
pub use value::ValueCode;
