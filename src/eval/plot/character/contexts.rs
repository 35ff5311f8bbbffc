//! Figure of what a longer context gains over the shortest, on the same characters.

use super::{check_table, column, extent, model, one_panel};
use crate::cli::short_count;
use crate::eval::plot::page::{LegendEntry, Page};
use crate::eval::plot::scale::Scale;
use crate::eval::plot::theme::Ink;
use crate::eval::plot::Figure;
use crate::eval::report::{CharEval, Estimate};

/// Draws the figure; `None` for a single context, which has no gain.
///
/// # Errors
/// Bits that are missing or inconsistent, with what is wrong.
pub fn figure(eval: &CharEval) -> Result<Option<Figure>, String> {
    check_table(&eval.bits_by_context, eval.contexts.len(), "bits by context")?;
    let mut order: Vec<usize> = (0..eval.contexts.len()).collect();
    order.sort_by_key(|i| eval.contexts[*i]);
    order.dedup_by_key(|i| eval.contexts[*i]);
    let Some((&shortest, longer)) = order.split_first().filter(|(_, longer)| !longer.is_empty()) else {
        return Ok(None);
    };
    let base = column(&eval.bits_by_context, shortest);
    let gain = |i: &usize| {
        let gain = Estimate::of_differences(&base, &column(&eval.bits_by_context, *i))?;
        Some((eval.contexts[*i] as f64, gain))
    };
    let points: Vec<(f64, Estimate)> = longer.iter().filter_map(gain).collect();
    let free = (f64::NEG_INFINITY, f64::INFINITY);
    let y = Scale::linear(extent(&points).chain([0.0]), free).ok_or("holds no bits by context")?;
    let x = Scale::contexts(&order.iter().map(|i| eval.contexts[*i]).collect::<Vec<_>>());
    let first = short_count(eval.contexts[shortest]);
    let mut keys = vec![
        LegendEntry::Series(0, format!("gain over a context of {first}")),
        LegendEntry::Faint(format!("{first}: 0 by definition")),
    ];
    if points.iter().any(|(_, e)| e.low.is_some()) {
        keys.push(LegendEntry::Interval("95% interval of the paired differences".into()));
    }
    let bits = Estimate::of(&base).map_or(String::new(), |e| e.show(4));
    let about = [
        format!(
            "{}the same {} segments of {} characters at every context · {}",
            model(&eval.command),
            base.len(),
            short_count(eval.segment),
            eval.device
        ),
        format!("With a context of {first}: {bits} bits per character; above 0, the longer context is better"),
    ];
    let mut page = Page::new("What a longer context gains", &about, &keys);
    let plot = one_panel(&mut page, "Gain, bits per character", (&x, "context, characters"), &y, &points);
    page.scene.hollow(0, plot.at(eval.contexts[shortest] as f64, 0.0), Ink::Muted);
    Ok(Some(Figure { name: "contexts".into(), scene: page.finish(&[]) }))
}
