//! Operators of training in bf16 against those of the CPU in f32, on the same rounded inputs.

use super::errors;
use crate::common::{gpu, Any};
use bfly::char::{Batch, CharConfig, CharModel, GpuStream, MlpForm, Pairing, PartnerForm, Rematerialise, Streaming};
use bfly::ops::pair::{self, PairRope, PairShape, Partner};
use bfly::ops::training::{
    cross_entropy, gated_silu, gated_silu_backward, norm, norm_backward, FlatGradient, NO_TARGET,
};
use bfly::train::{AdamW, AdamWSettings, Objective, Schedule, Trainer};
use candle_core::{DType, Device, Tensor};
use rand::{rngs::StdRng, Rng, SeedableRng};

const CPU: &Device = &Device::Cpu;

/// A random tensor, rounded to bf16: on the GPU, and in f32 on the CPU.
fn pair_of(gpu: &Device, std: f32, shape: (usize, usize)) -> Any<(Tensor, Tensor)> {
    let x = Tensor::randn(0f32, std, shape, CPU)?.to_dtype(DType::BF16)?;
    Ok((x.to_device(gpu)?, x.to_dtype(DType::F32)?))
}

fn close(got: &Tensor, want: &Tensor, limit: f64, what: &str) -> Any {
    let (off, _) = errors(got, want, DType::BF16)?;
    if off <= limit {
        return Ok(());
    }
    Err(format!("{what}: {off:.1e} off, limit {limit:.1e}").into())
}

#[test]
fn pair_attention_is_the_cpus() -> Any {
    let Some(gpu) = gpu("pair_attention_is_the_cpus") else { return Ok(()) };
    let mut rng = StdRng::seed_from_u64(1);
    for case in 0..24 {
        let chunk = if case % 3 == 0 { 16 } else { 128 };
        let shape = PairShape {
            batch: rng.random_range(1..4),
            chunks: rng.random_range(1..9),
            chunk,
            heads: rng.random_range(1..4),
            dim: 64,
        };
        let distance = 1 << rng.random_range(0..4);
        let partner = match case % 4 {
            3 => Partner::Xor(distance),
            1 => Partner::Summary(distance),
            _ => Partner::Shift(distance),
        };
        let (x, x_cpu) = pair_of(&gpu, 1.5, (shape.rows(), 3 * shape.width()))?;
        let (dy, dy_cpu) = pair_of(&gpu, 1.0, (shape.rows(), shape.width()))?;
        let of = |device: &Device, x: &Tensor, dy: &Tensor| -> Any<_> {
            let rope = PairRope::new(chunk, 64, 10_000.0, device)?;
            let (out, lse) = pair::forward(x, shape, partner, &rope)?;
            let dx = pair::backward(x, (&out, &lse), dy, shape, partner, &rope)?;
            Ok([out, lse, dx])
        };
        let (got, want) = (of(&gpu, &x, &dy)?, of(CPU, &x_cpu, &dy_cpu)?);
        // Queries, keys, weights and their gradients are rounded once each.
        for ((got, want), (limit, what)) in got.iter().zip(&want).zip([(8e-3, "out"), (2e-3, "lse"), (1.5e-2, "dqkv")])
        {
            close(got, want, limit, &format!("{what} of {shape:?}, {partner:?}"))?;
        }
    }
    Ok(())
}

#[test]
fn pointwise_operators_are_the_cpus() -> Any {
    let Some(gpu) = gpu("pointwise_operators_are_the_cpus") else { return Ok(()) };
    let mut rng = StdRng::seed_from_u64(2);
    for (rows, n) in [(1, 8), (33, 64), (1000, 128), (17, 384), (5, 1024), (300, 768)] {
        let (x, x_cpu) = pair_of(&gpu, 2.0, (rows, n))?;
        let (add, add_cpu) = pair_of(&gpu, 1.0, (rows, n))?;
        let (dy, dy_cpu) = pair_of(&gpu, 1.0, (rows, n))?;
        let weight = Tensor::randn(1f32, 0.3, n, CPU)?;
        let on_gpu = weight.to_device(&gpu)?;
        for with in [false, true] {
            let (add, add_cpu) = (with.then_some(&add), with.then_some(&add_cpu));
            let got = norm(&x, add, &on_gpu, 1e-5)?;
            let want = norm(&x_cpu, add_cpu, &weight, 1e-5)?;
            for (got, want, what) in [(&got.sum, &want.sum, "sum"), (&got.y, &want.y, "norm"), (&got.r, &want.r, "r")] {
                close(got, want, 4e-3, &format!("{what} of {rows} x {n}"))?;
            }
            let (dx, dw) = norm_backward(&got.sum, &on_gpu, &got.r, &dy, add)?;
            let sum = got.sum.to_device(CPU)?.to_dtype(DType::F32)?;
            let r = norm(&sum, None, &weight, 1e-5)?.r;
            let (want_dx, want_dw) = norm_backward(&sum, &weight, &r, &dy_cpu, add_cpu)?;
            close(&dx, &want_dx, 4e-3, &format!("dx of {rows} x {n}"))?;
            close(&dw, &want_dw, 1e-4, &format!("dw of {rows} x {n}"))?;
        }
        let (both, both_cpu) = pair_of(&gpu, 3.0, (rows, 2 * n))?;
        close(&gated_silu(&both)?, &gated_silu(&both_cpu)?, 4e-3, "gated")?;
        close(&gated_silu_backward(&both, &dy)?, &gated_silu_backward(&both_cpu, &dy_cpu)?, 4e-3, "gated, backward")?;
        let (z, z_cpu) = pair_of(&gpu, 3.0, (rows, 256))?;
        let targets: Vec<u32> =
            (0..rows).map(|_| if rng.random_bool(0.2) { NO_TARGET } else { rng.random_range(0..256) }).collect();
        let (got, want) = (cross_entropy(&z, &targets, 0.25)?, cross_entropy(&z_cpu, &targets, 0.25)?);
        close(&got.0, &want.0, 1e-5, "losses")?;
        close(&got.1, &want.1, 4e-3, "gradient of the logits")?;
        let symbols: Vec<u32> = (0..rows).map(|_| rng.random_range(0..256)).collect();
        let gradient = |device: &Device, dy: &Tensor, x: &Tensor| -> Any<Tensor> {
            let mut to = FlatGradient::zeros(3 + n * n + 256 * n, device)?;
            to.put_product(3, dy, x)?;
            to.add_embedding(3 + n * n, &symbols, dy)?;
            to.add_embedding(3 + n * n, &symbols, x)?;
            Ok(to.into_tensor())
        };
        close(&gradient(&gpu, &dy, &x)?, &gradient(CPU, &dy_cpu, &x_cpu)?, 1e-5, "products")?;
    }
    Ok(())
}

/// Shapes of the presets with fewer layers, and their batches.
fn models() -> Any<Vec<(CharConfig, usize)>> {
    let of = |preset: &str, stages: &[u32]| -> Any<CharConfig> {
        Ok(CharConfig { stages: stages.to_vec(), local_layers: [1, 1], ..CharConfig::preset(preset)? })
    };
    Ok(vec![
        (of("micro", &[0, 1, 2, 3])?, 16 * 20 - 3),
        (of("tiny", &[0, 1, 2])?, 128 * 7 - 50),
        (of("small", &[0])?, 128 * 3),
        (CharConfig { partner_form: PartnerForm::Summary, ..of("micro", &[0, 1, 2])? }, 16 * 13 - 5),
        (CharConfig { partner_form: PartnerForm::Summary, ..of("tiny", &[0, 1])? }, 128 * 5 - 50),
        (CharConfig { pairing: Pairing::Xor, ..of("micro", &[0, 2])? }, 16 * 8),
        (CharConfig { mlp: MlpForm::Factored, ..of("micro", &[0, 1])? }, 16 * 9 - 3),
    ])
}

#[test]
fn every_gradient_of_the_model_is_the_cpus() -> Any {
    let Some(gpu) = gpu("every_gradient_of_the_model_is_the_cpus") else { return Ok(()) };
    for (config, length) in models()? {
        let mut rng = StdRng::seed_from_u64(3);
        let texts: Vec<Vec<u8>> = (0..2).map(|i| (0..length - 9 * i).map(|_| rng.random()).collect()).collect();
        let batch = Batch::documents(&[&texts[0], &texts[1]], config.chunk);
        let of = |device: &Device, remat| -> Any<_> {
            let model = CharModel::new(config.clone(), remat, device)?;
            // Weights that bf16 holds, so that both compute the same.
            let weights = model.layout().initial(5, CPU)?.to_dtype(DType::BF16)?.to_dtype(DType::F32)?;
            let (loss, count, gradient) = model.gradient(&weights.to_device(device)?, &batch, 1e-3)?;
            Ok((loss, count, gradient.to_device(CPU)?, model.layout().clone()))
        };
        let (got, want) = (of(&gpu, Rematerialise::Nothing)?, of(CPU, Rematerialise::Nothing)?);
        assert_eq!(got.1, want.1);
        assert!((got.0 - want.0).abs() < 2e-3 * want.0, "loss {} where the CPU has {}", got.0, want.0);
        for (p, start) in want.3.iter() {
            let part = |x: &Tensor| x.narrow(0, start, p.len());
            close(&part(&got.2)?, &part(&want.2)?, 4e-2, &p.name)?;
            let rms = part(&got.2)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
            assert!(rms > 0.0, "{} receives no gradient", p.name);
        }
        let again = of(&gpu, Rematerialise::Layers)?;
        assert_eq!(again.2.to_vec1::<f32>()?, got.2.to_vec1::<f32>()?, "rematerialised layers differ");
    }
    Ok(())
}

#[test]
fn a_stream_gives_the_whole_sequences_logits() -> Any {
    let Some(gpu) = gpu("a_stream_gives_the_whole_sequences_logits") else { return Ok(()) };
    for (config, _) in
        models()?.into_iter().filter(|(c, _)| c.pairing == Pairing::CausalShift && c.mlp == MlpForm::Dense)
    {
        let mut rng = StdRng::seed_from_u64(4);
        // Beyond what the stages reach, so that the rings are written over.
        let length = 3 * config.reach() * config.chunk;
        let text: Vec<u8> = (0..length).map(|_| rng.random()).collect();
        let model = CharModel::new(config.clone(), Rematerialise::Nothing, &gpu)?;
        let weights = model.layout().initial(5, &gpu)?;
        let wide: Vec<u32> = text.iter().map(|s| u32::from(*s)).collect();
        let want = model.logits(&weights, &wide, 1)?.to_device(CPU)?.to_dtype(DType::F32)?;
        for prompt in [1, config.chunk + 3, length / 2, length - 2] {
            let mut stream = GpuStream::new(&model, &weights)?;
            let mut got = stream.read_all(&text[..prompt])?.ok_or("nothing was read")?;
            for symbol in &text[prompt..] {
                got.extend(stream.read(*symbol)?);
            }
            let got = Tensor::from_vec(got, (length - prompt + 1, 256), CPU)?;
            // The forward pass rounds activations to bf16, the stream does not.
            let want = want.narrow(0, prompt - 1, length - prompt + 1)?;
            close(&got, &want, 3e-2, &format!("{} channels, prompt of {prompt}", config.hidden_size))?;
            assert_eq!(stream.bytes(), config.stream_bytes(2));
        }
    }
    Ok(())
}

#[test]
fn training_learns_a_text_as_on_the_cpu() -> Any {
    let Some(gpu) = gpu("training_learns_a_text_as_on_the_cpu") else { return Ok(()) };
    let text = b"the quick brown fox jumps over the lazy dog, again and again. ".repeat(4);
    let losses = |device: &Device| -> Any<Vec<f64>> {
        let config = CharConfig { stages: vec![0, 1, 2], local_layers: [1, 1], ..CharConfig::preset("micro")? };
        let model = CharModel::new(config, Rematerialise::Nothing, device)?;
        let initial = model.layout().initial(1, device)?;
        let optimiser = AdamW::new(model.layout(), initial, AdamWSettings::default())?;
        let schedule = Schedule { peak: 3e-3, floor: 3e-4, warmup: 5, steps: 80 };
        let mut trainer = Trainer::new(model, optimiser, schedule);
        let batches = [Batch::documents(&[&text], 16)];
        (0..80).map(|_| Ok(trainer.step(&batches, text.len())?.loss)).collect()
    };
    let (got, want) = (losses(&gpu)?, losses(CPU)?);
    assert!(got[79] < 0.5, "last loss {}", got[79]);
    for (step, (got, want)) in got.iter().zip(&want).enumerate() {
        assert!((got - want).abs() < 0.02 * want + 0.05, "step {}: {got} where the CPU has {want}", step + 1);
    }
    Ok(())
}
