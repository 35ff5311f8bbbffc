//! `bfly-transforms`: learns fast algorithms of linear transforms and applies them.

mod apply;
mod arrays;
mod learn;
mod stored;
mod target;

use crate::error::Result;
pub use apply::ApplyArgs;
use clap::Subcommand;
pub use learn::LearnArgs;
#[cfg(feature = "eval")]
pub(crate) use learn::{finished, learned, with_setting, Outcome as TransformRun};
#[cfg(feature = "eval")]
pub(crate) use stored::{Facts, Stored};
#[cfg(feature = "eval")]
pub(crate) use target::Target;

/// Subcommands of `bfly-transforms` that learn and apply.
#[derive(Debug, Subcommand)]
pub enum TransformsCommand {
    /// Learn a transform.
    Learn(LearnArgs),
    /// Apply a learned transform to the vectors of a file.
    Apply(ApplyArgs),
}

/// The file of a run that says what it was.
const RESULT: &str = "result.json";
/// The file of a run that holds the product.
const FACTORS: &str = "factors.safetensors";

/// Runs a subcommand.
///
/// # Errors
/// What the subcommand cannot do; [`ErrorKind::Quality`](crate::error::ErrorKind::Quality) where nothing was found
/// within the tolerance.
pub fn transforms(command: &TransformsCommand) -> Result<()> {
    match command {
        TransformsCommand::Learn(args) => learn::run(args),
        TransformsCommand::Apply(args) => apply::run(args),
    }
}
