//! Use of a trained character model: `bfly-char generate`, `eval` and `recall`.

use super::{ExportArgs, GenerateArgs, RecallArgs, StreamArgs, TrainedArgs};
use crate::char::{
    checkpoint, decode, encode, CharModel, Corpus, RecallTask, Recalled, Rematerialise, Stream, Streaming, Windows,
    END_OF_TEXT,
};
use crate::checkpoint::{directory, OpenOptions};
use crate::cli::{human_bytes, note, open_device, print, Bars, Output, SamplingArgs};
use crate::error::{At, Error, ErrorKind, Result};
use crate::generate::Sampler;
use crate::stats::median;
use crate::train::Objective;
use candle_core::{Device, Tensor, D};
use rand::Rng;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Directory of the model that the sources come with.
const BUNDLED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/results/2026-11-30-h200-char/tiny");

/// The directory of `model`: a local one, one from the hub, or that of the model that the sources come with.
fn locate(model: Option<&Path>) -> Result<PathBuf> {
    let bars = Bars::new(false);
    match model {
        None if Path::new(BUNDLED).is_dir() => Ok(BUNDLED.into()),
        None => Err(Error::usage("--model", format!("none is given, and there is none at {BUNDLED}"))),
        Some(path) if path.exists() => checkpoint::resolve(path),
        Some(id) => {
            directory(&id.to_string_lossy(), &OpenOptions::default(), &|stage, n, all| bars.show(stage, n, all))
        }
    }
}

/// The model and weights that flags name.
pub(super) fn open(args: &TrainedArgs) -> Result<(CharModel, Tensor)> {
    read(&locate(args.model.as_deref())?, &open_device(&args.device)?)
}

/// The model and weights of a directory.
fn read(dir: &Path, device: &Device) -> Result<(CharModel, Tensor)> {
    let model = CharModel::new(checkpoint::config(dir)?, Rematerialise::Nothing, device)?;
    let weights = checkpoint::weights(dir, model.layout(), device)?;
    Ok((model, weights))
}

/// An empty text on the device of the weights.
fn stream<'a>(model: &'a CharModel, weights: &Tensor) -> Result<Box<dyn Streaming + 'a>> {
    #[cfg(feature = "cuda")]
    if weights.device().is_cuda() {
        return Ok(Box::new(crate::char::GpuStream::new(model, weights)?));
    }
    Ok(Box::new(Stream::new(model, weights)?))
}

pub(super) fn generate(args: &GenerateArgs) -> Result<()> {
    let dir = locate(args.trained.model.as_deref())?;
    continue_text(&dir, &args.trained.device, &args.prompt, &args.sampling, args.stats)
}

/// Prints `prompt` and what the model of `dir` continues it with; `stats` adds time and memory.
pub(super) fn continue_text(
    dir: &Path,
    device: &str,
    prompt: &str,
    sampling: &SamplingArgs,
    stats: bool,
) -> Result<()> {
    let symbols = encode(prompt, "--prompt")?;
    let mut sampler = Sampler::new(sampling.sampling())?;
    let (model, weights) = read(dir, &open_device(device)?)?;
    let mut stream = stream(&model, &weights)?;
    let read = [&[END_OF_TEXT][..], &symbols].concat();
    let none = || Error::new(ErrorKind::Backend, "prompt", "no symbol was read");
    let mut logits = stream.read_all(&read)?.ok_or_else(none)?;
    print(prompt)?;
    let start = Instant::now();
    let mut made = 0;
    while made < sampling.max_new_tokens {
        let row = Tensor::new(logits.as_slice(), &Device::Cpu).and_then(|l| l.unsqueeze(0));
        let row = row.at("logits")?;
        let symbol = u8::try_from(sampler.sample(&row)?)
            .map_err(|_| Error::new(ErrorKind::Backend, "sampling", "a symbol beyond Latin-1"))?;
        if symbol == END_OF_TEXT && !sampling.ignore_eos {
            break;
        }
        print(decode(&[symbol]))?;
        logits = stream.read(symbol)?;
        made += 1;
    }
    print("\n")?;
    if stats {
        let each = start.elapsed().as_secs_f64() * 1e3 / made.max(1) as f64;
        let bytes = human_bytes(stream.bytes());
        note(format_args!("{made} characters, {each:.2} ms each; {bytes} of keys and values, whatever the length"));
    }
    Ok(())
}

pub(super) fn time_stream(args: &StreamArgs) -> Result<()> {
    let output = args.json.as_ref().map(|path| Output::reserve(path, "--json")).transpose()?;
    let (model, weights) = open(&args.trained)?;
    let (mut rows, mut table) = (vec![], String::from("read        ms a character, median of each\n"));
    for at in &args.at {
        let mut rng = crate::train::random(*at as u64, 0);
        let mut letters = |count| (0..count).map(|_| rng.random_range(b'a'..=b'z')).collect::<Vec<u8>>();
        let (before, timed) = (letters(*at), letters(args.count));
        let mut stream = stream(&model, &weights)?;
        stream.read_all(&before)?;
        let mut seconds = vec![];
        for symbol in &timed {
            let start = Instant::now();
            stream.read(*symbol)?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        let _ = writeln!(table, "{at:<11} {:.4}", 1e3 * median(&seconds).unwrap_or(f64::NAN));
        rows.push(serde_json::json!({ "read": at, "seconds": seconds, "bytes": stream.bytes() }));
    }
    print(table)?;
    if let Some(output) = output {
        let json = serde_json::json!({
            "kind": "bfly-char-stream", "schema_version": 1, "git_sha": env!("BFLY_GIT_SHA"),
            "command": std::env::args().collect::<Vec<_>>(), "device": crate::ops::describe(weights.device()), "streams": rows,
        });
        output.write(json.to_string().as_bytes())?;
    }
    Ok(())
}

pub(super) fn export(args: &ExportArgs) -> Result<()> {
    let (model, weights) = read(&checkpoint::resolve(&args.model)?, &Device::Cpu)?;
    checkpoint::export(&args.out, model.config(), model.layout(), &weights)
}

/// Windows computed at once.
const AT_ONCE: usize = 4;

pub(super) fn recall(args: &RecallArgs) -> Result<()> {
    let (model, weights) = open(&args.trained)?;
    let chunk = model.config().chunk;
    model.config().check_whole("--window", args.window)?;
    let output = args.json.as_ref().map(|path| Output::reserve(path, "--json")).transpose()?;
    let (task, bars) = (RecallTask::over(args.window, args.seed)?, Bars::new(false));
    let mut texts = match args.texts.as_slice() {
        [] => None,
        texts => Some(Windows::new(&Corpus::read(texts)?.held_out, args.window, args.seed)?),
    };
    let mut recalled = Recalled::default();
    for first in (0..args.windows).step_by(AT_ONCE) {
        let (batch, asked) = task.batch(first as u64, AT_ONCE.min(args.windows - first), texts.as_mut());
        let logits = model.logits(&weights, &batch.symbols, batch.sequences)?;
        let best: Vec<u32> = logits.argmax(D::Minus1).and_then(|b| b.to_vec1()).at("logits")?;
        recalled.add(&batch, &asked, &best);
        bars.show("documents", (first + AT_ONCE).min(args.windows) as u64, args.windows as u64);
    }
    let mut table = String::from("distance         values  letters right\n");
    let mut line = |name: String, (share, values): (f64, usize)| {
        if values > 0 {
            let _ = writeln!(table, "{name:<15} {values:>7}  {:>6.1}%", 100.0 * share);
        }
    };
    let octaves = std::iter::successors(Some(16usize), |d| d.checked_mul(2)).take_while(|d| *d < args.window);
    for from in octaves {
        line(format!("{from} to {}", 2 * from - 1), recalled.share(from..2 * from));
    }
    line("all".into(), recalled.share(0..args.window));
    for bits in 0..usize::BITS {
        line(format!("{bits} set bits"), recalled.share_of_bits(bits, chunk));
    }
    print(table)?;
    if let Some(output) = output {
        let values: Vec<_> = recalled.iter().map(|(asked, right)| [asked.at, asked.distance, right]).collect();
        let json = serde_json::json!({
            "kind": "bfly-char-recall", "schema_version": 1, "git_sha": env!("BFLY_GIT_SHA"),
            "command": std::env::args().collect::<Vec<_>>(), "window": args.window, "chunk": chunk,
            "columns": ["place", "distance", "letters_right_of_16"], "values": values,
        });
        output.write(json.to_string().as_bytes())?;
    }
    Ok(())
}
