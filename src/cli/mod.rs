//! What the binaries share: argument groups, progress bars, the memory ledger, reports.

mod args;
mod device;
mod ledger;
mod output;
mod patch;
mod progress;
mod retrofit;
mod size;

pub use crate::ops::{describe, human_bytes};
pub use args::{Cli, Command, ModelArgs, PromptArgs, RetrofitArgs, RunArgs, SamplingArgs};
pub use device::{open_device, weight_format};
pub use ledger::{peak_memory, Ledger};
pub use output::Output;
pub use patch::Patch;
pub use progress::Bars;
pub use retrofit::run;
pub use size::{at_least_one, parse_bytes, parse_count, parse_size, short_count};

/// Runs `f` and turns its error into a message on stderr and an exit code: 1 where a figure that was asked for was missed, 2 for the
/// rest.
pub fn main_with(f: impl FnOnce() -> crate::Result<()>) -> std::process::ExitCode {
    match f() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e}");
            std::process::ExitCode::from(if e.kind() == crate::ErrorKind::Quality { 1 } else { 2 })
        }
    }
}
