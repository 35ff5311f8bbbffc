//! Quality: what a variant keeps of the stock model, with confidence intervals and CI gates.
//!
//! ```text
//! documents, tasks --> runner (stock, then each variant, on the same tokens)
//!                        `--> metrics, scores --> report (every sample)
//! ```
//!
//! | file | owns |
//! |---|---|
//! | [`documents`] | which tokens of real text are read |
//! | [`tasks`] | prompts whose answer is known |
//! | [`runner`] | one set of weights as one variant after another, and workers side by side |
//! | [`prompting`] | one sample prompted: its tokens, the greedy answer, the loss on the expected one |
//! | [`metrics`] | distances between next-token distributions, over the whole vocabulary |
//! | [`smoke`], [`gate`] | distributions and greedy text against stock; `--fail-below`, `--fail-above` |
//! | [`ruler`], [`needle`], [`answers`], [`join`] | tasks and needle grids answered by every variant; files joined |
//! | [`eval_set`], [`layers`], [`heads`], [`ablate`], [`reads`] | which layers, heads and settings matter |
//! | [`positions`] | the loss by position, beyond the trained length |
//! | [`args`], [`eval_args`], [`eval_set_args`], [`sample_args`] | flags |

pub mod ablate;
pub mod answers;
pub mod args;
pub mod documents;
pub mod eval_args;
pub mod eval_set;
pub mod eval_set_args;
pub mod gate;
pub mod heads;
pub mod join;
pub mod layers;
pub mod metrics;
pub mod needle;
pub mod positions;
pub mod prompting;
pub mod reads;
pub mod ruler;
pub mod runner;
pub mod sample_args;
pub mod smoke;
pub mod tasks;
