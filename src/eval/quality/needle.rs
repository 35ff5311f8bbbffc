//! `needle`: one needle over a grid of lengths and depths (Kamradt 2023,
//! <https://github.com/gkamradt/LLMTest_NeedleInAHaystack>).

use super::sample_args::{CellSpec, SampleArgs};
use super::tasks::{needle, Haystack, Sample, SampleKey, NEEDLE};
use crate::cli::print;
use crate::error::Result;
use crate::eval::report::table::grid_table;
use clap::{Args, ValueEnum};

/// Text in which the needle is hidden, as `--hay` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HaystackArg {
    /// Real text from the folder of --texts.
    Prose,
    /// RULER's noise sentences, repeated.
    Noise,
}

/// Flags of `needle`.
#[derive(Debug, Args)]
pub struct NeedleArgs {
    /// Number of depths, evenly spaced from the start of the context to its end.
    #[arg(long, value_name = "N", default_value_t = 11, value_parser = clap::value_parser!(u16).range(2..=101))]
    pub depths: u16,
    /// Text in which the needle is hidden.
    #[arg(long, default_value = "prose")]
    pub hay: HaystackArg,
    /// Generation and prompting of samples; `--samples` is the number per depth.
    #[command(flatten)]
    pub sample: SampleArgs,
}

/// Runs the grid and prints a table.
///
/// # Errors
/// Invalid flags or files; a variant that cannot be run.
pub fn run(args: &NeedleArgs) -> Result<()> {
    let sources = args.sample.sources(None, None)?;
    let depths = usize::from(args.depths);
    let hay = if args.hay == HaystackArg::Prose { Haystack::Essay } else { Haystack::Noise };
    let (sources, seed) = (&sources, args.sample.seed);
    let cell = |length| CellSpec {
        task: NEEDLE.into(),
        length,
        count: depths * args.sample.samples,
        make: Box::new(move |i, count| {
            let depth = (i % depths) as f64 / (depths - 1) as f64;
            let made = needle(sources, hay, depth, SampleKey { length, seed, index: i / depths }, count)?;
            // Each depth of a needle is a sample with its own index.
            Ok(Sample { index: i, depth: Some(depth), ..made })
        }),
    };
    let cells: Vec<_> = args.sample.lengths().into_iter().map(cell).collect();
    if let Some(answers) = args.sample.run(&cells, None)? {
        print(grid_table(&answers))?;
    }
    Ok(())
}
