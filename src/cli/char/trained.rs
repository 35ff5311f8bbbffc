//! Use of a trained character model: `bfly-char generate`, `eval` and `recall`.

use super::{EvalArgs, GenerateArgs, RecallArgs};
use crate::char::{
    checkpoint, decode, encode, Batch, CharModel, RecallTask, Recalled, Rematerialise, Stream, END_OF_TEXT,
};
use crate::cli::{human_bytes, note, print, Bars};
use crate::error::{At, Error, ErrorKind, Result};
use crate::generate::Sampler;
use crate::train::Objective;
use candle_core::{Device, Tensor, D};
use std::fmt::Write;
use std::path::Path;
use std::time::Instant;

/// The model and weights of a directory.
fn open(path: &Path) -> Result<(CharModel, Tensor)> {
    let dir = checkpoint::resolve(path)?;
    let model = CharModel::new(checkpoint::config(&dir)?, Rematerialise::Nothing, &Device::Cpu)?;
    let weights = checkpoint::weights(&dir, model.layout(), &Device::Cpu)?;
    Ok((model, weights))
}

pub(super) fn generate(args: &GenerateArgs) -> Result<()> {
    let (model, weights) = open(&args.model)?;
    let prompt = encode(&args.prompt, "--prompt")?;
    let (mut sampler, mut stream) = (Sampler::new(args.sampling.sampling())?, Stream::new(&model, &weights)?);
    let mut logits = stream.read(END_OF_TEXT)?;
    for symbol in &prompt {
        logits = stream.read(*symbol)?;
    }
    print(&args.prompt)?;
    let start = Instant::now();
    let mut made = 0;
    while made < args.sampling.max_new_tokens {
        let row = Tensor::new(logits.as_slice(), &Device::Cpu).and_then(|l| l.unsqueeze(0));
        let row = row.at("logits")?;
        let symbol = u8::try_from(sampler.sample(&row)?)
            .map_err(|_| Error::new(ErrorKind::Backend, "sampling", "a symbol beyond Latin-1"))?;
        if symbol == END_OF_TEXT && !args.sampling.ignore_eos {
            break;
        }
        print(decode(&[symbol]))?;
        logits = stream.read(symbol)?;
        made += 1;
    }
    print("\n")?;
    if args.stats {
        let each = start.elapsed().as_secs_f64() * 1e3 / made.max(1) as f64;
        let bytes = human_bytes(stream.bytes());
        note(format_args!("{made} characters, {each:.2} ms each; {bytes} of keys and values, whatever the length"));
    }
    Ok(())
}

pub(super) fn eval(args: &EvalArgs) -> Result<()> {
    let (model, weights) = open(&args.model)?;
    for path in &args.texts {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        let symbols = encode(&text, &path.display().to_string())?;
        if symbols.is_empty() {
            return Err(Error::usage(path.display(), "is empty"));
        }
        let batch = Batch::documents(&[&symbols], model.config().chunk);
        let nats: f64 = model.losses(&weights, &batch)?.iter().map(|l| f64::from(*l)).sum();
        let bits = nats / std::f64::consts::LN_2 / symbols.len() as f64;
        print(format!("{}  {} characters  {bits:.4} bits a character\n", path.display(), symbols.len()))?;
    }
    Ok(())
}

/// Windows computed at once.
const AT_ONCE: usize = 4;

pub(super) fn recall(args: &RecallArgs) -> Result<()> {
    let (model, weights) = open(&args.model)?;
    let chunk = model.config().chunk;
    if !args.window.is_multiple_of(chunk) {
        return Err(Error::usage(
            "--window",
            format!("{} is not a multiple of the chunk, {chunk} characters", args.window),
        ));
    }
    let (task, bars) = (RecallTask::over(args.window, args.seed)?, Bars::new(false));
    let mut recalled = Recalled::default();
    for first in (0..args.windows).step_by(AT_ONCE) {
        let (batch, asked) = task.batch(first as u64, AT_ONCE.min(args.windows - first));
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
    print(table)
}
