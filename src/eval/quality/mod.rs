//! Quality of variants against the stock model, with confidence intervals and CI gates.
//!
//! ```text
//! documents, tasks --> runner (stock, then each variant, on the same tokens)
//!                        `--> metrics, scores --> report (every sample)
//! ```
//!
//! | file | owns |
//! |---|---|
//! | [`documents`] | excerpts of real text |
//! | [`tasks`] | prompts with known answers (RULER) |
//! | [`runner`] | running variants over one copy of the weights, on several workers |
//! | [`prompting`] | prompting with one sample: its tokens, the greedy answers of its turns, the loss on the expected ones |
//! | [`metrics`] | distances between next-token distributions, over the whole vocabulary |
//! | [`smoke`], [`gate`] | distributions and greedy text against stock; `--fail-below`, `--fail-above` |
//! | [`fidelity`] | distributions over stock's answers to tasks |
//! | [`ruler`], [`needle`], [`answers`], [`join`] | scores in tasks and needle grids; joining files |
//! | [`eval_set`], [`layers`], [`heads`], [`ablate`], [`axes`], [`reads`] | sensitivity to layers, heads and settings |
//! | [`positions`] | loss by position, within and beyond the trained length |
//! | [`args`], [`eval_args`], [`eval_set_args`], [`sample_args`] | flags |

pub mod ablate;
pub mod answers;
pub mod args;
pub mod axes;
pub mod documents;
pub mod eval_args;
pub mod eval_set;
pub mod eval_set_args;
pub mod fidelity;
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
