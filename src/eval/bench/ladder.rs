//! `ladder`: every variant and peer at rising contexts, interleaved.

use super::ceilings::{ceilings, CeilingSizes};
use super::engine::BflyEngine;
use super::ladder_args::LadderArgs;
use super::peer::Peer;
use super::schedule::{empty_run, Entry, EntryKind, Schedule};
use crate::cli::{open_device, print, Bars, Temporary};
use crate::error::{Error, Result};
use crate::eval::report::resume::{check_prompt, earlier_ladder, LadderFile};
use crate::eval::report::table::ladder_table;
use crate::eval::report::{hash, id_bytes, Header, Ladder, PromptSource, LADDER};
use crate::eval::target::Target;
use crate::eval::variant::recalls;
use crate::ops::release_memory;
use std::path::Path;

/// Runs the ladder and prints a table. All flags and files are checked before weights are read.
///
/// # Errors
/// Invalid flags, files or peers. A run that is out of memory is recorded, and the ladder continues.
pub fn run(args: &LadderArgs) -> Result<()> {
    let bars = Bars::new(args.quiet);
    let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
    args.target.model.set_threads()?;
    let contexts = args.contexts()?;
    let device = open_device(&args.target.model.device)?;
    let earlier = earlier_ladder(&args.out)?;
    let target = Target::open(&args.target, device, &progress)?;
    let variants = target.variants()?;
    target.refuse_too_large()?;

    let own = contexts.iter().max().map_or(0, |c| c - args.decode);
    let tokens = own.max(earlier.as_ref().map_or(0, |e| e.prompt.tokens));
    let stream = target.stream(tokens, &progress)?;
    target.warn(&bars);
    if let Some(earlier) = &earlier {
        check_prompt(&args.out, earlier, |n| hash(&stream.ids[..n]))?;
    }
    let fresh = ladder(args, target.header(LADDER), stream.describe(tokens));
    let file = LadderFile::open(&args.out, earlier, fresh)?;
    target.warn_beyond_trained(&bars, &contexts);

    let recalled = recalls(&variants).cloned();
    let mut entries: Vec<Entry> = variants.into_iter().map(|v| Entry::new(EntryKind::Bfly(v))).collect();
    entries.iter().try_for_each(|e| file.check(&empty_run(args, e, contexts[0], None)))?;
    let complete = |e: &Entry| contexts.iter().all(|c| file.missing(e.names(), *c, args.repeats) == 0);
    if args.peers.is_empty() && entries.iter().all(complete) {
        bars.say(&format!("{} is complete", args.out.display()));
        return print(ladder_table(&file.ladder));
    }
    let ids = (!args.peers.is_empty()).then(|| IdFile::write(&stream.ids[..tokens])).transpose()?;
    // Peers load their weights while bfly loads its own.
    let mut peers = args.peers.iter().map(|c| Peer::start(c)).collect::<Result<Vec<_>>>()?;
    let engine = BflyEngine::new(target.load(recalled.as_ref(), &progress)?, !peers.is_empty());
    for mut peer in peers.drain(..) {
        let ready = peer.ready()?;
        entries.push(Entry::new(EntryKind::Peer(Box::new(peer), ready)));
    }
    let ids = ids.as_ref().map_or(Path::new(""), |f| f.0.path());
    let mut schedule =
        Schedule { args, contexts, bars: &bars, engine, stream: &stream.ids, ids, entries, file, done: 0 };
    schedule.check()?;
    if schedule.file.ladder.ceilings.is_none() && !target.device.is_cpu() {
        schedule.file.ladder.ceilings = Some(ceilings(&target.device, &CeilingSizes::of(&target.device, false))?);
        release_memory(&target.device);
    }
    schedule.all()?;
    print(ladder_table(&schedule.file.ladder))
}

fn ladder(args: &LadderArgs, header: Header, prompt: PromptSource) -> Ladder {
    Ladder {
        header,
        ceilings: None,
        decode_tokens: args.decode,
        prefill_chunk: Some(args.prefill_chunk),
        memory_budget: args.memory_budget,
        prompt,
        runs: vec![],
    }
}

/// Temporary file with the prompt's ids, which peers read; removed when dropped.
struct IdFile(Temporary);

impl IdFile {
    fn write(ids: &[u32]) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("bfly-bench-{}.ids", std::process::id()));
        let file = Temporary::new(path.clone()).and_then(|file| {
            std::fs::write(file.path(), id_bytes(ids))?;
            Ok(file)
        });
        Ok(Self(file.map_err(|e| Error::io(path, e))?))
    }
}
