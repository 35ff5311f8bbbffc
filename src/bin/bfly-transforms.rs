//! See `bfly-transforms --help`.

use bfly::cli::{main_with, parse, transforms, TransformsCli};

fn main() -> std::process::ExitCode {
    match parse::<TransformsCli>() {
        Err(code) => code,
        Ok(cli) => main_with(|| transforms(&cli.command)),
    }
}
