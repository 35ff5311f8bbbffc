//! Tests of properties that all tasks share.

use super::fixture::{sources, words, Counter};
use super::*;
use crate::error::At;
use std::path::Path;
use std::sync::Mutex;

fn quiet(_: &str, _: u64, _: u64) {}

/// The sources, with questions of both forms.
fn all_sources() -> Result<Sources> {
    let dir = tempfile::tempdir().at("temporary folder")?;
    let (squad, hotpot) = (dir.path().join("squad"), dir.path().join("hotpot"));
    let text = |i: usize| format!("Fact {i}: the answer is a{i}a. {}", "More of it follows. ".repeat(8));
    let qas = |i: usize| serde_json::json!([{"question": format!("What is fact {i}?"), "answers": [{"text": format!("a{i}a")}]}]);
    let paragraphs: Vec<_> = (0..40).map(|i| serde_json::json!({"context": text(i), "qas": qas(i)})).collect();
    std::fs::write(&squad, serde_json::json!({"data": [{"paragraphs": paragraphs}]}).to_string()).at("squad")?;
    let question = |i: usize| {
        serde_json::json!({"question": format!("What is fact {i}?"), "answer": format!("a{i}a"),
        "context": [[format!("Title {i}"), [text(i)]], [format!("Other {i}"), ["Nothing."]]]})
    };
    std::fs::write(&hotpot, serde_json::json!((0..40).map(question).collect::<Vec<_>>()).to_string()).at("hotpot")?;
    Ok(Sources { squad: Some(Questions::squad(&squad)?), hotpot: Some(Questions::hotpot(&hotpot)?), ..sources() })
}

#[test]
fn the_tasks_are_rulers() {
    let rooms: Vec<_> = TASKS.iter().map(|t| (t.name, t.max_new_tokens, t.rule.name())).collect();
    let niah =
        ["single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery"];
    let names: Vec<_> = niah.iter().map(|n| format!("niah_{n}")).collect();
    let mut expected: Vec<_> = names.iter().map(|n| (n.as_str(), 128, "string_match_all")).collect();
    expected.extend([
        ("vt", 30, "string_match_all"),
        ("cwe", 120, "string_match_all"),
        ("fwe", 50, "string_match_all"),
    ]);
    expected.extend([("qa_1", 32, "string_match_part"), ("qa_2", 32, "string_match_part")]);
    assert_eq!(rooms, expected);
    let error = find("niah").err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error.contains("`niah`") && error.contains("niah_single_1, ") && error.contains("qa_2"), "{error}");
    assert_eq!(rule("needle").ok(), Some(ScoringRule::All));
    assert_eq!(rule("qa_2").ok(), Some(ScoringRule::Part));
    assert!(rule("haystack").is_err());
}

#[test]
fn the_recall_tasks_are_named_apart_from_rulers() -> Result<()> {
    let tasks: Vec<_> = RECALL_TASKS.iter().map(|t| (t.name, t.max_new_tokens, t.rule.name())).collect();
    let expected = [
        ("recall_turns", 24, "string_match_all"),
        ("recall_needles", 256, "string_match_all"),
        ("recall_count", 32, "first_number_match"),
    ];
    assert_eq!(tasks, expected);
    let names = |names: &[&str]| -> Result<Vec<&str>> {
        let names: Vec<String> = names.iter().map(|n| n.to_string()).collect();
        Ok(named(&names)?.iter().map(|t| t.name).collect())
    };
    assert_eq!(names(&["vt", "recall"])?, ["vt", "recall_turns", "recall_needles", "recall_count"]);
    assert_eq!(names(&["recall_count"])?, ["recall_count"]);
    let twice = names(&["recall_turns", "recall"]).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(twice.contains("--tasks") && twice.contains("names `recall_turns` twice"), "{twice}");
    let unknown = names(&["recalls"]).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(unknown.contains("`recalls` is not one of") && unknown.contains("recall_count"), "{unknown}");
    Ok(())
}

#[test]
fn every_turn_has_room_and_is_counted_as_such() -> Result<()> {
    /// Counts words, and three more for every later turn, as a chat template adds them.
    struct Chat;
    impl TokenCounter for Chat {
        fn prompt(&self, text: &str) -> Result<usize> {
            words(text)
        }
        fn follow_up(&self, text: &str) -> Result<usize> {
            Ok(words(text)? + 3)
        }
    }
    let task = find("recall_turns")?;
    let sample = |count| task.sample(&sources(), SampleKey { length: 1_000, seed: 1, index: 0 }, count);
    let (plain, chat) = (sample(&words)?, sample(&Chat)?);
    assert_eq!((plain.follow_ups.len(), plain.room()), (9, 240));
    assert!(chat.input.len() < plain.input.len() && chat.follow_ups == plain.follow_ups);
    assert!((980..=1_000).contains(&chat.length) && (980..=1_000).contains(&plain.length));
    Ok(())
}

#[test]
fn lengths_are_counted_right_and_nearly_reached() -> Result<()> {
    let all = all_sources()?;
    for (task, length) in every().flat_map(|t| [900, 4_096, 20_000].map(|length| (t, length))) {
        let counter = Counter::default();
        let s = task.sample(&all, SampleKey { length, seed: 5, index: 2 }, &|t: &str| counter.count(t))?;
        let later = s.follow_ups.iter().map(|turn| words(&turn.prompt())).sum::<Result<usize>>()?;
        assert_eq!(s.length, words(&s.prompt())? + later + s.room(), "{}", task.name);
        assert_eq!((s.task.as_str(), s.max_new_tokens, s.index), (task.name, task.max_new_tokens, 2));
        let share = s.length as f64 / length as f64;
        // A document or a line of noise is up to 40 of 900 words.
        let least = if length == 900 { 0.95 } else { 0.98 };
        assert!(share <= 1.0 && share >= least, "{} at {length}: {}", task.name, s.length);
        assert!(
            counter.counts() <= 16 * (1 + s.follow_ups.len()),
            "{} at {length}: counted {} times",
            task.name,
            counter.counts()
        );
    }
    Ok(())
}

#[test]
fn a_sample_depends_on_task_length_seed_and_index_alone() -> Result<()> {
    let all = all_sources()?;
    for task in every() {
        let five = task.samples(&all, (1_200, 9), 5, &words, &quiet)?;
        assert_eq!(task.samples(&all, (1_200, 9), 2, &words, &quiet)?, five[..2], "{}", task.name);
        assert_eq!(task.sample(&all_sources()?, SampleKey { length: 1_200, seed: 9, index: 4 }, &words)?, five[4]);
        assert!((0..4).all(|i| five[i].input != five[i + 1].input), "{}", task.name);
        let other = task.sample(&all, SampleKey { length: 1_200, seed: 10, index: 0 }, &words)?;
        assert_ne!(other.input, five[0].input, "{}: the seed counts", task.name);
        // The same is hidden at every length.
        let longer = task.sample(&all, SampleKey { length: 1_500, seed: 9, index: 0 }, &words)?;
        assert_eq!((&longer.outputs, &longer.follow_ups), (&five[0].outputs, &five[0].follow_ups), "{}", task.name);
    }
    Ok(())
}

#[test]
fn the_question_is_not_in_the_context() -> Result<()> {
    let all = all_sources()?;
    for (task, index) in every().flat_map(|t| (0..3).map(move |i| (t, i))) {
        let s = task.sample(&all, SampleKey { length: 1_000, seed: 5, index }, &words)?;
        let (context, question) = (s.context()?, s.question()?);
        assert_eq!(format!("{context}{question}"), s.prompt());
        assert!(context.ends_with('\n') && question.ends_with(&s.answer_prefix));
        let asked = &s.input[context.len()..];
        // The example of `cwe` has the same question about another list.
        let before = if task.name == "cwe" { context.rsplit("Below is").next().unwrap_or_default() } else { context };
        assert!(!before.contains(asked), "{}: {asked}", task.name);
        assert!(s.follow_ups.iter().all(|turn| !s.input.contains(&turn.question)), "{}", task.name);
        // A file without `question_at`, as RULER writes it, is split at the same place, also where line breaks were
        // removed.
        assert_eq!(question_at(task.name, &s.input), s.question_at, "{}: {asked}", task.name);
        let flat = s.input.replace('\n', " ");
        assert_eq!(question_at(task.name, &flat), s.question_at, "{}: {asked}", task.name);
    }
    Ok(())
}

#[test]
fn the_question_of_rulers_own_prompts_is_found() {
    // Prompts of RULER's templates, with the chat template of its `meta-llama3` and without one; everything before the
    // question is context.
    let long = "The grass is green. ".repeat(3);
    for (task, context, question) in [
        (
            "niah_single_1",
            format!("A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the \
                     number afterwards.\n{long}\nOne of the special magic numbers for a-b is: 7.\n{long}\n"),
            "What is the special magic number for a-b mentioned in the provided text?",
        ),
        (
            "niah_multiquery",
            format!("Some special magic numbers are hidden within the following text.\n{long}\n"),
            "What are all the special magic numbers for a-b, and c-d mentioned in the provided text?",
        ),
        (
            "vt",
            format!("Memorize and track the chain(s) of variable assignment hidden in the following text.\n\nVAR A = 1\nQuestion: Find all \
                     variables that are assigned the value 1 in the text above. Answer: A\n\nMemorize and track\n\n{long}\n"),
            "Question: Find all variables that are assigned the value 2 in the text above.",
        ),
        (
            "qa_1",
            format!("Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nThe \
                     following are given documents.\n\nDocument 1:\n{long}\n\n"),
            "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\nQuestion: Who?",
        ),
    ] {
        for (before, after) in [("", ""), ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>")] {
            let context = format!("{before}{context}");
            assert_eq!(question_at(task, &format!("{context}{question}{after}")), Some(context.len()), "{task}");
        }
        assert_eq!(question_at(task, &long), None);
    }
    assert_eq!(question_at("my_task", "What is the special magic number"), None);
}

#[test]
fn lengths_that_nothing_fits_are_refused() -> Result<()> {
    let all = all_sources()?;
    for (task, length) in every().flat_map(|t| [0, 1, 40].map(|length| (t, length))) {
        let made = task.sample(&all, SampleKey { length, seed: 1, index: 0 }, &words);
        let error = made.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains(task.name) && error.contains(&format!("{length} tokens are too few")), "{error}");
    }
    Ok(())
}

#[test]
fn missing_sources_are_named() {
    let none = Sources::default();
    for task in every().filter(|t| t.name != "vt" && t.name != "fwe") {
        let made = task.sample(&none, SampleKey { length: 900, seed: 1, index: 0 }, &words);
        let error = made.err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.starts_with(task.name) && error.contains("needs"), "{error}");
    }
    let few =
        Sources { words: Some(WordLists::new(vec!["n".into()], vec!["a".into()], vec!["v".into()])), ..sources() };
    for task in ["niah_multiquery", "recall_turns", "recall_count"] {
        let made = find(task).and_then(|t| t.sample(&few, SampleKey { length: 900, seed: 1, index: 0 }, &words));
        assert!(made.err().is_some_and(|e| e.to_string().contains("too few words")), "{task}");
    }
}

#[test]
fn progress_and_the_tokenizers_errors_are_passed_on() -> Result<()> {
    let seen = Mutex::new(vec![]);
    let progress = |what: &str, done: u64, of: u64| seen.lock().expect("lock").push((what.to_string(), done, of));
    let task = find("fwe")?;
    task.samples(&Sources::default(), (400, 1), 2, &words, &progress)?;
    let expected = [0, 1, 2].map(|done| ("fwe".to_string(), done, 2));
    assert_eq!(*seen.lock().expect("lock"), expected);
    let broken = |_: &str| Err(Error::usage("tokenizer", "broken"));
    let made = task.sample(&Sources::default(), SampleKey { length: 400, seed: 1, index: 0 }, &broken);
    assert!(made.err().is_some_and(|e| e.to_string().contains("broken")));
    Ok(())
}

#[test]
fn the_fetched_words_fill_long_lists() -> Result<()> {
    let words_of = WordLists::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("words"))?;
    let all = Sources { words: Some(words_of), ..sources() };
    for length in [16_000, 100_000] {
        let s = find("cwe")?.sample(&all, SampleKey { length, seed: 1, index: 0 }, &words)?;
        assert!(s.length <= length && s.length as f64 > 0.99 * length as f64, "{} of {length}", s.length);
        let list = s.context()?.rsplit("most often.\n").next().unwrap_or_default();
        assert!(s.outputs.iter().all(|o| list.matches(&format!(". {o} ")).count() >= 29), "{:?}", s.outputs);
    }
    let s = find("niah_single_1")?.sample(&all, SampleKey { length: 1_000, seed: 1, index: 0 }, &words)?;
    assert!(s.question()?.contains('-'), "a key is an adjective and a noun");
    Ok(())
}
