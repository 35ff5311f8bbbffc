//! Figures of the character model: how it trains, and what it makes of distance.
//!
//! | file | draws | of |
//! |---|---|---|
//! | `training` | bits per character by step, of one or several runs | `bfly-char-log` |
//! | `names` | names of runs, after their files or directories | `bfly-char-log` |
//! | `positions` | bits per character by position | `bfly-char-eval` |
//! | `contexts` | the gain over the shortest context, paired | `bfly-char-eval` with contexts |
//! | `recall` | right letters by distance, and by set bits of the distance in chunks | `bfly-char-recall` |

mod contexts;
mod names;
mod positions;
mod recall;
#[cfg(test)]
mod tests;
mod training;

pub use names::run_name;
pub use recall::figures as recall;
pub use training::figures as training;

use super::axis::Tick;
use super::kinds::FiguresAndNotes;
use super::page::{Page, CONTENT};
use super::panel::{Axes, Panel};
use super::scale::Scale;
use super::scene::{Area, Scene};
use super::theme::{Ink, MARGIN};
use crate::cli::short_count;
use crate::error::{Error, Result};
use crate::eval::report::{CharEval, Estimate};
use std::path::Path;

/// Draws the figures of the bits read from `path`, with a remark where contexts cannot be compared.
///
/// # Errors
/// A file without bits, or an inconsistent one.
pub fn eval(eval: &CharEval, path: &Path) -> Result<FiguresAndNotes> {
    let fail = |message: String| Error::format(path.display(), message);
    let mut figures = vec![positions::figure(eval).map_err(fail)?];
    let mut notes = vec![];
    if !eval.contexts.is_empty() {
        match contexts::figure(eval).map_err(fail)? {
            Some(figure) => figures.push(figure),
            None => notes.push("no gains by context: there is one context, with nothing to compare it with".into()),
        }
    }
    Ok((figures, notes))
}

/// Returns `column` of a table of bits whose rows are windows.
fn column(rows: &[Vec<f64>], column: usize) -> Vec<f64> {
    rows.iter().filter_map(|row| row.get(column).copied()).collect()
}

/// Checks that a table of bits has rows, of `width` plausible values each; `what` names it.
fn check_table(rows: &[Vec<f64>], width: usize, what: &str) -> std::result::Result<(), String> {
    if rows.is_empty() || width == 0 {
        return Err(format!("holds no {what}"));
    }
    if let Some(row) = rows.iter().find(|row| row.len() != width) {
        return Err(format!("has a row of {} values in {what}; expected {width}", row.len()));
    }
    match rows.iter().flatten().find(|bits| !(0.0..1e6).contains(*bits)) {
        Some(bits) => Err(format!("has {bits} bits per character in {what}")),
        None => Ok(()),
    }
}

/// Returns a logarithmic scale from the first to the last of rising `edges` of octaves, labelled at each edge. An
/// octave that starts at 0 is placed from half of its end on, so that it is as wide as the others.
fn octaves(edges: &[usize]) -> Scale {
    let place = |i: usize| match (edges[i], edges.get(i + 1)) {
        (0, Some(next)) => *next as f64 / 2.0,
        (edge, _) => edge as f64,
    };
    let ticks: Vec<Tick> =
        edges.iter().enumerate().map(|(i, edge)| Tick { value: place(i), label: short_count(*edge) }).collect();
    let end = |tick: Option<&Tick>| tick.map_or(1.0, |t| t.value);
    Scale { low: end(ticks.first()), high: end(ticks.last()), log: true, ticks }
}

/// Returns the middle of octave `i` on a scale made by [`octaves`].
fn middle(scale: &Scale, i: usize) -> f64 {
    (scale.ticks[i].value * scale.ticks[i + 1].value).sqrt()
}

/// Draws a panel over the page's width with `points` and their intervals, and returns its axes.
fn one_panel(page: &mut Page, title: &str, (x, x_name): (&Scale, &str), y: &Scale, points: &[(f64, Estimate)]) -> Axes {
    let area = Area { x: MARGIN, y: page.y, w: CONTENT, h: 320.0 };
    let plot = Panel { title, x, x_name, y, shaded_from: None, crosses: None }.draw(&mut page.scene, area);
    estimates(&mut page.scene, &plot, points);
    page.y = area.bottom();
    plot
}

/// Draws `points` with their intervals, joined by a line.
fn estimates(scene: &mut Scene, plot: &Axes, points: &[(f64, Estimate)]) {
    let at: Vec<_> = points.iter().map(|(x, e)| plot.at(*x, e.mean)).collect();
    scene.series(0, &at);
    for ((x, estimate), place) in points.iter().zip(at) {
        plot.interval(scene, *x, 0.0, estimate, Ink::Series(0));
        scene.marker(0, place);
    }
}

/// Returns every end of the intervals of `points`, and their means.
fn extent(points: &[(f64, Estimate)]) -> impl Iterator<Item = f64> + '_ {
    points.iter().flat_map(|(_, e)| [Some(e.mean), e.low, e.high]).flatten()
}

/// Formats the model of a command line for a subtitle, such as `Model run · `; empty without one.
fn model(command: &[String]) -> String {
    let split = command.iter().find_map(|arg| arg.strip_prefix("--model="));
    let next = command.iter().position(|arg| arg == "--model").and_then(|i| command.get(i + 1)).map(String::as_str);
    let name = split.or(next).and_then(|path| Path::new(path).file_name());
    name.map_or(String::new(), |name| format!("Model {} · ", name.to_string_lossy()))
}
