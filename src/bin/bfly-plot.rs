//! See `bfly-plot --help`.

use bfly::cli::main_with;
use bfly::eval::plot::{run, Cli, Command};
use clap::{CommandFactory, Parser};

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    if let Some(Command::Completions { shell }) = cli.command {
        clap_complete::generate(shell, &mut Cli::command(), "bfly-plot", &mut std::io::stdout());
        return std::process::ExitCode::SUCCESS;
    }
    main_with(|| run(&cli))
}
