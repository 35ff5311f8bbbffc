//! A run survives cancellation and early stops, refuses use after a failure, and shares its weights.

use crate::common::*;
use bfly::eviction::EvictionPlan;
use bfly::generate::{watch, Phase, Request, Sampler, Sampling};
use bfly::method::Method;
use bfly::retrofit::{RetrofitPlan, Settings};
use bfly::run::Run;
use bfly::{Error, ErrorKind};
use candle_core::Tensor;
use std::ops::ControlFlow;
use std::sync::Arc;

fn ids(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| 4 + (i * i * 31 + i * 7) % 370).collect()
}

/// Models that between them have every kind of layer state.
fn models() -> Any<Vec<Model>> {
    let mut all = vec![];
    for name in ["llama3_rope", "gemma3"] {
        let stock = load_golden(name, None, 400)?;
        let settings = Settings { block: 8, window: 16, sink_tokens: 3, ..Settings::default() };
        let plan = RetrofitPlan::new(stock.spec(), None, settings)?;
        let evict = EvictionPlan::new("keydiff", 40, &[("block", 16)])?;
        all.extend([stock.by(&plan, 400), stock.by(&evict, 400), stock]);
    }
    Ok(all)
}

fn rows(logits: &Tensor) -> Any<Vec<Vec<f32>>> {
    Ok(logits.to_vec2()?)
}

#[test]
fn a_cancelled_prefill_holds_the_chunks_read_and_goes_on() -> Any {
    let text = ids(200);
    for model in models()? {
        let want = rows(&model.run()?.prefill(&text, 48, 4, &mut watch(|_| ()))?)?;
        let mut run = model.run()?;
        let mut stop_at = |n: usize| if n >= 96 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
        let error = run.prefill(&text, 48, 4, &mut stop_at).unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (ErrorKind::Cancelled, "prefill: cancelled after 96 of 200 tokens")
        );
        assert_eq!(run.cache().position(), 96);
        let got = rows(&run.prefill(&text[96..], 48, 4, &mut watch(|_| ()))?)?;
        assert_eq!(got, want, "{:?}", model.method);
    }
    Ok(())
}

#[test]
fn a_prefill_that_is_cancelled_at_its_end_is_whole() -> Any {
    let model = load_golden("llama", None, 64)?;
    let mut run = model.run()?;
    let logits = run.prefill(&ids(30), 10, 1, &mut |n| {
        if n == 30 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })?;
    assert_eq!((logits.dims(), run.cache().position()), (&[1, model.spec().vocab][..], 30));
    Ok(())
}

/// New tokens of a greedy generation that the callback ends after `most`, and the run.
fn generate(model: &Model, text: &[u32], stop: &[u32], most: usize) -> Any<(Vec<u32>, Run)> {
    let mut run = model.run()?;
    let request = Request { prompt: text, max_new_tokens: 60, chunk: 64, stop, logits_last: 1, phase: Phase::Prefill };
    let greedy = &mut Sampler::new(Sampling::GREEDY)?;
    let made = run.generate(&request, greedy, &mut watch(|_| ()), &mut stop_after(most))?;
    Ok((made.tokens, run))
}

/// Wherever decode stops, the run holds the prompt and all new tokens but the last, and what is read next is read as if it had never
/// stopped.
#[test]
fn a_run_that_stopped_early_equals_one_that_never_did() -> Any {
    let (text, tail, mut stopped) = (ids(150), ids(9), 0);
    for model in models()? {
        let (all, _) = generate(&model, &text, &[], usize::MAX)?;
        let mut never = model.run()?;
        never.prefill(&text, 64, 1, &mut watch(|_| ()))?;
        never.compress()?;
        for most in [1, 2, 5, 8, 9, 17, 30] {
            let (made, mut run) = generate(&model, &text, &[], most)?;
            assert_eq!(made, all[..most]);
            assert_eq!(run.cache().position(), text.len() + most - 1, "{:?}", model.method);
            // Up to the same token, one by one.
            never.read(&all[never.cache().position() - text.len()..most])?;
            run.read(&made[most - 1..])?;
            assert_eq!(run.cache().used_bytes(), never.cache().used_bytes());
            let mut other = model.run()?;
            other.prefill(&text, 64, 1, &mut watch(|_| ()))?;
            other.compress()?;
            other.read(&all[..most])?;
            assert_eq!(rows(&run.read(&tail)?)?, rows(&other.read(&tail)?)?, "{:?} stopped after {most}", model.method);
        }
        // A stop token is made, neither delivered nor read.
        if let Some(at) = (1..50).find(|i| !all[..*i].contains(&all[*i])) {
            let (made, run) = generate(&model, &text, &[all[at]], usize::MAX)?;
            assert_eq!((made.as_slice(), run.cache().position()), (&all[..at], text.len() + at));
            stopped += 1;
        }
    }
    assert!(stopped > 0, "texts that repeat one token would prove nothing");
    Ok(())
}

#[test]
fn a_run_refuses_use_after_a_chunk_that_failed() -> Any {
    let text = ids(100);
    for model in models()? {
        let mut run = model.run()?;
        run.prefill(&text[..40], 40, 1, &mut watch(|_| ()))?;
        let error = run.forward_observed(&text[40..80], &[0], &mut |seen| match seen.layer {
            2 => Err(Error::new(ErrorKind::Backend, "observer", "gave up")),
            _ => Ok(()),
        });
        assert!(error.unwrap_err().to_string().contains("layer 2: observer: gave up"));
        for error in [
            run.forward(&text[40..80], &[0]).unwrap_err(),
            run.prefill(&text[40..80], 8, 1, &mut watch(|_| ())).unwrap_err(),
            run.read(&text[40..41]).unwrap_err(),
            run.compress().unwrap_err(),
        ] {
            let text = error.to_string();
            assert!(
                text.starts_with("run: ") && text.contains("gave up") && text.contains("start a new one"),
                "{text}"
            );
        }
        // The weights are as good as new.
        assert_eq!(model.run()?.prefill(&text, 40, 1, &mut watch(|_| ()))?.dims()[0], 1);
    }
    Ok(())
}

#[test]
fn what_is_refused_before_any_work_leaves_the_run_usable() -> Any {
    let model = load_golden("llama", Some(&Settings { block: 8, window: 16, ..Settings::default() }), 64)?;
    let mut run = model.run()?;
    for (bad, words) in [
        (vec![], "prompt: is empty"),
        (vec![1 << 30], "outside the vocabulary"),
        (vec![5; 65], "65 tokens after 0 exceed the context"),
    ] {
        let error = run.forward(&bad, &[]).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    assert!(run.forward(&[5], &[1]).unwrap_err().to_string().contains("position 1 is outside a chunk of 1"));
    assert_eq!(run.forward(&ids(64), &[63])?.dims()[0], 1);
    Ok(())
}

#[test]
fn runs_of_every_method_share_one_copy_of_the_weights() -> Any {
    let model = load_golden("qwen2", None, 64)?;
    let runs = [model.run(), model.run()];
    let evict = model.by(&EvictionPlan::new("keydiff", 8, &[])?, 64).run()?;
    assert_eq!(evict.layout().method(), &Method::Evict(EvictionPlan::new("keydiff", 8, &[])?));
    for run in runs {
        assert!(Arc::ptr_eq(run?.weights(), evict.weights()));
    }
    Ok(())
}
