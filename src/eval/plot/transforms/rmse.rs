//! Figure of the error of learned transforms by size, with the errors that the authors of arXiv:1903.05895 published.

use super::{sizes, Learned};
use crate::error::{Error, Result};
use crate::eval::plot::page::{LegendEntry, Page, CONTENT};
use crate::eval::plot::panel::{grid, Axes, Panel};
use crate::eval::plot::scale::Scale;
use crate::eval::plot::scene::{Coord, Scene};
use crate::eval::plot::theme::{Ink, MARGIN, SAMPLE, SAMPLE_SHIFT, THIN};
use crate::eval::plot::Figure;
use crate::stats::median;
use std::collections::BTreeSet;

/// Root mean square errors of Dao, Gu, Eichhorn, Rudra and Ré (2019, <https://arxiv.org/abs/1903.05895>) at
/// [`AUTHORS_N`], from `learning_transforms/rmse.pkl` of <https://github.com/HazyResearch/butterfly>.
pub(super) const AUTHORS: [(&str, [f64; 8]); 8] = [
    ("dft", [3.10e-06, 4.60e-06, 8.72e-06, 1.03e-05, 2.01e-05, 3.77e-05, 8.01e-05, 5.70e-05]),
    ("dct", [4.42e-06, 1.08e-05, 8.60e-06, 1.21e-05, 2.12e-05, 1.92e-05, 3.15e-05, 7.28e-05]),
    ("dst", [1.11e-06, 7.48e-06, 4.57e-05, 5.10e-05, 2.97e-05, 2.12e-05, 3.60e-05, 4.56e-05]),
    ("hadamard", [8.79e-07, 7.76e-06, 1.34e-05, 3.91e-05, 3.47e-05, 4.50e-05, 6.09e-05, 3.60e-05]),
    ("hartley", [3.42e-06, 8.97e-06, 1.11e-05, 1.30e-05, 3.58e-05, 4.30e-05, 4.51e-05, 3.56e-05]),
    ("convolution", [4.05e-06, 2.54e-05, 6.45e-05, 7.59e-05, 5.93e-05, 7.81e-05, 6.35e-05, 1.91e-02]),
    ("legendre", [3.40e-02, 2.92e-02, 2.36e-02, 1.38e-02, 7.93e-03, 4.49e-03, 2.59e-03, 1.57e-03]),
    ("random", [1.39e-01, 1.59e-01, 1.44e-01, 1.13e-01, 8.39e-02, 6.10e-02, 4.41e-02, 3.12e-02]),
];
/// Sizes of [`AUTHORS`].
const AUTHORS_N: [usize; 8] = [8, 16, 32, 64, 128, 256, 512, 1024];
/// Series of the authors; the first device is series 0, further ones follow the authors.
const AUTHORS_SERIES: usize = 1;
/// Height of a panel.
const HEIGHT: f64 = 178.0;

/// Draws the figure.
///
/// # Errors
/// Sweeps with neither an error above 0 nor a tolerance.
pub fn figure(learned: &Learned) -> Result<Figure> {
    let (transforms, devices) = (learned.transforms(), learned.devices());
    let published: Vec<f64> = transforms.iter().filter_map(|(_, name)| authors(name)).flatten().collect();
    let tolerances = tolerances(learned);
    let mut keys: Vec<LegendEntry> = devices
        .iter()
        .enumerate()
        .map(|(i, device)| LegendEntry::Series(series(i), format!("bfly on {device}: median over seeds")))
        .collect();
    keys.push(LegendEntry::Dots("one seed".into()));
    if !published.is_empty() {
        keys.push(LegendEntry::Series(AUTHORS_SERIES, "published by the authors".into()));
    }
    if !tolerances.is_empty() {
        let shown: Vec<String> = tolerances.iter().map(|t| format!("{t:e}")).collect();
        keys.push(LegendEntry::Dashes(format!("tolerance, {}", shown.join(" and "))));
    }
    let about = ["Root mean square of the error over all entries, on the unitary scale".into(), learned.about()];
    let mut page = Page::new("Error of learned transforms, by size", &about, &keys);
    let all = learned.runs.iter().map(|run| run.n).chain(AUTHORS_N).collect::<BTreeSet<_>>();
    let errors = learned.runs.iter().map(|run| run.rmse).chain(published.iter().chain(&tolerances).copied());
    let (x, y) = (sizes(&all), Scale::log(errors));
    let y = y.ok_or_else(|| Error::format("sweeps", "hold no error above 0 and no tolerance"))?;
    for (area, (_, name)) in grid(transforms.len(), 2, (MARGIN, CONTENT), page.y, HEIGHT).into_iter().zip(&transforms) {
        let title = format!("{name}: RMSE");
        let panel = Panel { title: &title, x: &x, x_name: "N", y: &y, shaded_from: None, crosses: None };
        let plot = panel.draw(&mut page.scene, area);
        for tolerance in &tolerances {
            page.scene.dashes(&[plot.at(x.low, *tolerance), plot.at(x.high, *tolerance)], Ink::Muted, THIN);
        }
        if let Some(errors) = authors(name) {
            let at: Vec<Coord> = AUTHORS_N.iter().zip(errors).map(|(n, error)| plot.at(*n as f64, error)).collect();
            line(&mut page.scene, AUTHORS_SERIES, &at);
        }
        for (i, device) in devices.iter().enumerate().rev() {
            own(&mut page.scene, &plot, i, learned, name, device);
        }
        page.y = area.bottom();
    }
    let source = "Authors: Dao et al. 2019, arXiv:1903.05895; learning_transforms/rmse.pkl of \
                  github.com/HazyResearch/butterfly.";
    let mut notes = vec![];
    if !tolerances.is_empty() {
        // Without it, errors near the tolerance read as the lowest that can be reached.
        notes.push("A run of bfly stops once it is well within its tolerance, so lower errors are not sought.".into());
    }
    if !published.is_empty() {
        notes.push(source.into());
    }
    Ok(Figure { name: "rmse".into(), scene: page.finish(&notes) })
}

/// Draws every seed of a transform on device `i`, and their median over each size.
fn own(scene: &mut Scene, plot: &Axes, i: usize, learned: &Learned, transform: &str, device: &str) {
    let ink = Ink::Series(series(i));
    // Devices that share a panel have their dots on different sides of the markers.
    let shift = if i.is_multiple_of(2) { SAMPLE_SHIFT } else { -SAMPLE_SHIFT };
    let mut medians = vec![];
    for (n, seeds) in learned.seeds(transform, device) {
        let errors: Vec<f64> = seeds.iter().map(|run| run.rmse).collect();
        for error in &errors {
            let (x, y) = plot.at(n as f64, *error);
            scene.dot((x + shift, y), SAMPLE, ink);
        }
        medians.extend(median(&errors).map(|error| plot.at(n as f64, error)));
    }
    line(scene, series(i), &medians);
}

fn line(scene: &mut Scene, series: usize, points: &[Coord]) {
    scene.series(series, points);
    points.iter().for_each(|at| scene.marker(series, *at));
}

/// Returns the series of device `i`.
fn series(i: usize) -> usize {
    if i < AUTHORS_SERIES {
        i
    } else {
        i + 1
    }
}

/// Returns the errors that the authors published of a transform.
fn authors(transform: &str) -> Option<[f64; 8]> {
    AUTHORS.iter().find(|(name, _)| *name == transform).map(|(_, errors)| *errors)
}

/// Returns the tolerances of all runs.
fn tolerances(learned: &Learned) -> Vec<f64> {
    let mut found: Vec<f64> = vec![];
    for tolerance in learned.runs.iter().filter_map(|run| run.settings["tolerance"].as_f64()) {
        if tolerance > 0.0 && !found.contains(&tolerance) {
            found.push(tolerance);
        }
    }
    found
}
