//! The ladder: every variant and peer at rising contexts, taking turns.

use super::args::LadderArgs;
use super::climb::{blank, Climb, Player, Seat};
use super::engine::Engine;
use super::file::{check_prompt, earlier, LadderFile};
use super::format::{Ladder, Prompt, LADDER, SCHEMA_VERSION};
use super::machine::{ceilings, machine, now, CeilingSizes};
use super::peer::Peer;
use super::prompt::{bytes, hash, Stream};
use super::table::table;
use super::variant;
use crate::checkpoint::{Checkpoint, Held, HoldAs};
use crate::cli::{hold_as, human_bytes, open_device, short_count, Bars, Patch};
use crate::error::{Error, ErrorKind, Result};
use crate::model::Model;
use crate::ops::release_memory;
use candle_core::Device;
use std::io::Write;
use std::path::{Path, PathBuf};

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
    let fresh = header(args, &checkpoint, patch.is_some(), &hold, &device, stream.describe(tokens));
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
    let ids = (!args.peers.is_empty()).then(|| IdFile::write(&stream.ids[..tokens])).transpose()?;
    // Peers load while this engine does.
    let mut peers = args.peers.iter().map(|c| Peer::start(c)).collect::<Result<Vec<_>>>()?;
    let model = Model::load(&checkpoint, None, contexts[0], &hold, &device, &progress)?;
    let engine = Engine::new(model, args.prefill_chunk, args.memory_budget, !peers.is_empty());
    for mut peer in peers.drain(..) {
        let ready = peer.ready()?;
        seats.push(Seat::new(Player::Peer(Box::new(peer), ready)));
    }
    let ids = ids.as_ref().map_or(Path::new(""), |f| f.0.as_path());
    let mut climb = Climb { args, contexts, bars: &bars, engine, stream: &stream.ids, ids, seats, file, done: 0 };
    climb.check()?;
    if climb.file.ladder.ceilings.is_none() && !device.is_cpu() {
        climb.file.ladder.ceilings = Some(ceilings(&device, &CeilingSizes::of(&device, false))?);
        release_memory(&device);
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
    let mut checkpoint = match &patch {
        Some(patch) => patch.base(&options, progress)?,
        None => Checkpoint::open(name, &options, progress)?,
    };
    if args.model.tie_embeddings {
        checkpoint.tie_embeddings()?;
    }
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
    patched: bool,
    hold: &HoldAs,
    device: &Device,
    prompt: Prompt,
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
        // A patch is not its base.
        model: args.random_weights.is_none().then(|| match patched {
            true => checkpoint.identity.clone(),
            false => checkpoint.identity.as_given(given),
        }),
        name: display_name(given),
        random_weights: args.random_weights,
        parameters: checkpoint.parameters(),
        trained_positions: checkpoint.spec.max_positions,
        dtype: most,
        held,
        kv_dtype: hold.compute().as_str().into(),
        decode_tokens: args.decode,
        prefill_chunk: Some(args.prefill_chunk),
        memory_budget: args.memory_budget,
        prompt,
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
