//! The table of what was learned.

use super::super::transforms::{Sweep, SweepRun};
use super::columns;
use crate::stats::median;

/// Formats, for each transform and size, how many seeds are within the tolerance, their median seconds, the largest and
/// the least error, and the largest of factors in closed form.
pub fn sweep_table(sweep: &Sweep) -> String {
    let mut places: Vec<(&str, usize)> = vec![];
    for run in &sweep.runs {
        if !places.contains(&(run.transform.as_str(), run.n)) {
            places.push((&run.transform, run.n));
        }
    }
    let head = ["transform", "N", "found", "median s", "largest rmse", "least rmse", "closed form"];
    let mut rows = vec![head.map(String::from).to_vec()];
    for (transform, n) in places {
        let runs: Vec<&SweepRun> = sweep.runs.iter().filter(|r| r.transform == transform && r.n == n).collect();
        let found = runs.iter().filter(|r| r.converged).count();
        let seconds: Vec<f64> = runs.iter().map(|r| r.seconds).collect();
        let errors = || runs.iter().map(|r| r.rmse);
        rows.push(vec![
            transform.into(),
            n.to_string(),
            format!("{found} of {}", runs.len()),
            median(&seconds).map_or("-".into(), |s| format!("{s:.1}")),
            format!("{:.1e}", errors().fold(0.0, f64::max)),
            format!("{:.1e}", errors().fold(f64::INFINITY, f64::min)),
            runs.iter().filter_map(|r| r.closed_form_rmse).reduce(f64::max).map_or("-".into(), |e| format!("{e:.1e}")),
        ]);
    }
    let all: f64 = sweep.runs.iter().map(|r| r.seconds).sum();
    format!("{}{} runs in {all:.0} s\n", columns(&rows), sweep.runs.len())
}

#[cfg(test)]
mod tests {
    use super::super::super::{machine, SCHEMA_VERSION, SWEEP};
    use super::*;
    use candle_core::Device;

    #[test]
    fn seeds_of_a_size_are_one_row() {
        let run = |transform: &str, seed: u64, rmse: f64, seconds: f64| SweepRun {
            transform: transform.into(),
            n: 8,
            seed,
            device: "cpu".into(),
            rmse,
            closed_form_rmse: (transform == "dft").then_some(1e-7),
            parameters: 56,
            seconds,
            threads: 2,
            start: 0,
            rounds: 0,
            converged: rmse < 1e-4,
            settings: serde_json::Value::Null,
        };
        let runs = vec![run("dct", 0, 5e-5, 1.0), run("dct", 1, 2e-2, 4.0), run("dft", 0, 1e-5, 0.5)];
        let machine = machine(&Device::Cpu);
        let (kind, git_sha, command) = (SWEEP.into(), "0".into(), vec![]);
        let table = sweep_table(&Sweep { kind, schema_version: SCHEMA_VERSION, git_sha, command, machine, runs });
        let lines: Vec<Vec<&str>> = table.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["dct", "8", "1", "of", "2", "2.5", "2.0e-2", "5.0e-5", "-"], "{table}");
        assert_eq!(lines[2][..5], ["dft", "8", "1", "of", "1"]);
        assert_eq!(lines[2].last(), Some(&"1.0e-7"), "{table}");
        assert_eq!(lines[3], ["3", "runs", "in", "6", "s"], "{table}");
    }
}
