//! Panel of lines over contexts on logarithmic axes, with failed runs as crosses above the plot.

use super::series::Line;
use crate::eval::plot::axis::brief;
use crate::eval::plot::panel::{plot_area, Axes, Panel};
use crate::eval::plot::scale::Scale;
use crate::eval::plot::scene::{Anchor, Area, Scene};
use crate::eval::plot::text::{shorten, text_width};
use crate::eval::plot::theme::{Ink, HAIR, LABEL, SAMPLE, SAMPLE_SHIFT, THIN, TICK};

/// Specification of a panel of lines.
pub struct LinePanel<'a> {
    /// Quantity and unit.
    pub title: &'a str,
    /// Lines of the panel, most important first.
    pub lines: &'a [Line],
    /// Lines that determine the range of the vertical axis: those of this panel, and those of panels with the same
    /// axis.
    pub scale: &'a [Line],
    /// Seconds or bytes per unit of the title.
    pub unit: f64,
    /// Every context of the ladder, so that panels of one figure share their horizontal axis.
    pub contexts: &'a [usize],
    /// Trained length, beyond which the panel is shaded.
    pub trained: usize,
    /// Value and name of a horizontal reference line.
    pub reference: Option<(f64, String)>,
    /// Whether each line's last value is written at its end.
    pub label_ends: bool,
}

/// Height of a row of crosses.
const ROW: f64 = 15.0;

/// Draws `lines` in a panel.
pub fn draw(scene: &mut Scene, area: Area, lines: &LinePanel) {
    let head = ROW * lines.lines.iter().filter(|l| !l.missed.is_empty()).count() as f64;
    let points = || lines.scale.iter().flat_map(|l| &l.points);
    let values = points().flat_map(|p| p.samples.iter().copied().chain(p.p95).chain([p.value]));
    // A margin of one half leaves room for the name above the reference line.
    let reference = lines.reference.iter().filter(|_| points().count() > 0).flat_map(|(v, _)| [*v, v * 1.5]);
    let y = Scale::log(values.chain(reference).map(|v| v / lines.unit));
    let shaded = lines.contexts.iter().any(|c| *c > lines.trained);
    let none = Scale { low: 0.1, high: 10.0, log: true, ticks: vec![] };
    let panel = Panel {
        title: lines.title,
        x: &x_scale(lines, plot_area(area, head).w),
        x_name: "context, tokens",
        y: y.as_ref().unwrap_or(&none),
        shaded_from: shaded.then_some(lines.trained.max(1) as f64),
        crosses: Some(head),
    };
    let plot = panel.draw(scene, area);
    if y.is_none() {
        let middle = (plot.area.x + plot.area.w / 2.0, plot.area.y + plot.area.h / 2.0);
        scene.text_on(Ink::Paper, middle, Anchor::Middle, TICK, "not reported by any run");
        return crosses(scene, lines.lines, &plot, area.y + 24.0);
    }
    let at = |ctx: usize, v: f64| plot.at(ctx as f64, v / lines.unit);
    if let Some((value, name)) = &lines.reference {
        let y = plot.y.at(value / lines.unit);
        scene.line((plot.area.x, y), (plot.area.right(), y), Ink::Axis, THIN);
        let behind = if shaded { Ink::Shade } else { Ink::Paper };
        scene.text_on(behind, (plot.area.right() - 6.0, y - 8.0), Anchor::End, TICK, name);
    }
    // The first line is the most important one: drawn last, so on top.
    for line in lines.lines.iter().rev() {
        curve(scene, line, &at);
    }
    if lines.label_ends {
        let last = lines.lines.iter().filter_map(|l| l.points.last().zip(end_label(l, lines.unit)));
        label_ends(scene, last.map(|(p, text)| (at(p.ctx, p.value), text)).collect(), plot.area);
    }
    crosses(scene, lines.lines, &plot, area.y + 24.0);
}

/// Formats a line's last value with its name, such as `0.106× end-to-end time`.
fn end_label(line: &Line, unit: f64) -> Option<String> {
    line.points.last().map(|p| format!("{}× {}", brief(p.value / unit), line.label))
}

/// Distance of a label from its point.
const BESIDE: f64 = SAMPLE_SHIFT + 6.0;

/// Draws the texts of `ends` right of their points, moved apart where they would touch.
fn label_ends(scene: &mut Scene, mut ends: Vec<((f64, f64), String)>, plot: Area) {
    const APART: f64 = 1.3;
    ends.sort_by(|a, b| a.0 .1.total_cmp(&b.0 .1));
    let step = LABEL.size * APART;
    // First down from the top, then up from the bottom, so that no label leaves the plot.
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

/// Returns the scale of contexts, with room on the right for the labels at line ends; the plot is `width` wide.
fn x_scale(lines: &LinePanel, width: f64) -> Scale {
    let mut scale = Scale::contexts(lines.contexts);
    for line in lines.lines.iter().filter(|_| lines.label_ends) {
        if let (Some(last), Some(label)) = (line.points.last(), end_label(line, lines.unit)) {
            let share = 1.0 - (BESIDE + text_width(&label, LABEL) + 6.0) / width;
            scale.high = scale.high.max(scale.low * (last.ctx as f64 / scale.low).powf(1.0 / share));
        }
    }
    scale
}

/// Draws one line: medians joined where no run between them failed, 95th percentiles dashed, every sample a dot.
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

/// Draws a row of crosses for each line with failed runs, from `top` down, with the line's name where there is room.
fn crosses(scene: &mut Scene, lines: &[Line], plot: &Axes, top: f64) {
    let missing = lines.iter().filter(|l| !l.missed.is_empty());
    for (row, line) in missing.enumerate() {
        let y = top + ROW * (row as f64 + 0.5);
        let at: Vec<f64> = line.missed.iter().map(|c| plot.x.at(*c as f64)).collect();
        for x in &at {
            scene.cross(Ink::Series(line.style), (*x, y));
        }
        let (first, last) = (at[0] - 9.0, at[at.len() - 1] + 9.0);
        let (before, after) = (first - plot.area.x, plot.area.right() - last);
        let (x, anchor) = if before >= after { (first, Anchor::End) } else { (last, Anchor::Start) };
        if before.max(after) > 60.0 {
            scene.text((x, y), anchor, LABEL, shorten(&line.label, LABEL, before.max(after)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::plot::scene::Shape;

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
