//! Real checkpoints held in f32 give transformers' greedy ids: stock, and with a window that covers the prompt.
//!
//! SmolLM2's file is fetched by scripts/test.sh, all four by scripts/test.sh --all-models.

use crate::common::*;
use bfly::generate::{watch, Phase, Request, Sampler, Sampling};
use bfly::retrofit::Settings;

fn greedy(name: &str, settings: Option<&Settings>) -> Any {
    let recorded = fixture(&format!("real/{name}.json"))?;
    let (prompt, want) = (numbers(&recorded["prompt_ids"])?, numbers(&recorded["greedy_ids"])?);
    let model = load(&open(&real_model(name)?)?, settings, prompt.len() + want.len())?;
    let request = Request {
        prompt: &prompt,
        max_new_tokens: want.len(),
        chunk: 200,
        stop: &[],
        logits_last: 1,
        phase: Phase::Prefill,
    };
    let mut sampler = Sampler::new(Sampling::GREEDY)?;
    let got = model.run()?.generate(&request, &mut sampler, &mut watch(|_| ()), &mut watch(|_| ()))?;
    assert_eq!(got.tokens, want, "{name}, {settings:?}");
    Ok(())
}

/// Stock, and retrofitted with a window as long as prompt and answer.
fn both(name: &str) -> Any {
    greedy(name, None)?;
    greedy(name, Some(&Settings { window: 640, ..Settings::default() }))
}

#[test]
fn smollm2_gives_transformers_greedy_ids() -> Any {
    both("smollm2-135m")
}

#[test]
#[ignore = "reads checkpoints that only scripts/test.sh --all-models fetches"]
fn the_other_models_give_transformers_greedy_ids() -> Any {
    for name in ["qwen2.5-coder-0.5b", "gemma3-270m", "qwen2.5-coder-1.5b"] {
        both(name)?;
        println!("{name}: 32 of 32 ids, stock and with a covering window");
    }
    Ok(())
}
