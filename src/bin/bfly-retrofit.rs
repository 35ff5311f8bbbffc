//! See `bfly-retrofit --help`.

use bfly::cli::{main_with, run, Cli, Command};
use clap::{CommandFactory, Parser};

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Completions { shell }) => {
            clap_complete::generate(shell, &mut Cli::command(), "bfly-retrofit", &mut std::io::stdout());
            std::process::ExitCode::SUCCESS
        }
        None => main_with(|| run(&cli.run)),
    }
}
