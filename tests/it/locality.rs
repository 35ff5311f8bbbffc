//! What an output can depend on: exactly the declared set, shown by perturbing every token.
//!
//! The set is written out here from the design's formulas, not taken from the code under test.

use crate::common::*;
use bfly::retrofit::Settings;
use candle_core::Tensor;
use proptest::prelude::*;
use std::collections::BTreeSet;

/// Positions that query position `p` reads in the first swapped layer under `causal_shift` with `k` partners.
fn declared(s: &Settings, ctx: usize, p: usize) -> BTreeSet<usize> {
    let (b, w) = (p / s.block, s.window / s.block);
    let u = w + 1;
    let left = b.saturating_sub(w) * s.block;
    let mut set: BTreeSet<usize> = (left..=p).chain(0..s.sink_tokens.min(p + 1)).collect();
    let units = ctx.div_ceil(s.block).div_ceil(u);
    let stages = (0..).find(|t| 1 << t >= units).unwrap_or(0).max(1);
    for stage in 0..s.partner_count.min(stages) {
        if let Some(n) = b.checked_sub(u << stage) {
            set.extend((n * s.block..(n + 1) * s.block).filter(|x| *x >= s.sink_tokens));
        }
    }
    set
}

fn logits_at(model: &Model, ids: &[u32], chunk: usize, want: &[usize]) -> Any<Vec<Vec<f32>>> {
    let all = last_logits(model, ids, chunk, ids.len())?;
    Ok(want.iter().map(|p| all.get(*p).and_then(|row: Tensor| row.to_vec1())).collect::<Result<_, _>>()?)
}

fn check(settings: &Settings, length: usize, chunk: usize) -> Any {
    // One layer, so that what a query reads is all that its output can depend on.
    let dir = variant("llama3_rope", |c| c["num_hidden_layers"] = 1.into())?;
    let model = load(&open(&dir.path().to_string_lossy())?, Some(settings), length)?;
    let ids: Vec<u32> = (0..length as u32).map(|i| 5 + (i * 29) % 360).collect();
    let queries = [length / 3, length / 2 + 1, length - 2, length - 1];
    let before = logits_at(&model, &ids, chunk, &queries)?;
    for x in 0..length {
        let mut changed = ids.clone();
        changed[x] = 5 + (ids[x] + 100) % 360;
        let after = logits_at(&model, &changed, chunk, &queries)?;
        for ((p, before), after) in queries.iter().zip(&before).zip(&after) {
            let inside = declared(settings, length, *p).contains(&x);
            let moved = before != after;
            let what = format!("token {x} and query {p} under {settings:?}, chunks of {chunk}");
            assert!(inside || !moved, "an undeclared or future token changes the output: {what}");
            assert!(!inside || moved, "a declared token changes nothing: {what}");
        }
    }
    Ok(())
}

#[test]
fn stock_attention_reads_every_earlier_token_and_no_later_one() -> Any {
    let dir = variant("llama3_rope", |c| c["num_hidden_layers"] = 1.into())?;
    let model = load(&open(&dir.path().to_string_lossy())?, None, 40)?;
    let ids: Vec<u32> = (5..45).collect();
    let before = logits_at(&model, &ids, 7, &[20])?;
    for x in 0..40 {
        let mut changed = ids.clone();
        changed[x] = 300;
        assert_eq!(logits_at(&model, &changed, 7, &[20])? != before, x <= 20, "token {x}");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn outputs_depend_on_every_declared_token_and_on_no_other(
        block in 1usize..12,
        window_blocks in 0usize..4,
        sink_tokens in 0usize..7,
        partner_count in 1usize..4,
        length in 30usize..110,
        chunk in 1usize..120,
    ) {
        let settings = Settings { block, window: window_blocks * block, sink_tokens, partner_count, ..Settings::default() };
        check(&settings, length, chunk).map_err(|e| TestCaseError::fail(e.to_string()))?;
    }
}
