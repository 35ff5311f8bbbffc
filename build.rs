//! Records the commit that a build was made from, for reports, and compiles the kernels where they are asked for.

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
    println!("cargo:rerun-if-changed=src");
    println!("cargo:rerun-if-changed=.git/HEAD");
    println!("cargo:rerun-if-changed=.git/index");
    #[cfg(feature = "cuda")]
    kernels::compile();
}
