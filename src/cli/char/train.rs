//! `bfly-char train`.

use super::live::{Live, Log};
use super::record::Record;
use super::setup::Data;
use super::TrainArgs;
use crate::char::{checkpoint, Batch, CharModel, Mix, Pairing};
use crate::cli::Bars;
use crate::error::Result;
use crate::train::{Objective, Schedule, Trainer};
use candle_core::Tensor;
use std::path::PathBuf;
use std::time::Instant;

pub(super) fn train(args: &TrainArgs) -> Result<()> {
    let config = args.config()?;
    let (device, ranks) = args.ranks()?;
    let (rank, count) = (ranks.rank(), ranks.count());
    // One rank speaks and writes for all.
    let bars = if rank == 0 { Bars::new(args.quiet) } else { Bars::silent() };
    if config.pairing == Pairing::Xor {
        bars.warn("xor pairs read later characters: the result is no language model");
    }
    let Data { corpus, mut mix, held_out } = args.data(&bars)?;
    let held_out = held_out.filter(|_| rank == 0);
    let settings = args.settings(&config)?;
    let (model, optimiser) = args.start(config, &device, &corpus.hash, &bars)?;
    bars.say(&format!(
        "{} parameters; {} characters to train on, {} held out; stages reach {} characters",
        model.layout().len(),
        corpus.training.iter().map(Vec::len).sum::<usize>(),
        corpus.held_out.iter().map(Vec::len).sum::<usize>(),
        model.config().reach() * model.config().chunk,
    ));
    let log = || Log::open(&args.out.join("log.jsonl"), optimiser.steps(), args.from.is_some());
    let mut log = (rank == 0).then(log).transpose()?;
    let schedule = Schedule { peak: args.lr, floor: args.lr / 10.0, warmup: args.warmup, steps: args.steps as u64 };
    let record = |dir: &PathBuf| Record::new(dir, model.config(), model.layout(), optimiser.weights());
    let mut record = args.record.as_ref().map(record).transpose()?;
    let mut live = Live::new(&device, model.config(), count);
    let mut trainer = Trainer::new(model, optimiser, schedule).among(ranks);
    let characters = args.batch * args.window;
    let parts = args.batch.div_ceil(args.micro_batch);
    for step in trainer.optimiser().steps()..args.steps as u64 {
        let start = Instant::now();
        let batches: Vec<Batch> = (rank * parts / count..(rank + 1) * parts / count)
            .map(|part| part * args.micro_batch)
            .map(|at| mix.batch(step * args.batch as u64 + at as u64, args.micro_batch.min(args.batch - at)))
            .collect();
        if let Some(record) = &mut record {
            record.push(&batches);
        }
        let predicted = batches.iter().map(Batch::predicted).sum();
        let done = trainer.step(&batches, predicted)?;
        live.step(start);
        let last = done.step == args.steps as u64;
        let held_out = match &held_out {
            Some(_) if !last && done.step % args.eval_every.max(1) != 0 => None,
            Some(w) => Some(evaluate(trainer.objective(), trainer.optimiser().weights(), w, args.micro_batch)?),
            None => None,
        };
        if let Some(log) = &mut log {
            let recall = mix.recalls(step).is_some();
            log.write(&done, recall, (characters, live.rate(characters)), held_out)?;
        }
        live.show(&bars, &done, characters, args.steps as u64);
        if let Some(bits) = held_out {
            bars.say(&format!("step {}: held out {bits:.3}, {}", done.step, live.line(&done, characters)));
        }
        if rank == 0 && (last || done.step % args.save_every.max(1) == 0) {
            let state =
                checkpoint::TrainingState { step: done.step, corpus: corpus.hash.clone(), settings: settings.clone() };
            let dir = checkpoint::save(&args.out, trainer.objective(), trainer.optimiser(), &state)?;
            bars.say(&format!("saved {}", dir.display()));
        }
    }
    record.map_or(Ok(()), |record| record.finish(args.batch))
}

/// Windows that an evaluation reads.
const EVALUATED: usize = 32;

/// Bits per character of held-out windows.
fn evaluate(model: &CharModel, weights: &Tensor, windows: &Mix, at_once: usize) -> Result<f64> {
    let (mut windows, mut sum, mut count) = (windows.clone(), 0f64, 0);
    for at in (0..EVALUATED).step_by(at_once) {
        let batch = windows.batch(at as u64, at_once.min(EVALUATED - at));
        sum += model.losses(weights, &batch)?.iter().map(|l| f64::from(*l)).sum::<f64>();
        count += batch.predicted();
    }
    Ok(sum / count as f64 / std::f64::consts::LN_2)
}
