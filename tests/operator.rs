//! The attention operator against its definition, on random ragged shapes and every kind of segment.

mod common;

use bfly::ops::{attend, reference, AttentionArgs, FarArgs, FarRow, Past, Window};
use candle_core::{Device, Tensor};
use common::Any;
use proptest::prelude::*;

#[derive(Debug, Clone)]
struct Case {
    tokens: usize,
    start: usize,
    group: usize,
    kv_heads: usize,
    dim: usize,
    window: Window,
    sinks: usize,
    far_rows: usize,
    clamp: bool,
    seed: u64,
}

fn window() -> impl Strategy<Value = Window> {
    prop_oneof![
        Just(Window::Unbounded),
        (1usize..80).prop_map(Window::Tokens),
        (1usize..40, 0usize..4).prop_map(|(block, count)| Window::Blocks { block, count }),
    ]
}

prop_compose! {
    fn case()(
        tokens in 1usize..150,
        start in prop_oneof![Just(0usize), 1usize..700],
        group in 1usize..=8,
        kv_heads in 1usize..4,
        dim in prop_oneof![Just(8usize), Just(10), Just(16), Just(64), Just(80), Just(128), Just(256)],
        window in window(),
        sinks in 0usize..6,
        far_rows in 0usize..20,
        clamp in any::<bool>(),
        seed in any::<u64>(),
    ) -> Case {
        Case { tokens, start, group, kv_heads, dim, window, sinks, far_rows, clamp, seed }
    }
}

/// Values that repeat from a seed, unlike candle's own.
fn values(shape: (usize, usize, usize), seed: u64, size: f32) -> candle_core::Result<Tensor> {
    let mut x = seed | 1;
    let next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        ((x >> 40) as f32 / (1u64 << 24) as f32 - 0.5) * size
    };
    Tensor::from_iter(std::iter::repeat_with(next).take(shape.0 * shape.1 * shape.2), &Device::Cpu)?.reshape(shape)
}

fn difference(c: &Case) -> Any<f32> {
    let heads = c.group * c.kv_heads;
    let keys = |rows: usize, salt: u64| values((rows, c.kv_heads, c.dim), c.seed ^ salt, 4.0);
    let (q, q_far) = (values((c.tokens, heads, c.dim), c.seed, 4.0)?, values((c.tokens, heads, c.dim), !c.seed, 4.0)?);
    let (k, v) = (keys(c.tokens, 1)?, keys(c.tokens, 2)?);
    let block = match c.window {
        Window::Blocks { block, .. } => block,
        _ => 16,
    };
    // Just large enough for the window, so that the ring wraps at odd places.
    let capacity = (c.start - c.window.left(c.start)).max(1) + c.seed as usize % 7;
    let (past_k, past_v) = (keys(capacity, 3)?, keys(capacity, 4)?);
    let (sink_k, sink_v) = (keys(c.sinks.max(1), 5)?, keys(c.sinks.max(1), 6)?);
    let (far_k, far_v) = (keys(c.far_rows.max(1), 7)?, keys(c.far_rows.max(1), 8)?);
    let blocks = (c.start + c.tokens - 1) / block - c.start / block + 1;
    let routes: Vec<Vec<FarRow>> = (0..blocks)
        .map(|b| {
            let pick = |row: usize| (row as u64 * 7 + b as u64 * 5 + c.seed).is_multiple_of(3);
            let far = |row: usize| FarRow {
                row,
                bias: (row as f32 - 3.0) / 2.0,
                far_query: c.clamp && row.is_multiple_of(2),
                from: if c.clamp { c.start + row * 3 } else { 0 },
                until: if row % 5 == 4 { c.start + row * 6 } else { usize::MAX },
            };
            (0..c.far_rows).filter(|r| pick(*r)).map(far).collect()
        })
        .collect();
    let args = AttentionArgs {
        q: &q,
        q_far: c.clamp.then_some(&q_far),
        k: &k,
        v: &v,
        start: c.start,
        past: Some(Past { k: &past_k, v: &past_v }),
        sinks: (c.sinks > 0).then_some((Past { k: &sink_k, v: &sink_v }, c.sinks)),
        window: c.window,
        far: (c.far_rows > 0).then_some(FarArgs { k: &far_k, v: &far_v, block, routes: &routes }),
        scale: 1.0 / (c.dim as f32).sqrt(),
    };
    Ok((attend(&args)? - reference(&args)?)?.abs()?.max_all()?.to_scalar()?)
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
        far: None,
        scale: 1.0,
    };
    let error = attend(&args).unwrap_err().to_string();
    assert!(error.contains("reaches back 10 positions, the cache holds 1"), "{error}");
    Ok(())
}
