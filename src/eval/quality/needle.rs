//! `needle`: one needle over a grid of lengths and depths (Kamradt 2023, <https://github.com/gkamradt/LLMTest_NeedleInAHaystack>).

use super::sample_args::{SampleArgs, Wanted};
use super::table::grid_table;
use super::tasks::{needle, Draw, Hay, Sample, NEEDLE};
use crate::error::Result;
use clap::{Args, ValueEnum};
use std::io::Write;

/// What a needle is hidden in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum In {
    /// Real text.
    Prose,
    /// RULER's sentences over and over.
    Noise,
}

/// A grid.
#[derive(Debug, Args)]
pub struct NeedleArgs {
    /// Depths, evenly from the context's beginning to its end.
    #[arg(long, value_name = "N", default_value_t = 11, value_parser = clap::value_parser!(u16).range(2..=101))]
    pub depths: u16,
    /// What the needle is hidden in.
    #[arg(long, default_value = "prose")]
    pub hay: In,
    /// How samples are made and put; --samples are those of each depth.
    #[command(flatten)]
    pub ask: SampleArgs,
}

/// Runs it and prints a table.
///
/// # Errors
/// Bad flags or files; a variant that cannot be run.
pub fn run(args: &NeedleArgs) -> Result<()> {
    let sources = args.ask.sources(None, None)?;
    let depths = usize::from(args.depths);
    let hay = if args.hay == In::Prose { Hay::Essay } else { Hay::Noise };
    let (sources, seed) = (&sources, args.ask.seed);
    let one = |length| Wanted {
        task: NEEDLE.into(),
        length,
        count: depths * args.ask.samples,
        make: Box::new(move |i, count| {
            let depth = (i % depths) as f64 / (depths - 1) as f64;
            let made = needle(sources, hay, depth, Draw { length, seed, index: i / depths }, count)?;
            // A sample's number tells it apart from the same needle at another depth.
            Ok(Sample { index: i, depth: Some(depth), ..made })
        }),
    };
    let wanted: Vec<_> = args.ask.lengths().into_iter().map(one).collect();
    if let Some(answers) = args.ask.run(&wanted, None)? {
        let _ = write!(std::io::stdout(), "{}", grid_table(&answers));
    }
    Ok(())
}
