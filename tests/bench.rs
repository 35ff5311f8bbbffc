//! bfly-bench: ladders with variants and peers, resuming, random weights, kernels, and bad input.

mod common;

use assert_cmd::Command;
use bfly::bench::format::{read, Kernels, Ladder, Run, KERNELS, LADDER};
use bfly::bench::machine;
use bfly::bench::prompt::{hash, Stream};
use bfly::checkpoint::{Checkpoint, Held, HoldAs};
use bfly::generate::{Request, Sampler, Sampling, Session};
use bfly::retrofit::Settings;
use candle_core::quantized::GgmlDType;
use candle_core::Device;
use common::*;
use serde_json::{json, Value};
use std::path::{Path, PathBuf};

/// A place for a ladder's file, and the flags that most tests share: a tiny checkpoint without a tokenizer, on the CPU.
struct Place {
    dir: tempfile::TempDir,
    model: String,
}

/// The retrofit that these short contexts can hold.
const RETROFIT: &str = "retrofit:block=16,window=32";

impl Place {
    fn new() -> Any<Self> {
        Ok(Self { dir: tempfile::tempdir()?, model: golden_dir("qwen2").to_string_lossy().into_owned() })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn out(&self) -> PathBuf {
        self.path("ladder.json")
    }

    fn ladder(&self, flags: &[&str]) -> Command {
        let mut command = bench("ladder");
        command.args(["--model", &self.model, "--device", "cpu", "--threads", "1", "--decode", "8"]);
        command.arg("--out").arg(self.out()).args(flags);
        command
    }

    /// Runs it and reads what it wrote.
    fn climb(&self, flags: &[&str]) -> Any<Ladder> {
        self.ladder(flags).assert().success();
        Ok(read(&self.out(), LADDER)?)
    }

    /// Runs it where it must refuse: one error, nothing on stdout, and the file as it was.
    fn refuses(&self, flags: &[&str], says: &[&str]) {
        let before = std::fs::read(self.out()).ok();
        refused(&mut self.ladder(flags), says);
        assert!(std::fs::read(self.out()).ok() == before, "{flags:?} touched the file");
    }

    /// Rewrites the file.
    fn edit(&self, change: impl FnOnce(&mut Value)) -> Any {
        let mut value = serde_json::from_str(&std::fs::read_to_string(self.out())?)?;
        change(&mut value);
        Ok(std::fs::write(self.out(), value.to_string())?)
    }
}

fn bench(command: &str) -> Command {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_bfly-bench"));
    bench.arg(command);
    bench
}

fn refused(command: &mut Command, says: &[&str]) {
    let out = command.output().expect("the binary runs");
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(2), "{stderr}");
    assert!(!stderr.contains("panicked") && out.stdout.is_empty(), "{stderr}");
    assert_eq!(stderr.lines().filter(|l| l.starts_with("error:")).count(), 1, "{stderr}");
    for word in says {
        assert!(stderr.contains(word), "should say `{word}`: {stderr}");
    }
}

/// The command of the fake peer.
fn peer(args: &str) -> String {
    format!("python3 {}/tests/fixtures/bench/peer.py {args}", env!("CARGO_MANIFEST_DIR"))
}

fn run<'a>(ladder: &'a Ladder, variant: &str, ctx: usize) -> &'a Run {
    ladder.runs.iter().find(|r| r.variant == variant && r.ctx == ctx).expect("the ladder has the run")
}

/// The first ids that the tiny checkpoint is given.
fn prompt(tokens: usize) -> Any<Vec<u32>> {
    let checkpoint = open(&golden_dir("qwen2").to_string_lossy())?;
    Ok(Stream::open(&checkpoint, Path::new("none"), tokens, 0, &|_, _, _| ())?.ids)
}

#[test]
fn a_ladder_holds_every_sample_of_every_variant() -> Any {
    let place = Place::new()?;
    let variants = format!("stock,{RETROFIT}");
    let out = place.ladder(&["--ctx", "256,128", "--variants", &variants, "--repeats", "3"]).output()?;
    let (stdout, stderr) = (String::from_utf8(out.stdout)?, String::from_utf8(out.stderr)?);
    assert!(out.status.success(), "{stderr}");
    let ladder: Ladder = read(&place.out(), LADDER)?;
    assert_eq!((ladder.name.as_str(), ladder.dtype.as_str(), ladder.kv_dtype.as_str()), ("qwen2", "f32", "f32"));
    assert_eq!((ladder.decode_tokens, ladder.trained_positions, ladder.random_weights), (8, 32768, None));
    assert_eq!(
        (ladder.prompt.documents.as_slice(), ladder.prompt.tokens),
        (["random ids".to_string()].as_slice(), 248)
    );
    assert_eq!(ladder.prompt.sha256, hash(&prompt(248)?));
    assert!(ladder.ceilings.is_none() && ladder.machine.memory_bytes > 0 && !ladder.git_sha.is_empty());
    let order: Vec<_> = ladder.runs.iter().map(|r| (r.ctx, r.variant.as_str())).collect();
    assert_eq!(order, [(128, "stock"), (128, RETROFIT), (256, "stock"), (256, RETROFIT)]);
    for r in &ladder.runs {
        assert_eq!((r.engine.as_str(), r.status.as_str(), r.prompt_tokens, r.warmups), ("bfly", "ok", r.ctx - 8, 1));
        assert_eq!((r.samples.len(), r.deterministic), (3, Some(true)));
        assert_eq!(r.plan.is_some(), r.variant != "stock");
        let (kv, s) = (r.kv.ok_or("no kv")?, r.summary.as_ref().ok_or("no summary")?);
        assert_eq!(kv.total_bytes, kv.local_bytes + kv.summary_bytes + kv.sink_bytes);
        assert_eq!(kv.total_bytes == kv.dense_bytes, r.variant == "stock");
        for x in &r.samples {
            assert!(0.0 < x.prefill_s && x.prefill_s <= x.ttft_s && x.ttft_s <= x.end_to_end_s);
            assert_eq!((x.inter_token_s.len(), x.fetched_tokens), (7, 1));
            assert!(x.peak_device_bytes > ladder.held["f32"], "{}", x.peak_device_bytes);
            assert!(x.prompt_s < 0.01 * x.end_to_end_s, "the prompt took {} s", x.prompt_s);
        }
        let mut times: Vec<_> = r.samples.iter().map(|x| x.end_to_end_s).collect();
        times.sort_by(f64::total_cmp);
        assert_eq!(s.end_to_end_s, times[1], "the median");
        let bytes = r.read_per_token.ok_or("no accounting")?;
        let rate = (bytes.weights as f64 + bytes.kv) / s.inter_token_p50_s / 1e9;
        assert!((s.decode_gb_s.ok_or("no rate")? / rate - 1.0).abs() < 1e-12);
        assert!(stdout.contains(&format!("bfly {}", r.variant)), "{stdout}");
    }
    // Each repeat begins with another variant.
    let turns: Vec<_> = stderr.lines().filter(|l| l.starts_with("  128")).map(|l| l.contains("stock")).collect();
    assert_eq!(turns, [true, false, false, true, true, false], "{stderr}");
    Ok(())
}

#[test]
fn variants_give_the_tokens_of_a_model_loaded_for_them() -> Any {
    // The golden case whose attention is sharp: its tokens show which keys were read.
    let model = golden_dir("llama3_rope").to_string_lossy().into_owned();
    let place = Place { model, ..Place::new()? };
    let variants = format!("{RETROFIT},stock,retrofit:block=16,window=16,layers=0,2");
    let ladder =
        place.climb(&["--ctx", "100,200", "--repeats", "1", "--variants", &variants, "--prefill-chunk", "50"])?;
    let ids = Stream::open(&open(&place.model)?, Path::new("none"), 192, 0, &|_, _, _| ())?.ids;
    let settings = |window| Settings { block: 16, window, ..Settings::default() };
    let mut seen = std::collections::HashSet::new();
    for r in &ladder.runs {
        let (settings, layers) = match r.variant.as_str() {
            "stock" => (None, vec![]),
            RETROFIT => (Some(settings(32)), vec![0, 1, 2]),
            _ => (Some(settings(16)), vec![0, 2]),
        };
        assert_eq!(r.plan.as_ref().map(|p| (&p.settings, &p.layers)), settings.as_ref().map(|s| (s, &layers)));
        let checkpoint = open(&place.model)?;
        let hold = HoldAs::new(Held::Auto, 0, None);
        let quiet: bfly::checkpoint::OnProgress = &|_, _, _| ();
        let model = bfly::model::Model::load(&checkpoint, r.plan.as_ref(), r.ctx, &hold, &Device::Cpu, quiet)?;
        let request = Request { prompt: &ids[..r.ctx - 8], max_new_tokens: 8, chunk: 50, stop: &[], logits_last: 1 };
        let mut sampler = Sampler::new(Sampling::GREEDY)?;
        let made = Session::new(&model)?.generate(&request, &mut sampler, &mut |_| (), &mut |_| true)?;
        assert_eq!(r.samples[0].tokens_sha256, hash(&made.tokens), "{} at {}", r.variant, r.ctx);
        seen.insert(hash(&made.tokens));
    }
    assert!(seen.len() > 2, "tokens that are all the same would prove nothing");
    Ok(())
}

#[test]
fn a_ladder_goes_on_where_it_was_cut_off() -> Any {
    let place = Place::new()?;
    let flags = ["--ctx", "64,128", "--repeats", "2", "--variants", "stock,retrofit:block=16,window=16"];
    let whole = place.climb(&flags)?;
    // As if interrupted in the second repeat at 128.
    place.edit(|l| {
        let runs = l["runs"].as_array_mut().unwrap();
        runs[2]["samples"].as_array_mut().unwrap().pop();
        runs.pop();
    })?;
    let resumed = place.climb(&flags)?;
    assert_eq!((resumed.resumed.len(), resumed.started.as_str()), (1, whole.started.as_str()));
    assert_eq!(resumed.runs.len(), 4);
    for (old, new) in whole.runs.iter().zip(&resumed.runs) {
        assert_eq!((&old.variant, old.ctx, new.samples.len()), (&new.variant, new.ctx, 2));
        let kept = if new.ctx == 64 { 2 } else { usize::from(new.variant == "stock") };
        let same = old.samples.iter().zip(&new.samples).take_while(|(a, b)| a == b).count();
        assert_eq!(same, kept, "{} at {}", new.variant, new.ctx);
        assert_eq!(old.samples[0].tokens_sha256, new.samples[1].tokens_sha256);
    }
    // A whole one is left alone, and further contexts and repeats are added to it.
    let before = std::fs::read(place.out())?;
    place.ladder(&flags).assert().success().stderr(predicates::str::contains("is complete"));
    assert_eq!(std::fs::read(place.out())?, before);
    let more = place.climb(&["--ctx", "64,256", "--repeats", "3", "--variants", "stock"])?;
    assert_eq!(more.prompt.tokens, 248);
    assert_eq!(run(&more, "stock", 64).samples.len(), 3);
    assert_eq!(run(&more, "stock", 64).samples[..2], run(&resumed, "stock", 64).samples[..]);
    assert_eq!((run(&more, "stock", 128).samples.len(), run(&more, "stock", 256).samples.len()), (2, 3));
    // Fewer than before are taken from the same stream.
    place.climb(&["--ctx", "64", "--repeats", "4", "--variants", "stock"])?;
    Ok(())
}

#[test]
fn a_killed_ladder_leaves_a_whole_file() -> Any {
    let place = Place::new()?;
    // The fifth request is the timed one at 128: warm-up, two samples, warm-up.
    let flags = ["--ctx", "64,128", "--repeats", "2", "--variants", "stock"];
    let hanging = peer("hang=5");
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_bfly-bench"))
        .args(["ladder", "--model", &place.model, "--device", "cpu", "--decode", "8", "--quiet"])
        .args(flags)
        .args(["--peer", &hanging, "--out"])
        .arg(place.out())
        .spawn()?;
    let begin = std::time::Instant::now();
    let samples = |l: &Ladder| l.runs.iter().map(|r| r.samples.len()).sum::<usize>();
    while read(&place.out(), LADDER).map_or(0, |l: Ladder| samples(&l)) < 5 {
        assert!(
            begin.elapsed().as_secs() < 60 && child.try_wait()?.is_none(),
            "the ladder should be waiting for its peer"
        );
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    child.kill()?;
    child.wait()?;
    let cut: Ladder = read(&place.out(), LADDER)?;
    assert_eq!((samples(&cut), run(&cut, "stock", 128).samples.len()), (5, 1));
    let entries = std::fs::read_dir(place.dir.path())?.count();
    assert_eq!(entries, 1, "nothing half-written stays beside the file");
    let whole = place.climb(&[&flags[..], &["--peer", &peer("")]].concat())?;
    assert_eq!(samples(&whole), 8);
    assert_eq!(run(&whole, "sdpa", 64).samples, run(&cut, "sdpa", 64).samples);
    Ok(())
}

#[test]
fn files_of_something_else_are_refused() -> Any {
    let place = Place::new()?;
    let flags = ["--ctx", "64", "--repeats", "1", "--variants", "stock,retrofit:block=16,window=16"];
    let fake = peer("");
    let with_peer = [&flags[..], &["--peer", &fake]].concat();
    place.climb(&with_peer)?;
    let good = std::fs::read_to_string(place.out())?;
    let file = place.out().display().to_string();
    let spoilt = |text: &str, flags: &[&str], says: &[&str]| -> Any {
        std::fs::write(place.out(), text)?;
        place.refuses(flags, &[says, &[file.as_str()]].concat());
        Ok(())
    };
    spoilt(&good[..good.len() / 2], &flags, &["is not a whole JSON file"])?;
    spoilt("", &flags, &["is not a whole JSON file"])?;
    spoilt(
        &good.replace("\"schema_version\":1,\"git", "\"schema_version\":7,\"git"),
        &flags,
        &["schema version 7; this build reads 1"],
    )?;
    spoilt(
        &good.replace("bfly-ladder", "bfly-kernels"),
        &flags,
        &["is of kind `bfly-kernels`; `bfly-ladder` is wanted"],
    )?;
    spoilt(
        &good.replace("\"decode_tokens\":8", "\"decode_tokens\":9"),
        &flags,
        &["another --decode: 9 there, 8 here"],
    )?;
    let other = |key: &str, value: Value| -> Any<String> {
        let mut l: Value = serde_json::from_str(&good)?;
        l[key] = value;
        Ok(l.to_string())
    };
    spoilt(&other("git_sha", "abc".into())?, &flags, &["another build (git_sha): abc there"])?;
    spoilt(&other("dtype", "bf16".into())?, &flags, &["another --dtype: bf16 there, f32 here"])?;
    spoilt(&other("random_weights", 3.into())?, &flags, &["another --random-weights: 3 there, null here"])?;
    let mut elsewhere: Value = serde_json::from_str(&good)?;
    elsewhere["machine"]["device"] = "H100".into();
    spoilt(&elsewhere.to_string(), &flags, &["another machine: ", "H100"])?;
    elsewhere = serde_json::from_str(&good)?;
    elsewhere["prompt"]["sha256"] = "00".into();
    spoilt(&elsewhere.to_string(), &flags, &["another prompt: its 56 tokens have the hash 00"])?;
    spoilt(
        &good,
        &[&flags[..], &["--prefill-chunk", "32"]].concat(),
        &["bfly stock with another --prefill-chunk: 4096 there, 32 here"],
    )?;
    spoilt(
        &good,
        &[&flags[..], &["--peer", &peer("version=2")]].concat(),
        &["fake sdpa with another version: \"1.0\" there, \"2\" here"],
    )?;
    elsewhere = serde_json::from_str(&good)?;
    elsewhere["runs"][1]["plan"]["settings"]["sink_tokens"] = 5.into();
    let flags_again = ["--ctx", "64", "--repeats", "2", "--variants", "stock,retrofit:block=16,window=16"];
    spoilt(&elsewhere.to_string(), &flags_again, &["retrofit:block=16,window=16 with another plan"])?;
    let llama = golden_dir("llama").to_string_lossy().into_owned();
    std::fs::write(place.out(), &good)?;
    let out = place.out().display().to_string();
    refused(
        bench("ladder").args(["--model", &llama, "--device", "cpu", "--decode", "8", "--ctx", "64", "--out", &out]),
        &["another"],
    );
    Ok(())
}

#[test]
fn peers_take_turns_on_the_same_ids() -> Any {
    let place = Place::new()?;
    let (a, b) = (peer("full=256"), peer("name=chunked seconds=0.25"));
    let flags = ["--ctx", "64,128,256,512", "--variants", "stock", "--repeats", "2", "--peer", &a, "--peer", &b];
    let out = place.ladder(&flags).output()?;
    let (stdout, stderr) = (String::from_utf8(out.stdout)?, String::from_utf8(out.stderr)?);
    assert!(out.status.success(), "{stderr}");
    let ladder: Ladder = read(&place.out(), LADDER)?;
    let ids = prompt(504)?;
    for ctx in [64, 128] {
        let r = run(&ladder, "sdpa", ctx);
        assert_eq!((r.engine.as_str(), r.version.as_deref(), r.weights_bytes), ("fake", Some("1.0"), Some(1000)));
        assert_eq!((r.status.as_str(), r.samples.len(), r.warmups), ("ok", 2, 1));
        assert_eq!((r.kv, r.kv_bytes, r.plan.is_none()), (None, Some(777), true));
        assert_eq!(r.samples[0].tokens_sha256, hash(&ids[..ctx - 8]), "it read the same ids");
        assert_eq!(
            r.summary.as_ref().map(|s| (s.end_to_end_s, s.decode_gb_s, s.peak_device_bytes)),
            Some((0.5, None, 12345))
        );
    }
    // Out of memory at 256, and not tried at 512; everyone else goes on.
    let statuses: Vec<_> = [256, 512].iter().map(|c| run(&ladder, "sdpa", *c).status.as_str()).collect();
    assert_eq!(statuses, ["out of memory: tried to allocate 9 GiB", "skipped: did not fit at 256"]);
    assert!([256, 512]
        .iter()
        .all(|c| run(&ladder, "sdpa", *c).samples.is_empty() && run(&ladder, "stock", *c).samples.len() == 2));
    assert_eq!(run(&ladder, "chunked", 512).samples.len(), 2);
    assert!(stdout.contains("256 fake sdpa: out of memory: tried to allocate 9 GiB"), "{stdout}");
    // bfly's stock is the faster of the stocks here.
    let row = stdout.lines().find(|l| l.contains("128") && l.contains("chunked")).ok_or("no row")?;
    let want = 0.25 / run(&ladder, "stock", 128).summary.as_ref().ok_or("no summary")?.end_to_end_s;
    assert!(row.contains("0.250 s") && row.contains(&format!("{want:.3}x")), "{row}: {want}");
    let first: Vec<_> = stderr.lines().filter(|l| l.contains("1/2")).take(3).collect();
    let second: Vec<_> = stderr.lines().filter(|l| l.contains("2/2")).take(3).collect();
    assert!(first[0].contains("stock") && second[0].contains("sdpa") && second[2].contains("stock"), "{stderr}");
    Ok(())
}

#[test]
fn long_runs_are_repeated_once_and_changing_tokens_are_told() -> Any {
    let place = Place::new()?;
    let (long, fickle) = (peer("name=long seconds=31"), peer("name=fickle mood=fickle"));
    let flags = ["--ctx", "64", "--variants", "stock", "--repeats", "4", "--peer", &long, "--peer", &fickle];
    let out = place.ladder(&flags).output()?;
    let stderr = String::from_utf8(out.stderr)?;
    let ladder: Ladder = read(&place.out(), LADDER)?;
    let of = |v: &str| (run(&ladder, v, 64).samples.len(), run(&ladder, v, 64).deterministic);
    assert_eq!([of("long"), of("stock"), of("fickle")], [(2, Some(true)), (4, Some(true)), (4, Some(false))]);
    let warnings: Vec<_> = stderr.lines().filter(|l| l.starts_with("warning")).collect();
    assert_eq!(warnings, ["warning:    64  fake fickle: run 2 gave other tokens than the runs before it"]);
    Ok(())
}

#[test]
fn peers_that_fail_are_named() -> Any {
    let place = Place::new()?;
    let sample = json!({"sample": {"prefill_s": 0.1, "ttft_s": 0.1, "end_to_end_s": 0.2, "inter_token_s": [0.1],
        "fetched_tokens": 1, "peak_device_bytes": 1, "prompt_s": 0, "tokens_sha256": ""}});
    for (args, says) in [
        ("mood=deaf".to_string(), &["ended without saying what it is (exit status: 3)"][..]),
        ("mood=unready".into(), &["is not ready: failed: no such model"]),
        ("mood=dying".into(), &["ended without saying a sample (exit status: 7)"]),
        ("mood=backwards".into(), &["a sample whose times do not rise: 1 0.25 0.5 s"]),
        ("engine=bfly".into(), &["calls itself `bfly`"]),
        ("say=hello".into(), &["should have said a sample, not `hello`"]),
        ("say={}".into(), &["neither a sample nor a status"]),
        (format!("say='{sample}'"), &["times between tokens are of about 1 tokens, not 7"]),
    ] {
        let command = peer(&args);
        let flags = ["--ctx", "64", "--variants", "retrofit", "--repeats", "1", "--peer", &command];
        refused(&mut place.ladder(&flags), &[says, &["--peer python3", args.as_str()]].concat());
        // What was measured before it failed is kept.
        let kept = read(&place.out(), LADDER).map_or(0, |l: Ladder| l.runs.len());
        assert!(kept == usize::from(place.out().exists()), "{args}: {kept} runs kept");
    }
    let _ = std::fs::remove_file(place.out());
    place.refuses(&["--ctx", "64", "--peer", "exit 5"], &["--peer exit 5", "exit status: 5"]);
    place.refuses(&["--ctx", "64", "--peer", &peer(""), "--peer", &peer("")], &["two are called fake sdpa"]);
    // A failure that a peer reports is an outcome.
    let command = peer("say='{\"status\": \"failed: something else\"}'");
    let ladder = place.climb(&["--ctx", "64", "--variants", "stock", "--repeats", "1", "--peer", &command])?;
    assert_eq!(run(&ladder, "sdpa", 64).status, "failed: something else");
    Ok(())
}

/// A directory that holds a golden configuration and nothing else.
fn bare(change: impl FnOnce(&mut Value)) -> Any<tempfile::TempDir> {
    let dir = variant("qwen2", change)?;
    std::fs::remove_file(dir.path().join("model.safetensors"))?;
    Ok(dir)
}

#[test]
fn random_weights_need_a_configuration_alone_and_results_say_so() -> Any {
    let (dir, mut place) = (bare(|_| ())?, Place::new()?);
    let flags =
        ["--ctx", "128", "--repeats", "1", "--variants", "stock,retrofit:block=16,window=16", "--random-weights"];
    let tokens = |l: &Ladder| -> Vec<String> { l.runs.iter().map(|r| r.samples[0].tokens_sha256.clone()).collect() };
    let mut seen = vec![];
    for (model, seed, dtype) in [
        (dir.path().to_path_buf(), "7", "auto"),
        (dir.path().join("config.json"), "7", "f32"),
        (dir.path().to_path_buf(), "8", "f32"),
        (dir.path().to_path_buf(), "7", "q8_0"),
        (dir.path().to_path_buf(), "7", "q4_0"),
    ] {
        place.model = model.to_string_lossy().into_owned();
        let ladder = place.climb(&[&flags[..], &[seed, "--dtype", dtype]].concat())?;
        assert_eq!((ladder.random_weights, ladder.model.is_none()), (Some(seed.parse()?), true));
        assert_eq!(ladder.dtype, if dtype == "auto" { "f32" } else { dtype });
        // 384 x 64 tied, 4 layers of q, k, v, o, gate, up, down, three biases and two norms, and the last norm.
        let layer = 2 * 64 * 64 + 2 * 16 * 64 + 3 * 160 * 64 + 96 + 128;
        assert_eq!(ladder.parameters, 384 * 64 + 4 * layer + 64);
        let bytes = ladder.held.values().sum::<u64>() as f64;
        let per_weight =
            [("q8_0", 34.0 / 32.0), ("q4_0", 18.0 / 32.0)].iter().find(|(d, _)| *d == dtype).map_or(4.0, |x| x.1);
        assert_eq!(bytes, per_weight * (ladder.parameters - 4 * (96 + 128) - 64) as f64);
        seen.push(tokens(&ladder));
        std::fs::remove_file(place.out())?;
    }
    assert_eq!(seen[0], seen[1], "the same seed is the same model");
    assert!(seen[0] != seen[2] && seen[0] != seen[4], "another seed or type is another");
    let out = place.ladder(&[&flags[..], &["7"]].concat()).output()?;
    assert!(String::from_utf8(out.stdout)?.contains("random weights from seed 7: speed and memory only"));
    Ok(())
}

#[test]
fn drawn_matrices_are_close_to_normal_norms_are_one_and_shapes_share_what_is_quantised() -> Any {
    let dir = bare(|c| (c["dtype"], c["tie_word_embeddings"]) = ("bfloat16".into(), false.into()))?;
    let model = dir.path().to_string_lossy().into_owned();
    let checkpoint = Checkpoint::random(&model, 3)?;
    let device = Device::Cpu;
    let values = |name: &str, shape, held: GgmlDType| -> Any<Vec<f32>> {
        let hold = HoldAs::new(Held::As(held), 0, None);
        let ids = candle_core::Tensor::arange(0u32, 64, &device)?;
        let rows = checkpoint.matrix(name, shape, &hold, &device)?.rows(&ids, candle_core::DType::F32)?;
        Ok(rows.flatten_all()?.to_vec1()?)
    };
    let (q, o) = ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj.weight");
    let x = values(q, (64, 64), GgmlDType::F32)?;
    let spread = (x.iter().map(|v| f64::from(v * v)).sum::<f64>() / x.len() as f64).sqrt();
    assert!((spread / 0.02 - 1.0).abs() < 0.05, "a deviation of {spread}");
    assert!(x.iter().all(|v| half::bf16::from_f32(*v).to_f32() == *v), "stored in the configuration's type");
    assert_ne!(x, values(o, (64, 64), GgmlDType::F32)?, "matrices differ");
    assert_eq!(x, { values(q, (64, 64), GgmlDType::F32)? });
    let off = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let eight = values(q, (64, 64), GgmlDType::Q8_0)?;
    assert!(off(&x, &eight) < 0.08 / 127.0, "off by {}", off(&x, &eight));
    assert_eq!(eight, values(o, (64, 64), GgmlDType::Q8_0)?, "quantised once per shape");
    let one = checkpoint.vector("model.layers.2.post_attention_layernorm.weight", 64, &device)?.to_vec1::<f32>()?;
    let bias = checkpoint.vector("model.layers.2.self_attn.k_proj.bias", 16, &device)?.to_vec1::<f32>()?;
    assert!(one.iter().all(|v| *v == 1.0) && bias.iter().all(|v| *v == 0.0));
    let missing = checkpoint.vector("model.layers.9.input_layernorm.weight", 64, &device).unwrap_err().to_string();
    assert!(missing.contains("`model.layers.9.input_layernorm.weight` is missing"), "{missing}");
    let text = checkpoint.text().err().ok_or("has text")?.to_string();
    assert!(text.contains("random weights come without a tokenizer"), "{text}");
    Ok(())
}

#[test]
fn runs_that_do_not_fit_are_recorded() -> Any {
    // Half a megabyte of keys and values per position: 2 TiB at 4M.
    let dir = bare(|c| {
        for (key, value) in [("num_attention_heads", 64), ("num_key_value_heads", 64), ("head_dim", 256)] {
            c[key] = value.into();
        }
    })?;
    let place = Place { model: dir.path().to_string_lossy().into_owned(), ..Place::new()? };
    let flags = ["--ctx", "64,4M,5M", "--repeats", "1", "--variants", "stock", "--random-weights", "1"];
    let out = place.ladder(&flags).output()?;
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let ladder: Ladder = read(&place.out(), LADDER)?;
    assert_eq!(run(&ladder, "stock", 64).status, "ok");
    let failed = run(&ladder, "stock", 4 << 20);
    assert!(
        failed.status.starts_with("out of memory: --ctx: a cache for 4194304 tokens takes 2048.0 GiB"),
        "{}",
        failed.status
    );
    assert!(failed.samples.is_empty() && failed.summary.is_none());
    assert_eq!(run(&ladder, "stock", 5 << 20).status, "skipped: did not fit at 4M");
    // Recorded is done.
    place.ladder(&flags).assert().success().stderr(predicates::str::contains("is complete"));
    Ok(())
}

/// The golden checkpoint with a tokenizer of six words, and two documents of seven words each.
fn with_words() -> Any<(tempfile::TempDir, tempfile::TempDir)> {
    let (model, texts) = (variant("qwen2", |_| ())?, tempfile::tempdir()?);
    let tokenizer = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "unk_token": "?", "vocab": {"?": 0, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5}}});
    std::fs::write(model.path().join("tokenizer.json"), tokenizer.to_string())?;
    std::fs::write(texts.path().join("late.txt"), "e d c\n\nb a e d")?;
    std::fs::write(texts.path().join("early.txt"), "a b c d\n\nx b c")?;
    let manifest = json!({"bytes": 1, "documents": [{"order": 2, "file": "late.txt", "title": "L"}, {"order": 1, "file": "early.txt"}]});
    std::fs::write(texts.path().join("manifest.json"), manifest.to_string())?;
    Ok((model, texts))
}

#[test]
fn prompts_are_prefixes_of_the_documents_in_order() -> Any {
    let (model, texts) = with_words()?;
    let place = Place { model: model.path().to_string_lossy().into_owned(), ..Place::new()? };
    let folder = texts.path().to_string_lossy().into_owned();
    let flags = |ctx: &'static str| {
        ["--ctx", ctx, "--texts", &folder, "--repeats", "1", "--variants", "stock"].map(String::from)
    };
    let climb = |ctx| place.climb(&flags(ctx).each_ref().map(String::as_str));
    let first = climb("13")?;
    assert_eq!((first.prompt.documents.as_slice(), first.prompt.tokens), (["early.txt".to_string()].as_slice(), 5));
    assert_eq!(first.prompt.sha256, hash(&[1, 2, 3, 4, 0]));
    let both = climb("13,20")?;
    assert_eq!(both.prompt.documents, ["early.txt", "late.txt"]);
    assert_eq!(both.prompt.sha256, hash(&[1, 2, 3, 4, 0, 2, 3, 5, 4, 3, 2, 1]));
    assert!(both.prompt.tokenise_s.is_some());
    let short = flags("100");
    place.refuses(&short.each_ref().map(String::as_str), &["--texts", "hold 14 tokens of the 92", "78 are missing"]);
    // Another text is another prompt.
    std::fs::write(texts.path().join("early.txt"), "b b c d\n\nx b c")?;
    place.refuses(&flags("13").each_ref().map(String::as_str), &["another prompt"]);
    std::fs::remove_file(texts.path().join("late.txt"))?;
    place.refuses(&flags("20").each_ref().map(String::as_str), &["late.txt", "No such file"]);
    std::fs::write(
        texts.path().join("manifest.json"),
        json!({"documents": [{"order": 1, "file": "../x"}]}).to_string(),
    )?;
    place.refuses(&flags("20").each_ref().map(String::as_str), &["`../x` is not the name of a file"]);
    std::fs::remove_file(texts.path().join("manifest.json"))?;
    place.refuses(&flags("20").each_ref().map(String::as_str), &["no manifest.json", "scripts/fetch_texts.py"]);
    Ok(())
}

#[test]
fn bad_flags_get_one_error_before_any_work() -> Any {
    let place = Place::new()?;
    for (flags, says) in [
        (&["--ctx", "8"][..], &["--ctx: 8 leaves no room for a prompt before the 8 tokens of --decode"][..]),
        (&["--ctx", "64,x"], &["--ctx", "`x` is not a number of tokens"]),
        (&["--ctx", "64,,128"], &["--ctx", "`` is not a number"]),
        (&["--ctx", "64", "--repeats", "0"], &["--repeats", "not a whole number from 1 up"]),
        (&["--ctx", "64", "--decode", "0"], &["--decode", "not a whole number"]),
        (&["--ctx", "64", "--variants", "retrofit:windows=1"], &["--variants", "`windows` is not a setting"]),
        (&["--ctx", "64", "--variants", "dense"], &["--variants", "`dense` is not stock, retrofit"]),
        (&["--ctx", "64", "--device", "tpu"], &["--device", "`tpu` is not auto, cpu, cuda"]),
        (&["--ctx", "64", "--out", "/nowhere/at/all.json"], &["--out /nowhere/at/all.json: cannot be written"]),
        (&["--ctx", "64", "--out", "."], &["--out", "`.` "]),
        (&["--ctx", "64", "--random-weights", "1", "--model", "nowhere"], &["nowhere: holds no config.json"]),
        (&["--ctx", "64", "--random-weights", "x"], &["--random-weights"]),
        (&["--ctx", "64", "--model", "/nowhere/model"], &["/nowhere/model: no such file or directory"]),
    ] {
        let mut command = bench("ladder");
        let defaults = [
            ("--model", place.model.clone()),
            ("--device", "cpu".into()),
            ("--out", place.out().display().to_string()),
        ];
        let given = |flag: &str| flags.contains(&flag);
        command.args(defaults.iter().filter(|(f, _)| !given(f)).flat_map(|(f, v)| [f.to_string(), v.clone()]));
        if !given("--decode") {
            command.args(["--decode", "8"]);
        }
        refused(command.args(flags), says);
        assert!(!place.out().exists(), "{flags:?} left a file");
    }
    #[cfg(not(feature = "cuda"))]
    refused(
        bench("ladder").args(["--model", &place.model, "--device", "cuda", "--out"]).arg(place.out()),
        &["--device", "this build has no CUDA support"],
    );
    Ok(())
}

#[test]
fn kernels_are_judged_against_ceilings_of_the_same_process() -> Any {
    let place = Place::new()?;
    let out = place.path("kernels.json");
    let flags = ["--device", "cpu", "--small", "--kernel", "gated,attention_decode", "--samples", "3", "--out"];
    let stdout = bench("kernel").args(flags).arg(&out).output()?.stdout;
    let report: Kernels = read(&out, KERNELS)?;
    let cases: Vec<_> = report.kernels.iter().map(|k| (k.kernel.as_str(), k.case.as_str())).collect();
    assert_eq!(cases, [("attention_decode", "dense, 32k keys"), ("attention_decode", "butterfly"), ("gated", "silu")]);
    assert_eq!((report.ceilings.copy_s.len(), report.ceilings.matmul_s.len()), (10, 10));
    let median = |s: &[f64]| bfly::bench::summary::median(s).unwrap_or_default();
    let c = &report.ceilings;
    assert!((c.copy_gb_s - 2.0 * c.copy_bytes as f64 / median(&c.copy_s) / 1e9).abs() < 1e-9 * c.copy_gb_s);
    for k in &report.kernels {
        assert_eq!((k.samples_s.len(), k.dtype.as_str()), (3, "f32"));
        assert!((k.tflop_s - k.flop / median(&k.samples_s) / 1e12).abs() <= 1e-9 * k.tflop_s);
        assert!((k.gb_s - k.bytes / median(&k.samples_s) / 1e9).abs() <= 1e-9 * k.gb_s);
        assert!(String::from_utf8_lossy(&stdout).contains(&k.case));
    }
    // Three tensors of 64 x 18944 in f32.
    assert_eq!(report.kernels[2].bytes, (3 * 64 * 18944 * 4) as f64);
    refused(
        bench("kernel").args(["--device", "cpu", "--kernel", "matmul"]),
        &["--kernel", "matmul", "attention_prefill"],
    );
    refused(bench("kernel").args(["--device", "cpu", "--dtype", "bf16"]), &["--dtype", "no kernels on a CPU"]);
    refused(
        bench("kernel").args(["--device", "cpu", "--out", "/nowhere/k.json"]),
        &["--out /nowhere/k.json: cannot be written"],
    );
    Ok(())
}

#[test]
fn help_shows_examples_and_every_flag() -> Any {
    let help = |command: &str| -> Any<String> { Ok(String::from_utf8(bench(command).arg("--help").output()?.stdout)?) };
    let flags = "model ctx variants peer repeats decode prefill-chunk texts out random-weights quiet dtype device offline revision threads";
    for (command, flags) in [("ladder", flags), ("kernel", "kernel small dtype device samples out quiet")] {
        let text = help(command)?;
        assert!(text.contains("Examples:") && text.contains(&format!("bfly-bench {command}")), "{text}");
        for flag in flags.split_whitespace() {
            assert!(text.contains(&format!("--{flag}")), "{command} lacks --{flag}");
        }
    }
    assert!(String::from_utf8(bench("completions").arg("bash").output()?.stdout)?.contains("bfly-bench"));
    Ok(())
}

#[test]
fn the_peak_of_a_cpu_run_is_of_what_came_after_it_began() {
    let device = Device::Cpu;
    machine::begin_peak(&device);
    let before = machine::peak(&device);
    let held = vec![1u8; 256 << 20];
    let during = machine::peak(&device);
    assert!(during >= before + (192 << 20), "{before}, then {during} with {}", held.len());
    drop(held);
    machine::begin_peak(&device);
    let after = machine::peak(&device);
    assert!(after + (128 << 20) < during, "a new mark forgets the old one: {during}, then {after}");
}
