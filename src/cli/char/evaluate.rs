//! `bfly-char eval`.

use super::trained::open;
use super::EvalArgs;
use crate::char::{bits_by_context, bits_by_position, encode, octaves, Batch, CharModel, Corpus, Windows};
use crate::cli::{print, Bars, Output};
use crate::error::{Error, Result};
use crate::stats::Estimate;
use candle_core::Tensor;
use std::fmt::Write;

/// Characters whose bits are compared between contexts.
const SEGMENT: usize = 1 << 10;

pub(super) fn eval(args: &EvalArgs) -> Result<()> {
    let output = args.json.as_ref().map(|path| Output::reserve(path, "--json")).transpose()?;
    let (model, weights) = open(&args.trained)?;
    let Some(window) = args.window else {
        return documents(args, &model, &weights);
    };
    let chunk = model.config().chunk;
    for (flag, value) in std::iter::once(("--window", window)).chain(args.contexts.iter().map(|c| ("--contexts", *c))) {
        model.config().check_whole(flag, value)?;
    }
    let corpus = Corpus::read(&args.texts)?;
    let documents = match args.held_out {
        true => corpus.held_out,
        false => [corpus.training, corpus.held_out].concat(),
    };
    let bars = Bars::new(false);
    // Seven ranges or more, from a chunk on; 1k characters and its octaves where windows are long.
    let (ranges, mut table) = (octaves((window / 64).clamp(chunk, SEGMENT.max(chunk)), window), String::new());
    let mut windows = Windows::new(&documents, window, args.seed)?;
    let count = args.windows.min(windows.per_epoch());
    let progress = |done: usize| bars.show("documents", done as u64, count as u64);
    let by_position = bits_by_position(&model, &weights, &mut windows, count, &ranges, progress)?;
    let column = |rows: &[Vec<f64>], i: usize| rows.iter().map(|row| row[i]).collect::<Vec<f64>>();
    let _ = writeln!(table, "position        bits a character, mean over {count} windows with 95% interval");
    for (i, range) in ranges.iter().enumerate() {
        line(&mut table, &format!("{} to {}", range.start, range.end), &column(&by_position, i));
    }
    let share = |range: &std::ops::Range<usize>| range.len() as f64 / window as f64;
    let overall: Vec<f64> =
        by_position.iter().map(|row| row.iter().zip(&ranges).map(|(b, r)| b * share(r)).sum()).collect();
    line(&mut table, "all", &overall);
    let mut by_context = vec![];
    if let Some(longest) = args.contexts.iter().max() {
        // Only whole documents: joined ones have no context that far back.
        let long: Vec<Vec<u8>> = documents.into_iter().filter(|d| d.len() >= longest + SEGMENT).collect();
        let mut windows = Windows::new(&long, longest + SEGMENT, args.seed)
            .map_err(|_| Error::usage("--contexts", format!("no document has {longest} and {SEGMENT} characters")))?;
        let count = args.windows.min(windows.per_epoch());
        let progress = |done: usize| bars.show("documents", done as u64, count as u64);
        by_context = bits_by_context(&model, &weights, &mut windows, count, (SEGMENT, &args.contexts), progress)?;
        let _ = writeln!(
            table,
            "\ncontext         bits a character of the same {count} x {SEGMENT} characters; gain over the first"
        );
        for (i, context) in args.contexts.iter().enumerate() {
            line(&mut table, &context.to_string(), &column(&by_context, i));
            if i > 0 {
                let gains: Vec<f64> = by_context.iter().map(|row| row[0] - row[i]).collect();
                line(&mut table, "  gain", &gains);
            }
        }
    }
    print(table)?;
    if let Some(output) = output {
        let ranges: Vec<[usize; 2]> = ranges.iter().map(|r| [r.start, r.end]).collect();
        let json = serde_json::json!({
            "kind": "bfly-char-eval", "schema_version": 1, "git_sha": env!("BFLY_GIT_SHA"),
            "command": std::env::args().collect::<Vec<_>>(), "device": crate::ops::describe(weights.device()),
            "corpus": corpus.hash, "window": window, "positions": ranges, "bits_by_position": by_position,
            "contexts": args.contexts, "segment": SEGMENT, "bits_by_context": by_context,
        });
        output.write(json.to_string().as_bytes())?;
    }
    Ok(())
}

fn line(table: &mut String, name: &str, values: &[f64]) {
    if let Some(estimate) = Estimate::of(values) {
        let _ = writeln!(table, "{name:<15} {}", estimate.show(4));
    }
}

/// Bits of whole files.
fn documents(args: &EvalArgs, model: &CharModel, weights: &Tensor) -> Result<()> {
    if args.json.is_some() || args.held_out || !args.contexts.is_empty() {
        return Err(Error::usage("--json, --held-out, --contexts", "ask for --window"));
    }
    for path in &args.texts {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let symbols = encode(&text, &path.display().to_string())?;
        if symbols.is_empty() {
            return Err(Error::usage(path.display(), "is empty"));
        }
        let batch = Batch::documents(&[&symbols], model.config().chunk);
        let nats: f64 = model.losses(weights, &batch)?.iter().map(|l| f64::from(*l)).sum();
        let bits = nats / std::f64::consts::LN_2 / symbols.len() as f64;
        print(format!("{}  {} characters  {bits:.4} bits a character\n", path.display(), symbols.len()))?;
    }
    Ok(())
}
