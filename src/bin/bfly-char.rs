//! See `bfly-char --help`.

use bfly::cli::{char, main_with, parse, CharCli};

fn main() -> std::process::ExitCode {
    match parse::<CharCli>() {
        Err(code) => code,
        Ok(cli) => main_with(|| char(&cli.command)),
    }
}
