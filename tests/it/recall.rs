//! Exact recall: exact prefill, decode in three zones, calibration and its file.

use crate::common::*;
use bfly::eviction::EvictionPlan;
use bfly::generate::watch;
use bfly::method::Method;
use bfly::recall::{calibrate, Calibration, Positions};
use bfly::retrofit::{CodeFit, KeyPooling, PrefillKind, RestKind, RetrofitPlan, Settings, WindowAlign};
use bfly::run::Run;
use candle_core::Tensor;

/// A window of blocks where an even number of tokens is fetched, of tokens otherwise.
fn settings(recall: usize) -> Settings {
    let window_align = if recall.is_multiple_of(2) { WindowAlign::Block } else { WindowAlign::Token };
    Settings { block: 16, window: 32, sink_tokens: 3, recall, window_align, ..Settings::default() }
}

fn ids(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i + 7 * i + 3) % 251 + 3).collect()
}

fn calibrated(name: &str) -> Any<Model> {
    let model = load_golden(name, None, 600)?;
    let made =
        calibrate(&model.weights, &calibration_documents(model.spec().vocab), 3, Positions::Uniform, &|_, _, _| ())?;
    model.weights.calibrate(made);
    Ok(model)
}

fn run(model: &Model, settings: &Settings, ctx: usize) -> Any<Run> {
    let plan = RetrofitPlan::new(model.spec(), None, settings.clone())?;
    Ok(Run::new(&model.weights, &plan, ctx)?)
}

/// Logits of `text`: a prefill of the first `prefix` tokens in chunks, then decode steps.
fn read(run: &mut Run, text: &[u32], prefix: usize, chunk: usize) -> Any<Tensor> {
    run.prefill(&text[..prefix], chunk, 1, &mut watch(|_| ()))?;
    Ok(run.read(&text[prefix..])?)
}

#[test]
fn with_every_token_fetched_decode_is_dense_attention() -> Any {
    for name in ["llama", "qwen2", "gemma3", "qwen3_d128", "qwen3_5"] {
        let model = calibrated(name)?;
        let text = ids(260);
        let want = read(&mut Run::new(&model.weights, Method::Stock, 600)?, &text, 200, 64)?;
        for (rest, chunk, k) in [(RestKind::Codes, 1, 300), (RestKind::Means, 37, 301), (RestKind::None, 200, 301)] {
            let settings = Settings { rest, ..settings(k) };
            let got = read(&mut run(&model, &settings, 600)?, &text, 200, chunk)?;
            let off = deviation(&got, &want)?;
            assert!(off < 1e-4, "{name}, {rest:?}, chunks of {chunk}: {off:.2e} standard deviations off");
        }
    }
    Ok(())
}

#[test]
fn layers_of_a_plan_are_dense_recall_or_have_summaries() -> Any {
    let model = calibrated("qwen2")?;
    let text = ids(520);
    let of = |layers: &[usize], settings: Settings| RetrofitPlan::new(model.spec(), Some(layers.to_vec()), settings);
    // Recall of every token is dense attention, so that layers 0 and 2 are those of the stock model; so is layer 3.
    let mixed = Settings { partner_count: 2, butterfly_layers: vec![1], ..settings(520) };
    let summaries = Settings { recall: 0, butterfly_layers: vec![], ..mixed.clone() };
    for chunk in [37, 480] {
        let want = read(&mut Run::new(&model.weights, &of(&[1], summaries.clone())?, 600)?, &text, 480, chunk)?;
        let mut run = Run::new(&model.weights, &of(&[0, 1, 2], mixed.clone())?, 600)?;
        let got = read(&mut run, &text, 480, chunk)?;
        let off = deviation(&got, &want)?;
        assert!(off < 1e-4, "chunks of {chunk}: {off:.2e} standard deviations off");
        let kinds: Vec<bool> = run.layout().layers.iter().map(|l| l.butterfly().is_some()).collect();
        assert_eq!((kinds, run.layout().recall().count()), (vec![false, true, false, false], 2));
        assert!(!run.layout().prefills_exactly());
        let stock = read(&mut Run::new(&model.weights, Method::Stock, 600)?, &text, 480, chunk)?;
        assert!(deviation(&got, &stock)? > 1e-2, "summaries change what layer 1 reads");
    }
    // Stages go by the layers with summaries alone.
    let plan = of(&[0, 1, 2, 3], Settings { butterfly_layers: vec![1, 3], ..mixed })?;
    let layout = bfly::layout::Layout::new(model.spec(), &plan, 600)?;
    assert_eq!(layout.butterfly().map(|l| l.ordinal).collect::<Vec<_>>(), [0, 1]);
    Ok(())
}

#[test]
fn prefill_is_exact_whatever_is_fetched() -> Any {
    let model = calibrated("qwen2")?;
    let text = ids(500);
    let want = Run::new(&model.weights, Method::Stock, 600)?.prefill(&text, 128, 50, &mut watch(|_| ()))?;
    for chunk in [1, 33, 500] {
        let got = run(&model, &settings(1), 600)?.prefill(&text, chunk, 50, &mut watch(|_| ()))?;
        let off = deviation(&got, &want)?;
        assert!(off < 1e-4, "chunks of {chunk}: {off:.2e} standard deviations off");
    }
    Ok(())
}

#[test]
fn prefill_by_summaries_is_that_without_recall_until_a_decode_step() -> Any {
    for (name, pool) in [("llama", KeyPooling::PostRope), ("gemma3", KeyPooling::PreRope)] {
        let model = calibrated(name)?;
        let text = ids(500);
        let fast = Settings { prefill: PrefillKind::Butterfly, partner_count: 2, pool, ..settings(40) };
        let mut without = run(&model, &Settings { recall: 0, ..fast.clone() }, 600)?;
        let mut with = run(&model, &fast, 600)?;
        for part in [&text[..130], &text[130..400]] {
            let want = without.prefill(part, 64, 50, &mut watch(|_| ()))?;
            let got = with.prefill(part, 64, 50, &mut watch(|_| ()))?;
            assert_eq!(deviation(&got, &want)?, 0.0, "{name}: the same operations");
        }
        let exact = Settings { prefill: PrefillKind::Exact, pool: KeyPooling::PostRope, partner_count: 1, ..fast };
        let want = run(&model, &exact, 600)?.prefill(&text[..400], 64, 50, &mut watch(|_| ()))?;
        let got = without.prefill(&text[400..], 64, 50, &mut watch(|_| ()))?;
        assert!(deviation(&got, &want)? > 1e-2, "{name}: prefill by summaries is not exact");
    }
    Ok(())
}

#[test]
fn a_prompt_after_a_decode_step_is_read_exactly() -> Any {
    // In the last layer alone, nothing that is stored depends on how it reads.
    let model = calibrated("llama")?;
    let text = ids(500);
    let settings = Settings { prefill: PrefillKind::Butterfly, ..settings(40) };
    let plan = RetrofitPlan::new(model.spec(), Some(vec![3]), settings)?;
    let last = |steps: usize, plan: Option<&RetrofitPlan>| -> Any<Tensor> {
        let mut run = Run::new(&model.weights, plan, 600)?;
        run.prefill(&text[..400], 64, 1, &mut watch(|_| ()))?;
        if steps > 0 {
            run.read(&text[400..400 + steps])?;
        }
        Ok(run.prefill(&text[400 + steps..], 99, 20, &mut watch(|_| ()))?)
    };
    let want = last(1, None)?;
    assert!(deviation(&last(1, Some(&plan))?, &want)? < 1e-4, "summaries lack the decoded token");
    assert!(deviation(&last(0, Some(&plan))?, &want)? > 1e-2, "without a decode step the prompt goes on by summaries");
    Ok(())
}

#[test]
fn decode_does_not_depend_on_how_the_prompt_was_cut() -> Any {
    let model = calibrated("llama")?;
    let text = ids(400);
    for (rest, code_fit) in [
        (RestKind::Codes, CodeFit::Calibration),
        (RestKind::Codes, CodeFit::Text),
        (RestKind::Means, CodeFit::Text),
        (RestKind::None, CodeFit::Calibration),
    ] {
        for (k, key_code) in ([20, 21].into_iter().cycle()).zip([
            "pair:1bit",
            "pair:2bit",
            "pair:1.5bit",
            "qpq:1bit",
            "scalar2",
            "page",
            "exact",
        ]) {
            let settings = Settings { rest, code_fit, key_code: key_code.into(), ..settings(k) };
            let want = read(&mut run(&model, &settings, 600)?, &text, 380, 380)?;
            let got = read(&mut run(&model, &settings, 600)?, &text, 380, 7)?;
            let off = deviation(&got, &want)?;
            assert!(off < 1e-3, "{rest:?}, {code_fit:?}, {key_code}: {off:.2e} standard deviations off");
        }
    }
    Ok(())
}

#[test]
fn codes_fitted_to_the_text_are_nearer_to_the_stock_model() -> Any {
    // A text of few tokens, which the calibration's documents are not.
    let text: Vec<u32> = (0..520u32).map(|i| (i * i + 7 * i) % 23 + 3).collect();
    for name in ["llama", "qwen2", "qwen3_5"] {
        let model = calibrated(name)?;
        let want = read(&mut Run::new(&model.weights, Method::Stock, 600)?, &text, 480, 480)?;
        let mut off = vec![];
        for code_fit in [CodeFit::Calibration, CodeFit::Text] {
            let settings = Settings { code_fit, ..settings(20) };
            let mut run = run(&model, &settings, 600)?;
            off.push(deviation(&read(&mut run, &text, 480, 100)?, &want)?);
        }
        assert!(off[1] < 0.8 * off[0], "{name}: {:.2e} after {:.2e} standard deviations", off[1], off[0]);
    }
    Ok(())
}

#[test]
fn a_fork_of_the_stock_run_goes_on_as_a_run_that_prefilled_by_itself() -> Any {
    let (text, context) = (ids(420), 380);
    for name in ["llama", "qwen2", "gemma3", "qwen3_5"] {
        let model = calibrated(name)?;
        let full = model.spec().full_layers();
        let plan =
            |layers: &[usize], settings: Settings| RetrofitPlan::new(model.spec(), Some(layers.to_vec()), settings);
        let mut plans = vec![plan(&full, Settings { key_code: "page".into(), ..settings(20) })?];
        for rest in [RestKind::Codes, RestKind::Means, RestKind::None] {
            plans.push(plan(&full, Settings { rest, ..settings(20) })?);
            plans.push(plan(&full, Settings { rest, code_fit: CodeFit::Text, ..settings(21) })?);
        }
        // Dense layers beside layers with recall, and recall of everything, which is dense.
        plans.extend([plan(&full[..1], settings(20))?, plan(&full, settings(600))?]);
        let methods: Vec<Method> = plans.iter().map(Method::from).chain([Method::Stock]).collect();

        let mut stock = Run::new(&model.weights, Method::Stock, 600)?;
        stock.prefill(&text[..context], 100, 1, &mut watch(|_| ()))?;
        for method in &methods {
            for exact in [false, true] {
                let mut own = Run::new(&model.weights, method, 600)?;
                own.prefill(&text[..context], 100, 1, &mut watch(|_| ()))?;
                let mut forked = stock.fork(method)?.ok_or("no fork")?;
                assert_eq!((forked.cache().position(), forked.layout().method()), (context, method));
                assert_eq!(forked.cache().used_bytes(), own.cache().used_bytes());
                let go_on = |run: &mut Run| match exact {
                    true => run.prefill(&text[context..], 100, 40, &mut watch(|_| ())),
                    false => run.read(&text[context..]),
                };
                let off = deviation(&go_on(&mut forked)?, &go_on(&mut own)?)?;
                assert!(off < 1e-5, "{name}, {method:?}, exact {exact}: {off:.2e} standard deviations off");
            }
        }
        // The forks, which went on, have changed nothing.
        let mut fresh = Run::new(&model.weights, Method::Stock, 600)?;
        fresh.prefill(&text[..context], 100, 1, &mut watch(|_| ()))?;
        assert_eq!(stock.cache().position(), context);
        assert_eq!(stock.read(&text[context..])?.to_vec2::<f32>()?, fresh.read(&text[context..])?.to_vec2::<f32>()?);
    }
    Ok(())
}

#[test]
fn a_long_context_is_forked_in_pieces() -> Any {
    let (model, text) = (calibrated("llama")?, ids(4620));
    let mut stock = Run::new(&model.weights, Method::Stock, 5000)?;
    stock.prefill(&text[..4600], 512, 1, &mut watch(|_| ()))?;
    let method =
        Method::from(&RetrofitPlan::new(model.spec(), None, Settings { rest: RestKind::Means, ..settings(40) })?);
    let mut own = Run::new(&model.weights, &method, 5000)?;
    own.prefill(&text[..4600], 512, 1, &mut watch(|_| ()))?;
    let mut forked = stock.fork(&method)?.ok_or("no fork")?;
    let off = deviation(&forked.read(&text[4600..])?, &own.read(&text[4600..])?)?;
    assert!(off < 1e-5, "{off:.2e} standard deviations off");
    Ok(())
}

#[test]
fn a_fork_is_refused_where_prefill_is_not_the_stock_models() -> Any {
    let model = calibrated("gemma3")?;
    let run_of = |method: &Method| -> Any<Run> {
        let mut run = Run::new(&model.weights, method, 600)?;
        run.prefill(&ids(300), 100, 1, &mut watch(|_| ()))?;
        Ok(run)
    };
    let summaries = Method::from(&RetrofitPlan::new(model.spec(), None, settings(0))?);
    let evict = Method::from(&EvictionPlan::new("keydiff", 40, &[("block", 16)])?);
    let recall = Method::from(&RetrofitPlan::new(model.spec(), None, settings(20))?);
    let stock = run_of(&Method::Stock)?;
    for other in [&summaries, &evict] {
        assert!(stock.fork(other)?.is_none(), "{other:?} reads the context otherwise");
    }
    for other in [&summaries, &evict, &recall] {
        assert!(run_of(other)?.fork(Method::Stock)?.is_none(), "{other:?} lacks rows on the device");
    }
    let foreign = RetrofitPlan { model_layers: 99, ..RetrofitPlan::new(model.spec(), None, settings(20))? };
    assert!(stock.fork(&foreign).is_err());
    Ok(())
}

#[test]
fn tokens_far_back_are_recalled_and_without_recall_forgotten() -> Any {
    // An early token differs, outside every later window: the window alone cannot know, recall does.
    let model = calibrated("llama")?;
    let (mut text, mut other) = (ids(400), ids(400));
    (text[60], other[60]) = (7, 1234 % model.spec().vocab as u32);
    let moved = |settings: &Settings| -> Any<f32> {
        let read = |text: &[u32]| read(&mut run(&model, settings, 600)?, text, 380, 64);
        deviation(&read(&text)?, &read(&other)?)
    };
    let local = Settings { partner: "local".into(), ..settings(0) };
    // Layer by layer a change reaches three windows further; 60 + 4 layers of 48 tokens is far below 380.
    assert_eq!(moved(&local)?, 0.0);
    assert!(moved(&settings(20))? > 1e-4);
    Ok(())
}

#[test]
fn a_calibration_survives_its_file_and_faults_are_named() -> Any {
    let model = load_golden("qwen2", None, 600)?;
    let made =
        calibrate(&model.weights, &calibration_documents(model.spec().vocab), 3, Positions::Uniform, &|_, _, _| ())?;
    let bytes = made.to_bytes()?;
    let read = Calibration::from_bytes(&bytes, model.spec())?;
    assert_eq!(read.sink_tokens, 3);
    for (a, b) in made.layers.iter().flatten().zip(read.layers.iter().flatten()) {
        assert_eq!(a.heads, b.heads);
        for (a, b) in a.values.iter().zip(&b.values) {
            let off = a.codebook().iter().zip(b.codebook()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-2, "codewords are f16: {off}");
        }
    }
    assert!(read.to_bytes()? == bytes, "nothing is lost the second time");

    let fails = |bytes: &[u8], model: &Model| Calibration::from_bytes(bytes, model.spec()).unwrap_err().to_string();
    for length in [0, 4, 100, bytes.len() - 1] {
        assert!(fails(&bytes[..length], &model).contains("recall calibration"), "cut to {length} bytes");
    }
    let other = load_golden("gemma3", None, 600)?;
    let e = fails(&bytes, &other);
    assert!(e.contains("layers.") && (e.contains("shape") || e.contains("missing")), "{e}");
    let mut nan = bytes.clone();
    let end = nan.len();
    nan[end - 4..].fill(0xff);
    assert!(fails(&nan, &model).contains("NaN"), "{}", fails(&nan, &model));

    let few = calibrate(&model.weights, &[ids(100)], 3, Positions::Uniform, &|_, _, _| ()).unwrap_err().to_string();
    assert!(few.contains("97 tokens after the first 3"), "{few}");
    let e = run(&model, &settings(20), 600).err().ok_or("a run without a calibration")?.to_string();
    assert!(e.contains("needs a calibration"), "{e}");
    model.weights.calibrate(made);
    let sinks = Settings { sink_tokens: 5, ..settings(20) };
    let e = run(&model, &sinks, 600).err().ok_or("other sinks")?.to_string();
    assert!(e.contains("--sink-tokens: 5 sinks, but the calibration left out 3"), "{e}");
    Ok(())
}

#[test]
fn settings_of_summaries_are_refused_with_recall() -> Any {
    for (flag, set) in [
        ("--partner", Settings { partner: "all".into(), ..settings(9) }),
        ("--partner-count", Settings { partner_count: 2, ..settings(9) }),
        ("--shift-unit", Settings { shift_unit: Some(1), ..settings(9) }),
        ("--summary-bias", Settings { summary_bias: 1.0, ..settings(9) }),
    ] {
        let e = set.validate().unwrap_err().to_string();
        assert!(e.starts_with(flag) && e.contains("--recall 0"), "{e}");
        assert!(Settings { recall: 0, ..set }.validate().is_ok());
    }
    Ok(())
}

#[test]
fn bytes_are_those_of_the_settings_at_every_length() -> Any {
    let model = calibrated("qwen2")?;
    for (rest, key_code) in [(RestKind::Codes, "pair:1bit"), (RestKind::Means, "pair:2bit"), (RestKind::None, "page")] {
        let settings = Settings { rest, key_code: key_code.into(), ..settings(20) };
        let mut run = run(&model, &settings, 600)?;
        let empty = run.cache().capacity_bytes();
        let plan = run.layout().bytes(model.weights.dtype());
        assert_eq!((plan.peak, plan.host), (empty.total(), empty.host), "{rest:?}");
        assert_eq!(empty.host, run.cache().dense_bytes());
        let mut used = run.cache().used_bytes();
        for chunk in ids(600).chunks(150) {
            run.forward(chunk, &[])?;
            let now = run.cache().used_bytes();
            assert!(now.host > used.host && now.key_codes > used.key_codes);
            used = now;
            assert_eq!(run.cache().capacity_bytes(), empty);
        }
        assert_eq!((used.host, used.key_codes, used.values), (empty.host, empty.key_codes, empty.values));
    }
    Ok(())
}
