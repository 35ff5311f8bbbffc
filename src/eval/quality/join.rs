//! `join`: joins the answers files of several processes into one.

use crate::cli::print;
use crate::error::Result;
use crate::eval::report::table::answers_table;
use crate::eval::report::{check_replaceable, join, read, save, ANSWERS};
use clap::Args;
use std::path::PathBuf;

/// Flags of `join`.
#[derive(Debug, Args)]
pub struct JoinArgs {
    /// Answers files of `ruler`, which must agree in model, build, device and prompt settings and share no cell.
    #[arg(required = true, num_args = 2.., value_name = "FILE.json")]
    pub files: Vec<PathBuf>,
    /// Write the joined file to FILE.json, gzip-compressed where the name ends in .gz; an earlier answers file is
    /// replaced.
    #[arg(long, value_name = "FILE.json")]
    pub out: PathBuf,
}

/// Joins the files and prints a table.
///
/// # Errors
/// A file that is not an answers file; otherwise as [`crate::eval::report::join()`].
pub fn run(args: &JoinArgs) -> Result<()> {
    check_replaceable(&args.out, ANSWERS)?;
    let files = args.files.iter().map(|f| Ok((f.as_path(), read(f, ANSWERS)?))).collect::<Result<Vec<_>>>()?;
    let joined = join(files)?;
    save(&args.out, &joined)?;
    print(answers_table(&joined))
}
