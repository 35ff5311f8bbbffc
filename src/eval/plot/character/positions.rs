//! Figure of bits per character by position, in octaves.

use super::{check_table, column, extent, middle, model, octaves, one_panel};
use crate::cli::short_count;
use crate::eval::plot::page::{LegendEntry, Page};
use crate::eval::plot::scale::Scale;
use crate::eval::plot::Figure;
use crate::eval::report::{CharEval, Estimate};

/// Draws the figure.
///
/// # Errors
/// Bits that are missing or inconsistent, with what is wrong.
pub fn figure(eval: &CharEval) -> Result<Figure, String> {
    check_table(&eval.bits_by_position, eval.positions.len(), "bits by position")?;
    let mut edges = vec![eval.positions[0][0]];
    for range in &eval.positions {
        if edges.last() != Some(&range[0]) || range[0] >= range[1] {
            return Err(format!("has positions {} to {} out of order", range[0], range[1]));
        }
        edges.push(range[1]);
    }
    let x = octaves(&edges);
    let point = |i: usize| Some((middle(&x, i), Estimate::of(&column(&eval.bits_by_position, i))?));
    let points: Vec<(f64, Estimate)> = (0..eval.positions.len()).filter_map(point).collect();
    let y = Scale::linear(extent(&points), (0.0, f64::INFINITY)).ok_or("holds no bits by position")?;
    let mut keys = vec![LegendEntry::Series(0, "mean over an octave of positions".into())];
    if points.iter().any(|(_, e)| e.low.is_some()) {
        keys.push(LegendEntry::Interval("95% interval over windows".into()));
    }
    let mut page = Page::new("Bits per character, by position in the text", &[about(eval)], &keys);
    one_panel(&mut page, "Bits per character", (&x, "position, characters"), &y, &points);
    Ok(Figure { name: "positions".into(), scene: page.finish(&[]) })
}

/// Formats a line about the measurement.
fn about(eval: &CharEval) -> String {
    format!(
        "{}{} windows of {} characters · corpus {} · {}",
        model(&eval.command),
        eval.bits_by_position.len(),
        short_count(eval.window),
        eval.corpus.chars().take(12).collect::<String>(),
        eval.device
    )
}
