//! Schedule of a ladder: which entry runs next at which context, and what is recorded.

use super::engine::{past_budget, BflyEngine, Outcome, RunSizes, Workload};
use super::ladder_args::LadderArgs;
use super::peer::{Peer, PeerInfo, PeerOutcome};
use crate::cli::{human_bytes, short_count, Bars};
use crate::error::{Error, Result};
use crate::eval::report::resume::LadderFile;
use crate::eval::report::{LadderRun, TimedRun, OK};
use crate::eval::variant::Variant;
use std::collections::HashSet;
use std::path::Path;

/// Duration in seconds of a bfly run beyond which the next larger context gets no warm-up.
const SLOW_S: f64 = 5.0;

/// The engine of an entry.
pub enum EntryKind {
    /// bfly with a variant.
    Bfly(Variant),
    /// Another engine, with its ready message.
    Peer(Box<Peer>, PeerInfo),
}

/// An engine and variant that is timed in a ladder.
pub struct Entry {
    engine: EntryKind,
    /// Contexts at which the entry was warmed up in this process, or needs no warm-up.
    warm: HashSet<usize>,
    /// Warm-ups not yet recorded in the file.
    untimed: usize,
}

impl Entry {
    /// Creates an entry without runs.
    pub fn new(engine: EntryKind) -> Self {
        Self { engine, warm: HashSet::new(), untimed: 0 }
    }

    /// Returns the names of engine and variant.
    pub fn names(&self) -> (&str, &str) {
        match &self.engine {
            EntryKind::Bfly(variant) => ("bfly", &variant.name),
            EntryKind::Peer(_, ready) => (&ready.engine, &ready.variant),
        }
    }
}

/// A ladder in progress.
pub struct Schedule<'a> {
    /// Flags of the command.
    pub args: &'a LadderArgs,
    /// Contexts in rising order.
    pub contexts: Vec<usize>,
    /// Progress bars.
    pub bars: &'a Bars,
    /// bfly with its weights.
    pub engine: BflyEngine,
    /// Token ids of which every prompt is a prefix.
    pub stream: &'a [u32],
    /// File from which peers read these ids.
    pub ids: &'a Path,
    /// Entries in the order of the first repeat.
    pub entries: Vec<Entry>,
    /// Results file.
    pub file: LadderFile,
    /// Tokens of all runs made by this process.
    pub done: u64,
}

impl Schedule<'_> {
    /// Refuses two entries with one name, and entries that differ from those of the same name in the file.
    ///
    /// # Errors
    /// A repeated name, or a version or plan that differs from the file's.
    pub fn check(&self) -> Result<()> {
        let mut seen = HashSet::new();
        for entry in &self.entries {
            let (engine, variant) = entry.names();
            if !seen.insert((engine, variant)) {
                return Err(Error::usage(
                    "--peer",
                    format!("two are called {engine} {variant}; give each its own name"),
                ));
            }
            self.file.check(&empty_run(self.args, entry, self.contexts[0], None))?;
            let EntryKind::Peer(_, ready) = &entry.engine else { continue };
            let dtype = &self.file.ladder.header.kv_dtype;
            if let Some(other) = ready.dtype.as_ref().filter(|d| *d != dtype) {
                self.bars.warn(&format!("{engine} {variant} runs in {other}, bfly in {dtype}: not comparable"));
            }
            if ready.random_weights.is_some() != self.args.target.random_weights.is_some() {
                self.bars
                    .warn(&format!("only one of {engine} {variant} and bfly runs with random weights: not comparable"));
            }
        }
        Ok(())
    }

    /// Makes every run, smallest context first.
    ///
    /// # Errors
    /// A peer that fails, a file that cannot be written, or any failure of bfly but out of memory.
    pub fn all(&mut self) -> Result<()> {
        for ctx in self.contexts.clone() {
            for repeat in 0..self.args.repeats {
                for turn in 0..self.entries.len() {
                    self.turn((turn + repeat) % self.entries.len(), ctx, repeat)?;
                }
            }
        }
        self.bars.show("ladder", 1, 1);
        Ok(())
    }

    /// Makes the `repeat`-th run of entry `i` at `ctx`, unless the file has it or an earlier run was out of memory.
    fn turn(&mut self, i: usize, ctx: usize, repeat: usize) -> Result<()> {
        if self.missing(i, ctx) == 0 || self.timed(i, ctx) > repeat {
            return Ok(());
        }
        if let Some(at) = self.failed_below(i, ctx) {
            return self.fail(i, ctx, format!("skipped: did not fit at {}", short_count(at)));
        }
        if let Some(why) = self.warm_up(i, ctx)? {
            return self.fail(i, ctx, why);
        }
        match self.run_once(i, ctx)? {
            Outcome::Ran(timed, facts) => self.record(i, ctx, *timed, facts),
            Outcome::Failed(why) => self.fail(i, ctx, why),
        }
    }

    /// Makes an untimed run of entry `i` before its first timed run at `ctx`, and returns the reason where it fails.
    ///
    /// The first run includes loading kernels and allocating memory from the driver, which is negligible in a run of
    /// several seconds. A peer may compile as well, so it always gets a warm-up.
    fn warm_up(&mut self, i: usize, ctx: usize) -> Result<Option<String>> {
        let below = self.contexts.iter().rev().find(|c| **c < ctx).and_then(|c| self.run(i, *c));
        let slow = below.and_then(|r| r.summary.as_ref()).is_some_and(|s| s.end_to_end_s > SLOW_S);
        let entry = &mut self.entries[i];
        let (own, cold) = (matches!(entry.engine, EntryKind::Bfly(_)), entry.warm.is_empty());
        if !entry.warm.insert(ctx) {
            return Ok(None);
        }
        if own && slow {
            if cold {
                self.run_once(i, self.contexts[0])?;
            }
            return Ok(None);
        }
        match self.run_once(i, ctx)? {
            Outcome::Failed(why) => Ok(Some(why)),
            Outcome::Ran(..) => {
                self.entries[i].untimed += 1;
                Ok(None)
            }
        }
    }

    /// Runs entry `i` at `ctx`.
    fn run_once(&mut self, i: usize, ctx: usize) -> Result<Outcome> {
        let total = self.done + self.remaining();
        let (bars, done, new) = (self.bars, self.done, self.args.decode);
        bars.show("ladder", done, total);
        let chunk = self.args.prefill_chunk;
        let outcome = match &mut self.entries[i].engine {
            EntryKind::Bfly(variant) => {
                let mut on_tokens = |n: usize| bars.show("ladder", (done + n as u64).min(total - 1), total);
                let (prompt, budget) = (&self.stream[..ctx - new], self.args.memory_budget);
                self.engine.run(variant, &Workload { ctx, prompt, new, chunk, budget }, &mut on_tokens)?
            }
            EntryKind::Peer(peer, _) => match peer.run(self.ids, ctx - new, new, chunk)? {
                PeerOutcome::Ran(timed, kv_bytes) => {
                    Outcome::Ran(timed, RunSizes { chunk, kv_bytes, ..RunSizes::default() })
                }
                PeerOutcome::Status(why) => Outcome::Failed(why),
            },
        };
        let past = |t: &TimedRun| past_budget(t.peak_device_bytes, self.args.memory_budget?);
        Ok(match outcome {
            Outcome::Ran(timed, facts) => match past(&timed) {
                Some(why) => Outcome::Failed(why),
                None => Outcome::Ran(timed, facts),
            },
            failed => failed,
        })
    }

    /// Adds a timed run of entry `i` at `ctx` to the file.
    fn record(&mut self, i: usize, ctx: usize, timed: TimedRun, facts: RunSizes) -> Result<()> {
        let (seconds, peak) = (timed.end_to_end_s, timed.peak_device_bytes);
        let empty = empty_run(self.args, &self.entries[i], ctx, Some(self.engine.weights_bytes()));
        let run = self.file.run_or(empty);
        run.warmups += std::mem::take(&mut self.entries[i].untimed);
        let was = run.deterministic;
        (run.kv, run.kv_bytes, run.read_per_token) = (facts.kv, facts.kv_bytes, facts.read_per_token);
        run.prefill_chunk = facts.chunk;
        run.push(timed);
        let (count, differs) = (run.samples.len(), run.deterministic == Some(false) && was != Some(false));
        self.file.save()?;
        self.done += ctx as u64;
        let what = self.what(i, ctx);
        let of = count + self.missing(i, ctx);
        self.bars.say(&format!("{what}  {count}/{of}  {seconds:.3} s{}", peak_text(peak)));
        if differs {
            self.bars.warn(&format!("{what}: run {count} gave other tokens than the runs before it"));
        }
        Ok(())
    }

    /// Records that entry `i` fails at `ctx`, and why.
    fn fail(&mut self, i: usize, ctx: usize, why: String) -> Result<()> {
        self.bars.say(&format!("{}  {why}", self.what(i, ctx)));
        let empty = empty_run(self.args, &self.entries[i], ctx, Some(self.engine.weights_bytes()));
        let run = self.file.run_or(empty);
        (run.status, run.summary) = (why, None);
        self.file.save()
    }

    /// Returns context, engine and variant of entry `i`, for messages.
    fn what(&self, i: usize, ctx: usize) -> String {
        let (engine, variant) = self.entries[i].names();
        format!("{:>5}  {engine} {variant}", short_count(ctx))
    }

    fn run(&self, i: usize, ctx: usize) -> Option<&LadderRun> {
        self.file.run(self.entries[i].names(), ctx)
    }

    /// Returns the number of timed runs of entry `i` at `ctx` in the file.
    fn timed(&self, i: usize, ctx: usize) -> usize {
        self.run(i, ctx).map_or(0, |r| r.samples.len())
    }

    /// Returns the number of timed runs of entry `i` at `ctx` still to be made.
    fn missing(&self, i: usize, ctx: usize) -> usize {
        self.file.missing(self.entries[i].names(), ctx, self.args.repeats)
    }

    /// Returns the tokens of all timed runs still to be made.
    fn remaining(&self) -> u64 {
        let entries = 0..self.entries.len();
        let at = |ctx: &usize| entries.clone().map(|i| (ctx * self.missing(i, *ctx)) as u64).sum::<u64>();
        self.contexts.iter().map(at).sum()
    }

    /// Returns the smallest context below `ctx` at which entry `i` was out of memory.
    fn failed_below(&self, i: usize, ctx: usize) -> Option<usize> {
        let failed = |c: &&usize| **c < ctx && self.run(i, **c).is_some_and(|r| !r.ran());
        self.contexts.iter().find(failed).copied()
    }
}

/// Formats the peak as the end of a line; empty where the engine does not report it.
fn peak_text(peak: u64) -> String {
    if peak > 0 {
        format!("  {}", human_bytes(peak))
    } else {
        String::new()
    }
}

/// Returns the record of `entry` at `ctx` before its first timed run; `own_weights` is the size of bfly's weights.
pub fn empty_run(args: &LadderArgs, entry: &Entry, ctx: usize, own_weights: Option<u64>) -> LadderRun {
    let (engine, variant) = entry.names();
    let (plan, eviction, version, weights_bytes) = match &entry.engine {
        EntryKind::Bfly(v) => (v.method.plan().cloned(), v.method.eviction().cloned(), None, own_weights),
        EntryKind::Peer(_, ready) => (None, None, ready.version.clone(), ready.weights_bytes),
    };
    LadderRun {
        engine: engine.into(),
        variant: variant.into(),
        plan,
        eviction,
        ctx,
        prompt_tokens: ctx - args.decode,
        prefill_chunk: args.prefill_chunk,
        version,
        weights_bytes,
        kv: None,
        kv_bytes: None,
        read_per_token: None,
        status: OK.into(),
        warmups: 0,
        deterministic: None,
        samples: vec![],
        summary: None,
    }
}
