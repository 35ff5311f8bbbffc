//! Methods that evict: dense attention where nothing has to go, exactly the tokens that the scores say otherwise, and bytes.

use crate::common::attention::values;
use crate::common::*;
use bfly::cache::{Cache, LayerState};
use bfly::eviction::EvictionPlan;
use bfly::generate::{watch, MemoryNeeds, Phase, Request, Sampler, Sampling};
use bfly::layout::Layout;
use bfly::method::Method;
use bfly::mixer::{mix, ChunkContext, MixerWeights, Projections};
use bfly::nn::{Linear, Rope, Weight};
use bfly::run::Run;
use bfly::spec::{MixerSpec, ModelSpec, RopeScaling, RopeSpec};
use candle_core::{DType, Device, Tensor};

fn keydiff(budget: usize, block: usize) -> bfly::Result<EvictionPlan> {
    EvictionPlan::new("keydiff", budget, &[("block", block)])
}

fn snapkv(budget: usize, window: usize) -> bfly::Result<EvictionPlan> {
    EvictionPlan::new("snapkv", budget, &[("window", window)])
}

fn evicting(name: &str, plan: &EvictionPlan, ctx: usize) -> bfly::Result<Model> {
    Ok(load_golden(name, None, ctx)?.by(plan, ctx))
}

fn ids(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| 4 + (i * i * 31 + i * 7) % 370).collect()
}

/// Logits after each of the last `last` ids: all but those by prefill in chunks, with the context over at `end`, the others one
/// by one.
fn logits(model: &Model, ids: &[u32], chunk: usize, end: Option<usize>, last: usize) -> bfly::Result<Tensor> {
    let mut session = model.run()?;
    let (read, decoded) = ids.split_at(ids.len() - last);
    let (context, question) = read.split_at(end.unwrap_or(0));
    if !context.is_empty() {
        session.prefill(context, chunk, 1, &mut watch(|_| ()))?;
        session.compress()?;
    }
    if !question.is_empty() {
        session.prefill(question, chunk, 1, &mut watch(|_| ()))?;
    }
    session.read(decoded)
}

#[test]
fn a_budget_that_covers_the_text_gives_stock_logits() -> Any {
    for name in &goldens()? {
        let golden = Golden::open(name)?;
        let (text, want) = (golden.ids("short")?, golden.logits("short")?);
        for plan in [keydiff(text.len(), 37)?, keydiff(512, 128)?, snapkv(text.len(), 40)?] {
            let model = evicting(name, &plan, 512)?;
            let off = deviation(&last_logits(&model, &text, 77, 64)?, &want)?;
            assert!(off < 1e-4, "{name}, prefill: {off:.2e} standard deviations off with {plan:?}");
            let off = deviation(&logits(&model, &text, 77, Some(150), 64)?, &want)?;
            assert!(off < 1e-4, "{name}, decode: {off:.2e} standard deviations off with {plan:?}");
        }
    }
    Ok(())
}

#[test]
fn evicting_does_change_the_output() -> Any {
    // Without this the tests around it could pass on a cache that keeps everything.
    let text = ids(300);
    for name in ["llama3_rope", "gemma3"] {
        let stock = logits(&load_golden(name, None, 300)?, &text, 64, Some(200), 8)?;
        for plan in [keydiff(64, 16)?, snapkv(64, 16)?] {
            let off = deviation(&logits(&evicting(name, &plan, 300)?, &text, 64, Some(200), 8)?, &stock)?;
            assert!(off > 1e-3, "{name}: {plan:?} gives what stock gives");
        }
    }
    Ok(())
}

#[test]
fn the_output_does_not_depend_on_how_a_text_is_fed() -> Any {
    let text = ids(230);
    for name in ["qwen2_yarn", "llama3_rope"] {
        for plan in [keydiff(48, 16)?, keydiff(20, 7)?, keydiff(33, 100)?, snapkv(48, 12)?] {
            let model = evicting(name, &plan, 256)?;
            for end in [None, Some(101)] {
                let whole = logits(&model, &text, 230, end, 4)?;
                for chunk in [1, 16, 33, 128] {
                    let off = deviation(&logits(&model, &text, chunk, end, 4)?, &whole)?;
                    assert!(off < 2e-4, "{name}, chunks of {chunk}, end {end:?}: {off:.2e} off with {plan:?}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn generation_compresses_at_the_end_of_its_prompt() -> Any {
    let (text, new) = (ids(200), 12);
    for plan in [keydiff(40, 16)?, snapkv(40, 8)?] {
        let model = evicting("qwen2", &plan, 256)?;
        let mut session = model.run()?;
        assert!(!session.captures());
        let request =
            Request { prompt: &text, max_new_tokens: new, chunk: 64, stop: &[], logits_last: 1, phase: Phase::Prefill };
        let mut sampler = Sampler::new(Sampling::GREEDY)?;
        let made = session.generate(&request, &mut sampler, &mut watch(|_| ()), &mut watch(|_| ()))?.tokens;
        let mut by_hand = model.run()?;
        let mut last = by_hand.prefill(&text, 64, 1, &mut watch(|_| ()))?;
        by_hand.compress()?;
        let mut want = vec![];
        for _ in 0..new {
            want.push(last.argmax(1)?.to_vec1::<u32>()?[0]);
            last = by_hand.read(&want[want.len() - 1..])?;
        }
        assert_eq!(made, want, "{plan:?}");
    }
    Ok(())
}

/// A layer of `heads` query heads over `kv_heads`, with the identity for an output projection.
fn layer(heads: usize, kv_heads: usize, dim: usize, seed: u64) -> Any<(Projections, Rope)> {
    let hidden = heads * dim;
    let linear = |rows: usize, salt: u64| -> candle_core::Result<Linear> {
        Ok(Linear::new(Weight::Dense(values((1, rows, hidden), seed ^ salt, 1.0)?.squeeze(0)?), None))
    };
    let projections = Projections {
        q: linear(hidden, 11)?,
        k: linear(kv_heads * dim, 22)?,
        v: linear(kv_heads * dim, 33)?,
        out: Linear::new(Weight::Dense(Tensor::eye(hidden, DType::F32, &Device::Cpu)?), None),
        gate: None,
        qk_norm: None,
        heads,
        kv_heads,
        head_dim: dim,
        scale: 1.0 / (dim as f32).sqrt(),
        rope: 0,
    };
    Ok((projections, Rope::new(&RopeSpec { theta: 100.0, dim, rotated: dim, scaling: RopeScaling::None })))
}

/// A layout of one layer, that of [`layer`], and its cache.
fn cache(
    spec: &ModelSpec,
    plan: &EvictionPlan,
    (heads, kv_heads, dim): (usize, usize, usize),
    ctx: usize,
) -> Any<(Layout, Cache)> {
    let mut spec = spec.clone();
    spec.layers.truncate(1);
    let MixerSpec::Attention(a) = &mut spec.layers[0].mixer else { return Err("no attention".into()) };
    (a.heads, a.kv_heads, a.head_dim, a.scale) = (heads, kv_heads, dim, 1.0 / (dim as f64).sqrt());
    let layout = Layout::new(&spec, plan, ctx)?;
    let cache = Cache::new(&layout, DType::F32, &Device::Cpu)?;
    Ok((layout, cache))
}

/// Rows by position and head.
type Rows = Vec<Vec<Vec<f32>>>;

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(x, y)| *x as f64 * *y as f64).sum()
}

/// Softmax of a query's logits over `held` positions.
fn weights(q: &[f32], k: &Rows, head: usize, held: &[usize], scale: f64) -> Vec<f64> {
    let logits: Vec<f64> = held.iter().map(|i| scale * dot(q, &k[*i][head])).collect();
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|x| x / sum).collect()
}

/// The positions of `held` that the rule keeps in one head at `now`, by its definition.
fn kept(
    plan: &EvictionPlan,
    (q, k): (&Rows, &Rows),
    head: usize,
    held: &[usize],
    now: usize,
    scale: f64,
) -> Vec<usize> {
    let n = held.len();
    let scores: Vec<f64> = match plan.rule.as_str() {
        "keydiff" => {
            let unit = |i: &usize| {
                let key = &k[*i][head];
                let norm = dot(key, key).sqrt() as f32;
                key.iter().map(|x| x / norm).collect::<Vec<f32>>()
            };
            let units: Vec<_> = held.iter().map(unit).collect();
            let mean: Vec<f32> =
                (0..units[0].len()).map(|c| units.iter().map(|u| u[c]).sum::<f32>() / n as f32).collect();
            units.iter().map(|u| -dot(u, &mean)).collect()
        }
        _ => {
            let (window, kernel) = (plan.settings["window"], plan.settings["kernel"]);
            let group = q[0].len() / k[0].len();
            let mut sums = vec![0f64; n];
            for (p, queries) in q.iter().enumerate().take(now).skip(now - window) {
                let seen = held.iter().filter(|i| **i <= p).copied().collect::<Vec<_>>();
                for query in &queries[head * group..(head + 1) * group] {
                    sums.iter_mut().zip(weights(query, k, head, &seen, scale)).for_each(|(s, w)| *s += w);
                }
            }
            let (old, half) = (n - window, kernel / 2);
            let pooled = |i: usize| sums[i.saturating_sub(half)..(i + half + 1).min(old)].iter().sum::<f64>();
            (0..n).map(|i| if i < old { pooled(i) } else { f64::INFINITY }).collect()
        }
    };
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let mut kept: Vec<usize> = order[..plan.budget.min(n)].iter().map(|i| held[*i]).collect();
    kept.sort_unstable();
    kept
}

/// The layer by its definition: outputs of every position, and the positions held in each head at the end.
fn definition(
    plan: &EvictionPlan,
    (q, k, v): (&Rows, &Rows, &Rows),
    end: usize,
    scale: f64,
) -> (Vec<f32>, Vec<Vec<usize>>) {
    let (kv_heads, group) = (k[0].len(), q[0].len() / k[0].len());
    let (mut held, mut out) = (vec![vec![]; kv_heads], vec![]);
    for p in 0..q.len() {
        for (h, query) in q[p].iter().enumerate() {
            let head = h / group;
            if h % group == 0 {
                held[head].push(p);
            }
            let w = weights(query, k, head, &held[head], scale);
            let value =
                |c: usize| held[head].iter().zip(&w).map(|(i, w)| w * v[*i][head][c] as f64).sum::<f64>() as f32;
            out.extend((0..query.len()).map(value));
        }
        let whole = plan.settings.get("block").is_some_and(|block| (p + 1) % block == 0);
        if whole || p + 1 == end {
            for (head, held) in held.iter_mut().enumerate().filter(|(_, held)| held.len() > plan.budget) {
                *held = kept(plan, (q, k), head, held, p + 1, scale);
            }
        }
    }
    (out, held)
}

#[test]
fn a_layer_keeps_what_the_scores_say_and_attends_to_exactly_that() -> Any {
    let spec = open(&golden_dir("llama").to_string_lossy())?.spec;
    for seed in 0..10usize {
        let (kv_heads, group, dim) = (1 + seed % 3, 1 + seed % 4, [8, 10, 16][seed % 3]);
        let (heads, tokens) = (kv_heads * group, 60 + 7 * seed);
        let (projections, rope) = layer(heads, kv_heads, dim, seed as u64)?;
        let x = values((1, tokens, heads * dim), 77 + seed as u64, 4.0)?.squeeze(0)?;
        let table = |from: usize, n: usize| rope.table((from..from + n).map(|p| p as f32), &Device::Cpu);
        let whole = projections.project(&x, &table(0, tokens)?, false)?;
        let rows = |x: &Tensor| x.to_vec3::<f32>();
        let (q, k, v) = (rows(&whole.q)?, rows(&whole.k)?, rows(&whole.v)?);
        let weights = MixerWeights::Attention(Box::new(projections));
        for plan in [keydiff(9 + seed, 3 + seed)?, snapkv(12 + seed, 2 + seed)?] {
            let end = tokens / 2 + seed;
            let (want, held) = definition(&plan, (&q, &k, &v), end, 1.0 / (dim as f64).sqrt());
            for chunk in [1, 13, tokens] {
                let (layout, mut cache) = cache(&spec, &plan, (heads, kv_heads, dim), tokens)?;
                let mut got: Vec<f32> = vec![];
                for (from, until) in [(0, end), (end, tokens)] {
                    for start in (from..until).step_by(chunk) {
                        let n = chunk.min(until - start);
                        let (ropes, tables) = (std::slice::from_ref(&rope), [table(start, n)?]);
                        let step = ChunkContext { start, phase: Phase::Prefill, ropes, tables: &tables };
                        let x = x.narrow(0, start, n)?;
                        let y = mix(&layout.layers[0], &weights, &x, &step, &mut cache.layers[0])?;
                        got.extend(y.flatten_all()?.to_vec1::<f32>()?);
                    }
                    if until == end {
                        cache.compress()?;
                    }
                }
                let what = format!("seed {seed}, chunks of {chunk}, {plan:?}");
                let off = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(off < 1e-3, "{what}: {off:.1e} off");
                let LayerState::CompressedKv(kept) = &cache.layers[0] else { panic!("{what}: another state") };
                assert_eq!(kept.count(), held[0].len(), "{what}");
                let (stored_k, stored_v) = (rows(kept.rows().k)?, rows(kept.rows().v)?);
                for (head, held) in held.iter().enumerate() {
                    for (i, p) in held.iter().enumerate() {
                        let same = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-3);
                        let (row_k, row_v) = (&stored_k[i][head], &stored_v[i][head]);
                        let found = (0..tokens).find(|p| same(row_k, &k[*p][head]) && same(row_v, &v[*p][head]));
                        assert_eq!(found, Some(*p), "{what}: row {i} of head {head}");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn rows_are_the_marked_tokens_of_the_highest_scores_in_each_head() -> Any {
    // Two heads; in each, keys are alike but for some, which are other ones in either head. Values tell position and head.
    let spec = open(&golden_dir("llama").to_string_lossy())?.spec;
    let (_, mut cache) = cache(&spec, &keydiff(3, 10)?, (2, 2, 8), 64)?;
    let LayerState::CompressedKv(kept) = &mut cache.layers[0] else { return Err("another state".into()) };
    let apart = [[2usize, 5, 9], [0, 1, 7]];
    let mut keys = vec![];
    for p in 0..10 {
        for apart in &apart {
            let axis = if apart.contains(&p) { 1 + apart.iter().position(|a| *a == p).unwrap_or(0) } else { 0 };
            keys.extend((0..8).map(|c| if c == axis { 1.0f32 } else { 0.0 }));
        }
    }
    let k = Tensor::from_vec(keys, (10, 2, 8), &Device::Cpu)?;
    let marks = (0..10 * 2 * 8).map(|i| (i / 8) as f32);
    let v = Tensor::from_iter(marks, &Device::Cpu)?.reshape((10, 2, 8))?;
    for (from, n) in [(0, 4), (4, 6)] {
        assert_eq!(kept.until_eviction(64), 10 - from);
        kept.push(&k.narrow(0, from, n)?, &k.narrow(0, from, n)?, &v.narrow(0, from, n)?)?;
    }
    assert_eq!((kept.count(), kept.capacity()), (3, 13));
    let rows = kept.rows().v.to_vec3::<f32>()?;
    for (head, apart) in apart.iter().enumerate() {
        let marks: Vec<usize> = (0..3).map(|i| rows[i][head][7] as usize).collect();
        assert_eq!(marks, apart.map(|p| 2 * p + head), "head {head}");
    }
    kept.push(&k, &k, &v)?;
    assert_eq!(kept.count(), 3, "another whole block fits and is cut again");
    let long = Tensor::zeros((14, 2, 8), DType::F32, &Device::Cpu)?;
    let error = kept.push(&long, &long, &long).unwrap_err().to_string();
    assert!(error.contains("compressed KV: 14 tokens do not fit 13 rows with 3 in use"), "{error}");
    Ok(())
}

#[test]
fn keydiff_allocates_once_whatever_the_text() -> Any {
    // Four full layers of 2 KV heads of 8, keys and values, f32.
    let row = 4 * 2 * 2 * 8 * 4;
    let model = evicting("qwen2", &keydiff(40, 16)?, 4096)?;
    let mut session = model.run()?;
    let empty = session.cache().capacity_bytes();
    assert_eq!(empty.total(), (40 + 16) * row);
    assert_eq!(MemoryNeeds::of(&model.weights, session.layout())?.cache, empty.total());
    for read in [300, 512, 1000] {
        session.prefill(&vec![7; read], 512, 1, &mut watch(|_| ()))?;
        session.compress()?;
        let cache = session.cache();
        assert_eq!((cache.capacity_bytes(), cache.peak_bytes()), (empty, empty), "after {} tokens", cache.position());
        assert_eq!(cache.used_bytes().total(), 40 * row);
    }
    assert_eq!(session.cache().dense_bytes(), 4096 * row);
    let short = evicting("qwen2", &keydiff(40, 16)?, 50)?.run()?;
    assert_eq!(short.cache().capacity_bytes().total(), 50 * row, "no more rows than the context has positions");
    Ok(())
}

#[test]
fn snapkv_is_dense_until_the_context_is_over_and_its_peak_says_so() -> Any {
    let (row, ctx) = (2 * 2 * 8 * 4, 1000);
    let model = evicting("qwen2", &snapkv(100, 20)?, ctx)?;
    let heads = model.run()?.layout().layers[0].heads as u64;
    let queries = 4 * 20 * heads * 8 * 4;
    let mut session = model.run()?;
    session.compress()?;
    assert_eq!(session.cache().capacity_bytes().total(), 4 * ctx as u64 * row + queries, "no token, no context");
    session.prefill(&ids(600), 128, 1, &mut watch(|_| ()))?;
    let before = session.cache().capacity_bytes().total();
    assert_eq!(before, 4 * ctx as u64 * row + queries);
    assert_eq!(session.cache().used_bytes().total(), 4 * 600 * row + queries);
    assert_eq!(session.cache().peak_bytes().total(), before);
    session.compress()?;
    let (now, copy) = (session.cache().capacity_bytes().total(), (100 + 400) * row);
    assert_eq!(now, 4 * copy, "the budget, and what is left of the context");
    assert_eq!(session.cache().used_bytes().total(), 4 * 100 * row);
    assert_eq!(session.cache().peak_bytes().total(), before + copy, "all layers dense, and one's copy");
    assert!(session.cache().peak_bytes().total() <= MemoryNeeds::of(&model.weights, session.layout())?.cache);
    // Once is once: a question stays whole, to the last position that was provisioned.
    session.prefill(&ids(390), 128, 1, &mut watch(|_| ()))?;
    session.compress()?;
    session.read(&ids(10))?;
    assert_eq!(session.cache().used_bytes().total(), 4 * 500 * row);
    assert_eq!(session.cache().capacity_bytes().total(), now);
    assert!(session.read(&[7]).is_err(), "the context is full");
    Ok(())
}

#[test]
fn sliding_layers_stay_as_they_are() -> Any {
    let run = evicting("gemma3", &keydiff(40, 16)?, 1000)?.run()?;
    let cache = run.cache();
    // One full layer of 56 rows, five sliding ones of 64; one KV head of 32, keys and values, f32.
    assert_eq!(cache.capacity_bytes().total(), (56 + 5 * 64) * 32 * 2 * 4);
    Ok(())
}

#[test]
fn weights_are_run_by_one_method_after_another() -> Any {
    let (text, plan) = (ids(200), keydiff(32, 8)?);
    let stock = load_golden("qwen3", None, 256)?;
    let want: Vec<f32> = last_logits(&stock, &text, 64, 2)?.flatten_all()?.to_vec1()?;
    let evicting = stock.by(&plan, 256);
    assert_eq!(evicting.run()?.layout().method(), &Method::Evict(plan.clone()));
    assert_ne!(last_logits(&evicting, &text, 64, 2)?.flatten_all()?.to_vec1::<f32>()?, want);
    assert_eq!(last_logits(&stock, &text, 64, 2)?.flatten_all()?.to_vec1::<f32>()?, want, "nothing stays behind");
    let bad = EvictionPlan { budget: 0, ..plan };
    let error = stock.by(&bad, 256).run().err().ok_or("took a budget of 0")?.to_string();
    assert_eq!(error, "budget: 0 is not a number of tokens from 1 to 16M");
    let other = Layout::new(load_golden("gemma3", None, 256)?.spec(), None, 256)?;
    let error = Run::with_layout(&stock.weights, other).err().ok_or("took another model's layout")?.to_string();
    assert_eq!(error, "layout: was made for another model");
    Ok(())
}
