//! Prompts from documents.

use super::*;

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
    let run_ladder = |ctx| place.run_ladder(&flags(ctx).each_ref().map(String::as_str));
    let first = run_ladder("13")?;
    assert_eq!((first.prompt.documents.as_slice(), first.prompt.tokens), (["early.txt".to_string()].as_slice(), 5));
    assert_eq!(first.prompt.sha256, hash(&[1, 2, 3, 4, 0]));
    let both = run_ladder("13,20")?;
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
