//! See `bfly-quality-smoke --help`.

use bfly::cli::{completions, main_with, parse};
use bfly::eval::quality::args::{run, Cli, Command};

fn main() -> std::process::ExitCode {
    match parse::<Cli>() {
        Err(code) => code,
        Ok(Cli { command: Some(Command::Completions { shell }), .. }) => {
            completions::<Cli>(shell, "bfly-quality-smoke")
        }
        Ok(cli) => main_with(|| run(&cli)),
    }
}
