//! Ladders that were cut off, and files of something else.

use super::*;

#[test]
fn a_ladder_goes_on_where_it_was_cut_off() -> Any {
    let place = Place::new()?;
    let flags = ["--ctx", "64,128", "--repeats", "2", "--variants", "stock,retrofit:block=16,window=16"];
    let whole = place.run_ladder(&flags)?;
    // As if interrupted in the second repeat at 128.
    place.edit(|l| {
        let runs = l["runs"].as_array_mut().unwrap();
        runs[2]["samples"].as_array_mut().unwrap().pop();
        runs.pop();
    })?;
    let resumed = place.run_ladder(&flags)?;
    assert_eq!((resumed.header.resumed.len(), resumed.header.started.as_str()), (1, whole.header.started.as_str()));
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
    let more = place.run_ladder(&["--ctx", "64,256", "--repeats", "3", "--variants", "stock"])?;
    assert_eq!(more.prompt.tokens, 248);
    assert_eq!(run(&more, "stock", 64).samples.len(), 3);
    assert_eq!(run(&more, "stock", 64).samples[..2], run(&resumed, "stock", 64).samples[..]);
    assert_eq!((run(&more, "stock", 128).samples.len(), run(&more, "stock", 256).samples.len()), (2, 3));
    // Fewer than before are taken from the same stream.
    place.run_ladder(&["--ctx", "64", "--repeats", "4", "--variants", "stock"])?;
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
    let whole = place.run_ladder(&[&flags[..], &["--peer", &peer("")]].concat())?;
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
    place.run_ladder(&with_peer)?;
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
        &["is of kind `bfly-kernels`; expected `bfly-ladder`"],
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
        &["another --prefill-chunk: 4096 there, 32 here"],
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
