//! Resumable ladder file, written after every timed run.

use super::{another, header_difference, show, Difference};
use crate::error::{Error, Result};
use crate::eval::report::{check_writable, read, save, Ladder, LadderRun, LADDER};
use std::path::{Path, PathBuf};

/// Duration in seconds beyond which a run is timed at most twice.
const LONG_S: f64 = 30.0;

/// A ladder with the path of its file.
pub struct LadderFile {
    path: PathBuf,
    /// Content of the file.
    pub ladder: Ladder,
}

/// Reads the ladder of an earlier process at `path`, after checking that the path can be written.
///
/// # Errors
/// A path that cannot be written, or an existing file that is not a ladder of this schema.
pub fn earlier_ladder(path: &Path) -> Result<Option<Ladder>> {
    check_writable(path)?;
    match path.exists() {
        true => read(path, LADDER).map(Some),
        false => Ok(None),
    }
}

impl LadderFile {
    /// Starts with `fresh`, or resumes `earlier`.
    ///
    /// # Errors
    /// An earlier ladder of another measurement, with the difference.
    pub fn open(path: &Path, earlier: Option<Ladder>, fresh: Ladder) -> Result<Self> {
        let Some(mut ladder) = earlier else { return Ok(Self { path: path.into(), ladder: fresh }) };
        if let Some(differs) = difference(&ladder, &fresh) {
            return Err(another(path, differs));
        }
        ladder.header.resumed.push(fresh.header.started);
        if fresh.prompt.tokens > ladder.prompt.tokens {
            ladder.prompt = fresh.prompt;
        }
        Ok(Self { path: path.into(), ladder })
    }

    /// Writes the file atomically.
    ///
    /// # Errors
    /// A path that cannot be written.
    pub fn save(&self) -> Result<()> {
        save(&self.path, &self.ladder)
    }

    /// Returns the run of engine and variant `names` at `ctx`.
    pub fn run(&self, names: (&str, &str), ctx: usize) -> Option<&LadderRun> {
        self.ladder.runs.iter().find(|r| (r.names(), r.ctx) == (names, ctx))
    }

    /// Returns how many of `repeats` timed runs are still to be made. A run longer than 30 s is timed at most twice,
    /// and one that was out of memory is not repeated.
    pub fn missing(&self, names: (&str, &str), ctx: usize, repeats: usize) -> usize {
        let Some(run) = self.run(names, ctx) else { return repeats };
        if !run.ran() {
            return 0;
        }
        let long = run.samples.first().is_some_and(|s| s.end_to_end_s > LONG_S);
        let wanted = if long { repeats.min(2) } else { repeats };
        wanted.saturating_sub(run.samples.len())
    }

    /// Returns the run with the names and context of `empty`, and adds `empty` where there is none.
    pub fn run_or(&mut self, empty: LadderRun) -> &mut LadderRun {
        let same = |r: &LadderRun| (r.names(), r.ctx) == (empty.names(), empty.ctx);
        let at = self.ladder.runs.iter().position(same).unwrap_or_else(|| {
            self.ladder.runs.push(empty);
            self.ladder.runs.len() - 1
        });
        &mut self.ladder.runs[at]
    }

    /// Refuses runs of the same name as `like` with another version or plan.
    ///
    /// # Errors
    /// The difference.
    pub fn check(&self, like: &LadderRun) -> Result<()> {
        let mut same_name = self.ladder.runs.iter().filter(|r| r.names() == like.names());
        let other = same_name.find_map(|r| {
            let version = (r.version != like.version).then(|| ("version", show(&r.version), show(&like.version)));
            let plan = (r.plan != like.plan).then(|| ("plan", show(&r.plan), show(&like.plan)));
            let eviction = (r.eviction != like.eviction).then(|| ("eviction", show(&r.eviction), show(&like.eviction)));
            version.or(plan).or(eviction)
        });
        match other {
            None => Ok(()),
            Some((what, was, now)) => Err(Error::usage(
                format!("--out {}", self.path.display()),
                format!(
                    "has runs of {} {} with another {what}: {was} there, {now} here; choose another --out",
                    like.engine, like.variant
                ),
            )),
        }
    }
}

/// Returns the first difference that forbids resuming `earlier` as `fresh`.
fn difference(earlier: &Ladder, fresh: &Ladder) -> Option<Difference> {
    let pairs = [
        ("--decode", earlier.decode_tokens.to_string(), fresh.decode_tokens.to_string()),
        ("--prefill-chunk", show(&earlier.prefill_chunk), show(&fresh.prefill_chunk)),
        ("--memory-budget", show(&earlier.memory_budget), show(&fresh.memory_budget)),
    ];
    header_difference(&earlier.header, &fresh.header).or(pairs.into_iter().find(|(_, was, now)| was != now))
}

/// Refuses to resume a ladder whose prompt differs; `hash` returns the hash of the current prompt of a given length.
///
/// # Errors
/// A prompt of other ids.
pub fn check_prompt(path: &Path, earlier: &Ladder, hash: impl Fn(usize) -> String) -> Result<()> {
    let now = hash(earlier.prompt.tokens);
    if now == earlier.prompt.sha256 {
        return Ok(());
    }
    let message = format!(
        "was measured with another prompt: its {} tokens have the hash {}, here they have {now}; choose another --out",
        earlier.prompt.tokens, earlier.prompt.sha256
    );
    Err(Error::usage(format!("--out {}", path.display()), message))
}
