//! Figures of quality measurements: what a retrofit keeps, and what it costs in bytes.
//!
//! | file | draws | of |
//! |---|---|---|
//! | `smoke` | distance from stock on real text, by context | `bfly-smoke` |
//! | `grid` | where a needle is found: a heat map of lengths and depths for each variant | `bfly-answers` with depths |
//! | `tasks` | scores by task, with their mean, at each length | `bfly-answers` |
//! | `bytes` | the mean score against the KV cache's bytes | `bfly-answers` |
//! | `layers` | what swapping each layer alone does | `bfly-layers` |
//! | `curve` | what keeping the most sensitive ones dense gives, against its bytes | `bfly-layers` |
//! | `ablation` | paired differences of every change from the base | `bfly-ablation` |
//! | `positions` | the loss by position | `bfly-positions` |
//!
//! Intervals are those of [`crate::eval::report::Estimate`]: bootstrap, 95%, over documents or samples. Where there is one of these, there is no
//! interval, and none is drawn. `answers` says which figures a file of answers has, and `cells` orders them.

mod ablation;
mod answers;
mod bytes;
mod cells;
mod curve;
mod grid;
mod layers;
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

use super::axis::{brief, tokens};
use super::page::Key;
use super::theme::Ink;
use crate::eval::report::{EvalSetRecord, Header, VariantRecord};
use crate::eviction::RULES;

/// `title`, with a warning where the weights are random.
fn title(header: &Header, title: &str) -> String {
    match header.random_weights {
        Some(_) => format!("{title} (random weights: says nothing about quality)"),
        None => title.into(),
    }
}

/// Each variant once, in order, with its style. Stock always has the same, whatever else was measured.
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

const STOCK: usize = 1;

/// What kind of method a variant is, and its style; `most` is the number of layers that the others swap.
fn family(record: &VariantRecord, most: usize) -> (String, usize) {
    match (&record.eviction, &record.plan) {
        (Some(plan), _) => {
            let place = STOCK + 1 + RULES.iter().position(|r| r.name() == plan.rule).unwrap_or(RULES.len());
            // The last two colours are taken.
            (plan.rule.clone(), if place < KEPT { place } else { place + 2 })
        }
        (None, Some(plan)) if plan.layers.len() < most => ("retrofit, some layers kept dense".into(), KEPT),
        (None, Some(plan)) if plan.settings.partner == "local" => ("sinks + window".into(), WINDOW),
        (None, Some(_)) => ("retrofit".into(), 0),
        (None, None) => ("stock".into(), STOCK),
    }
}

const KEPT: usize = 4;
const WINDOW: usize = 5;

/// `0.063×`, or `0.25× to 0.031×` where it is not the same everywhere.
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

/// `Read at 4k tokens: 8 texts (last 128 positions of each after prefill) and 32 questions (niah_single_2, niah_multikey_1)`, and
/// whether that is beyond the trained length.
fn read(header: &Header, probed: &EvalSetRecord, texts: usize, questions: usize) -> String {
    let mut parts = vec![];
    if texts > 0 {
        let of = format!("last {} positions of each after prefill", probed.positions);
        parts.push(format!("{} ({of})", count([texts], "text")));
    }
    if questions > 0 {
        parts.push(format!("{} ({})", count([questions], "question"), probed.tasks.join(", ")));
    }
    let beyond = match probed.ctx > header.trained_positions {
        true => format!(", beyond the trained {}: extrapolated", tokens(header.trained_positions)),
        false => String::new(),
    };
    format!("Read at {} tokens{beyond}: {}", tokens(probed.ctx), parts.join(" and "))
}

/// `8 texts`, `1 text`, `3 to 8 texts`.
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

/// The key of the shade beyond the trained length, where an axis to `high` shows it.
fn trained_key(header: &Header, high: f64) -> Option<Key> {
    let trained = header.trained_positions;
    let text = format!("beyond the trained length ({}): extrapolated", tokens(trained));
    (high > trained as f64).then_some(Key::Patch(Ink::Shade, text))
}
