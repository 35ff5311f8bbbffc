//! See `bfly-retrofit --help`.

use bfly::cli::{calibrate, completions, main_with, parse, run, Cli, Command};

fn main() -> std::process::ExitCode {
    match parse::<Cli>() {
        Err(code) => code,
        Ok(Cli { command: Some(Command::Completions { shell }), .. }) => completions::<Cli>(shell, "bfly-retrofit"),
        Ok(Cli { command: Some(Command::Calibrate(args)), .. }) => main_with(|| calibrate(&args)),
        Ok(cli) => main_with(|| run(&cli.run)),
    }
}
