//! Other engines in a ladder.

use super::*;

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
        ("mood=deaf".to_string(), &["exited before its ready message (exit status: 3)"][..]),
        ("mood=unready".into(), &["is not ready: failed: no such model"]),
        ("mood=dying".into(), &["exited before a reply (exit status: 7)"]),
        ("mood=backwards".into(), &["a sample whose times do not rise: 1 0.25 0.5 s"]),
        ("engine=bfly".into(), &["calls itself `bfly`"]),
        ("say=hello".into(), &["expected a reply, got `hello`"]),
        ("say={}".into(), &["neither a sample nor a status"]),
        (format!("say='{sample}'"), &["times between tokens cover about 1 tokens, not 7"]),
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
    let ladder = place.run_ladder(&["--ctx", "64", "--variants", "stock", "--repeats", "1", "--peer", &command])?;
    assert_eq!(run(&ladder, "sdpa", 64).status, "failed: something else");
    Ok(())
}
