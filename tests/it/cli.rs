//! The command line: help, a run, its report, patches, logits, completions.

use crate::common::*;
use assert_cmd::Command;
use predicates::prelude::PredicateBooleanExt;
use serde_json::Value;

fn bfly() -> Command {
    Command::new(env!("CARGO_BIN_EXE_bfly-retrofit"))
}

struct Run {
    dir: tempfile::TempDir,
}

impl Run {
    fn new(ids: &[u32]) -> Any<Self> {
        let dir = tempfile::tempdir()?;
        std::fs::write(dir.path().join("ids.json"), serde_json::to_string(ids)?)?;
        Ok(Self { dir })
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_string_lossy().into_owned()
    }

    /// Runs the llama golden on the ids and returns the JSON report.
    fn report(&self, model: &str, flags: &[&str]) -> Any<Value> {
        let (ids, json) = (self.path("ids.json"), self.path("report.json"));
        bfly().args(["--model", model, "--token-ids", &ids, "--json", &json]).args(flags).assert().success();
        Ok(serde_json::from_str(&std::fs::read_to_string(json)?)?)
    }
}

fn llama() -> String {
    golden_dir("llama3_rope").to_string_lossy().into_owned()
}

#[test]
fn help_shows_examples_every_rule_and_every_flag() -> Any {
    let out = bfly().arg("--help").output()?;
    let help = String::from_utf8(out.stdout)?;
    for word in ["Examples:", "--ctx 256k", "causal_shift", "bit_reversal", "fixed_stride", "completions"] {
        assert!(help.contains(word), "help lacks {word}");
    }
    for flag in "model ctx stock layers plan block window window-align sink-tokens partner partner-count shift-unit pool \
                 summary-bias far-position recall key-code rest prompt prompt-file chat system max-new-tokens temperature top-p top-k seed \
                 prefill-chunk device dtype threads json token-ids logits-out logits-last save quiet revision offline ignore-eos"
        .split_whitespace()
    {
        assert!(help.contains(&format!("--{flag}")), "help lacks --{flag}");
    }
    let short = String::from_utf8(bfly().arg("-h").output()?.stdout)?;
    assert!(short.lines().count() < help.lines().count(), "-h should be the short form");
    Ok(())
}

#[test]
fn a_report_holds_every_promised_key() -> Any {
    let run = Run::new(&(5..205).collect::<Vec<_>>())?;
    let flags =
        ["--ctx", "1k", "-n", "6", "--window", "64", "--block", "32", "--prefill-chunk", "50", "--threads", "1"];
    let r = run.report(&llama(), &[&flags[..], &["--recall", "0"]].concat())?;
    for key in
        "schema_version git_sha model spec plan device dtype threads prompt_tokens generated_tokens prefill_s ttft_s \
                decode_s prefill_tok_s decode_tok_s peak_memory_bytes weights_bytes kv text token_ids"
            .split_whitespace()
    {
        assert!(r.get(key).is_some(), "the report lacks `{key}`");
    }
    let pools = ["local_bytes", "summary_bytes", "sink_bytes", "key_code_bytes", "value_bytes", "table_bytes"];
    for key in pools.iter().chain(&["host_bytes", "total_bytes", "used_bytes", "dense_bytes", "ratio"]) {
        assert!(r["kv"][key].is_number(), "the report's kv lacks `{key}`");
    }
    assert_eq!((r["prompt_tokens"].as_u64(), r["generated_tokens"].as_u64()), (Some(200), Some(6)));
    assert_eq!((r["threads"].as_u64(), r["ctx"].as_u64()), (Some(1), Some(1024)));
    assert_eq!(r["plan"]["settings"]["window"], 64);
    assert_eq!(r["decode_steps_s"].as_array().map(Vec::len), Some(5));
    let kv = &r["kv"];
    let sum: u64 = pools.iter().filter_map(|k| kv[*k].as_u64()).sum();
    assert_eq!(kv["total_bytes"].as_u64(), Some(sum));
    assert!(r["ttft_s"].as_f64() >= r["prefill_s"].as_f64());
    Ok(())
}

#[test]
fn the_ledger_goes_to_stderr_unless_quiet() -> Any {
    let run = Run::new(&[5, 6, 7])?;
    let ids = run.path("ids.json");
    let base = ["--model", &llama(), "--token-ids", &ids, "-n", "2", "--ctx", "100", "--recall", "0"];
    let loud = bfly().args(base).output()?;
    let ledger = String::from_utf8(loud.stderr)?;
    for row in ["weights", "local ring", "summaries", "dense KV", "ratio", "reach", "peak memory", "prefill", "decode"]
    {
        assert!(ledger.contains(row), "the ledger lacks `{row}`: {ledger}");
    }
    let quiet = bfly().args(base).arg("--quiet").output()?;
    assert!(quiet.status.success() && quiet.stderr.is_empty(), "{}", String::from_utf8_lossy(&quiet.stderr));
    Ok(())
}

/// Flags that make a small model recall a few tokens of a short text.
const RECALL: [&str; 8] = ["--window", "32", "--block", "16", "--recall", "8", "--ctx", "1k"];

#[test]
fn a_calibrated_patch_recalls_and_its_faults_are_named() -> Any {
    let (run, model) = (Run::new(&(5..250).cycle().take(700).collect::<Vec<_>>())?, tiny_model(&[])?);
    let (patch, model) = (run.path("patch"), model.path().to_string_lossy().into_owned());
    bfly().args(["calibrate", "--model", &model, "--out", &patch]).args(RECALL).assert().success();
    let r = run.report(&patch, &["-n", "4"])?;
    let kv = |key: &str| r["kv"][key].as_u64().unwrap_or(0);
    assert_eq!((kv("host_bytes"), kv("summary_bytes")), (kv("dense_bytes"), 0));
    assert!(kv("key_code_bytes") > 0 && kv("value_bytes") > 0 && kv("table_bytes") > 0);
    assert_eq!(r["plan"]["settings"]["recall"], 8);
    let file = run.dir.path().join("patch/recall.safetensors");
    let whole = std::fs::read(&file)?;
    std::fs::write(&file, &whole[..whole.len() / 2])?;
    let ids = run.path("ids.json");
    let refused = bfly().args(["--model", &patch, "--token-ids", &ids]).assert().code(2);
    refused.stderr(predicates::str::contains("recall.safetensors: "));
    std::fs::write(&file, &whole)?;
    let refused = bfly().args(["--model", &patch, "--token-ids", &ids, "--sink-tokens", "7"]).assert().code(2);
    refused.stderr(predicates::str::contains("--sink-tokens: 7 sinks, but the calibration left out 4"));

    let texts = run.dir.path().join("texts");
    std::fs::create_dir(&texts)?;
    let other = run.path("other");
    let calibrate = || {
        let mut command = bfly();
        command.args(["calibrate", "--model", &model, "--out", &other, "--texts"]).arg(&texts);
        command.assert().code(2)
    };
    calibrate().stderr(predicates::str::contains("--texts").and(predicates::str::contains("has no files")));
    std::fs::write(texts.join("a.txt"), "too short")?;
    calibrate().stderr(predicates::str::contains("2048 are the fewest"));
    assert!(!std::path::Path::new(&other).exists(), "nothing is half-written");

    // What cannot be written is said before the model is read, and a plan that is no patch is not passed over.
    let taken = texts.to_string_lossy().into_owned();
    for (out, why) in [(taken.as_str(), "exists and has no bfly.json"), ("/proc/none/patch", "--out /proc/none/patch")]
    {
        let refused = bfly().args(["calibrate", "--model", "nowhere", "--out", out]).assert().code(2);
        refused.stderr(predicates::str::contains("--out").and(predicates::str::contains(why)));
        let refused = bfly().args(["--model", "nowhere", "--prompt", "a", "--save", out]).assert().code(2);
        refused.stderr(predicates::str::contains("--save").and(predicates::str::contains("nowhere").not()));
    }
    let refused = bfly().args(["--model", &model, "--token-ids", &ids, "--plan", &taken]).assert().code(2);
    refused.stderr(predicates::str::contains("is a directory without a patch"));
    Ok(())
}

#[test]
fn a_patch_at_natural_positions_runs_and_refuses_qpq_by_name() -> Any {
    let (run, model) = (Run::new(&(5..250).cycle().take(700).collect::<Vec<_>>())?, tiny_model(&[])?);
    let (patch, model) = (run.path("patch"), model.path().to_string_lossy().into_owned());
    let calibrate = ["calibrate", "--positions", "natural", "--out", patch.as_str(), "--model"];
    // Said before the model is read.
    let refused = bfly().args(calibrate).args(["nowhere", "--key-code", "qpq:1bit"]).assert().code(2);
    refused.stderr(predicates::str::contains("--key-code: `qpq:1bit` is fitted to moments before rotation"));
    bfly().args(calibrate).arg(&model).args(RECALL).assert().success();
    let r = run.report(&patch, &["-n", "4"])?;
    assert_eq!((r["plan"]["settings"]["recall"].as_u64(), r["generated_tokens"].as_u64()), (Some(8), Some(4)));
    let ids = run.path("ids.json");
    let refused = bfly().args(["--model", &patch, "--token-ids", &ids, "--key-code", "qpq"]).assert().code(2);
    refused.stderr(
        predicates::str::contains("`qpq:1bit` is fitted").and(predicates::str::contains("--positions uniform")),
    );
    Ok(())
}

#[test]
#[cfg(target_os = "linux")]
fn the_first_run_calibrates_and_later_ones_use_the_cache() -> Any {
    let (run, model) = (Run::new(&(5..250).cycle().take(700).collect::<Vec<_>>())?, tiny_model(&[])?);
    let (model, ids) = (model.path().to_string_lossy().into_owned(), run.path("ids.json"));
    let cache = run.dir.path().join("cache");
    let go = || {
        let mut command = bfly();
        command.env("XDG_CACHE_HOME", &cache).args(["--model", &model, "--token-ids", &ids, "-n", "4"]).args(RECALL);
        command.assert().success()
    };
    go();
    let files = || std::fs::read_dir(cache.join("bfly/recall"))?.map(|e| Ok(e?.path())).collect::<Any<Vec<_>>>();
    let file = match files()?.as_slice() {
        [one] => one.clone(),
        other => return Err(format!("{other:?} in the cache").into()),
    };
    let (whole, then) = (std::fs::read(&file)?, std::fs::metadata(&file)?.modified()?);
    go().stderr(predicates::str::contains("damaged").not());
    assert_eq!(std::fs::metadata(&file)?.modified()?, then, "the cached calibration is used");
    std::fs::write(&file, &whole[..100])?;
    go().stderr(predicates::str::contains("the cached calibration is damaged and is made anew"));
    assert!(std::fs::read(&file)? == whole, "and is the same again");
    Ok(())
}

#[test]
fn logits_out_holds_transformers_logits() -> Any {
    let golden = Golden::open("llama3_rope")?;
    let ids = golden.ids("short")?;
    let run = Run::new(&ids)?;
    let file = run.path("logits.safetensors");
    run.report(&llama(), &["--stock", "--ctx", "512", "-n", "0", "--logits-out", &file, "--logits-last", "64"])?;
    let tensors = candle_core::safetensors::load(&file, &candle_core::Device::Cpu)?;
    assert_eq!(tensors["token_ids"].to_vec1::<u32>()?, ids);
    let off = deviation(&tensors["logits"], &golden.logits("short")?)?;
    assert!(off < 1e-4, "{off:.2e} standard deviations off");
    Ok(())
}

#[test]
fn a_patch_runs_what_was_saved() -> Any {
    let run = Run::new(&(5..300).collect::<Vec<_>>())?;
    let patch = run.path("patch");
    let flags =
        "--ctx 512 -n 8 --window 32 --block 16 --layers 0,2 --recall 0 --partner xor".split(' ').collect::<Vec<_>>();
    let first = run.report(&llama(), &[&flags[..], &["--save", &patch]].concat())?;
    let saved: Value = serde_json::from_str(&std::fs::read_to_string(run.dir.path().join("patch/bfly.json"))?)?;
    assert_eq!(saved["plan"]["layers"], serde_json::json!([0, 2]));
    assert_eq!(saved["base"]["sha256"].as_str().map(str::len), Some(64));
    assert_eq!(std::fs::read_dir(&patch)?.count(), 1, "a patch holds no weights");
    let again = run.report(&patch, &["-n", "8"])?;
    for key in ["token_ids", "plan", "ctx", "kv"] {
        assert_eq!(first[key], again[key], "{key}");
    }
    // Flags win over what was saved; a plan alone carries over to another run.
    assert_eq!(run.report(&patch, &["-n", "1", "--window", "64"])?["plan"]["settings"]["window"], 64);
    let plan = run.path("plan.json");
    std::fs::write(&plan, saved["plan"].to_string())?;
    let planned = run.report(&llama(), &["--plan", &plan, "--ctx", "512", "-n", "8"])?;
    assert_eq!(planned["token_ids"], first["token_ids"]);
    Ok(())
}

#[test]
fn a_report_replaces_an_earlier_one_and_nothing_else() -> Any {
    let run = Run::new(&[5, 6, 7])?;
    run.report(&llama(), &["-n", "1"])?;
    run.report(&llama(), &["-n", "1"])?;
    let precious = run.path("model.gguf");
    std::fs::write(&precious, "GGUF and weights")?;
    let out = bfly().args(["--model", &llama(), "--token-ids", &run.path("ids.json"), "--json", &precious]).output()?;
    let stderr = String::from_utf8(out.stderr)?;
    assert!(out.status.code() == Some(2) && stderr.contains("model.gguf: is not JSON"), "{stderr}");
    assert_eq!(std::fs::read_to_string(&precious)?, "GGUF and weights");
    Ok(())
}

#[test]
fn past_the_trained_positions_a_warning_names_limit_and_scaling() -> Any {
    let run = Run::new(&[5, 6, 7])?;
    let dir = variant("qwen2_yarn", |c| c["max_position_embeddings"] = 1000.into())?;
    let out = bfly()
        .args([
            "--model",
            &dir.path().to_string_lossy(),
            "--token-ids",
            &run.path("ids.json"),
            "-n",
            "1",
            "--ctx",
            "2k",
            "-q",
        ])
        .output()?;
    let stderr = String::from_utf8(out.stderr)?;
    assert!(out.status.success(), "{stderr}");
    for word in ["warning", "2048", "1000", "yarn, factor 4"] {
        assert!(stderr.contains(word), "should say `{word}`: {stderr}");
    }
    Ok(())
}

#[test]
fn real_text_streams_to_stdout_and_memory_stays_within_its_bound() -> Any {
    let run = Run::new(&[1])?;
    let json = run.path("report.json");
    let out = bfly()
        .args(["--model", &real_model("smollm2-135m")?, "--chat", "--prompt", "Say hello.", "-n", "12", "--ctx", "8k"])
        .args(["--dtype", "q8_0", "--json", &json])
        .output()?;
    let stderr = String::from_utf8(out.stderr)?;
    assert!(out.status.success(), "{stderr}");
    let r: Value = serde_json::from_str(&std::fs::read_to_string(json)?)?;
    let text = String::from_utf8(out.stdout)?;
    assert_eq!(Some(text.trim_end()), r["text"].as_str().map(str::trim_end));
    assert!(text.to_lowercase().contains("hello"), "{text}");
    // The template puts the model's own system turn before ours.
    assert!(r["prompt_tokens"].as_u64() > Some(20), "{}", r["prompt_tokens"]);
    let bytes = |v: &Value| v.as_u64().unwrap_or(u64::MAX / 4);
    let over =
        bytes(&r["peak_memory_bytes"]).saturating_sub(bytes(&r["weights_bytes"]) + bytes(&r["kv"]["total_bytes"]));
    assert!(over <= 400 << 20, "peak memory is {} MiB over weights and cache", over >> 20);
    Ok(())
}

#[test]
fn sampling_repeats_with_its_seed() -> Any {
    let run = Run::new(&(5..40).collect::<Vec<_>>())?;
    let with = |seed: &str| -> Any<Value> {
        Ok(run
            .report(&llama(), &["--ctx", "128", "-n", "20", "--temperature", "1.5", "--top-k", "50", "--seed", seed])?
            ["token_ids"]
            .clone())
    };
    assert_eq!(with("3")?, with("3")?);
    assert_ne!(with("3")?, with("4")?);
    Ok(())
}

#[test]
fn completions_are_printed_for_shells() {
    for shell in ["bash", "zsh", "fish"] {
        bfly().args(["completions", shell]).assert().success().stdout(predicates::str::contains("partner-count"));
    }
}

#[test]
fn a_prompt_is_read_from_standard_input() -> Any {
    let base = ["--model", &real_model("smollm2-135m")?, "-n", "4", "--ctx", "256", "--quiet"];
    let piped = bfly().args(base).args(["--prompt-file", "-"]).write_stdin("Once upon a time").output()?;
    let given = bfly().args(base).args(["--prompt", "Once upon a time"]).output()?;
    assert!(piped.status.success() && !piped.stdout.is_empty());
    assert_eq!(piped.stdout, given.stdout);
    Ok(())
}

/// An interrupt while tokens are made ends the run in good order: exit code 0, the ledger, the report.
#[cfg(unix)]
#[test]
fn an_interrupt_during_decode_ends_with_the_ledger() -> Any {
    use std::io::Read;
    let run = Run::new(&[1])?;
    let json = run.path("report.json");
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_bfly-retrofit"))
        .args(["--model", &real_model("smollm2-135m")?, "--prompt", "Once upon a time", "-n", "7000", "--ctx", "8k"])
        // Recall would calibrate first, which takes minutes.
        .args(["--ignore-eos", "--recall", "0", "--json", &json])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()?;
    // The first bytes of text say that decoding is under way.
    let mut first = [0; 4];
    let mut stdout = child.stdout.take().ok_or("no stdout")?;
    stdout.read_exact(&mut first)?;
    assert!(std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status()?.success());
    std::io::copy(&mut stdout, &mut std::io::sink())?;
    let out = child.wait_with_output()?;
    let stderr = String::from_utf8(out.stderr)?;
    assert!(out.status.success() && stderr.contains("KV cache"), "{stderr}");
    let report: Value = serde_json::from_str(&std::fs::read_to_string(json)?)?;
    let made = report["generated_tokens"].as_u64().ok_or("no count")?;
    assert!((1..7000).contains(&made), "{made} tokens");
    Ok(())
}
