//! The retrofit equals dense attention where it must, and does not depend on how a text is fed.

use crate::common::*;
use bfly::generate::watch;
use bfly::layout::Layout;
use bfly::retrofit::{FarPosition, KeyPooling, Settings, WindowAlign};
use bfly::run::Run;
use bfly::selector::SELECTORS;
use candle_core::Tensor;
use proptest::prelude::*;

fn small(block: usize, window: usize, sink_tokens: usize) -> Settings {
    Settings { block, window, sink_tokens, ..Settings::default() }
}

/// Ids that no period of the settings divides.
fn ids(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| 4 + (i * i * 31 + i * 7) % 370).collect()
}

#[test]
fn a_window_that_covers_the_text_gives_stock_logits() -> Any {
    for name in &goldens()? {
        let golden = Golden::open(name)?;
        let text = golden.ids("short")?;
        for settings in [small(128, 384, 4), small(16, 304, 0), small(50, 300, 70)] {
            let model = load_golden(name, Some(&settings), 512)?;
            let off = deviation(&last_logits(&model, &text, 77, 64)?, &golden.logits("short")?)?;
            assert!(off < 1e-4, "{name}: {off:.2e} standard deviations off with {settings:?}");
        }
    }
    Ok(())
}

#[test]
fn blocks_of_one_with_all_summaries_are_dense_attention() -> Any {
    for name in ["llama3_rope", "qwen3_d128", "gemma3", "qwen2_yarn", "qwen3_5"] {
        let golden = Golden::open(name)?;
        let text = golden.ids("short")?;
        for (sink_tokens, pool) in [(0, KeyPooling::PostRope), (5, KeyPooling::PostRope), (3, KeyPooling::PreRope)] {
            let settings = Settings { partner: "all".into(), pool, ..small(1, 3, sink_tokens) };
            let model = load_golden(name, Some(&settings), 300)?;
            let off = deviation(&last_logits(&model, &text, 300, 64)?, &golden.logits("short")?)?;
            assert!(off < 1e-4, "{name}, {sink_tokens} sinks, {pool:?}: {off:.2e} standard deviations off");
        }
    }
    Ok(())
}

#[test]
fn summaries_do_change_the_output() -> Any {
    // Without this the tests above could pass on an operator that drops its far rows.
    let text = ids(300);
    let logits = |partner: &str| -> Any<Tensor> {
        let settings = Settings { partner: partner.into(), ..small(16, 32, 2) };
        Ok(last_logits(&load_golden("llama3_rope", Some(&settings), 300)?, &text, 64, 8)?)
    };
    let local = logits("local")?;
    for rule in SELECTORS.iter().map(|s| s.name()).filter(|n| *n != "local") {
        assert!(deviation(&logits(rule)?, &local)? > 1e-3, "{rule} gives what no summaries give");
    }
    Ok(())
}

#[derive(Debug, Clone)]
struct Setup {
    settings: Settings,
    length: usize,
    chunk: usize,
    ctx: usize,
}

prop_compose! {
    fn setup()(
        block in prop_oneof![Just(1usize), Just(4), Just(7), Just(16), Just(32)],
        window_blocks in 0usize..5,
        sink_tokens in 0usize..9,
        rule in 0..SELECTORS.len(),
        partner_count in 1usize..4,
        shift_unit in prop_oneof![Just(None), Just(Some(1usize))],
        pre_rope in any::<bool>(),
        clamp in any::<bool>(),
        token in any::<bool>(),
        bias in prop_oneof![Just(0.0f64), Just(1.0)],
        length in 40usize..220,
        chunk in 1usize..200,
        spare in 0usize..300,
    ) -> Setup {
        let window = window_blocks * block;
        let settings = Settings {
            block, window, sink_tokens, partner_count, shift_unit,
            window_align: if token && window > 0 { WindowAlign::Token } else { WindowAlign::Block },
            partner: SELECTORS[rule].name().into(),
            pool: if pre_rope { KeyPooling::PreRope } else { KeyPooling::PostRope },
            summary_bias: bias,
            far_position: if clamp && pre_rope { FarPosition::Clamp } else { FarPosition::True },
            seed: 5,
            ..Settings::default()
        };
        Setup { settings, length, chunk, ctx: length + spare }
    }
}

/// The last 4 logits with an ordinary cache, and with one whose summary pools hold everything.
fn both_pools(model: &Model, settings: &Settings, ctx: usize, text: &[u32], chunk: usize) -> Any<(Tensor, Tensor)> {
    let plan = bfly::retrofit::RetrofitPlan::new(model.spec(), None, settings.clone())?;
    let full = Layout::with_full_pools(model.spec(), &plan, ctx)?;
    let own = model.run()?.prefill(text, chunk, 4, &mut watch(|_| ()))?;
    Ok((own, Run::with_layout(&model.weights, full)?.prefill(text, chunk, 4, &mut watch(|_| ()))?))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn one_shot_chunked_and_token_by_token_agree_and_stage_sized_pools_suffice(s in setup()) {
        let fail = |e: Box<dyn std::error::Error>| TestCaseError::fail(e.to_string());
        let text = ids(s.length);
        for name in ["qwen2_yarn", "llama3_rope"] {
            // Trained for fewer positions than these texts have, so that clamping is exercised.
            let dir = variant(name, |c| c["max_position_embeddings"] = 50.into()).map_err(fail)?;
            let checkpoint = open(&dir.path().to_string_lossy()).map_err(|e| fail(e.into()))?;
            let model = load(&checkpoint, Some(&s.settings), s.ctx).map_err(|e| fail(e.into()))?;
            let whole = last_logits(&model, &text, s.length, 4).map_err(|e| fail(e.into()))?;
            for chunk in [s.chunk, 1] {
                let (own, full) = both_pools(&model, &s.settings, s.ctx, &text, chunk).map_err(fail)?;
                let off = deviation(&own, &whole).map_err(fail)?;
                prop_assert!(off < 2e-4, "{name}: chunks of {chunk} are {off:.2e} standard deviations off one shot");
                let off = deviation(&full, &whole).map_err(fail)?;
                prop_assert!(off < 2e-4, "{name}: full pools are {off:.2e} standard deviations off stage-sized ones");
            }
        }
    }
}

/// The golden's short text through `settings` in chunks of `chunk`, in standard deviations off transformers' logits.
fn off_golden(name: &str, settings: &Settings, chunk: usize) -> Any<f32> {
    let golden = Golden::open(name)?;
    let model = load_golden(name, Some(settings), 300)?;
    deviation(&last_logits(&model, &golden.ids("short")?, chunk, 64)?, &golden.logits("short")?)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_covering_window_and_any_blocks_of_one_are_dense(
        block in 1usize..200, spare in 0usize..4, sink_tokens in 0usize..320, narrow in 0usize..20, chunk in 1usize..301,
    ) {
        let covering = small(block, (300usize.div_ceil(block) + spare) * block, sink_tokens);
        let ones = Settings { partner: "all".into(), ..small(1, narrow, sink_tokens) };
        for (what, settings) in [("covering window", covering), ("blocks of one", ones)] {
            let off = off_golden("llama3_rope", &settings, chunk).map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert!(off < 1e-4, "{what}: {off:.2e} standard deviations off");
        }
    }
}
