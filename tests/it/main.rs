//! The integration tests, a module each, in one binary: every further binary links the library and compiles its generic
//! code once more. Tests that need a process of their own are binaries beside it: `tests/peak.rs`, `tests/cuda/`.

mod common;

#[cfg(feature = "eval")]
mod bench;
mod calibration;
#[cfg(feature = "cli")]
mod char_cli;
mod character;
mod chat;
mod checkpoints;
#[cfg(feature = "cli")]
mod cli;
mod equivalence;
#[cfg(feature = "cli")]
mod errors;
mod eviction;
#[cfg(feature = "eval")]
mod forks;
mod gguf;
mod golden;
#[cfg(all(feature = "cli", feature = "hub"))]
mod hub;
mod imports;
mod locality;
mod memory;
#[cfg(feature = "cli")]
mod mutations;
mod operator;
#[cfg(all(feature = "cli", unix))]
mod outputs;
#[cfg(feature = "plot")]
mod plot;
#[cfg(feature = "eval")]
mod quality;
mod real_models;
mod recall;
mod run;
#[cfg(feature = "eval")]
mod studies;
mod tokenizers;
mod transforms;
mod unread;
