//! The GPU gives what the CPU gives. Built with `--features cuda`; without a GPU each test says that it was skipped.
//!
//! A binary of its own: scripts/gpu_tests.sh builds it alone and carries it to a machine that has a GPU and no Rust.

mod affine;
mod character;
#[path = "../it/common/mod.rs"]
mod common;
mod delta;
mod quantised;
mod recall;
mod transforms;

use bfly::checkpoint::{WeightDtype, WeightFormat};
use bfly::eviction::EvictionPlan;
use bfly::generate::{watch, MemoryNeeds, Phase, Request, Sampler, Sampling};
use bfly::ops::{self, AttentionArgs, KeyValues, RowList, Segment, Store, StoreRows, Window};
use bfly::retrofit::{FarPosition, KeyPooling, Settings, WindowAlign};
use bfly::run::Run;
use bfly::spec::Activation;
use bfly::storage::Storage;
use candle_core::{DType, Device, Tensor};
use common::attention::{batch, both, case, lse_difference, values, Case};
use common::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const TYPES: [(DType, Storage); 3] =
    [(DType::F32, Storage::F32), (DType::BF16, Storage::BF16), (DType::F16, Storage::F16)];

fn norm(x: &Tensor) -> Any<f64> {
    Ok(x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar::<f64>()?.sqrt())
}

/// `|got - want| / |want|`, and what rounding `want` once to `dtype` costs.
fn errors(got: &Tensor, want: &Tensor, dtype: DType) -> Any<(f64, f64)> {
    let rounded = want.to_dtype(dtype)?.to_dtype(DType::F32)?;
    let size = norm(want)?.max(1e-30);
    let got = got.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
    Ok((norm(&(got - want)?)? / size, norm(&(rounded - want)?)? / size))
}

fn check_attention(c: &Case, dtype: DType, device: &Device) -> Any {
    let (got, want) = both(c, dtype, device)?;
    let (off, rounding) = errors(&got.out, &want.out, dtype)?;
    // Weights are rounded before they meet the values, and the result once more.
    let limit = 4.0 * rounding + if dtype == DType::F32 { 1e-5 } else { 1e-3 };
    // Logits are exact products of the inputs, summed in f32.
    let lse = lse_difference(&got, &want)?;
    // NaN, from a key that was never written, fails the comparison.
    if off <= limit && lse <= 2e-3 {
        return Ok(());
    }
    Err(format!("{dtype:?}: off by {off:.2e}, limit {limit:.2e}, log-sum-exp by {lse:.2e}: {c:?}").into())
}

/// What the kernels take: tables for one query in 16 bits alone, and the chunk's own keys for more than one.
fn with_a_kernel(mut c: Case, dtype: DType) -> Case {
    if c.tokens > 1 || dtype == DType::F32 || !c.dim.is_multiple_of(8) || c.clamp {
        c.table = (0, 1);
    }
    c
}

#[test]
fn attention_equals_the_f64_reference_on_random_ragged_shapes() -> Any {
    let Some(device) = gpu("attention") else { return Ok(()) };
    let mut runner = TestRunner::new(Config { cases: 120, failure_persistence: None, ..Config::default() });
    let one = |c: Case| {
        let all =
            TYPES.iter().try_for_each(|(dtype, _)| check_attention(&with_a_kernel(c.clone(), *dtype), *dtype, &device));
        all.map_err(|e| TestCaseError::fail(e.to_string()))
    };
    runner.run(&case(), one)?;
    Ok(())
}

#[test]
fn attention_of_one_token_is_shared_out_over_its_keys() -> Any {
    let Some(device) = gpu("decode attention") else { return Ok(()) };
    for shape in [(7, 2, 64), (4, 8, 128), (1, 3, 80), (4, 1, 256), (20, 1, 96), (2, 2, 16)] {
        for (start, window) in [(9000, Window::Unbounded), (5000, Window::Tokens(700)), (0, Window::Unbounded)] {
            for (far_runs, places, without) in [(0, 0, 0), (4, 0, 0), (0, 500, 0), (3, 33, 0), (0, 64, 3)] {
                let c = Case { far_runs, table: (places, 1), without, ..Case::decode(start, shape, window) };
                let each =
                    |(dtype, _): &(DType, Storage)| check_attention(&with_a_kernel(c.clone(), *dtype), *dtype, &device);
                TYPES.iter().try_for_each(each)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_batch_gives_what_each_of_its_items_gives() -> Any {
    let Some(device) = gpu("attention of a batch") else { return Ok(()) };
    for (dtype, tokens, start) in [(DType::F32, 9, 30), (DType::BF16, 70, 40), (DType::F16, 1, 200)] {
        let (got, want) = batch(3, (tokens, start), 7, dtype, &device)?;
        for (b, want) in want.iter().enumerate() {
            let (off, rounding) = errors(&got.out.get(b)?, &want.out, dtype)?;
            assert!(off <= 4.0 * rounding + 1e-3, "{dtype:?}, item {b}: off by {off:.2e}");
        }
    }
    Ok(())
}

/// Rows that a table on the device names, in pinned host memory as on the device: the same bits.
#[test]
fn a_table_reads_rows_in_pinned_host_memory() -> Any {
    let Some(device) = gpu("host rows") else { return Ok(()) };
    for (dtype, (heads, g, d)) in [(DType::BF16, (14, 2, 64)), (DType::F16, (32, 8, 128)), (DType::BF16, (4, 1, 256))] {
        let make = |shape, seed| values(shape, seed, 4.0)?.to_dtype(dtype)?.to_device(&device);
        let (q, k, v) = (make((1, heads, d), 1)?, make((20_000, g, d), 2)?, make((20_000, g, d), 3)?);
        let index: Vec<u32> = (0..g * 2048).map(|i| (i as u32).wrapping_mul(2_654_435_761) % 20_000).collect();
        let index = Tensor::from_vec(index, (g, 1, 2048), &Device::Cpu)?.to_device(&device)?;
        let host = ops::HostRows::of(&k, &v, &device)?;
        let read = |rows| {
            let store = Store { rows, read: RowList::Table { block: 1, index: &index }, q: None };
            let (segments, window) = ([Segment::Store(store)], Window::Tokens(1));
            let args = AttentionArgs { q: &q, start: 30_000, window, scale: 0.1, segments: &segments, lse: true };
            let want = ops::reference(&args)?;
            Ok::<_, bfly::Error>((ops::attend(&args)?, want))
        };
        let (there, want) = read(StoreRows::Tensors(KeyValues { k: &k, v: &v }))?;
        let (here, same) = read(StoreRows::Host(&host))?;
        let bits = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
        assert_eq!(bits(&want.out)?, bits(&same.out)?, "what was copied is what was given");
        assert_eq!(bits(&here.out)?, bits(&there.out)?);
        let (off, rounding) = errors(&here.out, &want.out, dtype)?;
        assert!(off <= 4.0 * rounding + 1e-3, "{dtype:?}: off by {off:.2e}");
    }
    Ok(())
}

#[test]
fn small_operators_equal_the_cpus() -> Any {
    let Some(device) = gpu("small operators") else { return Ok(()) };
    for (dtype, _) in TYPES {
        for (t, heads, dim, seed) in [(1, 3, 8, 1u64), (33, 14, 64, 2), (130, 5, 128, 3), (7, 2, 256, 4)] {
            let n = heads * dim;
            // Inputs that `dtype` holds exactly, so that one rounding of the result is all that differs.
            let host = |shape, seed| values(shape, seed, 6.0)?.to_dtype(dtype)?.to_dtype(DType::F32);
            let there = |x: &Tensor| x.to_dtype(dtype)?.to_device(&device);
            let (x, y) = (host((t, heads, dim), seed)?, host((t, heads, dim), !seed)?);
            let weight = values((1, 1, n), seed ^ 9, 2.0)?.flatten_all()?;
            let flat = |x: &Tensor| x.reshape((t, n));
            let check = |what: &str, got: Tensor, want: Tensor| -> Any {
                let (off, rounding) = errors(&got, &want, dtype)?;
                assert!(
                    off <= 1.5 * rounding + 3e-6,
                    "{what} {dtype:?} {t} x {heads} x {dim}: {off:.2e}, {rounding:.2e}"
                );
                Ok(())
            };
            let (fx, fy) = (flat(&x)?, flat(&y)?);
            let (gx, gy, gw) = (there(&fx)?, there(&fy)?, weight.to_device(&device)?);
            let (sum, normed) = ops::add_norm(&gx, Some(&gy), &gw, 1e-6)?;
            let want_sum = (&fx + &fy)?;
            check("sum", sum.clone(), want_sum)?;
            let stored = sum.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
            check("norm", normed, ops::add_norm(&stored, None, &weight, 1e-6)?.1)?;
            for activation in [Activation::Silu, Activation::GeluTanh] {
                check("gated", ops::gated(&gx, &gy, activation)?, ops::gated(&fx, &fy, activation)?)?;
            }
            let positions = || (0..t).map(|i| (i * 997) as f32 + 0.5);
            let frequencies: Vec<f32> = (0..dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / dim as f32)).collect();
            let (cos, sin) = ops::rope_table(&frequencies, positions(), 1.1, &Device::Cpu)?;
            let (gcos, gsin) = ops::rope_table(&frequencies, positions(), 1.1, &device)?;
            for (a, b) in [(&cos, &gcos), (&sin, &gsin)] {
                let off = (a - b.to_device(&Device::Cpu)?)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(off < 1e-6, "rotary table: {off:.2e}");
            }
            let (bias, per_head) = (weight.clone(), weight.narrow(0, 0, dim)?);
            let (gbias, gper_head) = (bias.to_device(&device)?, per_head.to_device(&device)?);
            for parts in 0..8 {
                let has = |bit: usize| parts >> bit & 1 == 1;
                let norm = |w| has(1).then_some(ops::HeadNorm { weight: w, eps: 1e-5 });
                let want = ops::prepare_heads(
                    &fx,
                    heads,
                    has(0).then_some(&bias),
                    norm(&per_head),
                    has(2).then_some((&cos, &sin)),
                )?;
                let table = has(2).then_some((&gcos, &gsin));
                let got = ops::prepare_heads(&gx, heads, has(0).then_some(&gbias), norm(&gper_head), table)?;
                check("heads", got, want)?;
            }
        }
    }
    Ok(())
}

#[test]
fn block_means_equal_the_cpus_however_the_text_is_cut() -> Any {
    let Some(device) = gpu("block means") else { return Ok(()) };
    for (dtype, _) in TYPES {
        for (block, sinks, cuts) in
            [(16, 3, vec![5, 40, 1, 1, 18, 35]), (7, 0, vec![100]), (128, 200, vec![127, 1, 172]), (1, 2, vec![9])]
        {
            let total: usize = cuts.iter().sum();
            let k = values((total, 2, 24), 3, 4.0)?.to_dtype(dtype)?;
            let v = values((total, 2, 24), 4, 4.0)?.to_dtype(dtype)?;
            let mut host = ops::RunningMean::new(48, &Device::Cpu)?;
            let mut there = ops::RunningMean::new(48, &device)?;
            let mut at = 0;
            for n in cuts {
                let part = |x: &Tensor, d: &Device| x.narrow(0, at, n)?.contiguous()?.to_device(d);
                let wide = |x: Tensor| x.to_dtype(DType::F32);
                let (ck, cv) = (wide(part(&k, &Device::Cpu)?)?, wide(part(&v, &Device::Cpu)?)?);
                let want = ops::pool_blocks(&ck, &cv, at, block, sinks, &mut host)?;
                let got = ops::pool_blocks(&part(&k, &device)?, &part(&v, &device)?, at, block, sinks, &mut there)?;
                assert_eq!((got.first, got.count), (want.first, want.count));
                at += n;
                if want.count == 0 {
                    continue;
                }
                for (g, w) in [(&got.k, &want.k), (&got.v, &want.v)] {
                    // The same sums in the same order: exact but for the rounding of the result.
                    let exact = w.to_dtype(dtype)?.to_dtype(DType::F32)?;
                    let off = (g.to_device(&Device::Cpu)?.to_dtype(DType::F32)? - exact)?
                        .abs()?
                        .max_all()?
                        .to_scalar::<f32>()?;
                    assert!(off <= 1e-6, "{dtype:?}, blocks of {block}: {off:.2e}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn stock_logits_equal_transformers() -> Any {
    let Some(device) = gpu("stock logits") else { return Ok(()) };
    for name in &goldens()? {
        let (golden, checkpoint) = (Golden::open(name)?, open(&golden_dir(name).to_string_lossy())?);
        for (case, last, exact) in [("short", 64, 1e-4), ("long", 8, 1e-3)] {
            let (ids, want) = (golden.ids(case)?, golden.logits(case)?);
            let theirs = deviation(&golden.logits_bf16(case)?, &want)?;
            for (dtype, held) in TYPES {
                let model =
                    load_as(&checkpoint, None, ids.len(), &WeightFormat::for_gpu(WeightDtype::As(held)), &device)?;
                let off = deviation(&last_logits(&model, &ids, 1000, last)?, &want)?;
                let limit = if dtype == DType::F32 { exact } else { 2.0 * theirs };
                println!("{name} {case} {dtype:?}: {off:.2e}, limit {limit:.2e}");
                assert!(off <= limit, "{name} {case} {dtype:?}: {off:.2e} standard deviations off, limit {limit:.2e}");
            }
        }
    }
    Ok(())
}

fn small(block: usize, window: usize, sink_tokens: usize) -> Settings {
    Settings { block, window, sink_tokens, ..Settings::default() }
}

fn settings() -> Vec<Settings> {
    vec![
        small(16, 32, 4),
        Settings { partner_count: 2, summary_bias: 1.0, ..small(16, 16, 3) },
        Settings { partner: "all".into(), ..small(16, 16, 0) },
        Settings { partner: "xor".into(), ..small(7, 21, 20) },
        Settings { pool: KeyPooling::PreRope, ..small(16, 32, 4) },
        Settings { pool: KeyPooling::PreRope, far_position: FarPosition::Clamp, ..small(16, 32, 4) },
        Settings { window_align: WindowAlign::Token, shift_unit: Some(1), ..small(16, 32, 0) },
        small(128, 128, 4),
    ]
}

fn text(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| 4 + (i * i * 31 + i * 7) % 370).collect()
}

/// Prefill in ragged chunks and decode over several blocks, against the CPU in f32, for every family and setting.
#[test]
fn retrofit_prefill_and_decode_equal_the_cpus() -> Any {
    let Some(device) = gpu("retrofit logits") else { return Ok(()) };
    let (ids, tail) = (text(430), text(60));
    let mut wrong: Vec<String> = vec![];
    for name in ["llama3_rope", "qwen3_d128", "gemma3", "qwen2_yarn", "qwen3_5"] {
        let (golden, checkpoint) = (Golden::open(name)?, open(&golden_dir(name).to_string_lossy())?);
        // What transformers' own bf16 run is off on this model's text: the measure for 16-bit runs.
        let theirs = deviation(&golden.logits_bf16("short")?, &golden.logits("short")?)?;
        let stock = std::iter::once(None);
        for s in stock.chain(settings().into_iter().map(Some)) {
            let host = load(&checkpoint, s.as_ref(), 500)?;
            let mut session = host.run()?;
            let want = session.prefill(&ids, 100, 32, &mut watch(|_| ()))?;
            let want_next = session.read(&tail)?;
            for (dtype, held) in TYPES {
                let model =
                    load_as(&checkpoint, s.as_ref(), 500, &WeightFormat::for_gpu(WeightDtype::As(held)), &device)?;
                let mut session = model.run()?;
                let off = deviation(&session.prefill(&ids, 130, 32, &mut watch(|_| ()))?, &want)?;
                let read = session.read(&tail)?.to_device(&Device::Cpu)?;
                let next = deviation(&read, &want_next)?;
                let limit = match dtype {
                    DType::F32 => 1e-3,
                    DType::BF16 => 2.0 * theirs,
                    // Three more bits.
                    _ => theirs / 2.0,
                };
                println!("{name} {dtype:?}: prefill {off:.2e}, decode {next:.2e}, limit {limit:.2e}");
                if !(off <= limit && next <= limit) {
                    let rows = (0..tail.len()).map(|i| deviation(&read.get(i)?, &want_next.get(i)?));
                    let rows: Vec<_> = rows.collect::<Any<Vec<f32>>>()?.iter().map(|x| format!("{x:.2}")).collect();
                    wrong.push(format!(
                        "{name} {dtype:?} {s:?}: prefill {off:.2e}, limit {limit:.2e}, decode {}",
                        rows.join(" ")
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// In f32 alone: rounding to 16 bits changes which tokens stay, and with them everything.
#[test]
fn what_evicts_equals_the_cpus() -> Any {
    let Some(device) = gpu("evictions") else { return Ok(()) };
    let (ids, tail) = (text(430), text(60));
    for name in ["llama3_rope", "qwen3_d128", "gemma3"] {
        let checkpoint = open(&golden_dir(name).to_string_lossy())?;
        for (rule, set) in [("keydiff", ("block", 64)), ("snapkv", ("window", 40))] {
            let plan = EvictionPlan::new(rule, 150, &[set])?;
            let read = |device: &Device, hold: &WeightFormat, chunk: usize| -> Any<[Tensor; 2]> {
                let model = load_as(&checkpoint, None, 500, hold, device)?.by(&plan, 500);
                let mut session = model.run()?;
                let prefill = session.prefill(&ids, chunk, 32, &mut watch(|_| ()))?;
                session.compress()?;
                Ok([prefill, session.read(&tail)?.to_device(&Device::Cpu)?])
            };
            let f32s = WeightDtype::As(Storage::F32);
            let want = read(&Device::Cpu, &WeightFormat::new(f32s, 0, None), 100)?;
            let got = read(&device, &WeightFormat::for_gpu(f32s), 130)?;
            for (part, (got, want)) in ["prefill", "decode"].iter().zip(got.iter().zip(&want)) {
                let off = deviation(got, want)?;
                println!("{name} {rule}, {part}: {off:.2e}");
                assert!(off <= 1e-3, "{name} {rule}, {part}: {off:.2e} standard deviations off");
            }
        }
    }
    Ok(())
}

#[test]
fn captured_decode_takes_the_likeliest_token_and_stops_in_the_middle_of_a_batch() -> Any {
    let Some(device) = gpu("captured decode") else { return Ok(()) };
    let (checkpoint, prompt) = (open(&golden_dir("llama3_rope").to_string_lossy())?, text(300));
    let s = small(16, 32, 4);
    let model = load_as(&checkpoint, Some(&s), 400, &WeightFormat::for_gpu(WeightDtype::As(Storage::F16)), &device)?;
    let generate = |stop: &[u32]| -> Any<(Vec<u32>, usize)> {
        let request =
            Request { prompt: &prompt, max_new_tokens: 45, chunk: 128, stop, logits_last: 1, phase: Phase::Prefill };
        let mut session = model.run()?;
        let made =
            session.generate(&request, &mut Sampler::new(Sampling::GREEDY)?, &mut watch(|_| ()), &mut watch(|_| ()))?;
        Ok((made.tokens, session.cache().position()))
    };
    let (tokens, position) = generate(&[])?;
    assert_eq!((tokens.len(), position), (45, 300 + 44), "the last token is not read");
    let mut session = model.run()?;
    let first = session.prefill(&prompt, 128, 1, &mut watch(|_| ()))?.argmax(1)?.to_vec1::<u32>()?;
    let next = session.read(&tokens[..44])?.argmax(1)?.to_vec1::<u32>()?;
    assert_eq!(tokens, [first, next].concat(), "each token is the likeliest after those before it");
    let distinct: std::collections::HashSet<_> = tokens.iter().collect();
    assert!(distinct.len() > 10, "a text that repeats itself would hide a step that reads the wrong position");
    // A token that first occurs inside a batch.
    let at = (11..44).find(|i| i % 8 != 0 && !tokens[..*i].contains(&tokens[*i])).ok_or("no such token")?;
    let (stopped, position) = generate(&[tokens[at]])?;
    assert_eq!(stopped, tokens[..at]);
    assert_eq!(position, 300 + at, "tokens after the stop are not read");
    Ok(())
}

/// A captured decode that the callback ends inside a batch: what was launched beyond is undone, and what is read next is read as if it
/// had never stopped. Sliding rings, local rings, sinks, summaries, running sums and recurrent states; blocks that end inside the batch.
#[test]
fn captured_decode_that_is_stopped_equals_one_that_never_was() -> Any {
    let Some(device) = gpu("early stops") else { return Ok(()) };
    let (prompt, tail) = (text(300), text(40));
    let held = WeightFormat::for_gpu(WeightDtype::As(Storage::F16));
    for name in ["llama3_rope", "gemma3", "qwen3_5"] {
        let checkpoint = open(&golden_dir(name).to_string_lossy())?;
        let partner = |rule: &str| Settings { partner: rule.into(), partner_count: 2, ..small(8, 16, 4) };
        for s in
            [None, Some(small(8, 16, 4)), Some(small(4, 4, 0)), Some(partner("causal_shift")), Some(small(64, 64, 2))]
        {
            let model = load_as(&checkpoint, s.as_ref(), 400, &held, &device)?;
            let generate = |most: usize| -> Any<(Vec<u32>, Run)> {
                let request = Request {
                    prompt: &prompt,
                    max_new_tokens: 45,
                    chunk: 128,
                    stop: &[],
                    logits_last: 1,
                    phase: Phase::Prefill,
                };
                let mut run = model.run()?;
                assert!(run.captures());
                let greedy = &mut Sampler::new(Sampling::GREEDY)?;
                let made = run.generate(&request, greedy, &mut watch(|_| ()), &mut stop_after(most))?;
                Ok((made.tokens, run))
            };
            let (all, _) = generate(usize::MAX)?;
            for most in [1, 2, 4, 8, 9, 10, 13, 17, 30] {
                let (made, mut run) = generate(most)?;
                assert_eq!((made.as_slice(), run.cache().position()), (&all[..most], 300 + most - 1), "{name} {s:?}");
                let got = [run.read(&all[most - 1..most])?, run.read(&tail)?];
                let mut never = model.run()?;
                never.prefill(&prompt, 128, 1, &mut watch(|_| ()))?;
                never.compress()?;
                if most > 1 {
                    never.read(&all[..most - 1])?;
                }
                let want = [never.read(&all[most - 1..most])?, never.read(&tail)?];
                for (got, want) in got.iter().zip(&want) {
                    assert_eq!(got.to_vec2::<f32>()?, want.to_vec2::<f32>()?, "{name} {s:?} stopped after {most}");
                }
            }
        }
    }
    Ok(())
}

/// Captured steps are made and dropped all the time, while others run; their last launch may still be under way.
#[test]
fn runs_with_a_thread_and_a_stream_each_over_shared_weights_read_what_one_reads() -> Any {
    let Some(device) = gpu("runs side by side") else { return Ok(()) };
    let checkpoint = open(&golden_dir("llama3_rope").to_string_lossy())?;
    let (held, prompt) = (WeightFormat::for_gpu(WeightDtype::As(Storage::F16)), text(300));
    let model = load_as(&checkpoint, Some(&small(16, 32, 4)), 400, &held, &device)?;
    let read = move |model: &Model, rounds: usize| -> bfly::Result<Vec<Vec<f32>>> {
        let mut made = vec![];
        for _ in 0..rounds {
            let mut run = model.run()?;
            run.prefill(&prompt[..200], 64, 1, &mut watch(|_| ()))?;
            made = run.read(&prompt[200..212])?.to_vec2::<f32>()?;
        }
        Ok(made)
    };
    let want = read(&model, 1)?;
    let (say, hear) = std::sync::mpsc::channel();
    for _ in 0..4 {
        let (say, model, read) = (say.clone(), model.clone(), read.clone());
        std::thread::spawn(move || say.send(read(&model, 250).map_err(|e| e.to_string())));
    }
    for _ in 0..4 {
        // A GPU that hangs must not hang the test.
        let got = hear.recv_timeout(std::time::Duration::from_secs(120)).map_err(|_| "a thread does not end")?;
        assert_eq!(got?, want);
    }
    Ok(())
}

#[test]
fn what_evicts_decodes_captured_as_it_does_step_by_step() -> Any {
    let Some(device) = gpu("captured evictions") else { return Ok(()) };
    let (checkpoint, prompt, new) = (open(&golden_dir("llama3_rope").to_string_lossy())?, text(430), 150);
    for (rule, set) in [("keydiff", ("block", 64)), ("snapkv", ("window", 40))] {
        let plan = EvictionPlan::new(rule, 150, &[set])?;
        let held = WeightFormat::for_gpu(WeightDtype::As(Storage::F16));
        let model = load_as(&checkpoint, None, 600, &held, &device)?.by(&plan, 600);
        let begun = || -> Any<(Run, Tensor)> {
            let mut session = model.run()?;
            let last = session.prefill(&prompt, 100, 1, &mut watch(|_| ()))?;
            assert_eq!(session.captures(), rule == "keydiff", "snapkv must see the last queries first");
            session.compress()?;
            assert!(session.captures(), "{rule}");
            Ok((session, last))
        };
        // Two or three evictions of keydiff lie among the new tokens.
        let request = Request {
            prompt: &prompt,
            max_new_tokens: new,
            chunk: 100,
            stop: &[],
            logits_last: 1,
            phase: Phase::Prefill,
        };
        let mut session = model.run()?;
        let made = session
            .generate(&request, &mut Sampler::new(Sampling::GREEDY)?, &mut watch(|_| ()), &mut watch(|_| ()))?
            .tokens;
        assert_eq!((made.len(), session.cache().position()), (new, 430 + new - 1), "{rule}");
        let (mut session, last) = begun()?;
        let captured = session.read(&made[..new - 1])?;
        let likeliest = [last.argmax(1)?.to_vec1::<u32>()?, captured.argmax(1)?.to_vec1::<u32>()?].concat();
        assert_eq!(made, likeliest, "{rule}: each token is the likeliest after those before it");
        // From the same rows on, before and after evictions (at 18, 82 and 146 new tokens for keydiff): rounding alone differs. A text read
        // both ways from its beginning would differ in who stays, where scores are close.
        for at in [0, 18, 40, 82, 146 - 4] {
            let from = || -> Any<Run> {
                let (mut session, _) = begun()?;
                if at > 0 {
                    session.read(&made[..at])?;
                }
                Ok(session)
            };
            let next = &made[at..at + 4];
            let captured = from()?.read(next)?;
            let mut session = from()?;
            let steps = next.iter().map(|id| session.prefill(&[*id], 1, 1, &mut watch(|_| ())));
            let steps = Tensor::cat(&steps.collect::<Result<Vec<_>, _>>()?, 0)?.to_device(&Device::Cpu)?;
            let off = deviation(&captured, &steps)?;
            println!("{rule} after {at}: {off:.2e}");
            assert!(off <= 2e-2, "{rule} after {at}: {off:.2e} standard deviations off");
        }
    }
    Ok(())
}

#[test]
fn the_highest_scores_are_the_cpus() -> Any {
    let Some(device) = gpu("selection") else { return Ok(()) };
    let mut runner = TestRunner::new(Config { cases: 200, failure_persistence: None, ..Config::default() });
    // Few distinct scores have many ties.
    let shape = (1usize..5, 1usize..9000, 0f64..1.0, prop_oneof![Just(2f32), Just(50.0), Just(1e9)], any::<u64>());
    let one = |(heads, count, share, distinct, seed): (usize, usize, f64, f32, u64)| -> Any {
        let mut state = seed | 1;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            match state >> 59 {
                0 => f32::INFINITY,
                1 => -0.0,
                _ => ((state >> 33) as f32 / (1u64 << 31) as f32 * distinct).floor() / distinct - 0.5,
            }
        };
        let scores: Vec<f32> = (0..heads * count).map(|_| next()).collect();
        let scores = Tensor::from_vec(scores, (heads, count), &Device::Cpu)?;
        let keep = ((share * count as f64) as usize).max(1);
        let want = ops::highest_rows(&scores, keep)?.to_vec1::<u32>()?;
        let got = ops::highest_rows(&scores.to_device(&device)?, keep)?.to_vec1::<u32>()?;
        match got == want {
            true => Ok(()),
            false => Err(format!("{keep} of {count} for {heads} heads, {distinct} distinct scores").into()),
        }
    };
    runner.run(&shape, |c| one(c).map_err(|e| TestCaseError::fail(e.to_string())))?;
    Ok(())
}

#[test]
fn a_run_allocates_nothing_that_grows_with_the_text() -> Any {
    let Some(device) = gpu("constant memory") else { return Ok(()) };
    let checkpoint = open(&golden_dir("qwen2").to_string_lossy())?;
    let model =
        load_as(&checkpoint, Some(&small(128, 512, 4)), 1 << 16, &WeightFormat::for_gpu(WeightDtype::Auto), &device)?;
    let mut peaks = vec![];
    for length in [4096, 4096, 40_000] {
        ops::reset_peak(&device);
        let mut session = model.run()?;
        session.prefill(&text(length), 1024, 1, &mut watch(|_| ()))?;
        peaks.push(ops::device_memory(&device).ok_or("no figures")?.peak);
    }
    // The first run also loads what libraries keep.
    assert!(peaks[2].abs_diff(peaks[1]) < 1 << 20, "{peaks:?}");
    Ok(())
}

#[test]
fn a_budget_is_kept_and_does_not_change_the_output() -> Any {
    let Some(device) = gpu("memory budget") else { return Ok(()) };
    let (checkpoint, prompt) = (open(&golden_dir("qwen3_d128").to_string_lossy())?, text(6000));
    let ctx = 8192;
    let model = load_as(&checkpoint, None, ctx, &WeightFormat::for_gpu(WeightDtype::Auto), &device)?;
    let needs = MemoryNeeds::of(&model.weights, model.run()?.layout())?;
    let golden = Golden::open("qwen3_d128")?;
    let theirs = deviation(&golden.logits_bf16("long")?, &golden.logits("long")?)?;
    let run = |chunk: usize| -> Any<(Tensor, u64)> {
        ops::reset_peak(&device);
        let request =
            Request { prompt: &prompt, max_new_tokens: 20, chunk, stop: &[], logits_last: 1, phase: Phase::Prefill };
        let mut session = model.run()?;
        let made =
            session.generate(&request, &mut Sampler::new(Sampling::GREEDY)?, &mut watch(|_| ()), &mut watch(|_| ()))?;
        Ok((made.prompt_logits.to_device(&Device::Cpu)?, ops::device_memory(&device).ok_or("no figures")?.peak))
    };
    // What the process holds besides (other tests' models are gone; libraries keep little).
    let besides = ops::device_memory(&device).ok_or("no figures")?.used.saturating_sub(needs.weights);
    for wanted in [4096, 1024, 256] {
        let budget = needs.total(wanted);
        let chunk = needs.chunk_within(budget, 1 << 20)?;
        let (logits, peak) = run(chunk)?;
        println!("budget {budget}: chunk {chunk}, peak {peak}");
        assert!(peak <= budget + besides, "{peak} of {budget} with chunks of {chunk}");
        // Matrix products of other sizes may sum in another order, which bf16 shows.
        let off = deviation(&logits, &run(4096)?.0)?;
        assert!(off <= theirs, "chunks of {chunk}: {off:.2e} off, transformers' bf16 run {theirs:.2e}");
    }
    assert!(needs.chunk_within(needs.weights, 4096).is_err());
    Ok(())
}
