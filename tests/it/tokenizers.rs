//! Tokenizers built from GGUF metadata give transformers' ids on hard strings.
//!
//! SmolLM2's file is fetched by scripts/test.sh, all four by scripts/test.sh --all-models.

use crate::common::*;
use bfly::checkpoint::{Detokenizer, TextTokenizer};
use bfly::spec::Config;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{json, Value};
use std::path::Path;

fn check(name: &str) -> Any {
    let text = open(&real_model(name)?)?.tokenizer()?;
    let fixture = fixture(&format!("tokenizers/{name}.json"))?;
    let cases = fixture["cases"].as_array().ok_or("no cases")?;
    assert!(cases.len() >= 40, "{} cases", cases.len());
    for case in cases {
        let input = case["text"].as_str().ok_or("no text")?;
        assert_eq!(text.encode(input, false)?, numbers(&case["ids"])?, "{name}: {input:?}");
        assert_eq!(text.encode(input, true)?, numbers(&case["ids_with_special"])?, "{name} with special: {input:?}");
        let ids = numbers(&case["ids"])?;
        assert_eq!(
            text.tokenizer.decode(&ids, false).map_err(|e| e.to_string())?,
            case["decoded"].as_str().ok_or("no text")?,
            "{name}: {ids:?}"
        );
    }
    Ok(())
}

#[test]
fn smollm2_tokenizer_equals_transformers() -> Any {
    check("smollm2-135m")
}

#[test]
#[ignore = "reads checkpoints that only scripts/test.sh --all-models fetches"]
fn qwen_tokenizers_equal_transformers() -> Any {
    check("qwen2.5-coder-0.5b")?;
    check("qwen2.5-coder-1.5b")
}

#[test]
#[ignore = "reads checkpoints that only scripts/test.sh --all-models fetches"]
fn gemma_tokenizer_equals_transformers() -> Any {
    check("gemma3-270m")
}

#[test]
fn a_directory_gives_the_tokenizer_template_and_stop_tokens_of_its_files() -> Any {
    let from_gguf = open(&real_model("smollm2-135m")?)?.tokenizer()?;
    let dir = variant("llama", |c| c["eos_token_id"] = serde_json::json!([7, 9]))?;
    from_gguf.tokenizer.save(dir.path().join("tokenizer.json"), false).map_err(|e| e.to_string())?;
    let about = serde_json::json!({
        "eos_token": { "content": "<|im_end|>" }, "bos_token": "<|im_start|>",
        "chat_template": [{ "name": "tools", "template": "no" }, { "name": "default", "template": "{{ bos_token }}" }],
    });
    std::fs::write(dir.path().join("tokenizer_config.json"), about.to_string())?;
    let text = open(&dir.path().to_string_lossy())?.tokenizer()?;
    assert_eq!(text.encode("Hello, 42 worlds", true)?, from_gguf.encode("Hello, 42 worlds", true)?);
    assert_eq!(text.stop, [0, 2, 7, 9], "eos of the configuration, of the tokenizer, and the ends of a turn");
    let template = text.chat_template()?;
    assert_eq!(template.source, "{{ bos_token }}");
    assert!(template.tokens.contains(&("bos_token".into(), "<|im_start|>".into())), "{:?}", template.tokens);
    std::fs::write(dir.path().join("chat_template.jinja"), "from its own file")?;
    let text = open(&dir.path().to_string_lossy())?.tokenizer()?;
    assert_eq!(text.chat_template()?.source, "from its own file");
    Ok(())
}

/// The text side of a folder without weights.
fn text_of(dir: &Path) -> bfly::Result<TextTokenizer> {
    TextTokenizer::from_dir(dir, &Config::new("config.json", serde_json::json!({}))?)
}

/// The text side of the byte-level tokenizer with one special token, 256, and `files` beside it.
fn text_with(files: &[(&str, Value)]) -> Any<TextTokenizer> {
    let dir = tempfile::tempdir()?;
    std::fs::copy(fault("added-tokens-json/tokenizer.json"), dir.path().join("tokenizer.json"))?;
    for (name, value) in files {
        std::fs::write(dir.path().join(name), value.to_string())?;
    }
    Ok(text_of(dir.path())?)
}

const TURN: &str = "<|im_start|>hi<|im_end|>";

#[test]
fn stored_truncation_and_padding_do_not_apply() -> Any {
    for case in ["tokenizer-truncation", "tokenizer-padding"] {
        let text = text_of(&fault(case))?;
        assert_eq!(text.encode(&"a".repeat(40), true)?.len(), 40, "{case}");
    }
    Ok(())
}

#[test]
fn tokens_of_an_added_tokens_decoder_are_one_token_and_end_a_turn() -> Any {
    let text = text_of(&fault("added-tokens-decoder"))?;
    assert_eq!(text.encode(TURN, true)?, [257, 104, 105, 258]);
    assert_eq!(text.stop, [256, 258], "<|endoftext|> and the eos_token");
    assert_eq!(text.decode(&[257, 104, 105, 258])?, "hi");
    Ok(())
}

#[test]
fn tokens_of_added_tokens_json_are_one_token_and_end_a_turn() -> Any {
    let text = text_of(&fault("added-tokens-json"))?;
    assert_eq!(text.encode(TURN, true)?, [257, 104, 105, 258]);
    assert_eq!(text.stop, [256, 258]);
    assert!(text.warnings().is_empty(), "{:?}", text.warnings());
    Ok(())
}

/// What transformers 5.24 gives for the same files.
#[test]
fn special_tokens_by_name_get_their_ids_in_the_order_of_transformers() -> Any {
    let flags =
        json!({ "content": "<|im_end|>", "lstrip": false, "rstrip": false, "normalized": false, "single_word": false });
    let map = json!({ "eos_token": flags, "additional_special_tokens": ["<|im_start|>"] });
    let text = text_with(&[("tokenizer_config.json", json!({})), ("special_tokens_map.json", map)])?;
    assert_eq!(text.encode(TURN, true)?, [258, 104, 105, 257]);
    assert_eq!(text.stop, [256, 257]);

    let config =
        json!({ "eos_token": "<|im_end|>", "image_token": "<img>", "additional_special_tokens": ["<|im_start|>"] });
    let text = text_with(&[("tokenizer_config.json", config)])?;
    assert_eq!(text.encode(&format!("{TURN}<img>"), true)?, [259, 104, 105, 257, 258]);

    let config = json!({ "eos_token": "<|im_end|>", "extra_special_tokens": { "boi_token": "<|im_start|>" } });
    let text = text_with(&[("tokenizer_config.json", config)])?;
    assert_eq!(text.encode(TURN, true)?, [258, 104, 105, 257]);

    let decoder = json!({ "257": { "content": "<|im_start|>", "special": true } });
    let text = text_with(&[
        ("tokenizer_config.json", json!({ "added_tokens_decoder": decoder })),
        ("added_tokens.json", json!({ "<|im_end|>": 258 })),
        ("special_tokens_map.json", json!({ "eos_token": "<|im_end|>" })),
    ])?;
    assert_eq!(text.encode(TURN, true)?[..2], [257, 104], "a decoder is the whole list");
    assert_eq!(text.encode("<|im_end|>", true)?.len(), 10);
    Ok(())
}

#[test]
fn an_added_token_whose_id_the_tokenizer_cannot_give_is_warned_of() -> Any {
    let token = |content: &str| json!({ "content": content, "special": true });
    let decoder = json!({ "300": token("<|im_start|>"), "259": token("<|im_end|>") });
    let text = text_with(&[("tokenizer_config.json", json!({ "added_tokens_decoder": decoder }))])?;
    assert_eq!(text.encode(TURN, true)?, [258, 104, 105, 257], "as transformers 5.24");
    let warnings = text.warnings().join("\n");
    for word in ["tokenizer.json", "`<|im_start|>` has the id 258", "300", "`<|im_end|>` has the id 257", "259"] {
        assert!(warnings.contains(word), "should say `{word}`: {warnings}");
    }
    Ok(())
}

#[test]
fn stop_tokens_come_from_the_generation_configuration_too() -> Any {
    let text = text_with(&[("generation_config.json", json!({ "eos_token_id": [7, 9] }))])?;
    assert_eq!(text.stop, [7, 9, 256]);
    Ok(())
}

#[test]
fn templates_know_special_tokens_by_every_name_the_files_give() -> Any {
    let config = json!({ "bos_token": { "__type": "AddedToken", "content": "<s>" }, "image_token": "<img>", "chat_template": "x" });
    let map = json!({ "pad_token": "<pad>", "eos_token": { "content": "</s>" } });
    let text = text_with(&[("tokenizer_config.json", config), ("special_tokens_map.json", map)])?;
    let mut names = text.chat_template()?.tokens.clone();
    names.sort();
    let want = [("bos_token", "<s>"), ("eos_token", "</s>"), ("image_token", "<img>"), ("pad_token", "<pad>")];
    assert_eq!(names, want.map(|(name, text)| (name.to_string(), text.to_string())));
    // Padding that is stored names a token too.
    let padded = text_of(&fault("tokenizer-padding"))?;
    assert!(padded.chat_template().is_err());
    Ok(())
}

#[test]
fn of_named_templates_the_default_is_taken() -> Any {
    let named = |name: &str| json!({ "name": name, "template": format!("{name}!") });
    let config = |list: Value| json!({ "chat_template": list });
    let text = text_with(&[("tokenizer_config.json", config(json!([named("rag"), named("default")])))])?;
    assert_eq!(text.chat_template()?.source, "default!");
    let text = text_with(&[("tokenizer_config.json", config(json!([named("rag"), named("tool_use")])))])?;
    let why = text.chat_template().err().ok_or("a template")?.to_string();
    assert!(why.contains("--chat") && why.contains("rag, tool_use"), "{why}");
    let text = text_with(&[])?;
    assert!(text.chat_template().err().ok_or("a template")?.to_string().contains("no chat template"));
    let broken = text_with(&[("tokenizer_config.json", config(json!([{ "name": 1 }])))]);
    let why = broken.err().ok_or("is read")?.to_string();
    assert!(why.contains("tokenizer_config.json") && why.contains("chat_template"), "{why}");
    Ok(())
}

#[test]
fn template_files_come_before_the_configuration() -> Any {
    let dir = tempfile::tempdir()?;
    std::fs::copy(fault("added-tokens-json/tokenizer.json"), dir.path().join("tokenizer.json"))?;
    std::fs::write(dir.path().join("tokenizer_config.json"), json!({ "chat_template": "config" }).to_string())?;
    let folder = dir.path().join("additional_chat_templates");
    std::fs::create_dir(&folder)?;
    std::fs::write(folder.join("tool_use.jinja"), "tools")?;
    let why = text_of(dir.path())?.chat_template().err().ok_or("a template")?.to_string();
    assert!(why.contains("tool_use"), "as in transformers, files replace the configuration: {why}");
    std::fs::write(dir.path().join("chat_template.jinja"), "file")?;
    assert_eq!(text_of(dir.path())?.chat_template()?.source, "file");
    Ok(())
}

#[test]
fn llama_3_gguf_text_begins_with_bos_though_the_file_does_not_say_so() -> Any {
    let text = open(&fault("gguf-llama3-bos/model.gguf").to_string_lossy())?.tokenizer()?;
    assert_eq!(text.encode("hi", true)?, [259, 104, 105]);
    assert_eq!(text.encode("hi", false)?, [104, 105]);
    Ok(())
}

#[test]
fn a_gguf_file_without_pre_tokenizer_is_warned_of_once() -> Any {
    let checkpoint = open(&fault("gguf-no-pre-tokenizer/model.gguf").to_string_lossy())?;
    assert!(checkpoint.take_warnings().is_empty(), "nothing is said of text before it is asked for");
    checkpoint.tokenizer()?;
    checkpoint.tokenizer()?;
    let warnings = checkpoint.take_warnings();
    assert!(warnings.len() == 1 && warnings[0].contains("tokenizer.ggml.pre"), "{warnings:?}");
    assert!(warnings[0].contains("model.gguf"), "{warnings:?}");
    assert!(checkpoint.take_warnings().is_empty());
    Ok(())
}

/// Pieces of `ids`, each given out as its token comes, and the end.
fn pieces(text: &TextTokenizer, ids: &[u32]) -> Any<Vec<String>> {
    let mut stream = Detokenizer::new(text);
    let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(*id)).collect();
    pieces.push(stream.finish()?);
    assert_eq!(stream.text(), pieces.concat());
    Ok(pieces)
}

#[test]
fn a_stray_byte_does_not_end_the_stream() -> Any {
    let text = text_of(&fault("stream-byte-pieces"))?;
    // The bytes of an emoji and a stray one; byte b is token 3 + b.
    let mut ids: Vec<u32> = "😀".bytes().chain([0x80]).map(|b| 3 + u32::from(b)).collect();
    ids.extend(text.encode(" bcd", false)?);
    let pieces = pieces(&text, &ids)?;
    assert_eq!(pieces.concat(), text.decode(&ids)?);
    assert!(pieces.concat().ends_with(" bcd"), "{pieces:?}");
    Ok(())
}

#[test]
fn text_is_given_out_with_the_token_that_completes_it() -> Any {
    let bytes = text_of(&fault("added-tokens-json"))?;
    let ids: Vec<u32> = "aé😀b".bytes().map(u32::from).collect();
    assert_eq!(pieces(&bytes, &ids)?, ["a", "", "é", "", "", "", "😀", "b", ""]);
    let cut = &ids[..5];
    assert_eq!(pieces(&bytes, cut)?, ["a", "", "é", "", "", "\u{fffd}"], "an incomplete last character is not lost");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn streamed_pieces_are_the_text_whatever_the_tokens(ids in vec(token(), 0..200)) {
        for case in ["stream-byte-pieces", "added-tokens-decoder"] {
            let text = text_of(&fault(case)).map_err(|e| TestCaseError::fail(e.to_string()))?;
            let streamed = pieces(&text, &ids).map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert_eq!(streamed.concat(), text.decode(&ids).map_err(|e| TestCaseError::fail(e.to_string()))?);
        }
    }
}

/// Bytes of UTF-8 sequences and strays, words, special tokens, and ids that no token has.
fn token() -> impl Strategy<Value = u32> {
    prop_oneof![0..270u32, 131..140u32, 197..250u32, Just(0), Just(1), Just(260), Just(9999)]
}
