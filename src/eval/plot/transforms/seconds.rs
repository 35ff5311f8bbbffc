//! Figure of the seconds that a seed takes by size, a line per transform and a panel per device.

use super::{sizes, Learned};
use crate::error::{Error, Result};
use crate::eval::plot::page::{LegendEntry, Page, CONTENT};
use crate::eval::plot::panel::{grid, Panel};
use crate::eval::plot::scale::Scale;
use crate::eval::plot::scene::Coord;
use crate::eval::plot::theme::{Ink, MARGIN};
use crate::eval::plot::Figure;
use crate::eval::report::SweepRun;
use crate::stats::median;
use std::collections::BTreeSet;

/// Height of a panel.
const HEIGHT: f64 = 340.0;

/// Median seconds of the seeds of a size, and whether any of them is within the tolerance.
struct Point {
    n: usize,
    seconds: f64,
    found: bool,
}

/// Points of every transform, with the transform's series.
type Lines = Vec<(usize, Vec<Point>)>;

fn points(learned: &Learned, transform: &str, device: &str) -> Vec<Point> {
    let seeds = learned.seeds(transform, device).into_iter();
    let point = |(n, seeds): (usize, Vec<&SweepRun>)| {
        let seconds = median(&seeds.iter().map(|run| run.seconds).collect::<Vec<_>>())?;
        Some(Point { n, seconds, found: seeds.iter().any(|run| run.converged) })
    };
    seeds.filter_map(point).collect()
}

/// Draws the figure.
///
/// # Errors
/// Sweeps without seconds.
pub fn figure(learned: &Learned) -> Result<Figure> {
    let (transforms, devices) = (learned.transforms(), learned.devices());
    let lines = |device: &str| -> Lines {
        transforms.iter().map(|(i, transform)| (*i, points(learned, transform, device))).collect()
    };
    let panels: Vec<(&str, Lines)> = devices.iter().map(|d| (*d, lines(d))).collect();
    let every = || panels.iter().flat_map(|(_, lines)| lines).flat_map(|(_, points)| points);
    let mut keys: Vec<LegendEntry> =
        transforms.iter().map(|(i, name)| LegendEntry::Series(*i, (*name).into())).collect();
    if every().any(|point| !point.found) {
        keys.push(LegendEntry::Faint("hollow: no seed within the tolerance".into()));
    }
    let about = ["Seconds of a seed with all its starts, median over seeds".into(), learned.about()];
    let mut page = Page::new("Time to learn a transform, by size", &about, &keys);
    let x = sizes(&every().map(|point| point.n).collect::<BTreeSet<_>>());
    let y = Scale::log(every().map(|point| point.seconds));
    let y = y.ok_or_else(|| Error::format("sweeps", "hold no seconds"))?;
    for (area, (device, lines)) in grid(panels.len(), 2, (MARGIN, CONTENT), page.y, HEIGHT).into_iter().zip(&panels) {
        let title = format!("Seconds of a seed on {device}");
        let panel = Panel { title: &title, x: &x, x_name: "N", y: &y, shaded_from: None, crosses: None };
        let plot = panel.draw(&mut page.scene, area);
        let place = |point: &Point| plot.at(point.n as f64, point.seconds);
        for (i, points) in lines.iter().rev() {
            let at: Vec<Coord> = points.iter().map(place).collect();
            page.scene.series(*i, &at);
            for (point, at) in points.iter().zip(at) {
                match point.found {
                    true => page.scene.marker(*i, at),
                    false => page.scene.hollow(*i, at, Ink::Series(*i)),
                }
            }
        }
        page.y = area.bottom();
    }
    Ok(Figure { name: "seconds".into(), scene: page.finish(&[]) })
}
