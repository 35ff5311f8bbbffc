//! Gated DeltaNet on a GPU against the CPU's recurrence: position by position, and in pieces on tensor cores.

use crate::common::{gpu, Any};
use bfly::ops::{delta_on_gpu, delta_reference, DeltaArgs, DeltaLayer, DeltaState, GpuDelta};
use bfly::spec::DeltaSpec;
use candle_core::{DType, Device, Tensor};
use rand::{rngs::StdRng, Rng, SeedableRng};

/// Random inputs and weights of a layer, on a CPU.
struct Layer {
    spec: DeltaSpec,
    tiled: bool,
    /// Queries, keys and values, gate, step, decay.
    inputs: [Tensor; 4],
    conv: Tensor,
    rate: Tensor,
    bias: Tensor,
    norm: Tensor,
}

impl Layer {
    /// Inputs are rounded to `dtype`.
    fn random(spec: DeltaSpec, tiled: bool, tokens: usize, dtype: DType, rng: &mut StdRng) -> Any<Self> {
        let mut random = |shape: &[usize], low: f32, high: f32| -> Any<Tensor> {
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(low..high)).collect();
            Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
        };
        let mut input = |width: usize| -> Any<Tensor> { Ok(random(&[tokens, width], -2.0, 2.0)?.to_dtype(dtype)?) };
        let inputs =
            [input(spec.channels())?, input(spec.value_width())?, input(spec.value_heads)?, input(spec.value_heads)?];
        Ok(Self {
            spec,
            tiled,
            inputs,
            conv: random(&[spec.channels() * spec.kernel], -0.7, 0.7)?,
            // From decays of a thousandth a position to those that forget within one.
            rate: random(&[spec.value_heads], -8.0, -0.001)?,
            bias: random(&[spec.value_heads], -4.0, 1.0)?,
            norm: random(&[spec.value_dim], 0.5, 1.5)?,
        })
    }

    /// Runs `f` on positions `from..from + n` on `device`, inputs in `dtype`.
    fn part(
        &self,
        (from, n): (usize, usize),
        (device, dtype): (&Device, DType),
        f: impl FnOnce(&DeltaArgs) -> bfly::Result<Tensor>,
    ) -> Any<Vec<f32>> {
        let cut = |x: &Tensor| x.narrow(0, from, n)?.contiguous()?.to_dtype(dtype)?.to_device(device);
        let [qkv, z, beta, decay] = self.inputs.each_ref().map(cut);
        let [conv, rate, bias, norm] = [&self.conv, &self.rate, &self.bias, &self.norm].map(|w| w.to_device(device));
        let layer = DeltaLayer {
            spec: self.spec,
            conv: &conv?,
            rate: &rate?,
            decay_bias: &bias?,
            norm: (&norm?, 1e-6),
            tiled: self.tiled,
        };
        let args = DeltaArgs { layer, qkv: &qkv?, z: &z?, beta: &beta?, decay: &decay?, start: from };
        Ok(f(&args)?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }

    /// The recurrence on a CPU, in f32.
    fn reference(&self) -> Any<Vec<f32>> {
        let mut state = DeltaState::new(&self.spec);
        let tokens = self.inputs[0].dim(0)?;
        self.part((0, tokens), (&Device::Cpu, DType::F32), |args| delta_reference(args, &mut state))
    }

    /// On a GPU, in parts of `cuts` positions.
    fn on_gpu(&self, gpu: &Device, dtype: DType, cuts: &[usize]) -> Any<Vec<f32>> {
        let (mut state, mut got, mut from) = (GpuDelta::new(&self.spec, gpu)?, vec![], 0);
        for n in cuts {
            got.extend(self.part((from, *n), (gpu, dtype), |args| delta_on_gpu(args, &mut state))?);
            from += n;
        }
        Ok(got)
    }
}

#[test]
fn the_recurrence_is_the_cpus_in_any_cut() -> Any {
    let Some(gpu) = gpu("the_recurrence_is_the_cpus_in_any_cut") else { return Ok(()) };
    let mut rng = StdRng::seed_from_u64(1);
    for (key_heads, group, key_dim, value_dim, kernel) in
        [(1, 1, 16, 16, 4), (2, 3, 8, 24, 4), (4, 2, 128, 128, 4), (1, 2, 32, 16, 2), (3, 1, 100, 60, 3)]
    {
        let spec = DeltaSpec { key_heads, value_heads: key_heads * group, key_dim, value_dim, kernel };
        let layer = Layer::random(spec, group == 3, 130, DType::F32, &mut rng)?;
        let want = layer.reference()?;
        for cuts in [&[130][..], &[1, 129], &[2, 1, 64, 63], &[100, 1, 1, 1, 27]] {
            let got = layer.on_gpu(&gpu, DType::F32, cuts)?;
            let most = want.iter().fold(1f32, |m, x| m.max(x.abs()));
            let off = got.iter().zip(&want).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / most;
            assert!(got.len() == want.len() && off < 5e-5, "{spec:?} cut {cuts:?}: {off:.1e} off");
        }
    }
    Ok(())
}

/// Pieces of 64 positions, whole and in part, mixed with steps; more positions than are computed at once.
#[test]
fn pieces_on_tensor_cores_are_the_cpus_recurrence() -> Any {
    let Some(gpu) = gpu("pieces_on_tensor_cores_are_the_cpus_recurrence") else { return Ok(()) };
    let mut rng = StdRng::seed_from_u64(2);
    for (dtype, limit) in [(DType::BF16, 2e-2), (DType::F16, 4e-3)] {
        for (key_heads, group, cuts) in [
            (1, 1, &[64][..]),
            (2, 1, &[17, 64, 1, 130]),
            (2, 3, &[300, 2, 1, 65]),
            (4, 2, &[3, 500]),
            (40, 1, &[150, 16]),
            (1, 2, &[2500, 1, 40]),
        ] {
            let spec = DeltaSpec { key_heads, value_heads: key_heads * group, key_dim: 128, value_dim: 128, kernel: 4 };
            let layer = Layer::random(spec, group == 3, cuts.iter().sum(), dtype, &mut rng)?;
            let (got, want) = (layer.on_gpu(&gpu, dtype, cuts)?, layer.reference()?);
            let square = |x: f32| f64::from(x * x);
            let apart: f64 = got.iter().zip(&want).map(|(a, b)| square(a - b)).sum();
            let off = (apart / want.iter().map(|x| square(*x)).sum::<f64>()).sqrt();
            println!("{dtype:?} {key_heads} x {group}, {cuts:?}: {off:.2e}");
            assert!(got.len() == want.len() && off < limit, "{dtype:?} {spec:?} cut {cuts:?}: {off:.1e} off");
        }
    }
    Ok(())
}
