//! The native character model: gradients, streaming and what depends on what.

use crate::common::Any;
use bfly::char::{Batch, CharConfig, CharModel, MlpForm, Pairing, PartnerForm, Rematerialise, Stream, Streaming};
use bfly::ops::pair::Partner;
use bfly::train::ranks::{Ranks, Thread};
use bfly::train::{AdamW, AdamWSettings, Init, Objective, Partials, Schedule, Trainer};
use candle_core::{DType, Device, Tensor, Var};
use rand::{rngs::StdRng, Rng, SeedableRng};
use std::collections::HashMap;
use std::time::Duration;

const CPU: &Device = &Device::Cpu;

/// The model from its definition, in f64 and from differentiable operators alone: attention over the whole text by masks.
struct Reference<'a> {
    config: &'a CharConfig,
    weights: HashMap<String, Var>,
}

impl<'a> Reference<'a> {
    fn new(model: &'a CharModel, flat: &Tensor) -> Any<Self> {
        let mut weights = HashMap::new();
        for (p, start) in model.layout().iter() {
            let value = flat.narrow(0, start, p.len())?.reshape(p.shape.as_slice())?.to_dtype(DType::F64)?;
            weights.insert(p.name.clone(), Var::from_tensor(&value)?);
        }
        Ok(Self { config: model.config(), weights })
    }

    fn weight(&self, name: &str) -> Any<&Tensor> {
        Ok(self.weights.get(name).ok_or_else(|| format!("no {name}"))?)
    }

    /// `x Wᵀ` with `W` a stack of butterflies, level by level.
    fn factored(&self, x: &Tensor, factors: &Tensor, out: usize) -> Any<Tensor> {
        let (rows, n) = (x.dim(0)?, x.dim(1)?.next_power_of_two().max(2));
        let x = x.pad_with_zeros(1, 0, n - x.dim(1)?)?;
        let mut all = vec![];
        for stack in 0..factors.dim(0)? {
            let (mut y, mut half) = (x.clone(), 1);
            let own = factors.get(stack)?.reshape((n.trailing_zeros() as usize, n / 2, 4))?;
            for w in (0..own.dim(0)?).map(|level| own.get(level)) {
                let w = w?.reshape((1, n / 2 / half, half, 4))?;
                let [d1, d2, d3, d4] = [0, 1, 2, 3].map(|e| w.narrow(3, e, 1).and_then(|d| d.squeeze(3)));
                let blocks = y.reshape((rows, n / 2 / half, 2, half))?;
                let (a, b) = (blocks.narrow(2, 0, 1)?.squeeze(2)?, blocks.narrow(2, 1, 1)?.squeeze(2)?);
                let first = (a.broadcast_mul(&d1?)? + b.broadcast_mul(&d2?)?)?;
                let second = (a.broadcast_mul(&d3?)? + b.broadcast_mul(&d4?)?)?;
                y = Tensor::stack(&[first, second], 2)?.reshape((rows, n))?;
                half *= 2;
            }
            all.push(y);
        }
        Ok(Tensor::cat(&all, 1)?.narrow(1, 0, out)?)
    }

    /// A projection of the MLP, dense or factored.
    fn projection(&self, x: &Tensor, name: &str, out: usize) -> Any<Tensor> {
        match self.weights.get(&format!("{name}.factors")) {
            Some(factors) => self.factored(x, factors, out),
            None => self.linear(x, name),
        }
    }

    fn linear(&self, x: &Tensor, name: &str) -> Any<Tensor> {
        Ok(x.matmul(&self.weight(&format!("{name}.weight"))?.t()?)?)
    }

    fn norm(&self, x: &Tensor, name: &str) -> Any<Tensor> {
        let r = (x.sqr()?.mean_keepdim(1)? + self.config.rms_norm_eps)?.sqrt()?.recip()?;
        Ok(x.broadcast_mul(&r)?.broadcast_mul(self.weight(&format!("{name}.weight"))?)?)
    }

    /// `x [T, D]`, row `t` rotated by `position(t)`.
    fn rotated(&self, x: &Tensor, position: impl Fn(usize) -> usize) -> Any<Tensor> {
        let (rows, dim) = x.dims2()?;
        let half = dim / 2;
        let angle =
            |i: usize| position(i / half) as f64 * self.config.rope_theta.powf(-2.0 * (i % half) as f64 / dim as f64);
        let table =
            |f: fn(f64) -> f64| Tensor::from_iter((0..rows * half).map(|i| f(angle(i))), CPU)?.reshape((rows, half));
        let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
        let (low, high) = (x.narrow(1, 0, half)?, x.narrow(1, half, half)?);
        let first = ((&low * &cos)? - (&high * &sin)?)?;
        Ok(Tensor::cat(&[first, ((high * cos)? + (low * sin)?)?], 1)?)
    }

    /// `[rows, columns]`: 0 where `reads(i, j)`, else minus infinity.
    fn mask(rows: usize, columns: usize, reads: impl Fn(usize, usize) -> bool) -> Any<Tensor> {
        let of = |i: usize| if reads(i / columns, i % columns) { 0.0 } else { f64::NEG_INFINITY };
        Ok(Tensor::from_iter((0..rows * columns).map(of), CPU)?.reshape((rows, columns))?)
    }

    fn head(&self, q: &Tensor, k: &Tensor, v: &Tensor, partner: Partner) -> Any<Tensor> {
        let ((t, dim), b) = (q.dims2()?, self.config.chunk);
        let (chunks, scale) = (t / b, 1.0 / (dim as f64).sqrt());
        let (near, far, k) =
            (self.rotated(q, |t| t % b)?, self.rotated(q, |t| t % b + b)?, self.rotated(k, |t| t % b)?);
        let causal = !matches!(partner, Partner::Xor(_));
        let own = Self::mask(t, t, |i, j| i / b == j / b && (j <= i || !causal))?;
        let near = ((near.matmul(&k.t()?)? * scale)? + own)?;
        let (keys, values, reads) = match partner {
            Partner::Summary(_) => {
                let mean = |i: usize| if i % t / b == i / t { 1.0 / b as f64 } else { 0.0 };
                let mean = Tensor::from_iter((0..chunks * t).map(mean), CPU)?.reshape((chunks, t))?;
                let reads = Self::mask(t, chunks, |i, j| partner.of(i / b, chunks) == Some(j))?;
                (mean.matmul(&k)?, mean.matmul(v)?, reads)
            }
            _ => (k.clone(), v.clone(), Self::mask(t, t, |i, j| partner.of(i / b, chunks) == Some(j / b))?),
        };
        let far = ((far.matmul(&keys.t()?)? * scale)? + reads)?;
        let scores = Tensor::cat(&[near, far], 1)?;
        let p = scores.broadcast_sub(&scores.max_keepdim(1)?.detach())?.exp()?;
        Ok(p.broadcast_div(&p.sum_keepdim(1)?)?.matmul(&Tensor::cat(&[v, &values], 0)?)?)
    }

    /// Logits of one sequence.
    fn logits(&self, symbols: &[u32]) -> Any<Tensor> {
        let c = self.config;
        let embedding = self.weight("model.embed_tokens.weight")?;
        let mut x = embedding.index_select(&Tensor::new(symbols, CPU)?, 0)?;
        for (i, partner) in c.layers().into_iter().enumerate() {
            let at = |name: &str| format!("model.layers.{i}.{name}");
            let n = self.norm(&x, &at("input_layernorm"))?;
            let part = |name: &str| self.linear(&n, &at(&format!("self_attn.{name}")));
            let (q, k, v) = (part("q_proj")?, part("k_proj")?, part("v_proj")?);
            let mut heads = vec![];
            for h in 0..c.num_attention_heads {
                let own = |x: &Tensor| x.narrow(1, h * c.head_dim, c.head_dim);
                heads.push(self.head(&own(&q)?, &own(&k)?, &own(&v)?, partner)?);
            }
            x = (x + self.linear(&Tensor::cat(&heads, 1)?, &at("self_attn.o_proj"))?)?;
            let n = self.norm(&x, &at("post_attention_layernorm"))?;
            let wide = c.intermediate_size;
            let gate = self.projection(&n, &at("mlp.gate_proj"), wide)?;
            let gated = (gate.silu()? * self.projection(&n, &at("mlp.up_proj"), wide)?)?;
            x = (x + self.projection(&gated, &at("mlp.down_proj"), c.hidden_size)?)?;
        }
        self.linear(&self.norm(&x, "model.norm")?, "model.embed_tokens")
    }

    /// The sum of losses.
    fn loss(&self, batch: &Batch) -> Any<Tensor> {
        let per = batch.symbols.len() / batch.sequences;
        let mut sum = Tensor::zeros((), DType::F64, CPU)?;
        for (symbols, targets) in batch.symbols.chunks(per).zip(batch.targets.chunks(per)) {
            let logits = self.logits(symbols)?;
            let lse = logits.exp()?.sum_keepdim(1)?.log()?;
            let hot = |i: usize| f64::from(u8::from(targets[i / 256] == (i % 256) as u32));
            let hot = Tensor::from_iter((0..per * 256).map(hot), CPU)?.reshape((per, 256))?;
            sum = (sum - (logits.broadcast_sub(&lse)? * hot)?.sum_all()?)?;
        }
        Ok(sum)
    }
}

/// Ragged small models of all kinds of partners.
fn models() -> Any<Vec<CharModel>> {
    let of = |heads, dim, chunk, local, stages: &[u32], form, pairing| {
        let config =
            CharConfig { partner_form: form, pairing, ..CharConfig::new(heads, dim, chunk, local, stages.to_vec()) };
        CharModel::new(config, Rematerialise::Nothing, CPU)
    };
    // Widths at which results of the stacks are left out, and one at which none is.
    let factored = |heads, dim, wide| {
        let config = CharConfig::new(heads, dim, 4, [1, 0], vec![1, 0]);
        let config = CharConfig { mlp: MlpForm::Factored, intermediate_size: wide, ..config };
        CharModel::new(config, Rematerialise::Nothing, CPU)
    };
    let (raw, summary, shift, xor) = (PartnerForm::Raw, PartnerForm::Summary, Pairing::CausalShift, Pairing::Xor);
    Ok(vec![
        of(1, 8, 4, [1, 1], &[0, 1, 2], raw, shift)?,
        of(2, 6, 3, [1, 0], &[2, 0, 1], summary, shift)?,
        of(3, 2, 5, [0, 0], &[1, 0], raw, shift)?,
        of(2, 4, 1, [0, 1], &[1, 2], raw, shift)?,
        of(1, 4, 4, [0, 0], &[0, 1], raw, xor)?,
        factored(1, 8, 13)?,
        factored(3, 2, 20)?,
        factored(1, 8, 32)?,
    ])
}

/// Random weights, also of the norms, so that no gradient is by chance that of ones.
fn weights(model: &CharModel, seed: u64) -> Any<Tensor> {
    let mut values = model.layout().initial(seed, CPU)?.to_vec1::<f32>()?;
    let mut rng = StdRng::seed_from_u64(seed);
    for (p, start) in model.layout().iter().filter(|(p, _)| p.init == Init::Ones) {
        values[start..start + p.len()].iter_mut().for_each(|x| *x += rng.random_range(-0.5f32..0.5));
    }
    let len = values.len();
    Ok(Tensor::from_vec(values, len, CPU)?)
}

fn symbols(count: usize, seed: u64) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..count).map(|_| rng.random()).collect()
}

fn wide(symbols: &[u8]) -> Vec<u32> {
    symbols.iter().map(|s| u32::from(*s)).collect()
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

#[test]
fn every_gradient_is_the_references() -> Any {
    for (i, model) in models()?.iter().enumerate() {
        let flat = weights(model, i as u64)?;
        let (long, short) = (symbols(7 * model.config().chunk, 1), symbols(5 * model.config().chunk - 2, 2));
        let batch = Batch::documents(&[&long, &short], model.config().chunk);
        assert_eq!(batch.predicted(), long.len() + short.len());
        let reference = Reference::new(model, &flat)?;
        let want = reference.loss(&batch)?;
        let gradients = want.backward()?;
        let (loss, count, got) = model.gradient(&flat, &batch, 0.5)?;
        assert_eq!(count, batch.predicted());
        let want = want.to_scalar::<f64>()?;
        assert!((loss - want).abs() < 1e-5 * want, "model {i}: {loss} where the reference has {want}");
        for (p, start) in model.layout().iter() {
            let want =
                gradients.get(&reference.weights[&p.name]).ok_or_else(|| format!("{} has no gradient", p.name))?;
            let want: Vec<f64> = (want.flatten_all()? * 0.5)?.to_vec1()?;
            let got: Vec<f32> = got.narrow(0, start, p.len())?.to_vec1()?;
            let off: Vec<f64> = got.iter().zip(&want).map(|(g, w)| f64::from(*g) - w).collect();
            assert!(norm(&want) > 0.0, "model {i}: {} receives no gradient", p.name);
            assert!(norm(&off) < 2e-5 * norm(&want), "model {i}: {} is {:.1e} off", p.name, norm(&off) / norm(&want));
        }
    }
    Ok(())
}

#[test]
fn the_references_gradient_is_that_of_finite_differences() -> Any {
    for (i, model) in models()?.iter().enumerate() {
        let (flat, text) = (weights(model, i as u64)?, symbols(4 * model.config().chunk, 3));
        let batch = Batch::documents(&[&text], model.config().chunk);
        let reference = Reference::new(model, &flat)?;
        let gradients = reference.loss(&batch)?.backward()?;
        for (name, var) in &reference.weights {
            let (value, direction) = (var.as_detached_tensor().copy()?, Tensor::randn(0f64, 1.0, var.shape(), CPU)?);
            let at = |step: f64| -> Any<f64> {
                var.set(&(&value + (&direction * step)?)?)?;
                Ok(reference.loss(&batch)?.to_scalar::<f64>()?)
            };
            let slope = (at(1e-6)? - at(-1e-6)?) / 2e-6;
            var.set(&value)?;
            let gradient = gradients.get(var).ok_or_else(|| format!("{name} has no gradient"))?;
            let want = (gradient * direction)?.sum_all()?.to_scalar::<f64>()?;
            assert!((slope - want).abs() < 1e-6 * (1.0 + want.abs()), "model {i}: {name}: {slope} for {want}");
        }
    }
    Ok(())
}

#[test]
fn rematerialised_layers_give_the_same_gradient() -> Any {
    let config = CharConfig::new(2, 8, 4, [1, 1], vec![0, 1]);
    let batch = Batch::documents(&[&symbols(24, 1)], 4);
    let of = |rematerialise| -> Any<Vec<f32>> {
        let model = CharModel::new(config.clone(), rematerialise, CPU)?;
        Ok(model.gradient(&weights(&model, 1)?, &batch, 1.0)?.2.to_vec1()?)
    };
    assert_eq!(of(Rematerialise::Nothing)?, of(Rematerialise::Layers)?);
    Ok(())
}

#[test]
fn a_stream_gives_the_whole_sequences_logits() -> Any {
    let presets = ["micro", "tiny"].map(CharConfig::preset);
    let mut all: Vec<(CharModel, usize)> =
        models()?.into_iter().filter(|m| m.config().pairing == Pairing::CausalShift).map(|m| (m, 26)).collect();
    for config in presets {
        // The preset's shape with shorter chunks and fewer passes, to three times what its stages reach.
        let config = config?;
        let stages = config.stages[..3].to_vec();
        for partner_form in [PartnerForm::Raw, PartnerForm::Summary] {
            let config =
                CharConfig { chunk: 4, stages: stages.clone(), partner_form, local_layers: [1, 1], ..config.clone() };
            let chunks = 3 * config.reach();
            all.push((CharModel::new(config, Rematerialise::Nothing, CPU)?, chunks));
        }
    }
    for (i, (model, chunks)) in all.iter().enumerate() {
        let (flat, text) = (weights(model, 5)?, symbols(chunks * model.config().chunk, 6));
        let want: Vec<Vec<f32>> = model.logits(&flat, &wide(&text), 1)?.to_vec2()?;
        let mut stream = Stream::new(model, &flat)?;
        let bytes = stream.bytes();
        for (t, (symbol, want)) in text.iter().zip(&want).enumerate() {
            let got = stream.read(*symbol)?;
            let off = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
            assert!(off < 2e-4, "model {i}, character {t}: {off:.1e} off");
        }
        assert_eq!((bytes, stream.bytes()), (model.config().stream_bytes(4), bytes));
        // A prompt read in whole chunks, to every place in a chunk, goes on in the same way.
        for prompt in [1, model.config().chunk, text.len() / 2 + 1, text.len() - 3] {
            let mut stream = Stream::new(model, &flat)?;
            let first = stream.read_all(&text[..prompt])?.ok_or("nothing was read")?;
            let rest = text[prompt..].iter().map(|s| Ok(stream.read(*s)?)).collect::<Any<Vec<_>>>()?;
            for (t, got) in std::iter::once(first).chain(rest).enumerate() {
                let off = got.iter().zip(&want[prompt - 1 + t]).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
                assert!(off < 2e-4, "model {i}, prompt of {prompt}, character {t} after it: {off:.1e} off");
            }
        }
    }
    Ok(())
}

#[test]
fn no_later_character_moves_a_logit_and_every_earlier_one_does() -> Any {
    for partner_form in [PartnerForm::Raw, PartnerForm::Summary] {
        let config = CharConfig { partner_form, ..CharConfig::new(1, 16, 4, [1, 1], vec![0, 1, 2, 3, 4]) };
        let model = CharModel::new(config, Rematerialise::Nothing, CPU)?;
        let (flat, text) = (weights(&model, 7)?, wide(&symbols(32 * 4, 8)));
        let logits = |text: &[u32]| -> Any<Vec<Vec<f32>>> { Ok(model.logits(&flat, text, 1)?.to_vec2()?) };
        let (want, last) = (logits(&text)?, text.len() - 1);
        let mut rng = StdRng::seed_from_u64(9);
        let random: Vec<usize> = (0..20).map(|_| rng.random_range(0..=last)).collect();
        let distances = (0..7).map(|s| 1 << s).chain(random).chain([last]);
        for distance in distances {
            let mut changed = text.clone();
            changed[last - distance] = (changed[last - distance] + 1 + rng.random_range(0..255)) % 256;
            let got = logits(&changed)?;
            assert_eq!(
                got[..last - distance],
                want[..last - distance],
                "{distance} before the end: earlier logits moved"
            );
            assert_ne!(got[last], want[last], "the last logits do not depend on the character {distance} before");
        }
    }
    Ok(())
}

#[test]
fn xor_pairs_leak_later_characters_and_have_no_stream() -> Any {
    let config = CharConfig { pairing: Pairing::Xor, ..CharConfig::new(1, 8, 4, [0, 0], vec![0, 1]) };
    let model = CharModel::new(config, Rematerialise::Nothing, CPU)?;
    let (flat, mut text) = (weights(&model, 1)?, wide(&symbols(16, 2)));
    let first = |text: &[u32]| -> Any<Vec<f32>> { Ok(model.logits(&flat, text, 1)?.get(0)?.to_vec1()?) };
    let before = first(&text)?;
    text[15] = (text[15] + 1) % 256;
    assert_ne!(first(&text)?, before, "the first character's logits do not see the last character");
    let error = Stream::new(&model, &flat).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(error.contains("xor reads later characters"), "{error}");
    Ok(())
}

#[test]
fn partial_sums_of_aligned_parts_are_those_of_the_whole() -> Any {
    let terms: Vec<Tensor> =
        (0..8).map(|i| Tensor::randn(0f32, 10f32.powi(i % 5), 33, CPU)).collect::<Result<_, _>>()?;
    let sum = |terms: &[Tensor]| -> Any<Tensor> {
        let mut partials = Partials::default();
        terms.iter().try_for_each(|t| partials.push(t.clone()))?;
        Ok(partials.sum()?.ok_or("no terms")?)
    };
    let want = sum(&terms)?.to_vec1::<f32>()?;
    for ranks in [2, 4, 8] {
        let parts: Vec<Tensor> = terms.chunks(8 / ranks).map(sum).collect::<Any<_>>()?;
        assert_eq!(sum(&parts)?.to_vec1::<f32>()?, want, "{ranks} ranks");
    }
    Ok(())
}

#[test]
fn a_factored_model_has_factors_without_decay_and_learns_a_text() -> Any {
    let config = CharConfig { mlp: MlpForm::Factored, ..CharConfig::new(1, 16, 8, [1, 1], vec![0, 1]) };
    let model = CharModel::new(config, Rematerialise::Layers, CPU)?;
    let mlp: Vec<_> = model.layout().iter().filter(|(p, _)| p.name.starts_with("model.layers.2.mlp.")).collect();
    let of = |name: &str, shape: [usize; 2]| (format!("model.layers.2.mlp.{name}_proj.factors"), shape.to_vec(), false);
    let want = [of("gate", [4, 128]), of("up", [4, 128]), of("down", [1, 768])];
    assert!(mlp.iter().map(|(p, _)| (p.name.clone(), p.shape.clone(), p.decay)).eq(want), "{mlp:?}");
    let norms = (2 * model.config().num_layers() + 1) * model.config().hidden_size;
    assert_eq!(model.config().products() as usize + norms, model.layout().len());
    let text = b"the quick brown fox jumps over the lazy dog, again and again. ".repeat(2);
    let batches = [Batch::documents(&[&text], 8)];
    let optimiser = AdamW::new(model.layout(), model.layout().initial(1, CPU)?, AdamWSettings::default())?;
    let mut trainer = Trainer::new(model, optimiser, Schedule { peak: 1e-2, floor: 1e-3, warmup: 5, steps: 60 });
    let before = trainer.optimiser().weights().to_vec1::<f32>()?;
    let losses = (0..60).map(|_| Ok(trainer.step(&batches, text.len())?.loss)).collect::<Any<Vec<_>>>()?;
    assert!((losses[0] - 256f64.ln()).abs() < 1.0, "first loss {}", losses[0]);
    assert!(losses[59] < 1.0, "last loss {}", losses[59]);
    let after = trainer.optimiser().weights().to_vec1::<f32>()?;
    for (p, start) in trainer.objective().layout().iter() {
        assert_ne!(before[start..][..p.len()], after[start..][..p.len()], "{} was not trained", p.name);
    }
    Ok(())
}

#[test]
fn training_learns_a_text_and_refuses_a_loss_that_is_not_finite() -> Any {
    let config = CharConfig::new(1, 16, 8, [1, 1], vec![0, 1]);
    let model = CharModel::new(config, Rematerialise::Nothing, CPU)?;
    let text = b"the quick brown fox jumps over the lazy dog, again and again. ".repeat(2);
    let batches = [Batch::documents(&[&text], 8)];
    let optimiser = AdamW::new(model.layout(), model.layout().initial(1, CPU)?, AdamWSettings::default())?;
    let schedule = Schedule { peak: 1e-2, floor: 1e-3, warmup: 5, steps: 60 };
    let mut trainer = Trainer::new(model, optimiser, schedule);
    let mut losses = vec![];
    for _ in 0..60 {
        losses.push(trainer.step(&batches, text.len())?.loss);
    }
    assert!((losses[0] - 256f64.ln()).abs() < 1.0, "first loss {}", losses[0]);
    assert!(losses[59] < 1.0, "last loss {}", losses[59]);
    let before = trainer.optimiser().weights().to_vec1::<f32>()?;
    let bad = AdamW::new(
        trainer.objective().layout(),
        (trainer.optimiser().weights() * f64::INFINITY)?,
        AdamWSettings::default(),
    )?;
    let model = CharModel::new(trainer.objective().config().clone(), Rematerialise::Nothing, CPU)?;
    let error =
        Trainer::new(model, bad, schedule).step(&batches, text.len()).err().ok_or("trained on infinite weights")?;
    assert!(error.to_string().contains("step 1: the loss is NaN"), "{error}");
    assert_eq!(trainer.optimiser().weights().to_vec1::<f32>()?, before);
    Ok(())
}

#[test]
fn one_two_and_four_ranks_make_the_same_run() -> Any {
    let config = CharConfig::new(1, 8, 4, [1, 0], vec![0, 1]);
    let texts: Vec<Vec<u8>> = (0..8).map(|i| symbols(32 + 8 * (i as usize % 2), i)).collect();
    let batches: Vec<Batch> = texts.iter().map(|t| Batch::documents(&[t], 4)).collect();
    // The weights after three steps, and the losses.
    let run = |rank: Thread| -> bfly::Result<(Vec<f32>, Vec<f64>)> {
        let own = 8 / rank.count();
        let own = batches[rank.rank() * own..][..own].to_vec();
        let model = CharModel::new(config.clone(), Rematerialise::Nothing, CPU)?;
        let optimiser = AdamW::new(model.layout(), model.layout().initial(1, CPU)?, AdamWSettings::default())?;
        let schedule = Schedule { peak: 1e-2, floor: 1e-3, warmup: 1, steps: 3 };
        let mut trainer = Trainer::new(model, optimiser, schedule).among(Box::new(rank));
        let examples = own.iter().map(Batch::predicted).sum();
        let losses = (0..3).map(|_| Ok(trainer.step(&own, examples)?.loss)).collect::<bfly::Result<_>>()?;
        Ok((trainer.optimiser().weights().to_vec1()?, losses))
    };
    let ranks = |count| -> Any<Vec<(Vec<f32>, Vec<f64>)>> {
        std::thread::scope(|scope| {
            let all = Thread::run_of(count, Duration::from_secs(60));
            let all: Vec<_> = all.into_iter().map(|rank| scope.spawn(|| run(rank))).collect();
            all.into_iter().map(|t| Ok(t.join().map_err(|_| "a rank panicked")??)).collect()
        })
    };
    let want = ranks(1)?.remove(0);
    for count in [2, 4] {
        for (rank, got) in ranks(count)?.into_iter().enumerate() {
            assert_eq!(got.0, want.0, "rank {rank} of {count}");
            assert!(got.1.iter().zip(&want.1).all(|(g, w)| (g - w).abs() < 1e-12), "{:?} for {:?}", got.1, want.1);
        }
    }
    Ok(())
}

/// The share of pairs of a chunk and itself or an earlier one on which its last layer depends, of `chunks` chunks.
fn reached(layers: &[impl Fn(usize) -> Option<usize>], chunks: usize) -> f64 {
    let mut reads: Vec<Vec<bool>> = (0..chunks).map(|c| (0..chunks).map(|j| j == c).collect()).collect();
    for partner in layers {
        let before = reads.clone();
        for (c, row) in reads.iter_mut().enumerate() {
            if let Some(partner) = partner(c) {
                row.iter_mut().zip(&before[partner]).for_each(|(x, y)| *x |= y);
            }
        }
    }
    let all = reads.iter().flatten().filter(|x| **x).count();
    all as f64 / (chunks * (chunks + 1) / 2) as f64
}

#[test]
fn shifts_reach_every_earlier_chunk_and_causal_xor_a_part() {
    let pass = |rule: fn(usize, usize) -> Option<usize>| {
        (0..5).flat_map(move |_| (0..9).map(move |s| move |c: usize| rule(c, 1 << s))).collect::<Vec<_>>()
    };
    assert_eq!(reached(&pass(|c, d| c.checked_sub(d)), 512), 1.0);
    let one = (0..9).map(|s| move |c: usize| c.checked_sub(1 << s)).collect::<Vec<_>>();
    assert_eq!(reached(&one, 512), 1.0);
    // Only set bits can be cleared: 3^9 of 512 * 513 / 2 pairs, however many passes.
    let xor = reached(&pass(|c, d| Some(c ^ d).filter(|p| *p < c)), 512);
    assert!((xor - 3f64.powi(9) / (256.0 * 513.0)).abs() < 1e-12, "{xor}");
    let rule = |i: usize| {
        move |c: usize| {
            if (4..49).contains(&i) {
                Some(c ^ (1 << ((i - 4) % 9))).filter(|p| *p < c)
            } else {
                c.checked_sub(1)
            }
        }
    };
    let local = reached(&(0..53).map(rule).collect::<Vec<_>>(), 512);
    assert!((local - 0.42).abs() < 0.005, "{local}");
}
