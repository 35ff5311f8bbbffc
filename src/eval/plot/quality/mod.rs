//! Figures of quality measurements: quality of variants against the stock model, and the bytes of their caches.
//!
//! | file | draws | of |
//! |---|---|---|
//! | `smoke` | distance from stock on real text, by context | `bfly-smoke` |
//! | `needle` | scores by length and depth of the needle, a heat map per variant | `bfly-answers` with depths |
//! | `tasks` | scores by task, with their mean, at each length | `bfly-answers` |
//! | `bytes` | the mean score against the KV cache's bytes | `bfly-answers` |
//! | `layers` | sensitivity to swapping each layer alone | `bfly-layers` |
//! | `curve` | the score with the most sensitive layers kept dense, against the bytes | `bfly-layers` |
//! | `ablation` | paired differences of every change from the base | `bfly-ablation` |
//! | `positions` | the loss by position | `bfly-positions` |
//!
//! Intervals are those of [`Estimate`](crate::eval::report::Estimate): bootstrap, 95%, over documents or samples; a
//! single document or sample has none. `answers` selects the figures of an answers file, and `cells` sorts its cells.

mod ablation;
mod answers;
mod bytes;
mod cells;
mod curve;
mod layers;
mod needle;
mod positions;
mod smoke;
mod tasks;
#[cfg(test)]
mod tests;

pub use ablation::figures as ablation;
pub use answers::figures as answers;
pub use layers::figures as layers;
pub use positions::figures as positions;
pub use smoke::figures as smoke;

use super::axis::brief;
use crate::cli::short_count;
use crate::eval::report::{Estimate, EvalSetRecord, Header, Score, VariantRecord};
use crate::eviction::RULES;

/// A metric of a score; `None` where it was not measured.
type ScoreFigure<'a> = Box<dyn Fn(&Score) -> Option<Estimate> + 'a>;

/// Returns `title`, with a warning where the weights are random.
fn title(header: &Header, title: &str) -> String {
    match header.random_weights {
        Some(_) => format!("{title} (random weights: says nothing about quality)"),
        None => title.into(),
    }
}

/// Returns each variant once, in order of first occurrence, with its style; stock always has the same style.
fn variants<'a>(records: impl IntoIterator<Item = &'a VariantRecord>) -> Vec<(&'a str, usize)> {
    let mut found: Vec<(&str, usize)> = vec![];
    let mut free = [0].into_iter().chain(STOCK + 1..);
    for record in records {
        let name = record.variant.as_str();
        if found.iter().all(|(n, _)| *n != name) {
            let style = if name == "stock" { Some(STOCK) } else { free.next() };
            found.push((name, style.unwrap_or_default()));
        }
    }
    found
}

/// Style of stock.
const STOCK: usize = 1;

/// Returns whether a variant is one of exact recall.
fn recalls(record: &VariantRecord) -> bool {
    record.plan.as_ref().is_some_and(|plan| plan.settings.recall > 0)
}

/// Returns the family of methods of a variant and its style; `most` is the largest number of layers that a plan swaps, and
/// `recall` whether the figure has exact recall, which then takes the style of the retrofit with summaries.
fn family(record: &VariantRecord, most: usize, recall: bool) -> (String, usize) {
    let own = if recalls(record) { "exact recall" } else { "retrofit" };
    match (&record.eviction, &record.plan) {
        (Some(plan), _) => {
            let place = STOCK + 1 + RULES.iter().position(|r| r.name() == plan.rule).unwrap_or(RULES.len());
            // Skips the two styles of retrofit families.
            (plan.rule.clone(), if place < KEPT { place } else { place + 2 })
        }
        (None, Some(plan)) if plan.layers.len() < most => (format!("{own}, some layers kept dense"), KEPT),
        (None, Some(_)) if recalls(record) => (own.into(), 0),
        (None, Some(plan)) if plan.settings.partner == "local" => ("sinks + window".into(), WINDOW),
        (None, Some(_)) if recall => ("window and summaries".into(), SUMMARIES),
        (None, Some(_)) => (own.into(), 0),
        (None, None) => ("stock".into(), STOCK),
    }
}

/// Style of retrofits with some layers kept dense.
const KEPT: usize = 4;
/// Style of retrofits without summaries.
const WINDOW: usize = 5;
/// Style of retrofits with summaries beside exact recall.
const SUMMARIES: usize = 6;

/// Formats the share of a dense cache, such as `0.063×`, or `0.25× to 0.031×` where records differ.
fn share_of<'a>(records: impl IntoIterator<Item = &'a VariantRecord>) -> Option<String> {
    let (mut low, mut high) = (f64::INFINITY, 0.0f64);
    for share in records.into_iter().map(VariantRecord::share_of_dense).filter(|s| s.is_finite()) {
        (low, high) = (low.min(share), high.max(share));
    }
    let show = |share: f64| format!("{}×", brief(share));
    match (low <= high, show(low) == show(high)) {
        (false, _) => None,
        (true, true) => Some(show(low)),
        (true, false) => Some(format!("{} to {}", show(high), show(low))),
    }
}

/// Formats a line about the evaluation set, such as `Read at 4k tokens: 8 texts (last 128 positions of each after
/// prefill) and 32 questions (niah_single_2, niah_multikey_1)`, with a remark where it is beyond the trained length.
fn read_line(header: &Header, probed: &EvalSetRecord, texts: usize, questions: usize) -> String {
    let mut parts = vec![];
    if texts > 0 {
        let how = if probed.stepwise { "in decode steps" } else { "after prefill" };
        let of = format!("last {} positions of each {how}", probed.positions);
        parts.push(format!("{} ({of})", count([texts], "text")));
    }
    if questions > 0 {
        parts.push(format!("{} ({})", count([questions], "question"), probed.tasks.join(", ")));
    }
    let beyond = match header.extrapolates(probed.ctx) {
        true => format!(", beyond the trained {}: extrapolated", short_count(header.trained_positions)),
        false => String::new(),
    };
    format!("Read at {} tokens{beyond}: {}", short_count(probed.ctx), parts.join(" and "))
}

/// Formats a count with its noun, such as `8 texts`, `1 text` or `3 to 8 texts`.
fn count(numbers: impl IntoIterator<Item = usize>, what: &str) -> String {
    let (mut low, mut high) = (usize::MAX, 0);
    for n in numbers {
        (low, high) = (low.min(n), high.max(n));
    }
    match (low, high) {
        (low, high) if low > high => format!("0 {what}s"),
        (1, 1) => format!("1 {what}"),
        (low, high) if low == high => format!("{low} {what}s"),
        (low, high) => format!("{low} to {high} {what}s"),
    }
}
