//! Results as people read them.

use super::format::Smoke;
use super::gate::{Metric, METRICS};
use super::stats::Estimate;
use crate::bench::table::columns;
use crate::cli::short_count;

/// Metrics that a terminal has room for; the rest is in the JSON.
const SHOWN: [&str; 6] = ["kl", "top1", "overlap", "loss-added", "greedy", "greedy-equal"];

/// One row per context and variant: means over documents, with 95% intervals.
pub fn smoke_table(smoke: &Smoke) -> String {
    let mut head = vec!["ctx".to_string(), "variant".into(), "texts".into(), "KV of dense".into(), "stock ppl".into()];
    let shown: Vec<&(&str, Metric, usize)> = METRICS.iter().filter(|(name, ..)| SHOWN.contains(name)).collect();
    head.extend(shown.iter().map(|(name, ..)| name.to_string()));
    let mut rows = vec![head];
    for run in &smoke.runs {
        let kv = run.subject.kv;
        let of = |f: &dyn Fn(&super::format::DocumentScore) -> f64| {
            Estimate::of(&run.documents.iter().map(f).collect::<Vec<_>>())
        };
        let mut row = vec![
            short_count(run.ctx),
            run.subject.variant.clone(),
            run.documents.len().to_string(),
            format!("{:.4}x", kv.total_bytes as f64 / kv.dense_bytes as f64),
            of(&|d| d.stock_loss).map_or("-".into(), |e| format!("{:.2}", e.mean.exp())),
        ];
        row.extend(shown.iter().map(|(_, metric, decimals)| of(metric).map_or("-".into(), |e| e.show(*decimals))));
        rows.push(row);
    }
    let trained = smoke.header.trained_positions;
    let past = smoke.runs.iter().any(|r| r.ctx > trained);
    let remark =
        past.then(|| format!("trained for {} positions: what is beyond is extrapolated\n", short_count(trained)));
    let about = format!(
        "last {} positions of each text; KL in nats over the whole vocabulary, overlap of {} tokens, greedy of {} tokens; means over texts \
         with 95% intervals (bootstrap)\n",
        smoke.positions, smoke.top, smoke.greedy_tokens
    );
    columns(&rows) + &about + &remark.unwrap_or_default()
}
