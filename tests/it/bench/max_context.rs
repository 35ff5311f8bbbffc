//! The largest context within a budget, the run that verifies it, flags.

use super::*;
use bfly::eval::report::{MaxContextRun, MaxContexts, MAX_CONTEXT};
use bfly::generate::MemoryNeeds;
use bfly::layout::Layout;

/// Half of the tiny model's layers swapped: its cache grows half as fast.
const HALF: &str = "retrofit:block=16,window=32,layers=0-1";
const READ: usize = 256;

fn max_context(place: &Place, flags: &[&str]) -> Command {
    let mut command = bench("fit");
    command.args(["--model", &place.model, "--device", "cpu", "--threads", "1", "--read", "256"]);
    command.arg("--out").arg(place.out()).args(flags);
    command
}

fn found_contexts(place: &Place, flags: &[&str]) -> Any<MaxContexts> {
    max_context(place, flags).assert().success();
    Ok(read(&place.out(), MAX_CONTEXT)?)
}

fn of<'a>(found: &'a MaxContexts, variant: &str, budget: u64) -> &'a MaxContextRun {
    found.runs.iter().find(|r| r.variant == variant && r.memory_budget == budget).expect("the file has the run")
}

#[test]
fn no_larger_context_fits_and_the_run_is_provisioned_for_it() -> Any {
    let place = Place::new()?;
    let model = load_golden("qwen2", None, 64)?;
    let needs = |plan: Option<&_>, ctx| MemoryNeeds::of(&model.weights, &Layout::new(model.spec(), plan, ctx)?);
    // Room for 20k positions of the stock model and not for 21k: exactly, and all but a byte.
    let exact = needs(None, 20 << 10)?.total(128);
    let short = needs(None, 21 << 10)?.total(128) - 1;
    let budgets = format!("{short},{exact},4G");
    let variants = format!("stock,{HALF},{RETROFIT}");
    let flags = ["--memory-budget", &budgets, "--variants", &variants, "--most", "65k"];
    let found = found_contexts(&place, &flags)?;
    assert_eq!((found.decode_tokens, found.prefill_chunk, found.most_tokens), (8, 4096, 65 << 10));
    assert_eq!((found.header.name.as_str(), found.header.kv_dtype.as_str()), ("qwen2", "f32"));
    assert_eq!((found.prompt.tokens, found.prompt.sha256.as_str()), (READ, hash(&prompt(READ)?).as_str()));
    let order: Vec<_> = found.runs.iter().map(|r| (r.memory_budget, r.variant.as_str())).collect();
    let each = |budget| ["stock", HALF, RETROFIT].map(|v| (budget, v));
    assert_eq!(order, [exact, short, 4 << 30].map(each).concat(), "budgets rise");
    for r in &found.runs {
        let ctx = r.ctx.ok_or("nothing fits")?;
        let at = |ctx| needs(r.plan.as_ref(), ctx);
        assert!(at(ctx)?.chunk_within(r.memory_budget, 128).is_ok());
        let beyond = at(ctx + 1024)?.chunk_within(r.memory_budget, 128);
        assert!(r.at_most || beyond.is_err(), "{} reaches farther than {ctx} in {}", r.variant, r.memory_budget);
        assert_eq!(r.at_most, ctx == 65 << 10, "{r:?}");
        let chunk = r.prefill_chunk.ok_or("no chunk")?;
        assert_eq!(chunk, at(ctx)?.chunk_within(r.memory_budget, READ)?);
        assert_eq!((r.needed_bytes, r.weights_bytes), (Some(at(ctx)?.total(chunk)), model.weights.bytes()));
        // Provisioned whole, read in part: a position of the stock model takes 512 bytes.
        let (kv, sample) = (r.kv.ok_or("no kv")?, r.sample.as_ref().ok_or("no sample")?);
        assert_eq!((kv.total_bytes, kv.dense_bytes), (at(ctx)?.cache, 512 * ctx as u64));
        assert_eq!((r.read_tokens, sample.inter_token_s.len()), (Some(READ), 7));
        // The peak is that of the whole process here, which small budgets do not hold.
        let within = sample.peak_device_bytes <= r.memory_budget;
        assert_eq!((r.within, r.status == "ok"), (within, within), "{r:?}");
        assert!(within || r.status.starts_with("out of memory: the run took "), "{}", r.status);
    }
    for budget in [exact, short] {
        let (stock, half, all) = (of(&found, "stock", budget), of(&found, HALF, budget), of(&found, RETROFIT, budget));
        assert_eq!(stock.ctx, Some(20 << 10));
        assert!(stock.ctx < half.ctx && half.ctx < all.ctx, "{:?}, {:?}, {:?}", stock.ctx, half.ctx, all.ctx);
        assert!(!stock.at_most && !half.at_most && all.at_most);
    }
    assert_eq!(of(&found, "stock", exact).prefill_chunk, Some(128), "the exact budget has room for no more");
    assert!(found.runs.iter().filter(|r| r.memory_budget == 4 << 30).all(|r| r.at_most && r.within));
    Ok(())
}

#[test]
fn what_fits_nowhere_is_recorded_and_the_rest_goes_on() -> Any {
    let place = Place::new()?;
    let flags = ["--memory-budget", "100000,4G", "--most", "1500", "--random-weights", "7", "--variants"];
    let variants = format!("stock,{RETROFIT}");
    let out = max_context(&place, &[&flags[..], &[&variants]].concat()).output()?;
    let (stdout, stderr) = (String::from_utf8(out.stdout)?, String::from_utf8(out.stderr)?);
    assert!(out.status.success(), "{stderr}");
    let found: MaxContexts = read(&place.out(), MAX_CONTEXT)?;
    assert_eq!((found.header.random_weights, found.header.model.is_none(), found.most_tokens), (Some(7), true, 1024));
    let says = "out of memory: --memory-budget: 97.7 KiB is ";
    for variant in ["stock", RETROFIT] {
        let r = of(&found, variant, 100_000);
        assert!(r.status.starts_with(says) && r.status.contains("too little: weights take"), "{}", r.status);
        assert_eq!((r.ctx, r.at_most, r.within, r.needed_bytes, r.read_tokens), (None, false, false, None, None));
        assert!(r.kv.is_none() && r.sample.is_none() && r.prefill_chunk.is_none() && r.weights_bytes > 100_000);
        let r = of(&found, variant, 4 << 30);
        assert_eq!((r.ctx, r.at_most, r.within, r.status.as_str()), (Some(1024), true, true, "ok"));
        assert_eq!(
            (r.read_tokens, r.prefill_chunk),
            (Some(READ), Some(READ)),
            "a chunk is no longer than what is read"
        );
    }
    for words in [says, ">= 1k", "largest ctx", "random weights from seed 7: speed and memory only"] {
        assert!(stdout.contains(words), "lacks `{words}`: {stdout}");
    }
    assert_eq!(stderr.lines().filter(|l| l.contains("stock")).count(), 2, "a line for each run: {stderr}");
    Ok(())
}

#[test]
fn the_run_reads_64k_or_what_there_is_room_for_and_replaces_the_file() -> Any {
    let place = Place::new()?;
    std::fs::write(place.out(), r#"{"kind":"bfly-fit"}"#)?;
    let mut command = bench("fit");
    command.args(["--model", &place.model, "--device", "cpu", "--memory-budget", "4G", "--variants", RETROFIT]);
    command.args(["--most", "2k", "--decode", "3", "--prefill-chunk", "1000", "--quiet", "--out"]).arg(place.out());
    let out = command.output()?;
    assert!(out.status.success() && out.stderr.is_empty(), "{}", String::from_utf8_lossy(&out.stderr));
    let found: MaxContexts = read(&place.out(), MAX_CONTEXT)?;
    let r = of(&found, RETROFIT, 4 << 30);
    assert_eq!((r.ctx, r.read_tokens, r.prefill_chunk), (Some(2048), Some(2045), Some(1000)));
    assert!(read::<Ladder>(&place.out(), LADDER).is_err(), "a file of largest contexts is no ladder");
    // A file of another kind is not replaced.
    std::fs::write(place.out(), "{}")?;
    command.assert().code(2).stderr(predicates::str::contains("ladder.json: is not a results file"));
    assert_eq!(std::fs::read_to_string(place.out())?, "{}");
    std::fs::write(place.out(), serde_json::to_vec(&found)?)?;
    // Nor does a ladder go on with it.
    place.refuses(&["--ctx", "64"], &["is of kind `bfly-fit`; expected `bfly-ladder`"]);
    Ok(())
}

#[test]
fn bad_flags_get_one_error_before_any_work() -> Any {
    let place = Place::new()?;
    for (flags, says) in [
        (&["--memory-budget", "10X"][..], &["--memory-budget", "`10X` is not a size such as 10G"][..]),
        (&["--memory-budget", "1G,,2G"], &["--memory-budget", "`` is not a size"]),
        (&["--most", "1000"], &["--most: 1000 is less than 1k, the smallest context considered"]),
        (&["--most", "1Q"], &["--most", "`1Q` is not a number of tokens"]),
        (&["--decode", "1k"], &["--decode", "not a whole number from 1 to"]),
        (&["--decode", "1024"], &["--decode: 1024 tokens leave no room for a prompt in 1k"]),
        (&["--read", "0"], &["--read", "0 is not a context length"]),
        (&["--most", "4k", "--read", "4089"], &["--read: 4089 tokens and the 8 of --decode are more than --most 4k"]),
        (&["--variants", "dense"], &["--variants", "`dense` is not stock, retrofit"]),
        (&["--out", "/nowhere/at/all.json"], &["--out /nowhere/at/all.json: cannot be written"]),
        (&["--model", "/nowhere/model"], &["/nowhere/model: no such file or directory"]),
    ] {
        let given = |flag: &str| flags.contains(&flag);
        let out = place.out().display().to_string();
        let defaults = [("--model", place.model.as_str()), ("--memory-budget", "4G"), ("--out", &out)];
        let mut command = bench("fit");
        command.args(defaults.iter().filter(|(f, _)| !given(f)).flat_map(|(f, v)| [*f, *v]));
        refused(command.args(["--device", "cpu"]).args(flags), says);
        assert!(!place.out().exists(), "{flags:?} left a file");
    }
    refused(bench("fit").args(["--model", &place.model, "--out"]).arg(place.out()), &["--memory-budget <LIST>"]);
    Ok(())
}
