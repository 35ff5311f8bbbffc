//! The stock path gives transformers' logits, on every family, rope scaling and head shape.

mod common;

use common::*;

fn check(case: &str, last: usize, tolerance: f32) -> Any {
    for name in GOLDENS {
        let golden = Golden::open(name)?;
        let ids = golden.ids(case)?;
        let model = load_golden(name, None, ids.len())?;
        let off = deviation(&last_logits(&model, &ids, 512, last)?, &golden.logits(case)?)?;
        println!("{name} {case}: {off:.2e} standard deviations");
        assert!(off <= tolerance, "{name}, {case}: logits are {off:.2e} standard deviations off transformers'");
    }
    Ok(())
}

#[test]
fn stock_logits_equal_transformers_at_short_positions() -> Any {
    check("short", 64, 1e-4)
}

#[test]
fn stock_logits_equal_transformers_past_8k_positions() -> Any {
    check("long", 8, 1e-3)
}
