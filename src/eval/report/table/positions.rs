//! Table of losses by position: one row per bucket, one column per variant.

use super::{columns, extrapolated};
use crate::cli::short_count;
use crate::eval::report::{Estimate, LossByPosition};

/// Renders `positions` from the start of the text to its end.
pub fn positions_table(positions: &LossByPosition) -> String {
    let mut rows = vec![vec!["position".to_string(), String::new()]];
    rows[0].extend(positions.runs.iter().map(|r| r.record.variant.clone()));
    for bucket in 0..positions.ctx.div_ceil(positions.bucket) {
        let to = ((bucket + 1) * positions.bucket).min(positions.ctx);
        let mut row = vec![format!("{}-{}", bucket * positions.bucket, to), String::new()];
        for run in &positions.runs {
            let values: Vec<f64> = run.documents.iter().filter_map(|d| d.losses.get(bucket).copied()).collect();
            row.push(Estimate::of(&values).map_or("-".into(), |e| e.show(3)));
        }
        rows.push(row);
    }
    let about = format!(
        "loss on the next token in nats, means over {} documents with 95% intervals; trained length {}\n",
        positions.runs.first().map_or(0, |r| r.documents.len()),
        short_count(positions.header.trained_positions)
    );
    columns(&rows) + &about + &extrapolated(&positions.header, [positions.ctx])
}
