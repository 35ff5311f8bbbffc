//! Table of a smoke test: one row per context and variant, means over documents with 95% confidence intervals.

use super::{columns, extrapolated};
use crate::cli::short_count;
use crate::eval::report::{DocumentMetric, DocumentScore, Estimate, Smoke, METRICS};

/// Metrics shown in the table; the JSON has all of them.
const SHOWN: [&str; 6] = ["kl", "top1", "overlap", "loss-added", "greedy", "greedy-equal"];

/// Renders `smoke` in the order in which it was run.
pub fn smoke_table(smoke: &Smoke) -> String {
    let mut head = ["ctx", "variant", "texts", "KV of dense", "stock ppl", "ppl"].map(String::from).to_vec();
    let shown: Vec<&(&str, DocumentMetric, usize)> = METRICS.iter().filter(|(name, ..)| SHOWN.contains(name)).collect();
    head.extend(shown.iter().map(|(name, ..)| name.to_string()));
    let mut rows = vec![head];
    for run in &smoke.runs {
        let of = |f: &dyn Fn(&DocumentScore) -> f64| Estimate::of(&run.documents.iter().map(f).collect::<Vec<_>>());
        let perplexity = |loss: Option<Estimate>| loss.map_or("-".into(), |e| format!("{:.2}", e.mean.exp()));
        let mut row = vec![
            short_count(run.ctx),
            run.record.variant.clone(),
            run.documents.len().to_string(),
            format!("{:.4}x", run.record.share_of_dense()),
            perplexity(of(&|d| d.stock_loss)),
            perplexity(of(&|d| d.loss)),
        ];
        row.extend(shown.iter().map(|(_, metric, decimals)| of(metric).map_or("-".into(), |e| e.show(*decimals))));
        rows.push(row);
    }
    let (at, greedy, of) = match &smoke.answers {
        Some(a) => {
            (format!("stock's answers to {} after the context", a.tasks.join(", ")), "the answer".into(), "samples")
        }
        None => {
            let at = format!("last {} positions of each text", smoke.positions);
            (at, format!("{} tokens", smoke.greedy_tokens), "texts")
        }
    };
    let about = format!(
        "{at}; KL in nats over the whole vocabulary, overlap of {} tokens, greedy of {greedy}; means over {of} with 95% \
         intervals (bootstrap)\n",
        smoke.top
    );
    columns(&rows) + &about + &extrapolated(&smoke.header, smoke.runs.iter().map(|r| r.ctx))
}
