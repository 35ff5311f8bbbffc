//! Files of results: written whole after every sample, and a ladder's taken up again where it was cut off.

use super::format::{kind_of, read, Header, Ladder, Run, LADDER};
use crate::cli::Output;
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// `status` of a run that gave samples, or that stayed within its budget.
pub const OK: &str = "ok";
/// A run that takes longer is repeated only once.
const LONG_S: f64 = 30.0;

/// A ladder and where it is kept.
pub struct LadderFile {
    path: PathBuf,
    /// What is in it.
    pub ladder: Ladder,
}

/// Refuses a place that cannot be written to, before anything is measured.
///
/// # Errors
/// Which place, and why.
pub fn prove_writable(path: &Path) -> Result<()> {
    Output::reserve(path, "--out").map(drop)
}

/// Refuses a place that cannot be written to, and one that holds anything but earlier results of `kind`.
///
/// # Errors
/// Which place, and why.
pub fn prove_replaceable(path: &Path, kind: &str) -> Result<()> {
    let fault = |json: bool| {
        let found = if json { kind_of(path).ok().filter(|k| k != "none") } else { None };
        let found = found.as_deref().unwrap_or("no file of results");
        Ok((found != kind).then(|| format!("is {found}; only results of kind `{kind}` are replaced")))
    };
    Output::reserve_over(path, "--out", fault).map(drop)
}

/// Puts `results` in place at `path`, whole.
///
/// # Errors
/// No way to write there.
pub fn save(path: &Path, results: &impl serde::Serialize) -> Result<()> {
    let mut bytes = serde_json::to_vec(results).map_err(|e| Error::format(path.display(), e))?;
    bytes.push(b'\n');
    Output::reserve(path, "--out")?.write(&bytes)
}

/// Reads what an earlier ladder left at `path`, after proving that the place can be written to.
///
/// # Errors
/// No way to write there, or a file that is no ladder of this form.
pub fn earlier(path: &Path) -> Result<Option<Ladder>> {
    prove_writable(path)?;
    match path.exists() {
        true => read(path, LADDER).map(Some),
        false => Ok(None),
    }
}

impl LadderFile {
    /// Begins with `fresh`, or goes on with `earlier`.
    ///
    /// # Errors
    /// An earlier ladder that is not of the same thing: what differs.
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

    /// Puts the file in place, whole.
    pub fn save(&self) -> Result<()> {
        save(&self.path, &self.ladder)
    }

    /// The run of an engine's variant at `ctx`.
    pub fn run(&self, names: (&str, &str), ctx: usize) -> Option<&Run> {
        self.ladder.runs.iter().find(|r| ((r.engine.as_str(), r.variant.as_str()), r.ctx) == (names, ctx))
    }

    /// Runs of `repeats` that are yet to come. One that takes long is wanted only twice, and one that did not fit no more.
    pub fn missing(&self, names: (&str, &str), ctx: usize, repeats: usize) -> usize {
        let Some(run) = self.run(names, ctx) else { return repeats };
        if run.status != OK {
            return 0;
        }
        let long = run.samples.first().is_some_and(|s| s.end_to_end_s > LONG_S);
        let wanted = if long { repeats.min(2) } else { repeats };
        wanted.saturating_sub(run.samples.len())
    }

    /// The same, put there as `empty` where there is none.
    pub fn run_or(&mut self, empty: Run) -> &mut Run {
        let same = |r: &Run| (&r.engine, &r.variant, r.ctx) == (&empty.engine, &empty.variant, empty.ctx);
        let at = self.ladder.runs.iter().position(same).unwrap_or_else(|| {
            self.ladder.runs.push(empty);
            self.ladder.runs.len() - 1
        });
        &mut self.ladder.runs[at]
    }

    /// Refuses to mix the runs there with other ones of the same name.
    ///
    /// # Errors
    /// What differs.
    pub fn check(&self, like: &Run) -> Result<()> {
        let mut same_name =
            self.ladder.runs.iter().filter(|r| (&r.engine, &r.variant) == (&like.engine, &like.variant));
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
                    "holds runs of {} {} with another {what}: {was} there, {now} here; choose another --out",
                    like.engine, like.variant
                ),
            )),
        }
    }
}

/// The first thing that keeps `fresh` from going on where `earlier` stopped: its name, what it was and what it is.
fn difference(earlier: &Ladder, fresh: &Ladder) -> Option<Difference> {
    let pairs = [
        ("--decode", earlier.decode_tokens.to_string(), fresh.decode_tokens.to_string()),
        ("--prefill-chunk", show(&earlier.prefill_chunk), show(&fresh.prefill_chunk)),
        ("--memory-budget", show(&earlier.memory_budget), show(&fresh.memory_budget)),
    ];
    header_difference(&earlier.header, &fresh.header).or(pairs.into_iter().find(|(_, was, now)| was != now))
}

/// What differs, what it was, and what it is.
pub type Difference = (&'static str, String, String);

/// Refuses to go on with the results at `path`, which are of something else.
pub fn another(path: &Path, (what, was, now): Difference) -> Error {
    let message = format!("was measured with another {what}: {was} there, {now} here; choose another --out");
    Error::usage(format!("--out {}", path.display()), message)
}

/// The first thing in which two results are not of the same model, machine and build.
pub fn header_difference(was: &Header, now: &Header) -> Option<Difference> {
    let pairs = [
        ("build (git_sha)", was.git_sha.clone(), now.git_sha.clone()),
        ("machine", show(&was.machine), show(&now.machine)),
        ("--model", was.name.clone(), now.name.clone()),
        ("--random-weights", show(&was.random_weights), show(&now.random_weights)),
        ("--model", show(&was.model), show(&now.model)),
        ("number of parameters", was.parameters.to_string(), now.parameters.to_string()),
        ("--dtype", was.dtype.clone(), now.dtype.clone()),
        ("type of keys and values", was.kv_dtype.clone(), now.kv_dtype.clone()),
    ];
    pairs.into_iter().find(|(_, was, now)| was != now)
}

fn show(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// Refuses an earlier prompt that is no prefix of what `hash` gives for its length.
///
/// # Errors
/// Another text.
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
