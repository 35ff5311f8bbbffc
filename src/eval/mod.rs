//! Evaluation harness: speed, memory and quality of a retrofit against the stock model.
//!
//! ```text
//! target, variant, texts --> bench ----+
//!                       `--> quality --+--> report (JSON) --> tables, plot
//! ```
//!
//! | module | owns |
//! |---|---|
//! | [`report`] | the records and JSON forms of all results, resuming, joining, tables |
//! | [`target`] | the checkpoint under test, how it is opened, the format of its weights |
//! | [`variant`] | `--variants`: methods and their settings |
//! | [`kv_budget`] | windows and budgets from a share of a dense cache |
//! | [`texts`] | real text as token ids |
//! | [`mod@bench`] | speed and memory: ladders, largest contexts, kernels |
//! | [`quality`] | quality against stock: distributions, tasks, ablations, layer sensitivity |
//! | `plot` | figures from results (feature `plot`) |
//!
//! `bench` and `quality` do not import each other, and `plot` imports `report` alone (`tests/it/imports.rs`).

pub mod bench;
pub mod kv_budget;
#[cfg(feature = "plot")]
pub mod plot;
pub mod quality;
pub mod report;
pub mod target;
pub mod texts;
pub mod variant;
