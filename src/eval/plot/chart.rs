//! One panel of anything against anything: a title, two axes, what lies beyond the trained length shaded.

use super::axis::{draw as draw_axes, Axis};
use super::panel::TICKS;
use super::scale::Scale;
use super::scene::{shorten, Anchor, Area, At, Scene};
use super::theme::{Ink, PANEL, THIN, TICK};
use crate::eval::report::Estimate;

/// A panel before anything is drawn in it.
pub struct Chart<'a> {
    /// Quantity and unit.
    pub title: &'a str,
    /// The horizontal axis,
    pub x: &'a Scale,
    /// and what it is.
    pub x_name: &'a str,
    /// The vertical axis.
    pub y: &'a Scale,
    /// Shaded from here on.
    pub shaded_from: Option<f64>,
}

/// Where things lie in a panel.
pub struct Plot {
    /// Inside the axes.
    pub area: Area,
    x: Axis,
    y: Axis,
}

impl Chart<'_> {
    /// Draws title and axes, and a line at zero where the vertical axis has values on both sides of it.
    pub fn draw(&self, scene: &mut Scene, area: Area) -> Plot {
        scene.text((area.x, area.y + 8.0), Anchor::Start, PANEL, shorten(self.title, PANEL, area.w));
        let top = area.y + 24.0;
        let plot = Area { x: area.x + TICKS, y: top, w: area.w - TICKS, h: area.bottom() - 34.0 - top };
        let (x, y) = (self.x.on(plot.x, plot.right()), self.y.on(plot.bottom(), plot.y));
        if let Some(from) = self.shaded_from.filter(|from| *from < self.x.high) {
            let from = x.at(from.max(self.x.low));
            scene.rect(Area { x: from, y: plot.y, w: plot.right() - from, h: plot.h }, Ink::Shade);
            scene.line((from, plot.y), (from, plot.bottom()), Ink::Axis, THIN);
        }
        draw_axes(scene, plot, (&x, &self.x.ticks), (&y, &self.y.ticks));
        scene.text((plot.x + plot.w / 2.0, plot.bottom() + 27.0), Anchor::Middle, TICK, self.x_name);
        if !self.y.log && self.y.low < 0.0 && self.y.high > 0.0 {
            scene.line((plot.x, y.at(0.0)), (plot.right(), y.at(0.0)), Ink::Axis, THIN);
        }
        Plot { area: plot, x, y }
    }
}

impl Plot {
    /// Where `x`, `y` lies; what is beyond the axes, at their ends.
    pub fn at(&self, x: f64, y: f64) -> At {
        // A logarithm of nothing would be no place at all.
        let place = |axis: &Axis, v: f64| axis.at(v.clamp(axis.low.min(axis.high), axis.high.max(axis.low)));
        (place(&self.x, x), place(&self.y, y))
    }

    /// The interval of `estimate` at `x`, moved right by `shift`; nothing where it has none.
    pub fn interval(&self, scene: &mut Scene, x: f64, shift: f64, estimate: &Estimate, ink: Ink) {
        if let (Some(low), Some(high)) = (estimate.low, estimate.high) {
            let (a, b) = (self.at(x, low), self.at(x, high));
            scene.whisker((a.0 + shift, a.1), (b.0 + shift, b.1), ink);
        }
    }
}

/// Areas for `count` panels, `columns` to a row, from `top` down; each row's height is `h`.
pub fn grid(count: usize, columns: usize, (left, width): (f64, f64), top: f64, h: f64) -> Vec<Area> {
    const GAP: (f64, f64) = (24.0, 18.0);
    let columns = columns.clamp(1, count.max(1));
    let w = (width - GAP.0 * (columns - 1) as f64) / columns as f64;
    let place = |i: usize| ((i % columns) as f64, (i / columns) as f64);
    let area = |(column, row): (f64, f64)| Area { x: left + column * (w + GAP.0), y: top + row * (h + GAP.1), w, h };
    (0..count).map(place).map(area).collect()
}
