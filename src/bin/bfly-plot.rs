//! See `bfly-plot --help`.

use bfly::cli::{completions, main_with, parse};
use bfly::eval::plot::{run, Cli, Command};

fn main() -> std::process::ExitCode {
    match parse::<Cli>() {
        Err(code) => code,
        Ok(Cli { command: Some(Command::Completions { shell }), .. }) => completions::<Cli>(shell, "bfly-plot"),
        Ok(cli) => main_with(|| run(&cli)),
    }
}
