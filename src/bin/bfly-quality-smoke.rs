//! See `bfly-quality-smoke --help`.

use bfly::cli::main_with;
use bfly::eval::quality::args::{run, Cli, Command};
use clap::{CommandFactory, Parser};

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    if let Some(Command::Completions { shell }) = cli.command {
        clap_complete::generate(shell, &mut Cli::command(), "bfly-quality-smoke", &mut std::io::stdout());
        return std::process::ExitCode::SUCCESS;
    }
    main_with(|| run(&cli))
}
