//! Learned transforms: the GPU descends as the CPU does, and finds what it finds. Factored layers.

use super::errors;
use crate::common::*;
use bfly::ops::factored::{apply, apply_backward, Shape};
use bfly::transforms::{learn, Learned, Settings, Transform};
use candle_core::{DType, Device, Tensor};
use rand::{rngs::StdRng, Rng, SeedableRng};

fn found(transform: Transform, n: usize, settings: &Settings, device: &Device) -> bfly::Result<Learned> {
    learn(&transform.matrix(n, settings.seed), settings, device, &|_| ())
}

/// Some steps from the same start without noise: gradients of every kind of module, field and sharing of weights.
#[test]
fn descents_are_those_of_the_cpu() -> Any {
    let Some(device) = gpu("descents_are_those_of_the_cpu") else { return Ok(()) };
    for n in [2, 4, 8, 32, 128, 512] {
        for (product, complex) in
            [("B", false), ("BP", false), ("BP", true), ("BPP", true), ("BPBP", true), ("BPBP", false)]
        {
            for tied in [true, false] {
                // A tied product of 4 N numbers is what the kernels keep in shared memory; an untied one has no such limit.
                let settings = Settings {
                    tied,
                    drawn: 0,
                    starts: 2,
                    columns: 20,
                    relaxed_steps: 6,
                    logit_noise: 0.0,
                    weight_noise: 0.0,
                    fit_steps: 6,
                    rounds: 0,
                    polish: 0,
                    tolerance: 1e-9,
                    ..Settings::new(product, complex, 7, false)
                };
                let transform = if complex { Transform::Dft } else { Transform::Dct };
                let want = found(transform, n, &settings, &Device::Cpu)?;
                let got = found(transform, n, &settings, &device)?;
                let off = (got.error / want.error - 1.0).abs();
                println!("{product} of {n}, complex {complex}, tied {tied}: {:.4e} for {:.4e}", got.error, want.error);
                assert!(off < 1e-3, "{product} of {n}, complex {complex}, tied {tied}: off by {off:.1e}");
                let factors = |l: &Learned| l.product.factors().iter().flatten().copied().collect::<Vec<f32>>();
                let (want, got) = (factors(&want), factors(&got));
                let far = want.iter().zip(&got).filter(|(a, b)| (*a - *b).abs() > 0.02).count();
                assert!(far <= want.len() / 50, "{product} of {n}: {far} of {} numbers differ", want.len());
            }
        }
    }
    Ok(())
}

#[test]
fn fast_algorithms_are_found_on_a_gpu() -> Any {
    let Some(device) = gpu("fast_algorithms_are_found_on_a_gpu") else { return Ok(()) };
    for (transform, n) in
        [(Transform::Dft, 64), (Transform::Dct, 1024), (Transform::Hadamard, 128), (Transform::Convolution, 256)]
    {
        let (product, complex) = transform.product();
        let got = found(transform, n, &Settings::new(product, complex, 0, true), &device)?;
        println!("{} of {n}: {:.1e}", transform.name(), got.error);
        assert!(got.error < 1e-4, "{} of {n}: {:.1e}", transform.name(), got.error);
    }
    Ok(())
}

#[test]
fn factored_layers_are_those_of_the_cpu() -> Any {
    let Some(device) = gpu("factored_layers_are_those_of_the_cpu") else { return Ok(()) };
    let mut rng = StdRng::seed_from_u64(4);
    for size in [2, 4, 16, 64, 256, 1024, 4096] {
        for _ in 0..3 {
            let (stack, rows) = (rng.random_range(1..4), rng.random_range(1..200));
            let (inputs, outputs) = (rng.random_range(1..=size), rng.random_range(1..=stack * size));
            let len = Shape { size, complex: false, tied: false }.butterfly_len();
            let random = |shape: (usize, usize), std: f32| Tensor::randn(0f32, std, shape, &Device::Cpu);
            let (x, dy, w) = (random((rows, inputs), 1.0)?, random((rows, outputs), 1.0)?, random((stack, len), 0.7)?);
            let to = |t: &Tensor| t.to_device(&device);
            let ((want_dx, want_dw), (dx, dw)) =
                (apply_backward(&x, &w, &dy)?, apply_backward(&to(&x)?, &to(&w)?, &to(&dy)?)?);
            let y = apply(&to(&x)?, &to(&w)?)?;
            for (got, want, what) in [(&y, &apply(&x, &w)?, "y"), (&dx, &want_dx, "dx"), (&dw, &want_dw, "dw")] {
                assert_eq!(got.dims(), want.dims(), "{what}");
                let (off, _) = errors(got, want, DType::F32)?;
                assert!(off < 1e-5, "{what} of {rows} rows of {inputs} by {stack} of {size}: {off:.1e}");
            }
        }
    }
    Ok(())
}
