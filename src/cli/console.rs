//! Command-line parsing, stdout, stderr and exit codes.

use super::signals;
use crate::error::{Error, ErrorKind, Result};
use clap::error::ErrorKind as Bad;
use clap::{Arg, Command, Parser};
use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

/// Writes `text` to stdout and flushes; a broken pipe is not an error.
///
/// # Errors
/// stdout cannot be written to for another reason, such as a full disk.
pub fn print(text: impl Display) -> Result<()> {
    let mut stdout = io::stdout().lock();
    ignore_broken_pipe(write!(stdout, "{text}").and_then(|()| stdout.flush()))
}

/// Converts the result of a write to stdout; a broken pipe counts as success.
///
/// # Errors
/// The write failed for another reason than a broken pipe.
pub fn ignore_broken_pipe(result: io::Result<()>) -> Result<()> {
    match result {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::new(ErrorKind::Io, "stdout", format!("cannot be written: {e}")))
        }
        _ => Ok(()),
    }
}

/// Writes a line to stderr; errors are ignored.
pub fn note(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Parses the command line; prints help, version and usage errors.
///
/// # Errors
/// Returns the exit code where help, version or an error was printed: the process has nothing more to do.
pub fn parse<C: Parser>() -> Result<C, ExitCode> {
    let args: Vec<OsString> = std::env::args_os().collect();
    let mut command = C::command();
    command.build();
    let parsed = match flag_as_text(&command, &args) {
        Some(message) => Err(command.error(Bad::InvalidValue, message)),
        None => C::try_parse_from(args),
    };
    parsed.map_err(|e| {
        let printed = e.print().and_then(|()| io::stdout().flush());
        match ignore_broken_pipe(printed) {
            Err(failed) if !e.use_stderr() => fail(&failed),
            _ => ExitCode::from(e.exit_code() as u8),
        }
    })
}

/// Returns an error message where a text flag is followed by one of the command's own flags: text may begin with a
/// dash, so clap would take the flag as the text.
fn flag_as_text(command: &Command, args: &[OsString]) -> Option<String> {
    args.windows(2).find_map(|pair| {
        let (name, value) = (pair[0].to_str()?.strip_prefix("--")?, pair[1].to_str()?);
        let takes_text = |a: &&Arg| a.get_long() == Some(name) && a.is_allow_hyphen_values_set();
        command.get_arguments().find(takes_text)?;
        let own = |f: &dyn Fn(&Arg) -> bool| command.get_arguments().any(f);
        let flag = match value.strip_prefix("--") {
            Some(long) => own(&|a| a.get_long() == long.split('=').next()),
            None => {
                let short = value.strip_prefix('-').filter(|s| !s.contains(char::is_whitespace));
                short.and_then(|s| s.chars().next()).is_some_and(|c| own(&|a| a.get_short() == Some(c)))
            }
        };
        flag.then(|| {
            format!("--{name} needs a text, but `{value}` is a flag; if it is the text, write --{name}={value}")
        })
    })
}

/// Prints a completion script of command `C`, called `name`, for `shell`.
pub fn completions<C: clap::CommandFactory>(shell: clap_complete::Shell, name: &str) -> ExitCode {
    let mut script = vec![];
    clap_complete::generate(shell, &mut C::command(), name, &mut script);
    main_with(|| print(String::from_utf8_lossy(&script)))
}

/// Runs `f`, prints its error to stderr and returns the exit code: 0 on success, 1 for [`ErrorKind::Quality`] (a
/// quality gate was missed), 2 for other errors. SIGINT, SIGTERM and SIGHUP end the process with 128 plus the signal's
/// number.
pub fn main_with(f: impl FnOnce() -> Result<()>) -> ExitCode {
    signals::listen();
    f().map_or_else(|e| fail(&e), |()| ExitCode::SUCCESS)
}

fn fail(e: &Error) -> ExitCode {
    note(format_args!("error: {e}"));
    ExitCode::from(if e.kind() == ErrorKind::Quality { 1 } else { 2 })
}
