//! Figure of bits per character by step, of one or several training runs.

use super::names::run_names;
use crate::error::{Error, Result};
use crate::eval::plot::axis::ticks;
use crate::eval::plot::kinds::FiguresAndNotes;
use crate::eval::plot::page::{LegendEntry, Page, CONTENT};
use crate::eval::plot::panel::{Axes, Panel};
use crate::eval::plot::scale::Scale;
use crate::eval::plot::scene::{Area, Coord, Scene};
use crate::eval::plot::theme::{Ink, MARGIN, THIN};
use crate::eval::plot::Figure;
use crate::eval::report::{read_log, TrainingStep};
use std::path::Path;

/// Part of the steps that a running mean covers.
const SMOOTHED: usize = 50;
/// Ratio of the largest to the smallest smoothed loss from which the vertical axis is logarithmic.
const WIDE: f64 = 10.0;
/// Least distance of the points of a line and of two markers, in figure units.
const APART: (f64, f64) = (1.0, 10.0);

/// A run's losses by step, of the steps whose loss is finite.
struct Run {
    name: String,
    raw: Vec<Coord>,
    smooth: Vec<Coord>,
    held_out: Vec<Coord>,
    /// Number of steps whose loss was not finite.
    diverged: usize,
}

impl Run {
    fn new(name: String, steps: &[TrainingStep]) -> Self {
        let losses = |of: fn(&TrainingStep) -> Option<f64>| -> Vec<Coord> {
            let finite = |s: &TrainingStep| of(s).filter(|bits| (0.0..1e9).contains(bits));
            steps.iter().filter_map(|s| Some((s.step as f64, finite(s)?))).collect()
        };
        let raw = losses(|s| s.bits_per_character);
        let diverged = steps.len() - raw.len();
        let held_out = losses(|s| s.held_out_bits_per_character);
        Self { name, smooth: running_mean(&raw, raw.len() / SMOOTHED), raw, held_out, diverged }
    }
}

/// Averages each point with up to half of `width` points on either side: as many before as after, except at the end.
/// Near the start, which a logarithmic axis stretches, they are few, which keeps the fall of the first steps sharp.
fn running_mean(points: &[Coord], width: usize) -> Vec<Coord> {
    let mean = |(i, point): (usize, &Coord)| {
        let half = (width / 2).min(i / 8);
        let near = &points[i - half..(i + half + 1).min(points.len())];
        (point.0, near.iter().map(|p| p.1).sum::<f64>() / near.len() as f64)
    };
    points.iter().enumerate().map(mean).collect()
}

/// Splits a run into its steps on text and those that recall, whose losses have nothing to do with each other.
fn tasks(name: &str, steps: Vec<TrainingStep>) -> Vec<Run> {
    let (recall, text): (Vec<_>, Vec<_>) = steps.into_iter().partition(|s| s.task.as_deref() == Some("recall"));
    match (recall.is_empty(), text.is_empty()) {
        (true, _) => vec![Run::new(name.into(), &text)],
        (_, true) => vec![Run::new(name.into(), &recall)],
        _ => {
            let (mut main, mut other) = (Run::new(name.into(), &text), Run::new(format!("{name}, recall"), &recall));
            // Held-out windows are text, whatever the step before predicted.
            main.held_out.append(&mut other.held_out);
            main.held_out.sort_by(|a, b| a.0.total_cmp(&b.0));
            vec![main, other]
        }
    }
}

/// Draws the figure of the logs at `paths`, a line each.
///
/// # Errors
/// A log that cannot be read, or has no finite loss.
pub fn figures(paths: &[&Path]) -> Result<FiguresAndNotes> {
    let mut runs = vec![];
    for (path, name) in paths.iter().zip(run_names(paths)) {
        let own = tasks(&name, read_log(path)?);
        if own.iter().all(|run| run.raw.is_empty()) {
            return Err(Error::format(path.display(), "is a training log without a finite loss"));
        }
        runs.extend(own);
    }
    let mut keys: Vec<LegendEntry> =
        runs.iter().enumerate().map(|(i, run)| LegendEntry::Series(i, run.name.clone())).collect();
    if runs.iter().any(|run| !run.held_out.is_empty()) {
        keys.push(LegendEntry::Dashes("dashed, with markers: held out".into()));
    }
    keys.push(LegendEntry::Patch(Ink::Haze(5), "range of single steps".into()));
    let about = format!(
        "Lines: training loss, running mean over up to 1/{SMOOTHED} of the steps; markers that would touch are left out"
    );
    let mut page = Page::new("Bits per character, by training step", &[about], &keys);
    let raw = || runs.iter().flat_map(|run| &run.raw).chain(runs.iter().flat_map(|run| &run.held_out));
    let (Some(x), Some(y)) = (steps(raw().map(|p| p.0)), bits(&runs, raw().map(|p| p.1))) else {
        return Err(Error::format("training logs", "hold no losses"));
    };
    let panel =
        Panel { title: "Bits per character", x: &x, x_name: "optimiser step", y: &y, shaded_from: None, crosses: None };
    let area = Area { x: MARGIN, y: page.y, w: CONTENT, h: 400.0 };
    let plot = panel.draw(&mut page.scene, area);
    draw(&mut page.scene, &plot, &runs);
    page.y = area.bottom();
    let diverged = runs.iter().filter(|run| run.diverged > 0);
    let notes: Vec<String> =
        diverged.map(|r| format!("{}: {} steps without a finite loss.", r.name, r.diverged)).collect();
    Ok((vec![Figure { name: "training".into(), scene: page.finish(&notes) }], vec![]))
}

/// Returns the scale of steps.
fn steps(values: impl Iterator<Item = f64>) -> Option<Scale> {
    let (low, high) = values.fold((f64::INFINITY, 0.0f64), |(low, high), v| (low.min(v), high.max(v)));
    // Most of a loss falls early: a linear axis would press it against the edge.
    let (low, high) = (low.max(1.0), high.max(low.max(1.0) * 2.0) * 1.05);
    // Decade by decade, since the ticks of many decades at once are powers of ten alone.
    let decades = std::iter::successors(Some(1.0f64), |d| Some(d * 10.0)).take_while(|d| *d <= high);
    let ticks = decades.flat_map(|d| ticks(d, (d * 9.0).min(high))).filter(|tick| tick.value >= low);
    low.is_finite().then(|| Scale { low, high, log: true, ticks: ticks.collect() })
}

/// Returns the scale of bits: logarithmic where the smoothed losses differ much.
fn bits(runs: &[Run], values: impl Iterator<Item = f64>) -> Option<Scale> {
    let smooth = runs.iter().flat_map(|run| &run.smooth).map(|p| p.1);
    let (low, high) = smooth.fold((f64::INFINITY, 0.0f64), |(low, high), v| (low.min(v), high.max(v)));
    match high > WIDE * low {
        true => Scale::log(values),
        false => Scale::linear(values, (0.0, f64::INFINITY)),
    }
}

/// Draws all bands, then all lines, then what was held out, so that nothing is hidden by a band.
fn draw(scene: &mut Scene, plot: &Axes, runs: &[Run]) {
    let place = |points: &[Coord]| -> Vec<Coord> { points.iter().map(|p| plot.at(p.0, p.1)).collect() };
    for (i, run) in runs.iter().enumerate() {
        let (top, bottom) = band(&place(&run.raw));
        if top.len() > 1 {
            scene.polygon(top.into_iter().chain(bottom.into_iter().rev()).collect(), Ink::Haze(i));
        }
    }
    for (i, run) in runs.iter().enumerate().rev() {
        scene.series(i, &thinned(&place(&run.smooth), APART.0));
    }
    for (i, run) in runs.iter().enumerate().rev() {
        let held_out = place(&run.held_out);
        scene.dashes(&held_out, Ink::Series(i), THIN);
        thinned(&held_out, APART.1).into_iter().for_each(|at| scene.marker(i, at));
    }
}

/// Returns the upper and the lower edge of the range of `points` in columns of the width of two points of a line.
fn band(points: &[Coord]) -> (Vec<Coord>, Vec<Coord>) {
    let (mut top, mut bottom): (Vec<Coord>, Vec<Coord>) = (vec![], vec![]);
    for &(x, y) in points {
        match (top.last_mut(), bottom.last_mut()) {
            (Some(high), Some(low)) if x < high.0 + 2.0 * APART.0 => {
                (high.1, low.1) = (high.1.min(y), low.1.max(y));
            }
            _ => {
                top.push((x, y));
                bottom.push((x, y));
            }
        }
    }
    (top, bottom)
}

/// Returns those of `points` that are at least `apart` from the one before, and the last one.
fn thinned(points: &[Coord], apart: f64) -> Vec<Coord> {
    let mut kept: Vec<Coord> = vec![];
    for point in points.iter().rev() {
        if kept.last().is_none_or(|last| last.0 - point.0 >= apart) {
            kept.push(*point);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_mean_keeps_the_start_and_spreads_a_peak_later() {
        let points: Vec<Coord> = (0..100).map(|i| (f64::from(i), if i == 3 || i == 60 { 5.0 } else { 0.0 })).collect();
        let smooth = running_mean(&points, 4);
        assert_eq!((smooth[3].1, smooth[4].1), (5.0, 0.0));
        assert_eq!([57, 58, 60, 62, 63].map(|i: usize| smooth[i].1), [0.0, 1.0, 1.0, 1.0, 0.0]);
        assert_eq!(running_mean(&points[..1], 50), points[..1]);
        let rising: Vec<Coord> = (0..40).map(|i| (0.0, f64::from(i))).collect();
        assert_eq!(running_mean(&rising, 4)[39].1, 38.0, "the mean of the last three");
    }

    #[test]
    fn steps_that_recall_are_a_line_of_their_own() {
        let step = |step, task: Option<&str>, held_out| TrainingStep {
            step,
            bits_per_character: Some(2.0),
            held_out_bits_per_character: held_out,
            task: task.map(Into::into),
        };
        let mixed = vec![step(1, None, Some(3.0)), step(2, Some("recall"), Some(2.5)), step(3, None, None)];
        let runs = tasks("run", mixed.clone());
        let found: Vec<_> = runs.iter().map(|r| (r.name.as_str(), r.raw.len(), r.held_out.len())).collect();
        assert_eq!(found, [("run", 2, 2), ("run, recall", 1, 0)]);
        assert_eq!(runs[0].held_out[1], (2.0, 2.5));
        assert_eq!(tasks("run", mixed[1..2].to_vec()).len(), 1);
    }

    #[test]
    fn a_band_holds_every_point_and_thinning_keeps_the_last() {
        let points: Vec<Coord> = (0..50).map(|i| (f64::from(i) * 0.25, f64::from(i * 7 % 5))).collect();
        let (top, bottom) = band(&points);
        assert_eq!((top.len(), bottom.len()), (7, 7));
        assert!(top[..6].iter().all(|p| p.1 == 0.0) && bottom[..6].iter().all(|p| p.1 == 4.0));
        assert_eq!(thinned(&points, 10.0), [points[49], points[9]]);
    }

    #[test]
    fn steps_are_labelled_in_every_decade_without_repeats() {
        let labels = |values: &[f64]| -> Vec<String> {
            let scale = steps(values.iter().copied());
            scale.map_or(vec![], |s| s.ticks.into_iter().map(|t| t.label).collect())
        };
        assert_eq!(labels(&[1.0, 500.0]), ["1", "2", "5", "10", "20", "50", "100", "200", "500"]);
        assert_eq!(labels(&[40.0, 100.0]), ["50", "100"]);
        assert_eq!(labels(&[0.0]), ["1", "2"]);
        assert!(labels(&[]).is_empty());
    }
}
