//! `bfly-retrofit`: runs one prompt through one model and reports time and memory.

use super::calibration::make as make_calibration;
use super::char::{character_model, run_character_model};
use super::console::ignore_broken_pipe;
use super::ledger::{FetchedRows, KvBytes, LEDGER_KIND, LEDGER_VERSION};
use super::output::{not_of_kind, not_of_tensors};
use super::{describe, human_bytes, open_device, peak_memory, short_count, signals, weight_format};
use super::{Bars, CalibrateArgs, Ledger, Output, Patch, RunArgs};
use crate::checkpoint::{Checkpoint, Detokenizer, OnProgress, TextTokenizer, WeightDtype};
use crate::error::{At, Error, ErrorKind, Result};
use crate::generate::{render_chat, watch, MemoryNeeds, Phase, Request, Sampler};
use crate::layout::{Layout, MAX_CONTEXT};
use crate::ops::device_memory;
use crate::recall::{KeyCodeChoice, Positions};
use crate::retrofit::{parse_layers, RetrofitPlan};
use crate::run::Run;
use crate::spec::{AttentionKind, ModelSpec};
use crate::weights::Weights;
use candle_core::{Device, Tensor};
use std::collections::HashMap;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::Path;

/// Names of the tensors in a `--logits-out` file, sorted.
const LOGITS: [&str; 2] = ["logits", "token_ids"];

/// Runs `bfly-retrofit`. Flags, files and the plan are checked before weights are read.
///
/// # Errors
/// A bad flag or file, a plan or prompt that does not fit the model, a device without enough memory, or a failed write.
pub fn run(args: &RunArgs) -> Result<()> {
    if let Some(dir) = character_model(args.model.model.as_deref().unwrap_or_default()) {
        return run_character_model(args, &dir);
    }
    let bars = Bars::new(args.quiet);
    let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
    args.model.set_threads()?;
    let device = open_device(&args.model.device)?;
    let mut sampler = Sampler::new(args.sampling.sampling())?;
    let json = args.json.as_deref().map(reserve_report).transpose()?;
    let logits_out = args.logits_out.as_deref().map(reserve_logits).transpose()?;
    args.save.as_deref().map(|dir| Patch::check(dir, "--save")).transpose()?;
    let Inputs { checkpoint, patch, plan, ctx, ids, text } = Inputs::open(args, &progress)?;
    let spec = &checkpoint.spec;
    checkpoint.take_warnings().iter().for_each(|w| bars.warn(w));
    warn_past_training(&bars, spec, ctx);
    let name = args.model.model.as_deref().unwrap_or_default();
    let request: WeightDtype = args.model.dtype.parse()?;
    let format = weight_format(request, &checkpoint, &device);
    let layout = Layout::new(spec, plan.as_ref(), ctx)?;
    let weights = Weights::load(&checkpoint, &format, &device, &progress)?;
    let tokens = ids.len() + args.sampling.max_new_tokens;
    // A saved patch is for any later prompt.
    let tokens = Some(tokens).filter(|_| args.save.is_none());
    if let Some(layer) = layout.recall().next() {
        let warn = |line: &str| bars.warn(line);
        super::prepare_recall(&weights, &checkpoint, &layer.settings, tokens, patch.as_ref(), (&warn, &progress))?;
    }
    if let (Some(dir), Some(plan)) = (&args.save, &plan) {
        Patch::save(dir, &checkpoint, ctx, plan, weights.calibration().ok(), "--save", &progress)?;
        bars.say(&format!("saved {}; run it with --model {}", dir.display(), dir.display()));
    }
    let chunk = chunk(args, &weights, &layout)?;
    let mut run = Run::with_layout(&weights, layout)?;
    if !weights.host_memory().is_locked() {
        bars.warn("the system does not lock host memory for the GPU: the host gathers the rows that recall fetches");
    }
    let mut stream = text.as_ref().map(Detokenizer::new);
    let mut stdout = Stdout::default();
    let made = run.generate(
        &Request {
            prompt: &ids,
            max_new_tokens: args.sampling.max_new_tokens,
            chunk,
            logits_last: args.logits_last,
            phase: Phase::Prefill,
            stop: text.as_ref().filter(|_| !args.sampling.ignore_eos).map_or(&[], |t| &t.stop),
        },
        &mut sampler,
        &mut watch(|n| bars.show("prefill", n as u64, ids.len() as u64)),
        &mut |id| {
            signals::decoding();
            if let Some(stream) = &mut stream {
                stdout.show(&stream.push(id));
            }
            match stdout.failed.is_none() && !signals::interrupted() {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        },
    )?;
    if let Some(stream) = &mut stream {
        stdout.show(&(stream.finish()? + "\n"));
    }
    if let Some(file) = logits_out {
        file.write(&logits_file(&made.prompt_logits, &ids)?)?;
    }
    stay_within(args.memory_budget, &device)?;
    let mut ledger = Ledger {
        kind: LEDGER_KIND,
        schema_version: LEDGER_VERSION,
        git_sha: env!("BFLY_GIT_SHA"),
        model: checkpoint.identity.as_given(name),
        spec: spec.clone(),
        reach: run.layout().reach(),
        plan,
        ctx,
        device: describe(&device),
        dtype: request.to_string(),
        held: format.bytes_by_type(),
        threads: rayon::current_num_threads(),
        prefill_chunk: chunk,
        prompt_tokens: ids.len(),
        generated_tokens: made.tokens.len(),
        prefill_s: 0.0,
        ttft_s: 0.0,
        decode_s: 0.0,
        prefill_tok_s: 0.0,
        decode_tok_s: 0.0,
        decode_steps_s: vec![],
        peak_memory_bytes: peak_memory(),
        peak_device_bytes: device_memory(&device).map(|m| m.peak),
        weights_bytes: weights.bytes(),
        kv: KvBytes::of(run.cache()),
        fetched: run.cache().fetched()?.map(|(bytes, repeated)| FetchedRows {
            bytes_per_step: bytes as f64 / made.timing.steps.len().max(1) as f64,
            repeated,
        }),
        text: stream.map(|s| s.text().to_string()),
        token_ids: made.tokens,
    };
    ledger.time(&made.timing);
    bars.say(&format!("\n{}", ledger.render().trim_end()));
    if let Some(json) = json {
        let mut bytes = serde_json::to_vec_pretty(&ledger).map_err(|e| Error::format("--json", e))?;
        bytes.push(b'\n');
        json.write(&bytes)?;
    }
    // A failed stdout is reported last, so that it does not cost the report, which holds the generated text.
    stdout.failed.map_or(Ok(()), |e| ignore_broken_pipe(Err(e)))
}

/// Writes generated text to stdout; keeps the first write error, which ends the text but not the ledger and the report.
#[derive(Default)]
struct Stdout {
    failed: Option<std::io::Error>,
}

impl Stdout {
    fn show(&mut self, piece: &str) {
        if self.failed.is_none() && !piece.is_empty() {
            let mut stdout = std::io::stdout().lock();
            self.failed = stdout.write_all(piece.as_bytes()).and_then(|()| stdout.flush()).err();
        }
    }
}

/// Runs `bfly-retrofit calibrate`: calibrates exact recall and saves it with a plan as a patch.
///
/// # Errors
/// A bad flag, a model or text that cannot be read, a text too short, or a failed write.
pub fn calibrate(args: &CalibrateArgs) -> Result<()> {
    let bars = Bars::new(args.quiet);
    let progress = |stage: &str, done: u64, total: u64| bars.show(stage, done, total);
    args.model.set_threads()?;
    let device = open_device(&args.model.device)?;
    let name = args.model.model.as_deref().unwrap_or_default();
    let settings = args.retrofit.without_plan();
    settings.validate()?;
    Patch::check(&args.out, "--out")?;
    if settings.recall == 0 {
        return Err(Error::usage("--recall", "0 turns exact recall off: nothing needs a calibration"));
    }
    if args.positions == Positions::Natural {
        KeyCodeChoice::parse(&settings.key_code)?.check_natural()?;
    }
    let checkpoint = Checkpoint::open(name, &args.model.open_options(), &progress)?;
    checkpoint.take_warnings().iter().for_each(|w| bars.warn(w));
    let layers = args.retrofit.layers.as_deref().map(parse_layers).transpose()?.flatten();
    let plan = RetrofitPlan::new(&checkpoint.spec, layers, settings)?;
    let ctx = args.ctx.unwrap_or(checkpoint.spec.max_positions);
    let format = weight_format(args.model.dtype.parse()?, &checkpoint, &device);
    let weights = Weights::load(&checkpoint, &format, &device, &progress)?;
    let of = (plan.settings.sink_tokens, args.positions);
    let made = make_calibration(&weights, &checkpoint, args.texts.as_deref(), of, &progress)?;
    Patch::save(&args.out, &checkpoint, ctx, &plan, Some(&made), "--out", &progress)?;
    bars.say(&format!("saved {}; run it with --model {}", args.out.display(), args.out.display()));
    Ok(())
}

fn reserve_report(path: &Path) -> Result<Output> {
    Output::reserve_replacing(path, "--json", |json| not_of_kind(path, json, LEDGER_KIND, "an earlier report"))
}

fn reserve_logits(path: &Path) -> Result<Output> {
    Output::reserve_replacing(path, "--logits-out", |_| not_of_tensors(path, &LOGITS, "an earlier file of logits"))
}

/// Inputs of a run, opened and checked against each other.
struct Inputs {
    checkpoint: Checkpoint,
    patch: Option<Patch>,
    plan: Option<RetrofitPlan>,
    ctx: usize,
    ids: Vec<u32>,
    text: Option<TextTokenizer>,
}

impl Inputs {
    fn open(args: &RunArgs, progress: OnProgress) -> Result<Self> {
        let name = args.model.model.as_deref().unwrap_or_default();
        let patch = Patch::open(name)?;
        let (saved, plan_patch) = match args.retrofit.plan.as_deref() {
            Some(path) if path.is_dir() => {
                let missing = || Error::usage(format!("--plan {}", path.display()), "is a directory without a patch");
                (None, Some(Patch::open(&path.to_string_lossy())?.ok_or_else(missing)?))
            }
            path => (path.map(RetrofitPlan::load).transpose()?, None),
        };
        let base = saved.or(plan_patch.as_ref().or(patch.as_ref()).map(|p| p.plan.clone()));
        let layers = args.retrofit.layers.as_deref().map(parse_layers).transpose()?;
        let mut settings = match &base {
            Some(plan) => args.retrofit.settings(plan.settings.clone()),
            None => args.retrofit.without_plan(),
        };
        settings.seed = args.sampling.seed.unwrap_or(settings.seed);
        settings.validate()?;
        let (text_prompt, id_prompt) = (args.prompt.text()?, args.prompt.ids()?);

        let options = args.model.open_options();
        let checkpoint = match &patch {
            Some(patch) => patch.base(&options, progress)?,
            None => Checkpoint::open(name, &options, progress)?,
        };
        if let Some(plan_patch) = &plan_patch {
            plan_patch.check_base(&checkpoint, progress)?;
        }
        let patch = plan_patch.or(patch);
        let spec = &checkpoint.spec;
        if let Some(base) = &base {
            let place = args.retrofit.plan.as_deref().unwrap_or(Path::new(name));
            base.check(spec).map_err(|e| e.within(place.display()))?;
        }
        let layers = layers.unwrap_or(base.map(|p| p.layers));
        let plan = (!args.retrofit.stock).then(|| RetrofitPlan::new(spec, layers, settings)).transpose()?;
        let ctx = args.ctx.or(patch.as_ref().map(|p| p.ctx)).unwrap_or(spec.max_positions);
        let (ids, text) = prompt_ids(args, &checkpoint, text_prompt, id_prompt)?;
        let inputs = Self { checkpoint, patch, plan, ctx, ids, text };
        inputs.check(args)?;
        Ok(inputs)
    }

    fn check(&self, args: &RunArgs) -> Result<()> {
        let (count, new, ctx) = (self.ids.len(), args.sampling.max_new_tokens, self.ctx);
        let need = count.saturating_add(new);
        if need > ctx {
            let way = match need > MAX_CONTEXT {
                true => format!("the longest context is {}: give a smaller -n", short_count(MAX_CONTEXT)),
                false => format!("give --ctx {need} or more"),
            };
            let message = format!("{ctx} tokens are too few for a prompt of {count} and {new} new tokens; {way}");
            return Err(Error::new(ErrorKind::Context, "--ctx", message));
        }
        if args.logits_last == 0 || args.logits_last > count {
            let message = format!("{} is not from 1 to {count}, the prompt's length", args.logits_last);
            return Err(Error::usage("--logits-last", message));
        }
        let place = args.prompt.token_ids.as_ref().map_or("the prompt", |_| "--token-ids");
        let vocab = self.checkpoint.spec.vocab;
        if let Some(id) = self.ids.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::usage(place, format!("token id {id} is outside the vocabulary of {vocab} tokens")));
        }
        if let Some((id, key)) = self.checkpoint.placeholders().into_iter().find(|(id, _)| self.ids.contains(id)) {
            let message = format!("token id {id} is the configuration's `{key}`; only text is supported");
            return Err(Error::unsupported(place, message));
        }
        Ok(())
    }
}

fn prompt_ids(
    args: &RunArgs,
    checkpoint: &Checkpoint,
    text: Option<String>,
    ids: Option<Vec<u32>>,
) -> Result<(Vec<u32>, Option<TextTokenizer>)> {
    if let Some(ids) = ids {
        return Ok((ids, checkpoint.tokenizer().ok()));
    }
    let tokenizer = checkpoint.tokenizer()?;
    let text = text.unwrap_or_default();
    let ids = match args.prompt.chat {
        false => tokenizer.encode(&text, true)?,
        true => {
            let chat = render_chat(tokenizer.chat_template()?, args.prompt.system.as_deref(), &text)?;
            tokenizer.encode(&chat, false)?
        }
    };
    match ids.is_empty() {
        true => Err(Error::usage("--prompt", "the prompt is empty")),
        false => Ok((ids, Some(tokenizer))),
    }
}

/// Returns the tokens per prefill chunk: `--prefill-chunk` or the device's default, reduced to fit `--memory-budget`.
fn chunk(args: &RunArgs, weights: &Weights, layout: &Layout) -> Result<usize> {
    let default = if weights.device().is_cpu() { 512 } else { 4096 };
    let wanted = args.prefill_chunk.unwrap_or(default);
    match args.memory_budget {
        None => Ok(wanted),
        Some(_) if weights.device().is_cpu() => {
            let message = "counts GPU memory, but this run is on a CPU; use --prefill-chunk instead";
            Err(Error::unsupported("--memory-budget", message))
        }
        Some(budget) => MemoryNeeds::of(weights, layout)?.chunk_within(budget, wanted),
    }
}

/// Returns an error if the run's peak GPU memory exceeded `--memory-budget`.
fn stay_within(budget: Option<u64>, device: &Device) -> Result<()> {
    match (budget, device_memory(device)) {
        (Some(budget), Some(memory)) if memory.peak > budget => {
            let (peak, budget) = (human_bytes(memory.peak), human_bytes(budget));
            Err(Error::new(
                ErrorKind::Memory,
                "--memory-budget",
                format!("the run used {peak}, above the {budget} allowed"),
            ))
        }
        _ => Ok(()),
    }
}

fn warn_past_training(bars: &Bars, spec: &ModelSpec, ctx: usize) {
    if ctx > spec.max_positions {
        let full = spec.attention().find(|(_, a)| a.kind == AttentionKind::Full);
        let scaling = full.map_or("none".into(), |(_, a)| spec.ropes[a.rope].scaling.describe());
        bars.warn(&format!(
            "--ctx {ctx} is longer than the {} positions this model was trained for (rope scaling: {scaling}); output quality is \
             likely to degrade",
            spec.max_positions
        ));
    }
}

fn logits_file(logits: &Tensor, ids: &[u32]) -> Result<Vec<u8>> {
    let ids = Tensor::new(ids, &Device::Cpu)?;
    let logits = &logits.to_device(&Device::Cpu)?;
    let map: HashMap<_, _> = LOGITS.into_iter().zip([logits, &ids]).collect();
    safetensors::serialize(map, None).map_err(candle_core::Error::wrap).at("--logits-out")
}
