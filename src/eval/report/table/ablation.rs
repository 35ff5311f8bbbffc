//! Table of an ablation: one row per change, with its bytes and its paired differences from the base.

use super::{columns, extrapolated, stepwise};
use crate::cli::short_count;
use crate::eval::report::{Ablation, Estimate, Score, TextScore};

/// Column with summaries per query.
const SUMMARIES: usize = 3;

/// Renders `ablation` in the order in which it was run; without summaries where the base has exact recall.
pub fn ablation_table(ablation: &Ablation) -> String {
    let show = |e: Option<Estimate>, decimals| match e {
        Some(e) => e.show(decimals) + if e.differs() { " *" } else { "" },
        None => "-".into(),
    };
    let head = ["", "change", "KV of dense", "summaries", "KL", "KL changes by", "in decode by", "answer loss by"];
    let mut rows = vec![head.map(String::from).to_vec()];
    let kv = |score: &Score| format!("{:.4}x", score.record.share_of_dense());
    let base = &ablation.base;
    let kl = |score: &Score| Estimate::of(&score.texts(|t| t.kl)).map_or("-".into(), |e| e.show(4));
    let summaries = ablation.base_summaries_per_query.map_or("-".into(), |n| format!("{n:.2}"));
    let mut first = vec![String::new(), base.record.variant.clone(), kv(base), summaries, kl(base)];
    first.extend(["", "", ""].map(String::from));
    rows.push(first);
    for change in &ablation.changes {
        let mut row = vec![String::new(), format!("{} {}", change.axis.name(), change.value)];
        let summaries = format!("{:.2}", change.summaries_per_query);
        match &change.score {
            None => {
                let why = change.same_as.as_deref().unwrap_or_default();
                row.extend(["-".into(), summaries, format!("reads the same as `{why}`: not measured")]);
                row.extend(["", "", ""].map(String::from));
            }
            Some(score) => {
                let by = |f: fn(&TextScore) -> f64| Estimate::of_differences(&score.texts(f), &base.texts(f));
                row.extend([kv(score), summaries, kl(score)]);
                row.push(show(by(|t| t.kl), 4));
                row.push(show(by(|t| t.decode_kl), 4));
                row.push(show(Estimate::of_differences(&score.answer_losses(), &base.answer_losses()), 3));
            }
        }
        rows.push(row);
    }
    if ablation.recalls() {
        rows.iter_mut().for_each(|row| drop(row.remove(SUMMARIES)));
    }
    columns(&rows)
        + &format!(
            "differences from {} at {}, paired over {} texts and {} questions, with 95% intervals; * where they exclude 0\n",
            base.record.variant,
            short_count(ablation.probed.ctx),
            base.texts.len(),
            base.answers.len()
        )
        + stepwise(&ablation.probed)
        + &extrapolated(&ablation.header, [ablation.probed.ctx])
}
