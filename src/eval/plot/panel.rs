//! Panels: a plot with a title, two axes with their labels, and the region beyond the trained length shaded.

use super::axis::{draw as draw_axes, Axis};
use super::scale::Scale;
use super::scene::{Anchor, Area, Coord, Scene};
use super::text::shorten;
use super::theme::{Ink, PANEL, THIN, TICK};
use crate::eval::report::Estimate;

/// Room left of the plot for its labels.
const LABELS: f64 = 46.0;
/// Room above the plot for the title.
const TITLE: f64 = 24.0;
/// Room below the plot for its labels and the name of the horizontal axis.
const FOOT: f64 = 34.0;

/// Specification of a panel.
pub struct Panel<'a> {
    /// Quantity and unit of the vertical axis.
    pub title: &'a str,
    /// Scale of the horizontal axis.
    pub x: &'a Scale,
    /// Quantity and unit of the horizontal axis.
    pub x_name: &'a str,
    /// Scale of the vertical axis.
    pub y: &'a Scale,
    /// Value of the horizontal axis from which the panel is shaded.
    pub shaded_from: Option<f64>,
    /// Height of the rows of crosses above the plot, for a panel with such rows; the shade covers them too, without an
    /// edge line.
    pub crosses: Option<f64>,
}

/// Area and axes of a drawn panel.
pub struct Axes {
    /// Area inside the axes.
    pub area: Area,
    /// Horizontal axis.
    pub x: Axis,
    /// Vertical axis.
    pub y: Axis,
}

/// Returns the area inside the axes of a panel that occupies `area`, with rows of crosses of height `crosses` above it.
pub fn plot_area(area: Area, crosses: f64) -> Area {
    let top = area.y + TITLE + crosses;
    Area { x: area.x + LABELS, y: top, w: area.w - LABELS, h: area.bottom() - FOOT - top }
}

impl Panel<'_> {
    /// Draws title, shade and axes, and a line at zero where a linear vertical axis has values of both signs.
    pub fn draw(&self, scene: &mut Scene, area: Area) -> Axes {
        scene.text((area.x, area.y + 8.0), Anchor::Start, PANEL, shorten(self.title, PANEL, area.w));
        let plot = plot_area(area, self.crosses.unwrap_or(0.0));
        let (x, y) = (self.x.on(plot.x, plot.right()), self.y.on(plot.bottom(), plot.y));
        if let Some(from) = self.shaded_from.filter(|from| *from < self.x.high) {
            let from = x.at(from.max(self.x.low));
            let top = if self.crosses.is_some() { area.y + TITLE - 4.0 } else { plot.y };
            scene.rect(Area { x: from, y: top, w: plot.right() - from, h: plot.bottom() - top }, Ink::Shade);
            if self.crosses.is_none() {
                scene.line((from, plot.y), (from, plot.bottom()), Ink::Axis, THIN);
            }
        }
        draw_axes(scene, plot, (&x, &self.x.ticks), (&y, &self.y.ticks));
        scene.text((plot.x + plot.w / 2.0, plot.bottom() + 27.0), Anchor::Middle, TICK, self.x_name);
        if !self.y.log && self.y.low < 0.0 && self.y.high > 0.0 {
            scene.line((plot.x, y.at(0.0)), (plot.right(), y.at(0.0)), Ink::Axis, THIN);
        }
        Axes { area: plot, x, y }
    }
}

impl Axes {
    /// Returns the place of the point `x`, `y`, clamped to the axes.
    pub fn at(&self, x: f64, y: f64) -> Coord {
        // Clamping also keeps the logarithm of 0 finite.
        let place = |axis: &Axis, v: f64| axis.at(v.clamp(axis.low.min(axis.high), axis.high.max(axis.low)));
        (place(&self.x, x), place(&self.y, y))
    }

    /// Draws the interval of `estimate` at `x`, moved right by `shift`; nothing for an estimate without an interval.
    pub fn interval(&self, scene: &mut Scene, x: f64, shift: f64, estimate: &Estimate, ink: Ink) {
        if let (Some(low), Some(high)) = (estimate.low, estimate.high) {
            let (a, b) = (self.at(x, low), self.at(x, high));
            scene.whisker((a.0 + shift, a.1), (b.0 + shift, b.1), ink);
        }
    }
}

/// Returns the areas of `count` panels, `columns` per row, from `top` down; each row has height `h`.
pub fn grid(count: usize, columns: usize, (left, width): (f64, f64), top: f64, h: f64) -> Vec<Area> {
    const GAP: (f64, f64) = (24.0, 18.0);
    let columns = columns.clamp(1, count.max(1));
    let w = (width - GAP.0 * (columns - 1) as f64) / columns as f64;
    let place = |i: usize| ((i % columns) as f64, (i / columns) as f64);
    let area = |(column, row): (f64, f64)| Area { x: left + column * (w + GAP.0), y: top + row * (h + GAP.1), w, h };
    (0..count).map(place).map(area).collect()
}
