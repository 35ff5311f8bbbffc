//! Climbing: who runs next, at which context, and what is written down.

use super::engine::{past_budget, BflyEngine, Facts, Outcome, Task};
use super::file::{LadderFile, OK};
use super::format::{Run, Sample};
use super::ladder_args::LadderArgs;
use super::peer::{Answer, Peer, Ready};
use super::summary::{deterministic, summary};
use crate::cli::{human_bytes, short_count, Bars};
use crate::error::{Error, Result};
use crate::eval::variant::Variant;
use std::collections::HashSet;
use std::path::Path;

/// Where a run takes this engine longer, the next larger one is not warmed up.
const SLOW_S: f64 = 5.0;

/// An engine and what it runs.
pub enum Engine {
    /// This one.
    Own(Variant),
    /// Another one.
    Peer(Box<Peer>, Ready),
}

/// One that takes turns.
pub struct Entry {
    engine: Engine,
    /// Contexts at which it ran in this process, or need not before it is timed.
    warm: HashSet<usize>,
    /// Untimed runs that are not yet in the file.
    untimed: usize,
}

impl Entry {
    /// Nothing has run yet.
    pub fn new(engine: Engine) -> Self {
        Self { engine, warm: HashSet::new(), untimed: 0 }
    }

    /// Engine and variant.
    pub fn names(&self) -> (&str, &str) {
        match &self.engine {
            Engine::Own(variant) => ("bfly", &variant.name),
            Engine::Peer(_, ready) => (&ready.engine, &ready.variant),
        }
    }
}

/// Everything that a schedule needs.
pub struct Schedule<'a> {
    /// The flags.
    pub args: &'a LadderArgs,
    /// Rising.
    pub contexts: Vec<usize>,
    /// Progress.
    pub bars: &'a Bars,
    /// This engine.
    pub engine: BflyEngine,
    /// The ids of every prompt,
    pub stream: &'a [u32],
    /// and the file that peers read them from.
    pub ids: &'a Path,
    /// Who takes turns.
    pub entries: Vec<Entry>,
    /// What was written down.
    pub file: LadderFile,
    /// Tokens of the runs of this process.
    pub done: u64,
}

impl Schedule<'_> {
    /// Refuses two entries of one name, and runs that do not belong with those in the file.
    ///
    /// # Errors
    /// Which.
    pub fn check(&self) -> Result<()> {
        let mut seen = HashSet::new();
        for entry in &self.entries {
            let (engine, variant) = entry.names();
            if !seen.insert((engine, variant)) {
                return Err(Error::usage("--peer", format!("two are called {engine} {variant}")));
            }
            self.file.check(&blank(self.args, entry, self.contexts[0], None))?;
            let Engine::Peer(_, ready) = &entry.engine else { continue };
            let dtype = &self.file.ladder.header.kv_dtype;
            if let Some(other) = ready.dtype.as_ref().filter(|d| *d != dtype) {
                self.bars.warn(&format!("{engine} {variant} runs in {other}, bfly in {dtype}: not the same baseline"));
            }
            if ready.random_weights.is_some() != self.args.target.random_weights.is_some() {
                self.bars.warn(&format!("{engine} {variant} and bfly run one with random weights, one with real ones"));
            }
        }
        Ok(())
    }

    /// Every turn, smallest context first.
    ///
    /// # Errors
    /// A peer that fails, a file that cannot be written, or an engine's failure that is no want of memory.
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

    /// The `repeat`-th run of a entry at `ctx`, unless there is one already or there will be none.
    fn turn(&mut self, i: usize, ctx: usize, repeat: usize) -> Result<()> {
        if self.missing(i, ctx) == 0 || self.samples(i, ctx) > repeat {
            return Ok(());
        }
        if let Some(at) = self.failed_below(i, ctx) {
            return self.fail(i, ctx, format!("skipped: did not fit at {}", short_count(at)));
        }
        if let Some(why) = self.warm_up(i, ctx)? {
            return self.fail(i, ctx, why);
        }
        match self.play(i, ctx)? {
            Outcome::Ran(sample, facts) => self.record(i, ctx, *sample, facts),
            Outcome::Failed(why) => self.fail(i, ctx, why),
        }
    }

    /// An untimed run before a entry's first at `ctx`, and why it could not be, if so. What a first run pays for (kernels are
    /// loaded, memory is taken from the driver, a peer may compile) is lost in one that takes long anyway; of peers that is not known.
    fn warm_up(&mut self, i: usize, ctx: usize) -> Result<Option<String>> {
        let below = self.contexts.iter().rev().find(|c| **c < ctx).and_then(|c| self.run(i, *c));
        let slow = below.and_then(|r| r.summary.as_ref()).is_some_and(|s| s.end_to_end_s > SLOW_S);
        let entry = &mut self.entries[i];
        let (own, cold) = (matches!(entry.engine, Engine::Own(_)), entry.warm.is_empty());
        if !entry.warm.insert(ctx) {
            return Ok(None);
        }
        if own && slow {
            if cold {
                self.play(i, self.contexts[0])?;
            }
            return Ok(None);
        }
        match self.play(i, ctx)? {
            Outcome::Failed(why) => Ok(Some(why)),
            Outcome::Ran(..) => {
                self.entries[i].untimed += 1;
                Ok(None)
            }
        }
    }

    fn play(&mut self, i: usize, ctx: usize) -> Result<Outcome> {
        let total = self.done + self.remaining();
        let (bars, done, new) = (self.bars, self.done, self.args.decode);
        bars.show("ladder", done, total);
        let chunk = self.args.prefill_chunk;
        let outcome = match &mut self.entries[i].engine {
            Engine::Own(variant) => {
                let mut on_tokens = |n: usize| bars.show("ladder", (done + n as u64).min(total - 1), total);
                let (prompt, budget) = (&self.stream[..ctx - new], self.args.memory_budget);
                self.engine.run(variant, &Task { ctx, prompt, new, chunk, budget }, &mut on_tokens)?
            }
            Engine::Peer(peer, _) => match peer.run(self.ids, ctx - new, new, chunk)? {
                Answer::Ran(sample, kv_bytes) => Outcome::Ran(sample, Facts { chunk, kv_bytes, ..Facts::default() }),
                Answer::Status(why) => Outcome::Failed(why),
            },
        };
        let past = |s: &Sample| past_budget(s.peak_device_bytes, self.args.memory_budget?);
        Ok(match outcome {
            Outcome::Ran(sample, facts) => match past(&sample) {
                Some(why) => Outcome::Failed(why),
                None => Outcome::Ran(sample, facts),
            },
            failed => failed,
        })
    }

    fn record(&mut self, i: usize, ctx: usize, sample: Sample, facts: Facts) -> Result<()> {
        let (seconds, peak) = (sample.end_to_end_s, sample.peak_device_bytes);
        let empty = blank(self.args, &self.entries[i], ctx, Some(self.engine.weights_bytes()));
        let run = self.file.run_or(empty);
        run.warmups += std::mem::take(&mut self.entries[i].untimed);
        let was = run.deterministic;
        (run.kv, run.kv_bytes, run.read_per_token) = (facts.kv, facts.kv_bytes, facts.read_per_token);
        run.prefill_chunk = facts.chunk;
        run.samples.push(sample);
        run.deterministic = deterministic(&run.samples);
        run.summary = summary(run);
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

    fn fail(&mut self, i: usize, ctx: usize, why: String) -> Result<()> {
        self.bars.say(&format!("{}  {why}", self.what(i, ctx)));
        let empty = blank(self.args, &self.entries[i], ctx, Some(self.engine.weights_bytes()));
        let run = self.file.run_or(empty);
        (run.status, run.summary) = (why, None);
        self.file.save()
    }

    fn what(&self, i: usize, ctx: usize) -> String {
        let (engine, variant) = self.entries[i].names();
        format!("{:>5}  {engine} {variant}", short_count(ctx))
    }

    fn run(&self, i: usize, ctx: usize) -> Option<&Run> {
        self.file.run(self.entries[i].names(), ctx)
    }

    fn samples(&self, i: usize, ctx: usize) -> usize {
        self.run(i, ctx).map_or(0, |r| r.samples.len())
    }

    /// Runs still to come.
    fn missing(&self, i: usize, ctx: usize) -> usize {
        self.file.missing(self.entries[i].names(), ctx, self.args.repeats)
    }

    /// Tokens of the runs still to come.
    fn remaining(&self) -> u64 {
        let entries = 0..self.entries.len();
        let at = |ctx: &usize| entries.clone().map(|i| (ctx * self.missing(i, *ctx)) as u64).sum::<u64>();
        self.contexts.iter().map(at).sum()
    }

    /// The smallest context below `ctx` at which the entry's run did not fit.
    fn failed_below(&self, i: usize, ctx: usize) -> Option<usize> {
        let failed = |c: &&usize| **c < ctx && self.run(i, **c).is_some_and(|r| r.status != OK);
        self.contexts.iter().find(failed).copied()
    }
}

/// Nothing where an engine does not tell.
fn peak_text(peak: u64) -> String {
    if peak > 0 {
        format!("  {}", human_bytes(peak))
    } else {
        String::new()
    }
}

/// A entry's run before its first sample; `own_weights` as this engine holds them.
pub fn blank(args: &LadderArgs, entry: &Entry, ctx: usize, own_weights: Option<u64>) -> Run {
    let (engine, variant) = entry.names();
    let (plan, eviction, version, weights_bytes) = match &entry.engine {
        Engine::Own(v) => (v.method.plan().cloned(), v.method.eviction().cloned(), None, own_weights),
        Engine::Peer(_, ready) => (None, None, ready.version.clone(), ready.weights_bytes),
    };
    Run {
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
