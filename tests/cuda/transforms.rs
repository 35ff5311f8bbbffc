//! Learned transforms: the GPU descends as the CPU does, and finds what it finds.

use crate::common::*;
use bfly::transforms::{learn, Learned, Settings, Transform};
use candle_core::Device;

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
        [(Transform::Dft, 64), (Transform::Dct, 16), (Transform::Hadamard, 128), (Transform::Convolution, 8)]
    {
        let (product, complex) = transform.product();
        let got = found(transform, n, &Settings::new(product, complex, 0, true), &device)?;
        println!("{} of {n}: {:.1e}", transform.name(), got.error);
        assert!(got.error < 1e-4, "{} of {n}: {:.1e}", transform.name(), got.error);
    }
    Ok(())
}
