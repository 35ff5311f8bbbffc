//! Results: the record of every kind of results file, its JSON form, and everything computed from records alone.
//!
//! `bench`, `quality` and `bfly-char` write these records; tables, gates and figures read them. This module neither
//! measures nor draws, and imports nothing else of [`crate::eval`].
//!
//! | file | owns |
//! |---|---|
//! | `header` | [`Header`]: build, machine, model and weight format, which all results of a model share |
//! | `variant` | [`VariantRecord`], [`KvBytes`]: a variant's plan and the bytes of its cache |
//! | `ladder`, `max_context`, `kernels` | what `bfly-bench` measures |
//! | `smoke`, `answers`, `eval_set`, `layers`, `ablation`, `positions` | what `bfly-quality-smoke` measures |
//! | `training`, `character` | what `bfly-char` writes: its training log, bits per character, recall |
//! | `transforms` | [`TransformSpeed`], [`Sweep`]: what `bfly-transforms bench` and `sweep` measure |
//! | `rule` | [`ScoringRule`]: scoring of an answer by the expected outputs that it contains |
//! | `file` | reading and writing, `.json` and `.json.gz`, and which files may be replaced |
//! | [`resume`] | resuming an interrupted file, and the differences that forbid it |
//! | [`join()`] | joining the answers of several processes |
//! | [`table`] | plain-text tables |
//! | `trained` | the warning about contexts beyond the trained length |
//! | `machine`, `prompt` | description of the machine; source and hash of a prompt |
//!
//! The field `kind` identifies the kind of a file. All kinds have a `schema_version`, and [`read`] refuses any but
//! [`SCHEMA_VERSION`]. A training log alone has neither: it is known by the keys of its first line. Field names are the
//! keys of the JSON: renaming one makes earlier results unreadable.

mod ablation;
mod answers;
mod character;
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
pub mod table;
mod trained;
mod training;
mod transforms;
mod variant;

pub use crate::stats::{median, percentile, Estimate};
pub use ablation::{Ablation, AblationAxis, AblationChange, ABLATION};
pub use answers::{means, Answer, Answers, Cell, JoinedPart, PromptSettings, TurnAnswer, ANSWERS, FILE_TASKS};
pub use character::{CharEval, CharRecall, CHAR_EVAL, CHAR_RECALL};
pub use eval_set::{AnswerScore, EvalSetRecord, Score, TextScore};
pub use file::{check_replaceable, check_writable, kind_of, read, save, stem};
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
pub use smoke::{AnswerSettings, DocumentMetric, DocumentScore, Smoke, SmokeRun, METRICS, SMOKE};
pub use trained::beyond_trained;
pub use training::{read_log, TrainingStep, TRAINING};
pub use transforms::{Sweep, SweepRun, TransformSpeed, TransformTiming, SWEEP, TRANSFORM_SPEED};
pub use variant::{KvBytes, VariantRecord};
