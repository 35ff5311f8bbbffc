//! The attention operator against its definition, on random ragged shapes and every kind of segment.

use crate::common::attention::{batch, both, case, lse_difference, values, Case};
use crate::common::Any;
use bfly::ops::{
    attend, merge_attention, reference, Attended, AttentionArgs, KeyValues, RowList, Segment, Store, StoreRows, Window,
};
use candle_core::{DType, Device, Tensor};
use proptest::prelude::*;

fn apart(a: &Tensor, b: &Tensor) -> Any<f32> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar()?)
}

/// Largest differences of output and log-sum-exp on the CPU.
fn difference(c: &Case) -> Any<(f32, f32)> {
    let (got, want) = both(c, DType::F32, &Device::Cpu)?;
    Ok((apart(&got.out, &want.out)?, lse_difference(&got, &want)?))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn cpu_operator_equals_the_f64_reference_on_random_ragged_shapes(c in case()) {
        let (out, lse) = difference(&c).map_err(|e| TestCaseError::fail(e.to_string()))?;
        // Outputs are means of values in [-2, 2].
        prop_assert!(out < 2e-5 && lse < 2e-5, "off by {out}, log-sum-exp by {lse}");
    }
}

#[test]
fn long_decode_is_shared_out_over_the_keys_and_merged_exactly() -> Any {
    for window in [Window::Unbounded, Window::Tokens(3000)] {
        for table in [(0, 1), (40, 1)] {
            let (out, lse) = difference(&Case { clamp: true, table, ..Case::decode(5000, (3, 2, 64), window) })?;
            assert!(out < 2e-5 && lse < 2e-5, "{window:?}: off by {out}, log-sum-exp by {lse}");
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn parts_over_disjoint_keys_merge_into_the_whole(
        tokens in 1usize..20, before in 0usize..60, cut in 0usize..60, seed in any::<u64>(),
    ) {
        let run = || -> Any<(f32, f32)> {
            let (cut, q) = (cut.min(before), values((tokens, 6, 16), seed, 6.0)?);
            let (k, v) = (values((before.max(1), 2, 16), seed ^ 1, 6.0)?, values((before.max(1), 2, 16), seed ^ 2, 4.0)?);
            let (own_k, own_v) = (values((tokens, 2, 16), seed ^ 3, 6.0)?, values((tokens, 2, 16), seed ^ 4, 4.0)?);
            let own = Segment::Chunk(KeyValues { k: &own_k, v: &own_v });
            let part = |segments: &[Segment], window| -> bfly::Result<Attended> {
                attend(&AttentionArgs { q: &q, start: before, window, scale: 0.25, segments, lse: true })
            };
            let ring = Segment::Ring(KeyValues { k: &k, v: &v });
            let whole = part(&[own, ring], Window::Unbounded)?;
            // The same keys as rows that a list names, in two parts, one of which may be empty.
            let list = |from: usize, to: usize| vec![vec![bfly::ops::FarRow::run(from, to - from)]];
            let (low, high) = (list(0, cut), list(cut, before));
            let store = |rows: &'_ [Vec<bfly::ops::FarRow>]| -> bfly::Result<Attended> {
                let read = RowList::Blocks { block: 1 << 20, rows };
                part(&[Segment::Store(Store { rows: StoreRows::Tensors(KeyValues { k: &k, v: &v }), read, q: None })], Window::Tokens(1))
            };
            // The chunk alone: its queries read back to its start.
            let chunk = attend(&AttentionArgs {
                q: &q, start: 0, window: Window::Unbounded, scale: 0.25, segments: &[own], lse: true,
            })?;
            let merged = merge_attention(&[store(&low)?, chunk, store(&high)?])?;
            Ok((apart(&merged.out, &whole.out)?, lse_difference(&merged, &whole)?))
        };
        let (out, lse) = run().map_err(|e| TestCaseError::fail(e.to_string()))?;
        prop_assert!(out < 2e-5 && lse < 2e-5, "off by {out}, log-sum-exp by {lse}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 30, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_batch_gives_what_each_of_its_items_gives(
        items in 1usize..5, tokens in 1usize..20, start in 0usize..60, seed in any::<u64>(),
    ) {
        let run = || -> Any<(f32, f32)> {
            let (got, want) = batch(items, (tokens, start), seed, DType::F32, &Device::Cpu)?;
            let (mut out, mut lse) = (0f32, 0f32);
            for (b, want) in want.iter().enumerate() {
                let got = Attended { out: got.out.get(b)?, lse: got.lse.as_ref().map(|l| l.get(b)).transpose()? };
                out = out.max(apart(&got.out, &want.out)?);
                lse = lse.max(lse_difference(&got, want)?);
            }
            Ok((out, lse))
        };
        let (out, lse) = run().map_err(|e| TestCaseError::fail(e.to_string()))?;
        prop_assert!(out < 2e-5 && lse < 2e-5, "off by {out}, log-sum-exp by {lse}");
    }
}

#[test]
fn queries_that_read_nothing_give_zero_and_merge_as_nothing() -> Any {
    let (q, k) = (values((3, 2, 8), 1, 4.0)?, values((5, 1, 8), 2, 4.0)?);
    let kv = KeyValues { k: &k, v: &k };
    let nobody = [vec![]];
    let read = RowList::Blocks { block: 64, rows: &nobody };
    let empty = [Segment::Store(Store { rows: StoreRows::Tensors(kv), read, q: None })];
    let args = AttentionArgs { q: &q, start: 0, window: Window::Tokens(1), scale: 1.0, segments: &empty, lse: true };
    let nothing = attend(&args)?;
    assert_eq!(nothing.out.flatten_all()?.to_vec1::<f32>()?, vec![0.0; 48]);
    assert!(nothing
        .lse
        .as_ref()
        .ok_or("none")?
        .flatten_all()?
        .to_vec1::<f32>()?
        .iter()
        .all(|x| *x == f32::NEG_INFINITY));
    let all = [vec![bfly::ops::FarRow::run(0, 5)]];
    let read = RowList::Blocks { block: 64, rows: &all };
    let something = attend(&AttentionArgs {
        segments: &[Segment::Store(Store { rows: StoreRows::Tensors(kv), read, q: None })],
        ..args
    })?;
    let merged = merge_attention(&[nothing.clone(), something.clone()])?;
    assert!(apart(&merged.out, &something.out)? < 1e-6 && lse_difference(&merged, &something)? < 1e-6);
    let none = merge_attention(&[nothing.clone(), nothing])?;
    assert_eq!(none.out.flatten_all()?.to_vec1::<f32>()?, vec![0.0; 48]);
    assert_eq!(reference(&args)?.out.flatten_all()?.to_vec1::<f32>()?, vec![0.0; 48]);
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Any {
    let x = values((1, 1, 8), 3, 1.0)?;
    let kv = KeyValues { k: &x, v: &x };
    let refused = |segments: &[Segment], words: &str| {
        let args = AttentionArgs { q: &x, start: 10, window: Window::Unbounded, scale: 1.0, segments, lse: false };
        let error = attend(&args).map(drop).unwrap_err().to_string();
        assert!(error.starts_with("attention: ") && error.contains(words), "{error}");
    };
    refused(&[Segment::Chunk(kv), Segment::Ring(kv)], "reaches back 10 positions, the cache holds 1");
    refused(&[], "nothing to attend to");
    refused(&[Segment::Chunk(kv), Segment::Chunk(kv)], "two segments of a kind");
    refused(&[Segment::Sinks(kv, 2)], "2 sinks in 1 rows");
    let batch = Tensor::stack(&[&x, &x], 0)?;
    for segments in [[Segment::Chunk(kv)], [Segment::Chunk(KeyValues { k: &batch, v: &x })]] {
        let (window, segments) = (Window::Unbounded, &segments[..]);
        let args = AttentionArgs { q: &batch, start: 0, window, scale: 1.0, segments, lse: false };
        let error = attend(&args).map(drop).unwrap_err().to_string();
        assert!(error.contains("a tensor [1, 1, 8] in a batch of 2"), "{error}");
    }
    let read = RowList::Blocks { block: 4, rows: &[] };
    refused(&[Segment::Store(Store { rows: StoreRows::Tensors(kv), read, q: None })], "0 lists for 1 query blocks");
    for (index, words) in [(vec![7u32], "a table names row 7 of 1"), (vec![0, 0], "a table [1, 2, 1] of U32")] {
        let index = Tensor::from_vec(index.clone(), (1, index.len(), 1), &Device::Cpu)?;
        let read = RowList::Table { block: 1, index: &index };
        refused(&[Segment::Store(Store { rows: StoreRows::Tensors(kv), read, q: None })], words);
    }
    Ok(())
}
