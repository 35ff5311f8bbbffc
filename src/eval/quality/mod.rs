//! What a retrofit keeps: measured so that it can say no.
//!
//! ```text
//! documents, tasks --> runner (stock, then each variant, on the same tokens) --> metrics, scores --> JSON, every sample
//!                                                                                                     |--> table, gate (exit code)
//!                                                                                                     `--> plot
//! ```
//!
//! | file | owns |
//! |---|---|
//! | [`documents`] | which tokens of real text are read |
//! | [`tasks`] | prompts whose answer is known, and how answers are scored |
//! | [`runner`] | one set of weights as one variant after another |
//! | [`prompting`] | one sample put to a model |
//! | [`metrics`] | distances between distributions, over the whole vocabulary |
//! | [`stats`] | means with bootstrap intervals, paired differences |
//! | [`smoke`], [`gate`] | distributions and greedy text against stock; `--fail-below` |
//! | [`ruler`], [`needle`], [`answers`], [`join`] | tasks and needle grids put to every variant; answers of several processes as one file |
//! | [`eval_set`], [`layers`], [`heads`], [`ablate`], [`graph`] | which layers, heads and settings matter |
//! | [`positions`] | the loss by position, beyond the trained length |
//! | [`mod@format`] | the JSON |

pub mod ablate;
pub mod answers;
pub mod args;
pub mod documents;
pub mod eval_args;
pub mod eval_set;
pub mod eval_set_args;
pub mod format;
pub mod gate;
pub mod graph;
pub mod heads;
pub mod join;
pub mod layers;
pub mod metrics;
pub mod needle;
pub mod positions;
pub mod prompting;
pub mod ruler;
pub mod runner;
pub mod sample_args;
pub mod smoke;
pub mod stats;
mod table;
pub mod tasks;
