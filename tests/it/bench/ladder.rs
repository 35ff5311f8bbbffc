//! Ladders: what they hold, variants, budgets, flags.

use super::*;

#[test]
fn a_ladder_holds_every_sample_of_every_variant() -> Any {
    let place = Place::new()?;
    let variants = format!("stock,{RETROFIT}");
    let out = place.ladder(&["--ctx", "256,128", "--variants", &variants, "--repeats", "3"]).output()?;
    let (stdout, stderr) = (String::from_utf8(out.stdout)?, String::from_utf8(out.stderr)?);
    assert!(out.status.success(), "{stderr}");
    let ladder: Ladder = read(&place.out(), LADDER)?;
    let h = &ladder.header;
    assert_eq!((h.name.as_str(), h.dtype.as_str(), h.kv_dtype.as_str()), ("qwen2", "f32", "f32"));
    assert_eq!((ladder.decode_tokens, h.trained_positions, h.random_weights), (8, 32768, None));
    assert_eq!(
        (ladder.prompt.documents.as_slice(), ladder.prompt.tokens),
        (["random ids".to_string()].as_slice(), 248)
    );
    assert_eq!(ladder.prompt.sha256, hash(&prompt(248)?));
    assert!(ladder.ceilings.is_none() && h.machine.memory_bytes > 0 && !h.git_sha.is_empty());
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
            assert!(x.peak_device_bytes > h.held["f32"], "{}", x.peak_device_bytes);
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
        place.run_ladder(&["--ctx", "100,200", "--repeats", "1", "--variants", &variants, "--prefill-chunk", "50"])?;
    let ids = TextStream::open(&open(&place.model)?, Path::new("none"), 192, 0, &|_, _, _| ())?.ids;
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
        let hold = WeightFormat::new(WeightDtype::Auto, 0, None);
        let quiet: bfly::checkpoint::OnProgress = &|_, _, _| ();
        let weights = Weights::load(&checkpoint, &hold, &Device::Cpu, quiet)?;
        let request = Request {
            prompt: &ids[..r.ctx - 8],
            max_new_tokens: 8,
            chunk: 50,
            stop: &[],
            logits_last: 1,
            phase: bfly::generate::Phase::Prefill,
        };
        let mut sampler = Sampler::new(Sampling::GREEDY)?;
        let made = bfly::run::Run::new(&weights, r.plan.as_ref(), r.ctx)?.generate(
            &request,
            &mut sampler,
            &mut watch(|_| ()),
            &mut watch(|_| ()),
        )?;
        assert_eq!(r.samples[0].tokens_sha256, hash(&made.tokens), "{} at {}", r.variant, r.ctx);
        seen.insert(hash(&made.tokens));
    }
    assert!(seen.len() > 2, "tokens that are all the same would prove nothing");
    Ok(())
}

#[test]
fn weights_run_by_another_plan_give_what_weights_loaded_for_it_give() -> Any {
    let checkpoint = open(&golden_dir("llama3_rope").to_string_lossy())?;
    let ids: Vec<u32> = (0..400).map(|i| 5 + i * 7 % 300).collect();
    let logits = |model: &Model| -> Any<Vec<f32>> { Ok(last_logits(model, &ids, 64, 3)?.flatten_all()?.to_vec1()?) };
    let shared = load(&checkpoint, None, 64)?;
    let settings = |window| Settings { block: 16, window, sink_tokens: 2, ..Settings::default() };
    let mut seen = vec![];
    // 400 positions are two stages for a window of 128, 2048 are four: the third layer reads another block.
    for (settings, ctx) in
        [(Some(settings(128)), 400), (Some(settings(32)), 2048), (None, 400), (Some(settings(128)), 2048)]
    {
        let fresh = load(&checkpoint, settings.as_ref(), ctx)?;
        let model = shared.by(&fresh.method, ctx);
        assert_eq!(model.run()?.layout().method(), &fresh.method);
        assert_eq!((model.weights.bytes(), model.run()?.cache().ctx()), (fresh.weights.bytes(), ctx));
        let (got, want) = (logits(&model)?, logits(&fresh)?);
        assert_eq!(got, want, "{settings:?} for {ctx}");
        assert!(!seen.contains(&want), "logits that are all the same would prove nothing");
        seen.push(want);
    }
    let other = load_golden("qwen2", Some(&settings(16)), 64)?;
    let error = shared.by(&other.method, 64).run().err().ok_or("took another model's plan")?.to_string();
    assert!(error.contains("made for qwen2 with 4 layers"), "{error}");
    Ok(())
}

#[test]
fn a_budget_shrinks_chunks_and_what_breaks_it_did_not_fit() -> Any {
    let place = Place::new()?;
    let flags =
        ["--ctx", "512,1k", "--repeats", "1", "--variants", "stock", "--prefill-chunk", "512", "--memory-budget"];
    let free = place.run_ladder(&[&flags[..], &["4G"]].concat())?;
    assert!(free.runs.iter().all(|r| r.prefill_chunk == 512 && r.status == "ok"));
    assert_eq!((free.memory_budget, free.prefill_chunk), (Some(4 << 30), Some(512)));
    place.refuses(&[&flags[..], &["5G"]].concat(), &["another --memory-budget"]);
    std::fs::remove_file(place.out())?;
    // Weights alone take more.
    let out = place.ladder(&[&flags[..], &["100000"]].concat()).output()?;
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let tight: Ladder = read(&place.out(), LADDER)?;
    let status = |l: &Ladder, ctx| run(l, "stock", ctx).status.clone();
    assert!(status(&tight, 512).starts_with("out of memory: --memory-budget: 97.7 KiB is "), "{}", status(&tight, 512));
    assert_eq!(status(&tight, 1024), "skipped: did not fit at 512");
    std::fs::remove_file(place.out())?;
    // A token takes 2976 bytes here, beside some 17.8 MB of weights, cache and allowance. What is found to have taken
    // more than was allowed did not fit either.
    let (small, large) = (peer("name=small peak=18500000"), peer("name=large peak=20000000"));
    let kept = place.run_ladder(&[&flags[..], &["18500000", "--peer", &small, "--peer", &large]].concat())?;
    let stock = run(&kept, "stock", 512);
    assert!(stock.status != "ok" || stock.prefill_chunk == 128, "{stock:?}");
    assert_eq!(run(&kept, "small", 512).status, "ok");
    assert_eq!(run(&kept, "large", 512).status, "out of memory: the run took 19.1 MiB, 17.6 MiB were allowed");
    Ok(())
}

#[test]
fn bad_flags_get_one_error_before_any_work() -> Any {
    let place = Place::new()?;
    for (flags, says) in [
        (&["--ctx", "8"][..], &["--ctx: 8 leaves no room for a prompt before the 8 tokens of --decode"][..]),
        (&["--ctx", "64,x"], &["--ctx", "`x` is not a number of tokens"]),
        (&["--ctx", "64,,128"], &["--ctx", "`` is not a number"]),
        (&["--ctx", "64", "--repeats", "0"], &["--repeats", "not a whole number from 1 to"]),
        (&["--ctx", "64", "--decode", "0"], &["--decode", "not a whole number"]),
        (&["--ctx", "64", "--variants", "retrofit:windows=1"], &["--variants", "`windows` is not a setting"]),
        (&["--ctx", "64", "--variants", "dense"], &["--variants", "`dense` is not stock, retrofit"]),
        (&["--ctx", "64", "--device", "tpu"], &["--device", "`tpu` is not auto, cpu, cuda"]),
        (&["--ctx", "64", "--out", "/nowhere/at/all.json"], &["--out /nowhere/at/all.json: cannot be written"]),
        (&["--ctx", "64", "--out", "."], &["--out", ".: is a directory"]),
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
fn help_shows_examples_and_every_flag() -> Any {
    let help = |command: &str| -> Any<String> { Ok(String::from_utf8(bench(command).arg("--help").output()?.stdout)?) };
    let flags = "model ctx variants peer repeats decode prefill-chunk texts out random-weights quiet dtype device offline revision threads";
    let fit = "model memory-budget variants most read decode prefill-chunk texts out random-weights quiet dtype device";
    for (command, flags) in [("ladder", flags), ("fit", fit), ("kernel", "kernel small dtype device samples out quiet")]
    {
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
fn rules_that_evict_run_like_any_variant() -> Any {
    let place = Place::new()?;
    let variants = "stock,keydiff:budget=32,block=16,snapkv:budget=32,window=8";
    let ladder = place.run_ladder(&["--ctx", "128", "--variants", variants, "--repeats", "1"])?;
    let (stock, keydiff, snapkv) = (
        run(&ladder, "stock", 128),
        run(&ladder, "keydiff:budget=32,block=16", 128),
        run(&ladder, "snapkv:budget=32,window=8", 128),
    );
    assert!(stock.eviction.is_none() && keydiff.plan.is_none() && snapkv.plan.is_none());
    assert_eq!(keydiff.eviction, Some(bfly::eviction::EvictionPlan::new("keydiff", 32, &[("block", 16)])?));
    let kv = |r: &LadderRun| r.kv.map(|kv| (kv.total_bytes, kv.peak_bytes)).ok_or("no bytes");
    let (whole, none) = kv(stock)?;
    assert_eq!((none, kv(keydiff)?), (None, (whole * 48 / 128, None)));
    // The budget and 8 new tokens in the end; all of the context, a layer's copy and the last queries before.
    let (now, peak) = kv(snapkv)?;
    assert_eq!(now, whole * 40 / 128);
    assert!(peak.is_some_and(|peak| peak > whole + now / 4), "{peak:?}");
    let written: Value = serde_json::from_str(&std::fs::read_to_string(place.out())?)?;
    assert!(written["runs"][0].get("eviction").is_none() && written["runs"][0]["kv"].get("peak_bytes").is_none());
    Ok(())
}
