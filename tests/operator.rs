//! The attention operator against its definition, on random ragged shapes and every kind of segment.

mod common;

use bfly::ops::{attend, AttentionArgs, Past, Window};
use candle_core::{DType, Device};
use common::attention::{both, case, values, Case};
use common::Any;
use proptest::prelude::*;

/// Largest difference on the CPU.
fn difference(c: &Case) -> Any<f32> {
    let (got, want) = both(c, DType::F32, &Device::Cpu)?;
    Ok((got - want)?.abs()?.max_all()?.to_scalar()?)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 160, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn cpu_operator_equals_the_f64_reference_on_random_ragged_shapes(c in case()) {
        let off = difference(&c).map_err(|e| TestCaseError::fail(e.to_string()))?;
        // Outputs are means of values in [-2, 2].
        prop_assert!(off < 2e-5, "off by {off}");
    }
}

#[test]
fn long_decode_is_shared_out_over_the_keys_and_merged_exactly() -> Any {
    for window in [Window::Unbounded, Window::Tokens(3000)] {
        let c = Case {
            tokens: 1,
            start: 5000,
            group: 3,
            kv_heads: 2,
            dim: 64,
            window,
            sinks: 4,
            far_rows: 5,
            far_runs: 3,
            clamp: true,
            seed: 11,
        };
        let off = difference(&c)?;
        assert!(off < 2e-5, "{window:?}: off by {off}");
    }
    Ok(())
}

#[test]
fn a_window_that_the_cache_does_not_hold_is_refused() -> Any {
    let x = values((1, 1, 8), 3, 1.0)?;
    let args = AttentionArgs {
        q: &x,
        q_far: None,
        k: &x,
        v: &x,
        start: 10,
        past: Some(Past { k: &x, v: &x }),
        sinks: None,
        window: Window::Unbounded,
        far: &[],
        scale: 1.0,
    };
    let error = attend(&args).unwrap_err().to_string();
    assert!(error.contains("reaches back 10 positions, the cache holds 1"), "{error}");
    Ok(())
}
