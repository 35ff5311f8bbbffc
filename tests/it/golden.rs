//! The stock path gives transformers' logits, on every family, rope scaling and head shape.

use crate::common::*;
use bfly::checkpoint::{WeightDtype, WeightFormat};
use bfly::storage::Storage;
use candle_core::Device;

fn check(case: &str, last: usize, tolerance: f32) -> Any {
    for name in &goldens()? {
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

/// Weights held in bf16 are a half-precision path: rounded weights, f32 arithmetic. It may be off by twice what transformers'
/// own bf16 run is off, and should be off by less, since that rounds activations too.
#[test]
fn weights_in_bf16_are_within_twice_transformers_own_bf16_error() -> Any {
    let hold = || WeightFormat::new(WeightDtype::As(Storage::BF16), 0, None);
    for name in &goldens()? {
        let golden = Golden::open(name)?;
        let checkpoint = open(&golden_dir(name).to_string_lossy())?;
        for (case, last) in [("short", 64), ("long", 8)] {
            let (ids, want) = (golden.ids(case)?, golden.logits(case)?);
            let model = load_as(&checkpoint, None, ids.len(), &hold(), &Device::Cpu)?;
            let ours = deviation(&last_logits(&model, &ids, 512, last)?, &want)?;
            let theirs = deviation(&golden.logits_bf16(case)?, &want)?;
            println!("{name} {case}: {ours:.3} against transformers' {theirs:.3} standard deviations");
            assert!(ours > 1e-4, "{name}, {case}: nothing was rounded");
            assert!(ours <= 2.0 * theirs, "{name}, {case}: {ours:.3} off, transformers' bf16 run {theirs:.3}");
        }
    }
    Ok(())
}
