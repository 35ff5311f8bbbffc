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
