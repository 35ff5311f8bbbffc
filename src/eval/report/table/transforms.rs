//! The table of the speed of transforms.

use super::super::transforms::{TransformSpeed, TransformTiming};
use super::columns;

/// Formats median microseconds per vector: the learned product, the faster dense product, the faster FFT.
pub fn transforms_table(report: &TransformSpeed) -> String {
    let head = ["N", "case", "product", "us", "dense us", "dense / product", "FFT us", "product / FFT"];
    let mut rows = vec![head.map(String::from).to_vec()];
    for case in report.cases() {
        let least = |wanted: &dyn Fn(&str) -> bool| {
            let of = |t: &&TransformTiming| wanted(&t.method).then(|| t.seconds());
            case.iter().filter_map(of).min_by(f64::total_cmp)
        };
        let plan = least(&|m| m == "plan");
        let (dense, fft) = (least(&|m| m.starts_with("dense")), least(&|m| m.contains("fft")));
        let us = |s: Option<f64>| s.map_or("-".into(), |s| format!("{:.2}", s * 1e6));
        let ratio = |a: Option<f64>, b: Option<f64>| a.zip(b).map_or("-".into(), |(a, b)| format!("{:.2}", a / b));
        rows.push(vec![
            case[0].n.to_string(),
            case[0].case.clone(),
            case[0].product.clone(),
            us(plan),
            us(dense),
            ratio(dense, plan),
            us(fft),
            ratio(plan, fft),
        ]);
    }
    let factors = match report.random_factors {
        true => "random factors, on whose values speed does not depend; ",
        false => "",
    };
    format!("{}{factors}{} thread, median of single vectors\n", columns(&rows), report.threads)
}

#[cfg(test)]
mod tests {
    use super::super::super::{machine, SCHEMA_VERSION, TRANSFORM_SPEED};
    use super::*;

    #[test]
    fn the_faster_of_each_kind_is_compared() {
        let timing = |method: &str, samples: [f64; 3]| TransformTiming {
            n: 64,
            case: "DFT".into(),
            product: "BP".into(),
            complex: true,
            tied: true,
            complex_input: true,
            complex_output: true,
            method: method.into(),
            repeats: 1,
            samples_s: samples.map(|s| s * 1e-6).to_vec(),
        };
        let report = TransformSpeed {
            kind: TRANSFORM_SPEED.into(),
            schema_version: SCHEMA_VERSION,
            git_sha: String::new(),
            started: String::new(),
            command: vec![],
            machine: machine(&candle_core::Device::Cpu),
            threads: 1,
            random_factors: true,
            timings: vec![
                timing("plan", [2.0, 9.0, 1.0]),
                timing("dense f32 by rows", [8.0, 8.0, 8.0]),
                timing("dense c32 by rows", [4.0, 5.0, 6.0]),
                timing("rustfft", [0.5, 0.5, 7.0]),
            ],
        };
        let table = transforms_table(&report);
        let row: Vec<&str> = table.lines().nth(1).unwrap_or_default().split_whitespace().collect();
        assert_eq!(row, ["64", "DFT", "BP", "2.00", "5.00", "2.50", "0.50", "4.00"]);
        assert!(table
            .ends_with("random factors, on whose values speed does not depend; 1 thread, median of single vectors\n"));
    }
}
