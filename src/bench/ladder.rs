//! The ladder: every variant and peer at rising contexts, taking turns.

use super::args::LadderArgs;
use super::engine::{Engine, Facts, Outcome};
use super::file::{check_prompt, earlier, LadderFile, OK};
use super::format::{Ladder, Run, Sample, LADDER, SCHEMA_VERSION};
use super::machine::{ceilings, machine, now, CeilingSizes};
use super::peer::{Answer, Peer, Ready};
use super::prompt::{bytes, hash, Stream};
use super::summary::{deterministic, summary};
use super::table::table;
use super::variant::{self, Variant};
use crate::checkpoint::{Checkpoint, Held, HoldAs};
use crate::cli::{hold_as, human_bytes, open_device, short_count, Bars, Patch};
use crate::error::{Error, ErrorKind, Result};
use crate::model::Model;
use candle_core::Device;
use std::collections::HashSet;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Where a run takes this engine longer, the next larger one is not warmed up.
const SLOW_S: f64 = 5.0;

/// Climbs the ladder, and prints it as a table. Everything that can be refused is refused before weights are read.
///
/// # Errors
/// Bad flags, files or peers: named. A run that does not fit is no error: it is recorded, and the ladder goes on.
pub fn run(args: &LadderArgs) -> Result<()> {
    let bars = Bars::new(args.quiet);
    let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
    args.model.set_threads()?;
    let contexts = args.contexts()?;
    let device = open_device(&args.model.device)?;
    let before = earlier(&args.out)?;
    let (checkpoint, patch) = open(args, &progress)?;
    let variants = variant::parse(&args.variants, patch.as_ref().map(|p| &p.plan), &checkpoint.spec)?;
    let hold = hold_as(args.model.dtype.parse::<Held>()?, &checkpoint, &device);
    refuse_too_large(&checkpoint, &hold, &device)?;

    let own = contexts.iter().max().map_or(0, |c| c - args.decode);
    let tokens = own.max(before.as_ref().map_or(0, |b| b.prompt.tokens));
    let stream = Stream::open(&checkpoint, &args.texts, tokens, args.random_weights.unwrap_or(0), &progress)?;
    if let Some(before) = &before {
        check_prompt(&args.out, before, |n| hash(&stream.ids[..n]))?;
    }
    let ids = IdFile::write(&stream.ids[..tokens])?;
    let fresh = header(args, &checkpoint, &hold, &device, &stream, tokens);
    let file = LadderFile::open(&args.out, before, fresh)?;
    warn_past_training(&bars, &contexts, checkpoint.spec.max_positions);

    let mut seats: Vec<Seat> = variants.into_iter().map(|v| Seat::new(Player::Own(v))).collect();
    seats.iter().try_for_each(|s| file.check(&blank(args, s, contexts[0], None)))?;
    let complete = |s: &Seat| contexts.iter().all(|c| file.missing(s.names(), *c, args.repeats) == 0);
    if args.peers.is_empty() && seats.iter().all(complete) {
        bars.say(&format!("{} is complete", args.out.display()));
        let _ = write!(std::io::stdout(), "{}", table(&file.ladder));
        return Ok(());
    }
    // Peers load while this engine does.
    let mut peers = args.peers.iter().map(|c| Peer::start(c)).collect::<Result<Vec<_>>>()?;
    let model = Model::load(&checkpoint, None, contexts[0], &hold, &device, &progress)?;
    let engine = Engine::new(model, args.prefill_chunk, !peers.is_empty());
    for mut peer in peers.drain(..) {
        let ready = peer.ready()?;
        seats.push(Seat::new(Player::Peer(Box::new(peer), ready)));
    }
    let mut climb = Climb { args, contexts, bars: &bars, engine, stream: &stream.ids, ids, seats, file, done: 0 };
    climb.check()?;
    if climb.file.ladder.ceilings.is_none() && !device.is_cpu() {
        climb.file.ladder.ceilings = Some(ceilings(&device, &CeilingSizes::of(&device, false))?);
    }
    climb.all()?;
    // A closed pipe does not undo the file.
    let _ = write!(std::io::stdout(), "{}", table(&climb.file.ladder));
    Ok(())
}

fn open(args: &LadderArgs, progress: crate::checkpoint::OnProgress) -> Result<(Checkpoint, Option<Patch>)> {
    let name = args.model.model.as_deref().unwrap_or_default();
    if let Some(seed) = args.random_weights {
        return Ok((Checkpoint::random(name, seed)?, None));
    }
    let (patch, options) = (Patch::open(name)?, args.model.open_options());
    let checkpoint = match &patch {
        Some(patch) => patch.base(&options, progress)?,
        None => Checkpoint::open(name, &options, progress)?,
    };
    Ok((checkpoint, patch))
}

/// Refuses weights that cannot be held, before the first allocation fails and ends the process.
fn refuse_too_large(checkpoint: &Checkpoint, hold: &HoldAs, device: &Device) -> Result<()> {
    let need: u64 = checkpoint.held(hold).values().sum();
    match crate::ops::memory_of(device).filter(|memory| need > *memory) {
        None => Ok(()),
        Some(memory) => Err(Error::new(
            ErrorKind::Unsupported,
            checkpoint.identity.place(),
            format!("its weights take {}; there are {} of memory", human_bytes(need), human_bytes(memory)),
        )),
    }
}

fn warn_past_training(bars: &Bars, contexts: &[usize], trained: usize) {
    let past: Vec<_> = contexts.iter().filter(|c| **c > trained).map(|c| short_count(*c)).collect();
    if !past.is_empty() {
        let past = past.join(", ");
        bars.warn(&format!("trained for {} positions: at {past} this is speed and memory only", short_count(trained)));
    }
}

fn header(
    args: &LadderArgs,
    checkpoint: &Checkpoint,
    hold: &HoldAs,
    device: &Device,
    stream: &Stream,
    tokens: usize,
) -> Ladder {
    let given = args.model.model.as_deref().unwrap_or_default();
    let held = checkpoint.held(hold);
    let most = held.iter().max_by_key(|(_, bytes)| **bytes).map_or(String::new(), |(name, _)| name.clone());
    Ladder {
        kind: LADDER.into(),
        schema_version: SCHEMA_VERSION,
        git_sha: env!("BFLY_GIT_SHA").into(),
        started: now(),
        resumed: vec![],
        command: std::env::args().collect(),
        machine: machine(device),
        ceilings: None,
        model: args.random_weights.is_none().then(|| checkpoint.identity.as_given(given)),
        name: display_name(given),
        random_weights: args.random_weights,
        parameters: checkpoint.parameters(),
        trained_positions: checkpoint.spec.max_positions,
        dtype: most,
        held,
        kv_dtype: hold.compute().as_str().into(),
        decode_tokens: args.decode,
        prompt: stream.describe(tokens),
        runs: vec![],
    }
}

/// A hub id as it is; of a path its last part without what says only what kind of file it is.
fn display_name(given: &str) -> String {
    let path = Path::new(given);
    if !path.exists() {
        return given.into();
    }
    let path = if path.file_name().is_some_and(|n| n == "config.json") { path.parent().unwrap_or(path) } else { path };
    let full = std::fs::canonicalize(path).unwrap_or_else(|_| path.into());
    let name = if full.is_dir() { full.file_name() } else { full.file_stem() };
    name.map_or_else(|| given.into(), |n| n.to_string_lossy().into_owned())
}

/// The prompt's ids where peers can read them, for as long as this lives.
struct IdFile(PathBuf);

impl IdFile {
    fn write(ids: &[u32]) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("bfly-bench-{}.ids", std::process::id()));
        let interrupted = path.clone();
        // Fails only where a handler is already set: then the file stays behind when interrupted.
        let _ = ctrlc::set_handler(move || {
            let _ = std::fs::remove_file(&interrupted);
            std::process::exit(130);
        });
        let file = Self(path);
        std::fs::write(&file.0, bytes(ids)).map_err(|e| Error::io(&file.0, e))?;
        Ok(file)
    }
}

impl Drop for IdFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

enum Player {
    Own(Variant),
    Peer(Box<Peer>, Ready),
}

/// One that takes turns.
struct Seat {
    player: Player,
    /// Contexts at which it ran in this process, or need not before it is timed.
    warm: HashSet<usize>,
    /// Untimed runs that are not yet in the file.
    untimed: usize,
}

impl Seat {
    fn new(player: Player) -> Self {
        Self { player, warm: HashSet::new(), untimed: 0 }
    }

    fn names(&self) -> (&str, &str) {
        match &self.player {
            Player::Own(variant) => ("bfly", &variant.name),
            Player::Peer(_, ready) => (&ready.engine, &ready.variant),
        }
    }
}

struct Climb<'a> {
    args: &'a LadderArgs,
    contexts: Vec<usize>,
    bars: &'a Bars,
    engine: Engine,
    stream: &'a [u32],
    ids: IdFile,
    seats: Vec<Seat>,
    file: LadderFile,
    /// Tokens of the runs of this process.
    done: u64,
}

impl Climb<'_> {
    /// Refuses two seats of one name, and runs that do not belong with those in the file.
    fn check(&self) -> Result<()> {
        let mut seen = HashSet::new();
        for seat in &self.seats {
            let (engine, variant) = seat.names();
            if !seen.insert((engine, variant)) {
                return Err(Error::usage("--peer", format!("two are called {engine} {variant}")));
            }
            self.file.check(&blank(self.args, seat, self.contexts[0], None))?;
            let Player::Peer(_, ready) = &seat.player else { continue };
            let dtype = &self.file.ladder.kv_dtype;
            if let Some(other) = ready.dtype.as_ref().filter(|d| *d != dtype) {
                self.bars.warn(&format!("{engine} {variant} runs in {other}, bfly in {dtype}: not the same baseline"));
            }
            if ready.random_weights.is_some() != self.args.random_weights.is_some() {
                self.bars.warn(&format!("{engine} {variant} and bfly run one with random weights, one with real ones"));
            }
        }
        Ok(())
    }

    fn all(&mut self) -> Result<()> {
        for ctx in self.contexts.clone() {
            for repeat in 0..self.args.repeats {
                for turn in 0..self.seats.len() {
                    self.turn((turn + repeat) % self.seats.len(), ctx, repeat)?;
                }
            }
        }
        self.bars.show("ladder", 1, 1);
        Ok(())
    }

    /// The `repeat`-th run of a seat at `ctx`, unless there is one already or there will be none.
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

    /// An untimed run before a seat's first at `ctx`, and why it could not be, if so. What a first run pays for (kernels are
    /// loaded, memory is taken from the driver, a peer may compile) is lost in one that takes long anyway; of peers that is not known.
    fn warm_up(&mut self, i: usize, ctx: usize) -> Result<Option<String>> {
        let below = self.contexts.iter().rev().find(|c| **c < ctx).and_then(|c| self.run(i, *c));
        let slow = below.and_then(|r| r.summary.as_ref()).is_some_and(|s| s.end_to_end_s > SLOW_S);
        let seat = &mut self.seats[i];
        let (own, cold) = (matches!(seat.player, Player::Own(_)), seat.warm.is_empty());
        if !seat.warm.insert(ctx) {
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
                self.seats[i].untimed += 1;
                Ok(None)
            }
        }
    }

    fn play(&mut self, i: usize, ctx: usize) -> Result<Outcome> {
        let total = self.done + self.remaining();
        let (bars, done, new) = (self.bars, self.done, self.args.decode);
        bars.show("ladder", done, total);
        match &mut self.seats[i].player {
            Player::Own(variant) => {
                let mut on_tokens = |n: usize| bars.show("ladder", (done + n as u64).min(total - 1), total);
                self.engine.run(variant, ctx, self.stream, new, &mut on_tokens)
            }
            Player::Peer(peer, _) => Ok(match peer.run(&self.ids.0, ctx - new, new, self.args.prefill_chunk)? {
                Answer::Ran(sample, kv_bytes) => Outcome::Ran(sample, Facts { kv_bytes, ..Facts::default() }),
                Answer::Status(why) => Outcome::Failed(why),
            }),
        }
    }

    fn record(&mut self, i: usize, ctx: usize, sample: Sample, facts: Facts) -> Result<()> {
        let (seconds, peak) = (sample.end_to_end_s, sample.peak_device_bytes);
        let empty = blank(self.args, &self.seats[i], ctx, self.engine.weights_bytes());
        let run = self.file.run_or(empty);
        run.warmups += std::mem::take(&mut self.seats[i].untimed);
        let was = run.deterministic;
        (run.kv, run.kv_bytes, run.read_per_token) = (facts.kv, facts.kv_bytes, facts.read_per_token);
        run.samples.push(sample);
        run.deterministic = deterministic(&run.samples);
        run.summary = summary(run);
        let (count, differs) = (run.samples.len(), run.deterministic == Some(false) && was != Some(false));
        self.file.save()?;
        self.done += ctx as u64;
        let what = self.what(i, ctx);
        let of = count + self.missing(i, ctx);
        self.bars.say(&format!("{what}  {count}/{of}  {seconds:.3} s  {}", human_bytes(peak)));
        if differs {
            self.bars.warn(&format!("{what}: run {count} gave other tokens than the runs before it"));
        }
        Ok(())
    }

    fn fail(&mut self, i: usize, ctx: usize, why: String) -> Result<()> {
        self.bars.say(&format!("{}  {why}", self.what(i, ctx)));
        let empty = blank(self.args, &self.seats[i], ctx, self.engine.weights_bytes());
        let run = self.file.run_or(empty);
        (run.status, run.summary) = (why, None);
        self.file.save()
    }

    fn what(&self, i: usize, ctx: usize) -> String {
        let (engine, variant) = self.seats[i].names();
        format!("{:>5}  {engine} {variant}", short_count(ctx))
    }

    fn run(&self, i: usize, ctx: usize) -> Option<&Run> {
        self.file.run(self.seats[i].names(), ctx)
    }

    fn samples(&self, i: usize, ctx: usize) -> usize {
        self.run(i, ctx).map_or(0, |r| r.samples.len())
    }

    /// Runs still to come.
    fn missing(&self, i: usize, ctx: usize) -> usize {
        self.file.missing(self.seats[i].names(), ctx, self.args.repeats)
    }

    /// Tokens of the runs still to come.
    fn remaining(&self) -> u64 {
        let seats = 0..self.seats.len();
        let at = |ctx: &usize| seats.clone().map(|i| (ctx * self.missing(i, *ctx)) as u64).sum::<u64>();
        self.contexts.iter().map(at).sum()
    }

    /// The smallest context below `ctx` at which the seat's run did not fit.
    fn failed_below(&self, i: usize, ctx: usize) -> Option<usize> {
        let failed = |c: &&usize| **c < ctx && self.run(i, **c).is_some_and(|r| r.status != OK);
        self.contexts.iter().find(failed).copied()
    }
}

/// A seat's run before its first sample; `own_weights` as this engine holds them.
fn blank(args: &LadderArgs, seat: &Seat, ctx: usize, own_weights: Option<u64>) -> Run {
    let (engine, variant) = seat.names();
    let (plan, version, weights_bytes) = match &seat.player {
        Player::Own(v) => (v.plan.clone(), None, own_weights),
        Player::Peer(_, ready) => (None, ready.version.clone(), ready.weights_bytes),
    };
    Run {
        engine: engine.into(),
        variant: variant.into(),
        plan,
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
