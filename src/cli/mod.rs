//! Command-line code shared by the binaries: argument groups, progress bars, output files, the memory ledger.

mod args;
mod calibration;
mod char;
mod console;
mod device;
mod ledger;
mod output;
mod patch;
mod progress;
mod retrofit;
mod signals;
mod size;
mod temporary;
mod transforms;

pub use crate::ops::{describe, human_bytes};
pub use args::{CalibrateArgs, Cli, Command, ModelArgs, PromptArgs, RetrofitArgs, RunArgs, SamplingArgs};
pub use calibration::prepare as prepare_recall;
pub use char::{char, CharCli, CharCommand};
pub use console::{completions, main_with, note, parse, print};
pub use device::{open_device, weight_format};
pub use ledger::{peak_memory, Ledger};
pub use output::Output;
pub use patch::Patch;
pub use progress::Bars;
pub use retrofit::{calibrate, run};
pub use size::{at_least_one, parse_bytes, parse_count, parse_size, short_count};
pub use temporary::Temporary;
#[cfg(feature = "eval")]
pub(crate) use transforms::{finished, learned, with_setting, Facts, Stored, Target, TransformRun};
pub use transforms::{transforms, TransformsCommand};
