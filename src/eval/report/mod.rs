//! Results: the records of every kind of file, their JSON form, and everything that follows from records alone.
//!
//! `bench` and `quality` write these records; tables, gates and figures read them. Nothing here knows how a number was
//! measured or how a figure looks, and nothing else of [`crate::eval`] is imported.
//!
//! | file | owns |
//! |---|---|
//! | `header` | [`Header`]: build, machine, model and weight format, which all results of a model share |
//! | `variant` | [`VariantRecord`], [`KvBytes`]: what was run, and the bytes that its cache took |
//! | `ladder`, `max_context`, `kernels` | what `bfly-bench` measures |
//! | `smoke`, `answers`, `eval_set`, `layers`, `ablation`, `positions` | what `bfly-quality-smoke` measures |
//! | `rule` | [`ScoringRule`]: how the outputs that an answer contains become its score |
//! | `stats` | [`Estimate`] (means with bootstrap intervals), medians, percentiles |
//! | `file` | reading and writing, `.json` and `.json.gz`, and which files may be replaced |
//! | [`resume`] | taking up a file where it was cut off, and what keeps two files apart |
//! | [`join()`] | answers of several processes as one file |
//! | [`table`] | results as people read them |
//! | `trained` | the warning about contexts beyond the trained length |
//! | `machine`, `prompt` | facts about the machine; the hash and the description of a prompt |
//!
//! Kinds of file are told apart by `kind`. All carry a `schema_version`, and [`read`] refuses another one than
//! [`SCHEMA_VERSION`]. Field names are the keys of the JSON: renaming one makes earlier results unreadable.

mod ablation;
mod answers;
mod eval_set;
mod file;
mod header;
mod join;
mod kernels;
mod ladder;
mod layers;
mod machine;
mod max_context;
mod positions;
mod prompt;
pub mod resume;
mod rule;
mod smoke;
mod stats;
pub mod table;
mod trained;
mod variant;

pub use ablation::{Ablation, AblationAxis, AblationChange, ABLATION};
pub use answers::{means, Answer, Answers, Cell, JoinedPart, PromptSettings, ANSWERS, FILE_TASKS};
pub use eval_set::{AnswerScore, EvalSetRecord, Score, TextScore};
pub use file::{kind_of, prove_replaceable, prove_writable, read, save, stem};
pub use header::{Ceilings, Header, Machine, SCHEMA_VERSION};
pub use join::join;
pub use kernels::{KernelRun, Kernels, KERNELS};
pub use ladder::{Ladder, LadderRun, ReadBytes, TimedRun, TimingSummary, LADDER, OK};
pub use layers::{
    by_sensitivity, sensitivity, CurvePoint, EliminationRound, LayerScore, LayerStudy, RankBy, RankMethod,
    RetrievalHead, LAYERS,
};
pub use machine::{machine, now};
pub use max_context::{MaxContextRun, MaxContexts, MAX_CONTEXT};
pub use positions::{LossByPosition, PositionLosses, PositionRun, POSITIONS};
pub use prompt::{hash, id_bytes, PromptSource};
pub use rule::ScoringRule;
pub use smoke::{DocumentMetric, DocumentScore, Smoke, SmokeRun, METRICS, SMOKE};
pub use stats::{median, percentile, Estimate};
pub use trained::beyond_trained;
pub use variant::{KvBytes, VariantRecord};
