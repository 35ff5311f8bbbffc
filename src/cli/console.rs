//! The command line itself, stdout and stderr.

use super::signals;
use crate::error::{Error, ErrorKind, Result};
use clap::error::ErrorKind as Bad;
use clap::{Arg, Command, Parser};
use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

/// Writes `text` to stdout, at once. A reader that went away wants no more, which is no failure.
///
/// # Errors
/// A stdout that cannot be written to for another reason, such as a full disk.
pub fn print(text: impl Display) -> Result<()> {
    let mut stdout = io::stdout().lock();
    written(write!(stdout, "{text}").and_then(|()| stdout.flush()))
}

/// What a write to stdout came to: see [`print`].
///
/// # Errors
/// As [`print`].
pub fn written(result: io::Result<()>) -> Result<()> {
    match result {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Error::new(ErrorKind::Io, "stdout", format!("cannot be written: {e}")))
        }
        _ => Ok(()),
    }
}

/// Writes a line to stderr. Nobody may be left to read it, which costs nothing else.
pub fn note(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Reads the command line; what clap prints instead of a run (help, version, a mistake) is printed here.
///
/// # Errors
/// The exit code of a process that has nothing more to do.
pub fn parse<C: Parser>() -> Result<C, ExitCode> {
    let args: Vec<OsString> = std::env::args_os().collect();
    let mut command = C::command();
    command.build();
    let parsed = match flag_as_text(&command, &args) {
        Some(message) => Err(command.error(Bad::InvalidValue, message)),
        None => C::try_parse_from(args),
    };
    parsed.map_err(|e| {
        let told = e.print().and_then(|()| io::stdout().flush());
        match written(told) {
            Err(failed) if !e.use_stderr() => fail(&failed),
            _ => ExitCode::from(e.exit_code() as u8),
        }
    })
}

/// A text that is a flag's value may begin with a dash; where it is one of the command's own flags, the text was forgotten.
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
            format!("--{name} needs a text, and `{value}` is a flag; for that very text give --{name}={value}")
        })
    })
}

/// Prints a completion script of `C` for `shell`.
pub fn completions<C: clap::CommandFactory>(shell: clap_complete::Shell, name: &str) -> ExitCode {
    let mut script = vec![];
    clap_complete::generate(shell, &mut C::command(), name, &mut script);
    main_with(|| print(String::from_utf8_lossy(&script)))
}

/// Runs `f` and turns its error into a message on stderr and an exit code: 1 where a figure that was asked for was missed, 2 for the
/// rest, and 128 and the signal's number where SIGINT, SIGTERM or SIGHUP ended it.
pub fn main_with(f: impl FnOnce() -> Result<()>) -> ExitCode {
    signals::listen();
    f().map_or_else(|e| fail(&e), |()| ExitCode::SUCCESS)
}

fn fail(e: &Error) -> ExitCode {
    note(format_args!("error: {e}"));
    ExitCode::from(if e.kind() == ErrorKind::Quality { 1 } else { 2 })
}
