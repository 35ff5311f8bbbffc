//! Decode speed of one model at several depths, measured in turns in one process, so that a machine whose speed drifts
//! slows all depths alike. Random weights and ids: speed only.
//!
//! ```text
//! cargo run --release --example decode_depth -- CONFIG RECALL DEPTH,DEPTH,.. [ROUNDS]
//! cargo run --release --example decode_depth -- tests/fixtures/shapes/qwen3.5-0.8b-4bit 2048 1024,32768
//! ```
//!
//! Prints a JSON line per depth: seconds of each token, in turns of 8 tokens. `RECALL` 0 is two-pool attention.

use bfly::checkpoint::{Checkpoint, WeightDtype, WeightFormat};
use bfly::generate::watch;
use bfly::recall::{calibrate, Positions};
use bfly::retrofit::{PrefillKind, RetrofitPlan, Settings, WindowAlign};
use bfly::run::Run;
use bfly::weights::Weights;
use candle_core::Device;
use std::time::Instant;

const TURN: usize = 8;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [config, recall, depths, rest @ ..] = &args[..] else {
        return Err("usage: decode_depth CONFIG RECALL DEPTH,DEPTH,.. [ROUNDS]".into());
    };
    let rounds: usize = rest.first().map_or(Ok(16), |r| r.parse())?;
    let depths = depths.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>()?;
    let checkpoint = Checkpoint::random(config, 0)?;
    let format = WeightFormat::new(WeightDtype::Auto, 0, None);
    let weights = Weights::load(&checkpoint, &format, &Device::Cpu, &|_, _, _| ())?;
    let recall = recall.parse()?;
    let id = |i: usize| (i * 2_654_435_761 % checkpoint.spec.vocab) as u32;
    let mut settings = Settings { recall, prefill: PrefillKind::Butterfly, ..Settings::default() };
    if recall == 0 {
        (settings.window, settings.window_align) = (512, WindowAlign::Block);
    }
    if recall > 0 {
        let documents: Vec<Vec<u32>> = (0..4).map(|d| (0..2048).map(|i| id(d * 2048 + i)).collect()).collect();
        weights.calibrate(calibrate(&weights, &documents, settings.sink_tokens, Positions::Uniform, &|_, _, _| ())?);
    }
    let plan = RetrofitPlan::new(&checkpoint.spec, None, settings)?;
    let mut runs = vec![];
    for depth in &depths {
        let ids: Vec<u32> = (0..*depth).map(id).collect();
        let mut run = Run::new(&weights, &plan, depth + TURN * (rounds + 1))?;
        run.prefill(&ids, 1024, 1, &mut watch(|done| eprint!("\r{done} of {depth} tokens")))?;
        eprintln!();
        run.read(&ids[..TURN])?;
        runs.push((run, vec![]));
    }
    for round in 0..rounds {
        for (run, seconds) in &mut runs {
            for i in 0..TURN {
                let start = Instant::now();
                run.read(&[id(round * TURN + i + 7)])?;
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
    }
    for (depth, (_, seconds)) in depths.iter().zip(runs) {
        println!("{}", serde_json::json!({"config": config, "recall": recall, "depth": depth, "seconds": seconds}));
    }
    Ok(())
}
