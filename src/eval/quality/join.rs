//! `join`: answers of several processes as one file.

use crate::cli::print;
use crate::error::Result;
use crate::eval::report::table::answers_table;
use crate::eval::report::{check_replaceable, join, read, save, ANSWERS};
use clap::Args;
use std::path::PathBuf;

/// The flags of `join`.
#[derive(Debug, Args)]
pub struct JoinArgs {
    /// Files of answers of one model, build, device and way of prompting.
    #[arg(required = true, num_args = 2.., value_name = "FILE.json")]
    pub files: Vec<PathBuf>,
    /// Write the joined file to FILE.json, compressed where the name ends in .gz.
    #[arg(long, value_name = "FILE.json")]
    pub out: PathBuf,
}

/// Joins the files, and prints a table.
///
/// # Errors
/// A file that is none of answers; files of different measurements, or with the same cell: both files, and what
/// differs.
pub fn run(args: &JoinArgs) -> Result<()> {
    check_replaceable(&args.out, ANSWERS)?;
    let files = args.files.iter().map(|f| Ok((f.as_path(), read(f, ANSWERS)?))).collect::<Result<Vec<_>>>()?;
    let joined = join(files)?;
    save(&args.out, &joined)?;
    print(answers_table(&joined))
}
