//! What a retrofit keeps: measured so that it can say no.
//!
//! ```text
//! documents --> runner (stock, then each variant, on the same tokens) --> metrics --> format (JSON, every document)
//!                                                                                      |--> table, gate (exit code)
//!                                                                                      `--> plot
//! ```
//!
//! | file | owns |
//! |---|---|
//! | [`documents`] | which tokens are read |
//! | [`runner`] | one set of weights as one variant after another |
//! | [`metrics`] | distances between distributions, over the whole vocabulary |
//! | [`stats`] | means with bootstrap intervals, paired differences |
//! | [`smoke`] | distributions and greedy text against stock |
//! | [`gate`] | `--fail-below`, `--fail-above` |
//! | [`format`] | the JSON |

pub mod args;
pub mod documents;
pub mod format;
pub mod gate;
pub mod metrics;
pub mod runner;
pub mod smoke;
pub mod stats;
mod table;
