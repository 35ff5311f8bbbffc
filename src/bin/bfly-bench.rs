//! See `bfly-bench --help`.

use bfly::cli::main_with;
use bfly::eval::bench::args::{run, Cli, Command};
use clap::{CommandFactory, Parser};

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    if let Command::Completions { shell } = cli.command {
        clap_complete::generate(shell, &mut Cli::command(), "bfly-bench", &mut std::io::stdout());
        return std::process::ExitCode::SUCCESS;
    }
    main_with(|| run(&cli))
}
