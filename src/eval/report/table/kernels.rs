//! Table of kernels: one row per case, with its share of the binding ceiling.

use crate::eval::report::{median, Kernels};

/// Renders `report` in the order in which it was run.
pub fn kernels_table(report: &Kernels) -> String {
    let c = &report.ceilings;
    let mut out = format!(
        "{}: copy {:.1} GB/s, matmul {:.3} TFLOP/s ({}, {} square)\n",
        report.machine.device, c.copy_gb_s, c.matmul_tflop_s, c.matmul_dtype, c.matmul_size
    );
    for k in &report.kernels {
        let shape: Vec<_> = k.shape.iter().map(|(name, size)| format!("{name} {size}")).collect();
        let seconds = median(&k.samples_s).unwrap_or(0.0);
        let share = k.share_of_ceiling(c, seconds);
        out += &format!(
            "{:<18} {:<18} {:<32} {:>10.4} ms {:>8.3} TFLOP/s {:>8.1} GB/s  {:>3.0}% of {}\n",
            k.kernel,
            k.case,
            shape.join(" "),
            seconds * 1e3,
            k.tflop_s,
            k.gb_s,
            100.0 * share,
            if k.bound_by_copy(c) { "copy" } else { "matmul" }
        );
    }
    out
}
