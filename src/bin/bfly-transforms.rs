//! See `bfly-transforms --help`.

use bfly::cli::{main_with, parse, transforms, TransformsCommand};
#[cfg(feature = "eval")]
use bfly::eval::bench::{
    sweep::{run as sweep, SweepArgs},
    transforms::{run as bench, TransformsBenchArgs},
};
use clap::{Parser, Subcommand};

/// Learns fast algorithms of linear transforms from their matrices alone, and applies them.
///
/// The matrix is approximated by a product of butterfly factors and permutations with about 4 N parameters a butterfly,
/// which multiplies a vector in O(N log N) (Dao et al. 2019, arXiv:1903.05895).
#[derive(Debug, Parser)]
#[command(name = "bfly-transforms", version, after_help = EXAMPLES)]
struct Cli {
    /// What to do.
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  # Find an FFT of 64 points
  bfly-transforms learn --transform dft --n 64 --out dft64

  # Another seed and more starts, for a transform that is harder to find
  bfly-transforms learn --transform dct --n 128 --seed 1 --starts 32 --out dct128

  # Six transforms of 8 to 128 points, five seeds each
  bfly-transforms sweep --n 8..128 --seeds 5 --out sweep

  # A matrix of your own, from numpy.save
  bfly-transforms learn --target matrix.npy --product BPBP --out mine

  # Vectors [batch, 64] through what was found
  bfly-transforms apply --factors dft64 --input x.npy --out y.npy";

#[derive(Debug, Subcommand)]
enum Command {
    #[command(flatten)]
    Transforms(TransformsCommand),
    /// Time learned transforms on this CPU, beside dense products and FFTs.
    #[cfg(feature = "eval")]
    Bench(TransformsBenchArgs),
    /// Learn several transforms, sizes and seeds, and print a table.
    #[cfg(feature = "eval")]
    Sweep(SweepArgs),
}

fn main() -> std::process::ExitCode {
    match parse::<Cli>() {
        Err(code) => code,
        Ok(cli) => main_with(|| match &cli.command {
            Command::Transforms(command) => transforms(command),
            #[cfg(feature = "eval")]
            Command::Bench(args) => bench(args),
            #[cfg(feature = "eval")]
            Command::Sweep(args) => sweep(args),
        }),
    }
}
