//! One panel of a ladder: lines over contexts on logarithmic axes, the runs that did not end well above them.

use super::axis::{brief, draw as draw_axes, nice_range, ticks, tokens, Axis, Tick};
use super::scene::{shorten, text_width, Anchor, Area, Scene};
use super::series::Line;
use super::theme::{Ink, HAIR, LABEL, PANEL, SAMPLE, SAMPLE_SHIFT, THIN, TICK};

/// What a panel shows.
pub struct Panel<'a> {
    /// Quantity and unit.
    pub title: &'a str,
    /// Its lines, in drawing order.
    pub lines: &'a [Line],
    /// Lines whose values the vertical axis holds: those above, or also another panel's that is to be compared.
    pub scale: &'a [Line],
    /// A value is divided by it: seconds or bytes to the title's unit.
    pub unit: f64,
    /// Every context of the ladder: panels of one figure share their axis.
    pub contexts: &'a [usize],
    /// Shaded from here on.
    pub trained: usize,
    /// A horizontal line with its name.
    pub reference: Option<(f64, String)>,
    /// Write each line's last value beside it.
    pub label_ends: bool,
}

/// Height of a row of crosses.
const ROW: f64 = 15.0;
/// Room left of a plot for its labels.
pub const TICKS: f64 = 46.0;

/// Draws the panel and returns the area of its plot.
pub fn draw(scene: &mut Scene, area: Area, panel: &Panel) -> Area {
    scene.text((area.x, area.y + 8.0), Anchor::Start, PANEL, panel.title);
    let rows = panel.lines.iter().filter(|l| !l.missed.is_empty()).count() as f64;
    let top = area.y + 24.0 + rows * ROW;
    let plot = Area { x: area.x + TICKS, y: top, w: area.w - TICKS, h: area.bottom() - 34.0 - top };
    let x = x_axis(panel, plot);
    let shaded = panel.contexts.iter().any(|c| *c > panel.trained);
    if shaded {
        let from = x.at(panel.trained.max(1) as f64).clamp(plot.x, plot.right());
        scene.rect(
            Area { x: from, y: area.y + 20.0, w: plot.right() - from, h: plot.bottom() - area.y - 20.0 },
            Ink::Shade,
        );
    }
    let x_ticks: Vec<Tick> = panel.contexts.iter().map(|c| Tick { value: *c as f64, label: tokens(*c) }).collect();
    let points = || panel.scale.iter().flat_map(|l| &l.points);
    let values = points().flat_map(|p| p.samples.iter().copied().chain(p.p95).chain([p.value]));
    // Half as much again leaves room for the reference's name above it.
    let reference = panel.reference.iter().filter(|_| points().count() > 0).flat_map(|(v, _)| [*v, v * 1.5]);
    let range = nice_range(values.chain(reference).map(|v| v / panel.unit));
    let (low, high) = range.unwrap_or((0.1, 10.0));
    let y = Axis::log(low, high, plot.bottom(), plot.y);
    draw_axes(scene, plot, (&x, &x_ticks), (&y, &range.map_or(vec![], |_| ticks(low, high))));
    scene.text((plot.x + plot.w / 2.0, plot.bottom() + 27.0), Anchor::Middle, TICK, "context, tokens");
    if range.is_none() {
        let middle = (plot.x + plot.w / 2.0, plot.y + plot.h / 2.0);
        scene.text_on(Ink::Paper, middle, Anchor::Middle, TICK, "not reported by any run");
        missed(scene, panel, &x, plot, area.y + 24.0);
        return plot;
    }
    let at = |ctx: usize, v: f64| (x.at(ctx as f64), y.at(v / panel.unit));
    if let Some((value, name)) = &panel.reference {
        let y = y.at(value / panel.unit);
        scene.line((plot.x, y), (plot.right(), y), Ink::Axis, THIN);
        let behind = if shaded { Ink::Shade } else { Ink::Paper };
        scene.text_on(behind, (plot.right() - 6.0, y - 8.0), Anchor::End, TICK, name);
    }
    // The first line is the one that matters: drawn last, so on top.
    for line in panel.lines.iter().rev() {
        curve(scene, line, &at);
    }
    if panel.label_ends {
        let last = panel.lines.iter().filter_map(|l| l.points.last().zip(end_label(l, panel.unit)));
        label_ends(scene, last.map(|(p, text)| (at(p.ctx, p.value), text)).collect(), plot);
    }
    missed(scene, panel, &x, plot, area.y + 24.0);
    plot
}

/// `0.106× end-to-end time`: a line's last value.
fn end_label(line: &Line, unit: f64) -> Option<String> {
    line.points.last().map(|p| format!("{}× {}", brief(p.value / unit), line.label))
}

/// How far right of its point a label stands.
const BESIDE: f64 = SAMPLE_SHIFT + 6.0;

/// Values beside the last points, moved apart where they would touch.
fn label_ends(scene: &mut Scene, mut ends: Vec<((f64, f64), String)>, plot: Area) {
    const APART: f64 = 1.3;
    ends.sort_by(|a, b| a.0 .1.total_cmp(&b.0 .1));
    let step = LABEL.size * APART;
    // Down from the top, then up from the bottom, so that none leaves the plot.
    for i in 1..ends.len() {
        ends[i].0 .1 = ends[i].0 .1.max(ends[i - 1].0 .1 + step);
    }
    let mut limit = plot.bottom() - step / 2.0;
    for ((x, y), text) in ends.iter_mut().rev() {
        *y = y.min(limit);
        limit = *y - step;
        scene.text((*x + BESIDE, *y), Anchor::Start, LABEL, text.as_str());
    }
}

/// Every context with room on both sides, on the right also for labels.
fn x_axis(panel: &Panel, plot: Area) -> Axis {
    let ends = |i: Option<&usize>| i.map_or(1.0, |c| *c as f64);
    let room = 2f64.powf(0.4);
    let low = ends(panel.contexts.first()) / room;
    let mut high = ends(panel.contexts.last()) * room;
    for line in panel.lines.iter().filter(|_| panel.label_ends) {
        if let (Some(last), Some(label)) = (line.points.last(), end_label(line, panel.unit)) {
            let share = 1.0 - (BESIDE + text_width(&label, LABEL) + 6.0) / plot.w;
            high = high.max(low * (last.ctx as f64 / low).powf(1.0 / share));
        }
    }
    Axis::log(low, high, plot.x, plot.right())
}

/// Medians joined where no run between them is missing, 95th percentiles dashed, every sample a dot.
fn curve(scene: &mut Scene, line: &Line, at: &dyn Fn(usize, f64) -> (f64, f64)) {
    let ink = Ink::Series(line.style);
    for pair in line.points.windows(2) {
        if line.missed.iter().any(|m| (pair[0].ctx..pair[1].ctx).contains(m)) {
            continue;
        }
        scene.series(line.style, &[at(pair[0].ctx, pair[0].value), at(pair[1].ctx, pair[1].value)]);
        if let (Some(a), Some(b)) = (pair[0].p95, pair[1].p95) {
            scene.dashes(&[at(pair[0].ctx, a), at(pair[1].ctx, b)], ink, THIN);
        }
    }
    for point in &line.points {
        for sample in &point.samples {
            let (x, y) = at(point.ctx, *sample);
            scene.dot((x + SAMPLE_SHIFT, y), SAMPLE, ink);
        }
        if let Some(p95) = point.p95 {
            let ((x, y), (_, to)) = (at(point.ctx, point.value), at(point.ctx, p95));
            scene.line((x, y), (x, to), ink, HAIR);
            scene.line((x - 3.5, to), (x + 3.5, to), ink, THIN);
        }
        scene.marker(line.style, at(point.ctx, point.value));
    }
}

/// A row of crosses for each line that misses runs, named where there is room beside them.
fn missed(scene: &mut Scene, panel: &Panel, x: &Axis, plot: Area, top: f64) {
    let missing = panel.lines.iter().filter(|l| !l.missed.is_empty());
    for (row, line) in missing.enumerate() {
        let y = top + ROW * (row as f64 + 0.5);
        let at: Vec<f64> = line.missed.iter().map(|c| x.at(*c as f64)).collect();
        for x in &at {
            scene.cross(Ink::Series(line.style), (*x, y));
        }
        let (first, last) = (at[0] - 9.0, at[at.len() - 1] + 9.0);
        let (before, after) = (first - plot.x, plot.right() - last);
        let (x, anchor) = if before >= after { (first, Anchor::End) } else { (last, Anchor::Start) };
        if before.max(after) > 60.0 {
            scene.text((x, y), anchor, LABEL, shorten(&line.label, LABEL, before.max(after)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::scene::Shape;
    use super::*;

    #[test]
    fn labels_at_the_ends_keep_their_order_apart_and_inside() {
        let plot = Area { x: 0.0, y: 0.0, w: 100.0, h: 100.0 };
        let placed = |ys: [f64; 3]| -> Vec<(String, f64)> {
            let mut scene = Scene::new();
            label_ends(&mut scene, ys.iter().map(|y| ((50.0, *y), y.to_string())).collect(), plot);
            let mut texts: Vec<_> = scene
                .shapes
                .into_iter()
                .map(|s| match s {
                    Shape::Text { at, text, .. } => (text, at.1),
                    other => panic!("{other:?}"),
                })
                .collect();
            texts.sort_by(|a, b| a.1.total_cmp(&b.1));
            texts
        };
        let expect = |ys, wanted: [(&str, f64); 3]| {
            assert_eq!(placed(ys), wanted.map(|(t, y)| (t.to_string(), y)));
        };
        expect([70.0, 20.0, 40.0], [("20", 20.0), ("40", 40.0), ("70", 70.0)]);
        expect([12.0, 10.0, 11.0], [("10", 10.0), ("11", 23.0), ("12", 36.0)]);
        expect([99.0, 98.0, 97.0], [("97", 67.5), ("98", 80.5), ("99", 93.5)]);
    }
}
