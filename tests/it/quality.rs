//! What `bfly-quality-smoke` measures against what is known beforehand, and what it refuses.

use crate::common::*;
use assert_cmd::Command;
use bfly::eval::quality::metrics::{compare, losses, LogitRows, TOP};
use bfly::eval::quality::prompting::{answer_turns, loss, read_context, AnswerLimits, PromptIds, Prompter};
use bfly::eval::quality::tasks::{FollowUp, Sample, TokenCounter};
use bfly::eval::report::{read, Ablation, Answers, LayerStudy, Score, Smoke, ABLATION, ANSWERS, LAYERS, SMOKE};
use bfly::generate::{render_messages, watch, Phase};
use bfly::retrofit::Settings;
use std::path::Path;

fn quality(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bfly-quality-smoke"));
    command.current_dir(root()).args(args).args(["--device", "cpu"]);
    command
}

fn path(dir: &Path, name: &str) -> String {
    dir.join(name).to_string_lossy().into_owned()
}

/// A golden: texts are random ids, since it has no tokenizer.
fn golden(name: &str) -> String {
    golden_dir(name).to_string_lossy().into_owned()
}

/// SmolLM2, which scripts/test.sh fetches.
fn smollm2() -> String {
    let path = root().join("models/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing; run scripts/test.sh, which fetches it", path.display());
    path.to_string_lossy().into_owned()
}

#[test]
fn stock_against_stock_is_exactly_the_same() -> Any {
    let dir = tempfile::tempdir()?;
    let out = path(dir.path(), "smoke.json");
    for name in ["qwen2", "gemma3"] {
        let model = golden(name);
        let args =
            ["--model", &model, "--variants", "stock,retrofit:window=128", "--ctx", "400,700", "--documents", "3"];
        let more = ["--positions", "100", "--greedy", "20", "--prefill-chunk", "150", "--out", &out];
        let gates = ["--fail-above", "kl=1000", "--fail-below", "overlap=0"];
        quality(&[&args[..], &more, &gates].concat()).assert().success();
        let smoke: Smoke = read(Path::new(&out), SMOKE)?;
        assert_eq!(smoke.runs.len(), 4);
        for run in &smoke.runs {
            assert_eq!(run.documents.len(), 3);
            let stock = run.record.variant == "stock";
            for d in &run.documents {
                if stock {
                    assert_eq!((d.kl, d.kl_reverse, d.top1, d.overlap), (0.0, 0.0, 1.0, TOP as f64));
                    assert_eq!((d.greedy_prefix, d.greedy_equal, d.loss), (20, true, d.stock_loss));
                } else {
                    assert!(
                        d.kl > 0.0 && d.kl_reverse > 0.0 && d.overlap < TOP as f64,
                        "{name}: a window of 128 of {}",
                        run.ctx
                    );
                }
            }
            assert_eq!(run.record.kv.total_bytes < run.record.kv.dense_bytes, !stock);
        }
    }
    Ok(())
}

#[test]
fn with_transformers_logits_the_same_metrics_come_out() -> Any {
    for name in &goldens()? {
        let golden = Golden::open(name)?;
        // tests/it/golden.rs reads the long ones of all.
        for (case, last) in [("short", 64), ("long", 8)].into_iter().filter(|(c, _)| *c == "short" || name == "qwen2") {
            let ids = golden.ids(case)?;
            let ours = LogitRows::of(&last_logits(&load_golden(name, None, ids.len())?, &ids, 512, last)?)?;
            let theirs = LogitRows::of(&golden.logits(case)?)?;
            // Any tokens will do as the next ones.
            let next: Vec<u32> = ids[ids.len() - last..].iter().map(|id| id / 2).collect();
            let other = LogitRows::of(&golden.logits_bf16(case)?)?;
            // Both against a third set of logits, and against each other.
            for ((a, b), same) in compare(&ours, &other, &next)?
                .iter()
                .zip(compare(&theirs, &other, &next)?)
                .zip(compare(&theirs, &ours, &next)?)
            {
                let close = |x: f64, y: f64| (x - y).abs() <= 1e-3 * y.abs().max(1.0);
                assert!(close(a.kl, b.kl) && close(a.kl_reverse, b.kl_reverse), "{name}, {case}: {a:?} {b:?}");
                assert!(close(a.reference_loss, b.reference_loss), "{name}, {case}: {a:?} {b:?}");
                assert!(close(same.reference_loss, same.loss), "{name}, {case}: {same:?}");
                assert!(a.top1 == b.top1 && same.top1, "{name}, {case}: {a:?} {b:?} {same:?}");
                // A token more or less where two share the fiftieth place to within rounding.
                assert!(a.overlap.abs_diff(b.overlap) <= 1, "{name}, {case}: {a:?} {b:?}");
                assert!(same.kl.abs() < 1e-4 && same.overlap >= TOP - 1, "{name}, {case}: {same:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_missed_gate_ends_with_one_and_says_which() -> Any {
    let model = golden("qwen2");
    let args = ["--model", &model, "--ctx", "400", "--documents", "2", "--positions", "50", "--greedy", "4", "-q"];
    let out = quality(&[&args[..], &["--variants", "retrofit:window=128", "--fail-above", "kl=0.0000001"]].concat())
        .output()?;
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("kl of retrofit:window=128 at 400 is"), "{stderr}");
    let out = quality(&[&args[..], &["--variants", "stock", "--fail-above", "kl=0"]].concat()).output()?;
    let stdout = String::from_utf8_lossy(&out.stdout).into_owned();
    assert_eq!(out.status.code(), Some(0), "{stdout}");
    // Stock against itself: the perplexities of both are one.
    let row: Vec<&str> = stdout.lines().nth(1).unwrap_or_default().split_whitespace().collect();
    assert!(row.len() > 5 && row[4] == row[5] && row[4].parse::<f64>()? > 1.0, "{stdout}");
    Ok(())
}

/// Runs, and checks that one line names what is wrong.
fn refused(args: &[&str], says: &[&str]) {
    let out = quality(args).output().expect("the binary runs");
    let stderr = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(2), "{args:?}: {stderr}");
    let lines: Vec<_> = stderr.lines().filter(|l| l.starts_with("error:")).collect();
    assert!(lines.len() == 1 && !stderr.contains("panicked"), "{args:?}: {stderr}");
    says.iter().for_each(|word| assert!(stderr.contains(word), "{args:?} should say `{word}`: {stderr}"));
}

#[test]
fn bad_input_is_named() -> Any {
    let dir = tempfile::tempdir()?;
    let (tiny, real) = (golden("qwen2"), smollm2());
    refused(&["--model", &real, "--ctx", "16k"], &["--ctx: 16k", "trained for 8k", "--allow-extrapolation"]);
    refused(&["--model", &tiny, "--ctx", "100"], &["--ctx: 100 has no room for 256 positions"]);
    refused(&["--model", &tiny, "--fail-below", "top3=1"], &["--fail-below", "`top3` is not one of kl"]);
    refused(&["--model", &tiny, "--variants", "snapkv:budget=0"], &["--variants snapkv:budget=0"]);

    let texts = path(dir.path(), "texts");
    std::fs::create_dir(&texts)?;
    std::fs::write(Path::new(&texts).join("a.txt"), "A short text.")?;
    std::fs::write(Path::new(&texts).join("manifest.json"), r#"{"documents": [{"order": 0, "file": "a.txt"}]}"#)?;
    refused(
        &["--model", &real, "--ctx", "1k", "--texts", &texts],
        &["--texts", "too short for 1k tokens: the longest has"],
    );

    let ruler = |more: &[&str], says: &[&str]| refused(&[&["ruler", "--model", real.as_str()], more].concat(), says);
    ruler(&["--tasks", "niah_single_9"], &["--tasks", "`niah_single_9` is not one of niah_single_1"]);
    ruler(&["--samples", "0"], &["--samples"]);
    ruler(&["--ctx", "64", "--tasks", "niah_single_1"], &["niah_single_1", "64 tokens are too few"]);
    ruler(&["--ctx", "16k", "--tasks", "niah_single_1", "--samples", "1"], &["--ctx: 16k", "--allow-extrapolation"]);
    ruler(&["--words", "nowhere", "--tasks", "cwe"], &["cwe", "scripts/fetch_words.py"]);
    let broken = path(dir.path(), "broken.jsonl");
    let line = r#"{"task":"vt","index":0,"input":"a","outputs":["b"],"length":9,"max_new_tokens":3}"#;
    std::fs::write(&broken, format!("{line}\n{{\"task\":"))?;
    ruler(&["--import", &broken], &["broken.jsonl: line 2", "not a sample"]);
    for (second, says) in [
        (line.to_string(), "repeats the sample of line 1"),
        (line.replace("vt", "my_task"), "`my_task` is not one of"),
        (line.replace(r#"["b"]"#, r#"[""]"#), "nothing to score"),
    ] {
        std::fs::write(&broken, format!("{line}\n{second}\n"))?;
        ruler(&["--import", &broken], &["broken.jsonl: line 2", says]);
    }
    std::fs::write(&broken, line)?;
    ruler(&["--import", &broken, "--tasks", "cwe"], &["--import", "no samples of cwe"]);
    refused(&["ablate", "--model", &tiny, "--tasks", "vt,vt"], &["--tasks", "names `vt` twice"]);
    ruler(&["--tasks", "all,vt"], &["--tasks", "names `vt` twice"]);
    ruler(&["--tasks", "recall,recall_turns"], &["--tasks", "names `recall_turns` twice"]);
    ruler(&["--ctx", "700", "--tasks", "recall_turns"], &["recall_turns", "700 tokens are too few", "240 tokens"]);

    // What is no earlier result stays what it is.
    let (notes, no_dir) = (path(dir.path(), "notes.txt"), path(dir.path(), "no/where.jsonl"));
    std::fs::write(&notes, "do not lose this")?;
    let elsewhere = path(dir.path(), "smoke.json");
    std::fs::write(&elsewhere, r#"{"kind":"bfly-smoke","schema_version":1}"#)?;
    for command in [&[][..], &["ablate"], &["positions"], &["layers"], &["ruler"], &["needle"]] {
        refused(&[command, &["--model", &tiny, "--out", &notes]].concat(), &["notes.txt"]);
    }
    for command in ["ablate", "positions", "layers", "ruler", "needle"] {
        refused(&[command, "--model", &tiny, "--out", &elsewhere], &["smoke.json", "is", "bfly-smoke"]);
    }
    let joined = Command::new(env!("CARGO_BIN_EXE_bfly-quality-smoke"))
        .args(["join", &elsewhere, &elsewhere, "--out", &notes])
        .output()?;
    let stderr = String::from_utf8_lossy(&joined.stderr).into_owned();
    assert!(joined.status.code() == Some(2) && stderr.contains("notes.txt: is not a results file"), "{stderr}");
    ruler(&["--export", &notes, "--export-only"], &["--export", "notes.txt: holds no samples"]);
    ruler(&["--export", &no_dir, "--export-only"], &["--export", "where.jsonl"]);
    let both = path(dir.path(), "both.json");
    ruler(&["--export", &both, "--out", &both], &["--export", "the file of --out too"]);
    ruler(&["--ctx", "16k", "--export", &both, "--export-only"], &["--ctx: 16k", "--allow-extrapolation"]);
    assert!(!Path::new(&both).exists(), "refused before samples are written");
    refused(&["layers", "--model", &tiny, "--tasks", "none", "--plans", &notes], &["--plans", "notes.txt"]);
    assert_eq!(std::fs::read_to_string(&notes)?, "do not lose this");

    let layers = ["layers", "--model", tiny.as_str(), "--tasks", "none"];
    refused(&[&layers[..], &["--rank", "heads"]].concat(), &["--rank", "give --tasks"]);
    refused(&[&layers[..], &["--rank-by", "answers"]].concat(), &["--rank-by", "give --tasks"]);

    let plan = path(dir.path(), "plan.json");
    let other = r#"{"schema_version":1,"family":"qwen2","model_layers":99,"layers":[3],"settings":{}}"#;
    std::fs::write(&plan, other)?;
    let variant = format!("retrofit:plan={plan}");
    refused(
        &["--model", &real, "--ctx", "1k", "--variants", &variant],
        &["plan.json", "made for qwen2 with 99 layers"],
    );
    Ok(())
}

#[test]
fn answers_are_taken_up_again_and_samples_travel_through_files() -> Any {
    let dir = tempfile::tempdir()?;
    let (real, out, jsonl) = (smollm2(), path(dir.path(), "answers.json"), path(dir.path(), "samples.jsonl"));
    let ask = |more: &[&str]| {
        let args = ["ruler", "--model", real.as_str(), "-q", "--variants", "stock,snapkv:budget=256"];
        quality(&[&args[..], more].concat()).assert().success();
    };
    let made = ["--tasks", "niah_single_1,fwe", "--ctx", "450", "--seed", "3", "--out", &out];
    let answers = || read::<Answers>(Path::new(&out), ANSWERS);
    ask(&[&made[..], &["--samples", "1"]].concat());
    let first = answers()?;
    ask(&[&made[..], &["--samples", "2", "--export", &jsonl]].concat());
    let both = answers()?;
    assert_eq!((first.cells.len(), both.cells.len(), both.header.resumed.len()), (4, 4, 1));
    for (one, two) in first.cells.iter().zip(&both.cells) {
        assert_eq!((one.answers.len(), two.answers.len()), (1, 2));
        assert_eq!(one.answers[0], two.answers[0], "a stored answer is not generated again");
    }
    // The same samples out of the file, two side by side, give the same answers in the same order.
    let again = path(dir.path(), "again.json");
    ask(&["--import", &jsonl, "--jobs", "2", "--out", &again]);
    let again: Answers = read(Path::new(&again), ANSWERS)?;
    for cell in &again.cells {
        let key = (&cell.task, &cell.record.variant);
        let same = both.cells.iter().find(|c| (&c.task, &c.record.variant) == key).ok_or("a cell is missing")?;
        assert_eq!((cell.length, &cell.answers), (450, &same.answers), "{}", cell.task);
    }
    // Other prompt settings need another file.
    let args = ["ruler", "--model", real.as_str(), "-q", "--variants", "stock", "--chat", "--samples", "1"];
    refused(&[&args[..], &made].concat(), &["--out", "another set of prompt settings"]);
    Ok(())
}

#[test]
fn turns_are_recorded_resumed_and_travel_through_files() -> Any {
    let dir = tempfile::tempdir()?;
    let (real, jsonl) = (smollm2(), path(dir.path(), "samples.jsonl"));
    let ask = |name: &str, how: &[&str]| -> Any<Answers> {
        let out = path(dir.path(), name);
        let args = ["ruler", "--model", real.as_str(), "-q", "--variants", "stock", "--out", &out];
        quality(&[&args[..], how].concat()).assert().success();
        Ok(read(Path::new(&out), ANSWERS)?)
    };
    let made = ["--tasks", "recall_turns", "--ctx", "1100", "--samples", "1"];
    let chat = ["--chat", "--question-unseen"];
    let (asked, export) = ([&made[..], &chat].concat(), ["--export", jsonl.as_str()]);
    let chats = ask("chat.json", &[&asked[..], &export].concat())?;
    let lines = ask("lines.json", &made)?;
    for (answers, by_lines) in [(&chats, false), (&lines, true)] {
        let answer = &answers.cells[0].answers[0];
        assert_eq!(answer.turns.len(), 10);
        assert_eq!(answer.tokens, answer.turns.iter().map(|t| t.tokens).sum::<usize>());
        let mean = answer.turns.iter().map(|t| t.score).sum::<f64>() / 10.0;
        assert!((answer.score - mean).abs() < 1e-12 && answer.turns.iter().all(|t| t.tokens <= 24));
        assert!(answer.prompt_tokens + 10 * 24 <= 1100, "{} tokens of prompt", answer.prompt_tokens);
        // A line ends a raw answer; a chat has its own end of turn.
        let one_line = answer.turns.iter().all(|t| !t.answer.trim().contains('\n'));
        assert!(!by_lines || one_line, "{:?}", answer.turns);
    }
    // An answered sample is not answered again, and out of a file it is the same sample.
    let again = ask("chat.json", &asked)?;
    assert_eq!(again.cells, chats.cells);
    let imported = ask("imported.json", &[&["--import", jsonl.as_str()], &chat[..]].concat())?;
    assert_eq!((imported.cells[0].length, &imported.cells[0].answers), (1100, &chats.cells[0].answers));
    Ok(())
}

#[test]
fn rulers_own_files_are_one_cell_and_their_questions_can_be_unseen() -> Any {
    let dir = tempfile::tempdir()?;
    let (real, out, jsonl) = (smollm2(), path(dir.path(), "answers.json"), path(dir.path(), "ours.jsonl"));
    let ask = |more: &[&str]| {
        let args = ["ruler", "--model", real.as_str(), "--variants", "snapkv:budget=96", "--question-unseen"];
        let asked = quality(&[&args[..], &["--tasks", "niah_single_1"], more].concat()).output().expect("it runs");
        let stderr = String::from_utf8_lossy(&asked.stderr).into_owned();
        assert!(asked.status.success(), "{stderr}");
        stderr
    };
    ask(&["--ctx", "330", "--samples", "2", "--export", &jsonl, "--out", &out]);
    let ours: Answers = read(Path::new(&out), ANSWERS)?;
    // The same samples with RULER's fields alone.
    let mut lines = vec![];
    for line in std::fs::read_to_string(&jsonl)?.lines() {
        let sample: serde_json::Value = serde_json::from_str(line)?;
        let keep = |key: &str| (key.to_string(), sample[key].clone());
        let fields = ["index", "input", "outputs", "length", "answer_prefix"].map(keep);
        lines.push(serde_json::Value::Object(fields.into_iter().collect()).to_string());
    }
    let rulers = path(dir.path(), "validation.jsonl");
    std::fs::write(&rulers, lines.join("\n"))?;
    let imported = path(dir.path(), "imported.json");
    let warned = ask(&["--import", &rulers, "--import-length", "330", "--out", &imported]);
    assert!(!warned.contains("does not state the length"), "{warned}");
    let theirs: Answers = read(Path::new(&imported), ANSWERS)?;
    assert_eq!((theirs.cells.len(), theirs.cells[0].length), (1, 330));
    assert_eq!(theirs.cells[0].answers, ours.cells[0].answers, "split at the same place, and evicted at the same time");
    let args = ["ruler", "--model", real.as_str(), "--tasks", "niah_single_1", "--import", &rulers];
    refused(&[&args[..], &["--import-length", "200"]].concat(), &["--import-length: 200 is less than the 3", "give 3"]);
    let alone = ["ruler", "--model", real.as_str(), "--import-length", "200"];
    refused(&alone, &["--import"]);
    let warned = ask(&["--import", &rulers]);
    assert!(
        warned.contains("validation.jsonl does not state the length") && warned.contains("--import-length"),
        "{warned}"
    );
    Ok(())
}

/// What several turns read, with the answers in their places.
fn in_one_go(prompt: &PromptIds, answers: &[Vec<u32>]) -> Vec<u32> {
    let later = prompt.follow_ups.iter().zip(&answers[1..]).flat_map(|(turn, answer)| [turn.clone(), answer.clone()]);
    [prompt.first_turn(), answers[0].clone()].into_iter().chain(later).flatten().collect()
}

#[test]
fn several_turns_read_what_one_text_with_their_answers_reads() -> Any {
    let window = Settings { window: 64, block: 16, ..Settings::default() };
    for (name, settings) in [("qwen2", None), ("qwen2", Some(&window)), ("gemma3", None), ("gemma3", Some(&window))] {
        let model = load_golden(name, settings, 400)?;
        let ids = |n: u32, from: u32| (0..n).map(|i| 4 + (from + 37 * i) % 300).collect::<Vec<u32>>();
        for context in [ids(150, 0), vec![]] {
            let prompt = PromptIds { context, rest: ids(20, 5), follow_ups: vec![ids(9, 7), ids(1, 8), ids(14, 9)] };
            let answers_of = |stop: &[u32], ends: &dyn Fn(&[u32]) -> bool| -> Any<_> {
                let (mut run, mut read) = (model.run()?, vec![]);
                let before = read_context(&mut run, &prompt, 32, &mut |n| read.push(n))?;
                let limits = AnswerLimits { room: 6, stop, ends, chunk: 8, question: Phase::Decode };
                let answers = answer_turns(&mut run, &prompt, &limits, &mut |n| read.push(before + n))?;
                assert_eq!(read.last(), Some(&prompt.tokens()), "progress counts the prompt's tokens");
                assert!(read.windows(2).all(|p| p[0] <= p[1]), "{read:?}");
                Ok((answers, run.cache().position()))
            };
            let (full, _) = answers_of(&[], &|_| false)?;
            assert!(full.iter().all(|a| a.len() == 6), "{name}: room for six tokens");
            // A stop token is no part of its answer, a token that ends an answer otherwise is.
            let (stopped, _) = answers_of(&[full[0][3]], &|_| false)?;
            let first = full[0].iter().position(|id| *id == full[0][3]).ok_or("a token")?;
            assert_eq!(stopped[0], full[0][..first], "{name}");
            let (ended, _) = answers_of(&[], &|answer| answer.len() == 2)?;
            assert!(ended.iter().all(|a| a.len() == 2) && ended[0] == full[0][..2], "{name}");
            for (answers, how) in [(full, "full"), (stopped, "stopped"), (ended, "ended")] {
                let ids = in_one_go(&prompt, &answers);
                let logits = model.run()?.prefill(&ids, 512, ids.len(), &mut watch(|_| ()))?;
                let likeliest = logits.argmax(1)?.to_vec1::<u32>()?;
                let mut at = prompt.first_turn().len();
                for (i, answer) in answers.iter().enumerate() {
                    assert_eq!(likeliest[at - 1..at - 1 + answer.len()], answer[..], "{name}, {how}, turn {i}");
                    at += answer.len() + prompt.follow_ups.get(i).map_or(0, Vec::len);
                }
                // The loss on these very answers, read turn by turn and in one go.
                if answers.iter().all(|a| !a.is_empty()) {
                    let (by_turns, all_likeliest) = loss(&mut model.run()?, (&prompt, &answers), 8, &mut |_| ())?;
                    let rows = LogitRows::of(&logits.narrow(0, 0, ids.len() - 1)?)?;
                    let each = losses(&rows, &ids[1..])?;
                    let (mut at, mut own) = (prompt.first_turn().len(), vec![]);
                    for (i, answer) in answers.iter().enumerate() {
                        own.extend_from_slice(&each[at - 1..at - 1 + answer.len()]);
                        at += answer.len() + prompt.follow_ups.get(i).map_or(0, Vec::len);
                    }
                    let mean = own.iter().sum::<f64>() / own.len() as f64;
                    assert!(all_likeliest && (by_turns - mean).abs() < 1e-3, "{name}, {how}: {by_turns} and {mean}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn turns_in_a_chat_are_the_rendered_conversation() -> Any {
    let question = |key: &str| format!("What is the number for {key}?");
    let prefix = |key: &str| format!(" The number for {key} is");
    let turn = |key: &str| FollowUp { question: question(key), answer_prefix: prefix(key), outputs: vec!["1".into()] };
    let context = "The number for a is 71. The number for b is 82. The number for c is 93.\n";
    let sample = Sample {
        task: "recall_turns".into(),
        index: 0,
        input: format!("{context}{}", question("a")),
        question_at: Some(context.len()),
        answer_prefix: prefix("a"),
        outputs: vec!["71".into()],
        length: 0,
        made_for: None,
        max_new_tokens: 8,
        depth: None,
        follow_ups: vec![turn("b"), turn("c")],
    };
    let text = || open(&smollm2())?.tokenizer();
    let answers = [" 71.", " 82, I think.", " 93"];
    let ids = answers.map(|a| text().and_then(|t| t.encode(a, false)));
    let ids = ids.into_iter().collect::<bfly::Result<Vec<_>>>()?;
    let users = [sample.input.clone(), question("b"), question("c")];
    let said = ["a", "b", "c"].iter().zip(answers).map(|(key, answer)| prefix(key).trim_start().to_string() + answer);
    let said: Vec<String> = said.collect();
    let messages: Vec<_> =
        users.iter().zip(&said).flat_map(|(u, a)| [("user", u.as_str()), ("assistant", a)]).collect();
    // The last answer's message is open.
    let conversation = render_messages(text()?.chat_template()?, &messages[..5])? + &said[2];
    let plain = format!("{}{}{}", sample.prompt(), answers[0], "\n") + &turn("b").prompt() + answers[1] + "\n";
    let plain = plain + &turn("c").prompt() + answers[2];
    for (chat, unseen) in [(true, true), (true, false), (false, true), (false, false)] {
        let prompter = Prompter::new(text()?, chat, unseen, 64)?;
        let prompt = prompter.prompt(&sample)?;
        assert_eq!((prompt.follow_ups.len(), prompt.context.is_empty()), (2, !unseen));
        let want = text()?.encode(if chat { &conversation } else { &plain }, !chat)?;
        assert_eq!(in_one_go(&prompt, &ids), want, "chat {chat}, unseen {unseen}");
        // What is counted is what is read, to within a token where two texts meet.
        let later = sample.follow_ups.iter().map(|turn| prompter.follow_up(&turn.prompt()));
        let later: usize = later.collect::<bfly::Result<Vec<_>>>()?.iter().sum();
        let counted = TokenCounter::prompt(&prompter, &sample.prompt())? + later;
        assert!(
            (prompt.tokens()..=prompt.tokens() + 3).contains(&counted),
            "counted {counted}, read {}",
            prompt.tokens()
        );
    }
    Ok(())
}

#[test]
fn a_needle_is_found_where_the_window_still_holds_it() -> Any {
    let dir = tempfile::tempdir()?;
    let (real, out) = (smollm2(), path(dir.path(), "needle.json"));
    let args = ["needle", "--model", &real, "--ctx", "450", "--depths", "2", "--samples", "1", "--out", &out, "-q"];
    // Prose would have to be fetched.
    let more = ["--hay", "noise", "--variants", "stock,retrofit:window=128,block=64"];
    quality(&[&args[..], &more].concat()).assert().success();
    let answers: Answers = read(Path::new(&out), ANSWERS)?;
    for cell in &answers.cells {
        let got: Vec<_> = cell.answers.iter().map(|a| (a.depth, a.score)).collect();
        let first = if cell.record.variant == "stock" { 1.0 } else { 0.0 };
        assert_eq!(got, [(Some(0.0), first), (Some(1.0), 1.0)], "{}", cell.record.variant);
    }
    assert_eq!(answers.cells.len(), 2);
    Ok(())
}

#[test]
fn rules_are_compared_at_no_more_bytes_and_never_with_themselves() -> Any {
    let dir = tempfile::tempdir()?;
    let (model, out) = (golden("qwen2"), path(dir.path(), "ablation.json"));
    let args =
        ["ablate", "--model", &model, "--ctx", "700", "--documents", "2", "--tasks", "none", "--axes", "partner"];
    let base = ["--variants", "retrofit:window=64,block=16,partner-count=2", "--out", &out, "-q"];
    quality(&[&args[..], &base].concat()).assert().success();
    let found: Ablation = read(Path::new(&out), ABLATION)?;
    let change = |rule: &str| {
        let own = found.changes.iter().find(|c| c.value.starts_with(&format!("{rule}, window ")));
        own.unwrap_or_else(|| panic!("{rule} is missing"))
    };
    assert_eq!(found.changes.len(), 7);
    for change in &found.changes {
        let score = change.score.as_ref().ok_or("not measured")?;
        assert!(score.record.kv.total_bytes <= found.base.record.kv.total_bytes, "{}", change.value);
        assert_ne!(score.texts, found.base.texts, "{}: measured, but nothing moved", change.value);
    }
    // What is read is a fact of the graph: 700 tokens are 43 whole blocks of 16.
    assert_eq!(change("local").summaries_per_query, 0.0);
    assert_eq!(change("fixed_stride").summaries_per_query, 1.0);
    assert!((30.0..43.0).contains(&change("all").summaries_per_query));
    // A rule that does not keep summaries has the wider window.
    let window = |rule: &str| change(rule).value.rsplit(' ').next().unwrap_or_default().parse::<usize>();
    assert!(window("local")? > 64 && window("all")? < 64 && window("xor")? == 64);

    // On the last rows alone the three exclusive rules read the same: told, and not measured.
    let base = "retrofit:window=64,block=16,partner-count=4";
    let same = ["--variants", base, "--positions", "16", "--decode", "4", "--out", &out, "-q"];
    quality(&[&args[..], &same].concat()).assert().success();
    let found: Ablation = read(Path::new(&out), ABLATION)?;
    let alike: Vec<_> = found.changes.iter().filter(|c| c.same_as.is_some()).collect();
    assert_eq!(
        alike.iter().map(|c| c.value.as_str()).collect::<Vec<_>>(),
        ["bit_reversal, window 64", "benes, window 64"]
    );
    for change in alike {
        assert_eq!((change.same_as.as_deref(), &change.score), (Some("partner xor, window 64"), &None));
    }
    Ok(())
}

#[test]
fn looking_on_changes_nothing_and_sees_every_layer() -> Any {
    for name in ["qwen2", "gemma3"] {
        let model = load_golden(name, None, 64)?;
        let ids: Vec<u32> = (4..40).collect();
        let want = model.run()?.forward(&ids, &[3, 35])?;
        let mut seen = vec![];
        let got = model.run()?.forward_observed(&ids, &[3, 35], &mut |o| {
            seen.push((o.layer, o.x.dims().to_vec(), o.chunk.start));
            Ok(())
        })?;
        assert_eq!(want.to_vec2::<f32>()?, got.to_vec2::<f32>()?);
        let hidden = model.spec().hidden;
        let all: Vec<_> = (0..model.spec().layers.len()).map(|i| (i, vec![36, hidden], 0)).collect();
        assert_eq!(seen, all);
    }
    Ok(())
}

#[test]
fn layers_are_ranked_by_rounds_and_alike_however_many_are_judged_side_by_side() -> Any {
    let dir = tempfile::tempdir()?;
    let (model, plans) = (golden("qwen3"), path(dir.path(), "plans"));
    let study = |name: &str, more: &[&str]| -> std::result::Result<LayerStudy, Box<dyn std::error::Error>> {
        let out = path(dir.path(), name);
        let args = ["layers", "--model", model.as_str(), "-q", "--tasks", "none", "--ctx", "96", "--documents", "2"];
        let what = ["--positions", "16", "--decode", "4", "--variants", "retrofit:window=16,block=8", "--out", &out];
        quality(&[&args[..], &what, more].concat()).assert().success();
        Ok(read(Path::new(&out), LAYERS)?)
    };
    let alone = study("alone.json", &["--rank", "alone"])?;
    let rounds = study("rounds.json", &["--plans", &plans])?;
    let beside = study("beside.json", &["--jobs", "3"])?;
    assert!(alone.rounds.is_empty() && alone.single == rounds.single);
    assert_eq!((&rounds.order, &rounds.rounds, &rounds.curve), (&beside.order, &beside.rounds, &beside.curve));
    // Each round tries what the one before it left, but for what was swapped for good.
    let mut left = rounds.single.len();
    for round in &rounds.rounds {
        assert!(round.tried.len() < left && round.swapped.len() + round.tried.len() == rounds.single.len());
        left = round.tried.len();
        for single in &round.tried {
            let plan = single.score.record.plan.as_ref().ok_or("a round without a plan")?;
            let mut want = [round.swapped.as_slice(), &[single.layer]].concat();
            want.sort_unstable();
            assert_eq!(plan.layers, want);
        }
    }
    assert!(!rounds.rounds.is_empty());
    // The layer that is kept longest is dense in the plan that keeps one.
    let plan: bfly::retrofit::RetrofitPlan =
        serde_json::from_slice(&std::fs::read(path(dir.path(), "plans/dense-1.json"))?)?;
    assert!(!plan.layers.contains(&rounds.order[0]) && plan.layers.len() + 1 == rounds.order.len());

    // Cut off: some is judged and put in no order yet. What is there is not judged again, or the mark would go.
    let mut judged: Vec<_> =
        rounds.single.iter().skip(1).chain(&rounds.rounds[0].tried).map(|s| s.score.clone()).collect();
    judged[0].texts[0].decode_kl = 42.5;
    let cut = LayerStudy { judged, single: vec![], rounds: vec![], order: vec![], curve: vec![], ..rounds.clone() };
    std::fs::write(path(dir.path(), "cut.json"), serde_json::to_vec(&cut)?)?;
    let again = study("cut.json", &["--jobs", "2"])?;
    assert_eq!((&again.header.started, again.header.resumed.len()), (&rounds.header.started, 1));
    let mut want = rounds.single.clone();
    want[1].score.texts[0].decode_kl = 42.5;
    assert_eq!((&again.single, &again.rounds, &again.curve), (&want, &rounds.rounds, &rounds.curve));
    assert!(again.judged.is_empty());
    // The ranking may be another: one layer at a time has been judged.
    let ranked = study("cut.json", &["--rank", "alone"])?;
    assert_eq!(ranked.single, want);
    // What the rounds judged is still there.
    let told = |s: &Score| {
        ranked.judged.contains(s)
            || ranked.curve.iter().any(|k| k.score == *s)
            || ranked.single.iter().any(|l| l.score == *s)
    };
    assert!(again.rounds.iter().flat_map(|r| &r.tried).all(|l| told(&l.score)) && !ranked.judged.is_empty());
    let other = ["layers", "--model", model.as_str(), "--tasks", "none", "--documents", "2", "--positions", "16"];
    let what = ["--decode", "4", "--variants", "retrofit:window=16,block=8", "--out", &path(dir.path(), "cut.json")];
    refused(
        &[&other[..], &what, &["--ctx", "90"]].concat(),
        &["cut.json", "another evaluation set", "choose another --out"],
    );
    let mut changed = cut;
    changed.stock.texts[0].loss += 1.0;
    std::fs::write(path(dir.path(), "cut.json"), serde_json::to_vec(&changed)?)?;
    refused(&[&other[..], &what, &["--ctx", "96"]].concat(), &["cut.json", "score of stock", "nats"]);
    Ok(())
}
