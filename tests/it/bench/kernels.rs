//! Kernels and ceilings.

use super::*;

#[test]
fn kernels_are_judged_against_ceilings_of_the_same_process() -> Any {
    let place = Place::new()?;
    let out = place.path("kernels.json");
    let flags = ["--device", "cpu", "--small", "--kernel", "gated,attention_decode", "--samples", "3", "--out"];
    let stdout = bench("kernel").args(flags).arg(&out).output()?.stdout;
    let report: Kernels = read(&out, KERNELS)?;
    let cases: Vec<_> = report.kernels.iter().map(|k| (k.kernel.as_str(), k.case.as_str())).collect();
    assert_eq!(
        cases,
        [
            ("attention_decode", "dense, 32k keys"),
            ("attention_decode", "butterfly"),
            ("attention_decode", "16 raw blocks"),
            ("gated", "silu")
        ]
    );
    assert_eq!((report.ceilings.copy_s.len(), report.ceilings.matmul_s.len()), (10, 10));
    let median = |s: &[f64]| bfly::eval::report::median(s).unwrap_or_default();
    let c = &report.ceilings;
    assert!((c.copy_gb_s - 2.0 * c.copy_bytes as f64 / median(&c.copy_s) / 1e9).abs() < 1e-9 * c.copy_gb_s);
    for k in &report.kernels {
        assert_eq!((k.samples_s.len(), k.dtype.as_str()), (3, "f32"));
        assert!((k.tflop_s - k.flop / median(&k.samples_s) / 1e12).abs() <= 1e-9 * k.tflop_s);
        assert!((k.gb_s - k.bytes / median(&k.samples_s) / 1e9).abs() <= 1e-9 * k.gb_s);
        assert!(String::from_utf8_lossy(&stdout).contains(&k.case));
    }
    // Three tensors of 64 x 18944 in f32.
    assert_eq!(report.kernels[3].bytes, (3 * 64 * 18944 * 4) as f64);
    refused(
        bench("kernel").args(["--device", "cpu", "--kernel", "matmul"]),
        &["--kernel", "matmul", "attention_prefill"],
    );
    refused(bench("kernel").args(["--device", "cpu", "--dtype", "bf16"]), &["--dtype", "no kernels on a CPU"]);
    refused(
        bench("kernel").args(["--device", "cpu", "--out", "/nowhere/k.json"]),
        &["--out /nowhere/k.json: cannot be written"],
    );
    Ok(())
}
