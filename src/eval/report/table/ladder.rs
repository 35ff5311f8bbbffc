//! Table of a ladder: one row per context, engine and variant, with ratios to the best stock.

use super::{columns, random_weights};
use crate::cli::{human_bytes, short_count};
use crate::eval::report::{Ladder, LadderRun, TimingSummary};

const HEAD: [&str; 9] = ["ctx", "", "time", "of stock", "peak", "of stock", "KV of dense", "tokens/s", "GB/s"];

/// Returns whether a run is a baseline: a peer, or bfly's stock. `time` and `peak` are shown relative to the best of
/// these.
fn is_stock(run: &LadderRun) -> bool {
    run.engine != "bfly" || run.variant == "stock"
}

/// Renders `ladder` with contexts in rising order.
pub fn ladder_table(ladder: &Ladder) -> String {
    let mut runs: Vec<&LadderRun> = ladder.runs.iter().collect();
    runs.sort_by_key(|r| r.ctx);
    let mut rows = vec![HEAD.map(String::from)];
    for run in &runs {
        let best = |f: fn(&TimingSummary) -> f64| {
            let stocks = runs.iter().filter(|r| r.ctx == run.ctx && is_stock(r) && r.ran());
            stocks.filter_map(|r| r.summary.as_ref()).map(f).filter(|v| *v > 0.0).reduce(f64::min)
        };
        rows.push(row(run, best(|s| s.end_to_end_s), best(|s| s.peak_device_bytes as f64)));
    }
    let mut out = columns(&rows);
    for run in runs.iter().filter(|r| !r.ran()) {
        out += &format!("{} {} {}: {}\n", short_count(run.ctx), run.engine, run.variant, run.status);
    }
    out + &random_weights(&ladder.header)
}

fn row(run: &LadderRun, fastest: Option<f64>, smallest: Option<f64>) -> [String; 9] {
    let ratio = |value: f64, best: Option<f64>| {
        best.filter(|_| value > 0.0).map_or("-".into(), |b| format!("{:.3}x", value / b))
    };
    let name = format!("{} {}", run.engine, run.variant);
    let Some(s) = run.summary.as_ref().filter(|_| run.ran()) else {
        let none = || "-".to_string();
        return [short_count(run.ctx), name, none(), none(), none(), none(), none(), none(), none()];
    };
    let peak = s.peak_device_bytes;
    [
        short_count(run.ctx),
        name,
        format!("{:.3} s", s.end_to_end_s),
        ratio(s.end_to_end_s, fastest),
        if peak > 0 { human_bytes(peak) } else { "-".into() },
        ratio(peak as f64, smallest),
        run.kv.map_or("-".into(), |kv| format!("{:.4}x", kv.total_bytes as f64 / kv.dense_bytes as f64)),
        format!("{:.1}", s.decode_tok_s),
        s.decode_gb_s.map_or("-".into(), |r| format!("{r:.1}")),
    ]
}
