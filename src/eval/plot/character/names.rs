//! Names of training runs in figures.

use crate::eval::report::stem;
use std::path::Path;

/// Returns the name of a run: of its log's file, or of its directory where the file is called `log`, as a run calls it.
pub fn run_name(path: &Path) -> String {
    let own = stem(path).unwrap_or_else(|| "log".into());
    if own != "log" {
        return own;
    }
    // A log in the current directory is named after that directory.
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.into());
    whole.parent().and_then(Path::file_name).map_or(own, |name| name.to_string_lossy().into())
}

/// Returns the names of several runs: whole paths where names are alike.
pub fn run_names(paths: &[&Path]) -> Vec<String> {
    let short: Vec<String> = paths.iter().map(|path| run_name(path)).collect();
    let alike = |name: &String| short.iter().filter(|other| *other == name).count() > 1;
    let name = |(name, path): (&String, &&Path)| if alike(name) { path.display().to_string() } else { name.clone() };
    short.iter().zip(paths).map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_named_after_their_file_or_directory_and_never_alike() {
        let names = |paths: &[&str]| run_names(&paths.iter().map(Path::new).collect::<Vec<_>>());
        assert_eq!(names(&["a/tiny/log.jsonl", "b/wide.jsonl.gz"]), ["tiny", "wide"]);
        assert_eq!(names(&["a/x/log.jsonl", "b/x/log.jsonl"]), ["a/x/log.jsonl", "b/x/log.jsonl"]);
        assert_ne!(names(&["log.jsonl"]), ["log"]);
    }
}
