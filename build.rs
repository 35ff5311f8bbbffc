//! Records the commit that a build was made from, for reports, and compiles the kernels where they are asked for.

use std::path::Path;
use std::process::Command;

#[cfg(feature = "cuda")]
#[path = "kernels/build.rs"]
mod kernels;

fn main() {
    let git = |args: &[&str]| {
        let out = Command::new("git").args(args).output().ok().filter(|o| o.status.success())?;
        Some(String::from_utf8_lossy(&out.stdout).trim().to_string())
    };
    let sha = git(&["rev-parse", "--short=12", "HEAD"]).unwrap_or_else(|| "unknown".into());
    let dirty = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|s| !s.is_empty());
    println!("cargo:rustc-env=BFLY_GIT_SHA={sha}{}", if dirty { "-dirty" } else { "" });
    for source in ["src", "kernels", "Cargo.toml", "Cargo.lock"] {
        println!("cargo:rerun-if-changed={source}");
    }
    // The reflog has a line for each commit and checkout. A path that is not there, such as `.git/HEAD` in a worktree, would
    // make cargo build everything anew each time.
    let path = |file| git(&["rev-parse", "--git-path", file]).filter(|path| Path::new(path).exists());
    if let Some(path) = path("logs/HEAD").or_else(|| path("index")) {
        println!("cargo:rerun-if-changed={path}");
    }
    #[cfg(feature = "cuda")]
    kernels::compile();
}
