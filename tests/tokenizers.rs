//! Tokenizers built from GGUF metadata give transformers' ids on hard strings.
//!
//! SmolLM2's file is fetched by scripts/test.sh, all four by scripts/test.sh --all-models.

mod common;

use common::*;

fn check(name: &str) -> Any {
    let text = open(&real_model(name)?)?.text()?;
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
    let from_gguf = open(&real_model("smollm2-135m")?)?.text()?;
    let dir = variant("llama", |c| c["eos_token_id"] = serde_json::json!([7, 9]))?;
    from_gguf.tokenizer.save(dir.path().join("tokenizer.json"), false).map_err(|e| e.to_string())?;
    let about = serde_json::json!({
        "eos_token": { "content": "<|im_end|>" }, "bos_token": "<|im_start|>",
        "chat_template": [{ "name": "tools", "template": "no" }, { "name": "default", "template": "{{ bos_token }}" }],
    });
    std::fs::write(dir.path().join("tokenizer_config.json"), about.to_string())?;
    let text = open(&dir.path().to_string_lossy())?.text()?;
    assert_eq!(text.encode("Hello, 42 worlds", true)?, from_gguf.encode("Hello, 42 worlds", true)?);
    assert_eq!(text.stop, [0, 2, 7, 9], "eos of the configuration, of the tokenizer, and the ends of a turn");
    let template = text.template.ok_or("no template")?;
    assert_eq!((template.source.as_str(), template.bos.as_str()), ("{{ bos_token }}", "<|im_start|>"));
    std::fs::write(dir.path().join("chat_template.jinja"), "from its own file")?;
    let template = open(&dir.path().to_string_lossy())?.text()?.template.ok_or("no template")?;
    assert_eq!(template.source, "from its own file");
    Ok(())
}
