//! Resuming interrupted results: what an earlier process measured is not measured again, and a file of another
//! measurement is refused.

mod answers;
mod ladder;
mod layers;

pub use answers::AnswersFile;
pub use ladder::{check_prompt, earlier_ladder, LadderFile};
pub use layers::earlier_layers;

use super::header::Header;
use crate::error::Error;
use std::path::Path;

/// A difference between two results: its name, the value in the file, and the value of this process.
pub type Difference = (&'static str, String, String);

/// Returns the error for a file at `path` that cannot be resumed because of a difference.
pub fn another(path: &Path, (what, was, now): Difference) -> Error {
    let message = format!("was measured with another {what}: {was} there, {now} here; choose another --out");
    Error::usage(format!("--out {}", path.display()), message)
}

/// Returns the first difference in build, machine, model or weight format.
pub fn header_difference(was: &Header, now: &Header) -> Option<Difference> {
    let pairs = [
        ("build (git_sha)", was.git_sha.clone(), now.git_sha.clone()),
        ("machine", show(&was.machine), show(&now.machine)),
        ("--model", was.name.clone(), now.name.clone()),
        ("--random-weights", show(&was.random_weights), show(&now.random_weights)),
        ("--model", show(&was.model), show(&now.model)),
        ("number of parameters", was.parameters.to_string(), now.parameters.to_string()),
        ("--dtype", was.dtype.clone(), now.dtype.clone()),
        ("type of keys and values", was.kv_dtype.clone(), now.kv_dtype.clone()),
    ];
    pairs.into_iter().find(|(_, was, now)| was != now)
}

fn show(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}
