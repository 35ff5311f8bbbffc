//! See `bfly-bench --help`.

use bfly::cli::{completions, main_with, parse};
use bfly::eval::bench::args::{run, Cli, Command};

fn main() -> std::process::ExitCode {
    match parse::<Cli>() {
        Err(code) => code,
        Ok(Cli { command: Command::Completions { shell }, .. }) => completions::<Cli>(shell, "bfly-bench"),
        Ok(cli) => main_with(|| run(&cli)),
    }
}
