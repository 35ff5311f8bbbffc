//! Evaluation harness: speed, memory and quality of a retrofit against the model as it came.
//!
//! ```text
//! target (checkpoint, device), variant, prompt --> bench ---+
//!                                            `--> quality --+--> JSON --> plot
//! ```
//!
//! | module | owns |
//! |---|---|
//! | [`target`] | the checkpoint under test, how it is opened and held |
//! | [`variant`], [`kv_budget`] | `--variants`: methods and their settings; windows and budgets from a share of a dense cache |
//! | [`mod@bench`] | ladders, largest contexts, kernels |
//! | [`quality`] | distributions, tasks, ablations, plans |
//! | `plot` | figures from JSON (feature `plot`) |

pub mod bench;
pub mod kv_budget;
#[cfg(feature = "plot")]
pub mod plot;
pub mod quality;
pub mod target;
pub mod variant;
