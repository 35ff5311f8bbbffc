//! Kernels against the machine's ceilings: a roofline, and each case's share of its binding ceiling.
//!
//! Cases are numbered; the bars serve as the legend of the roofline.

use super::axis::brief;
use super::labels::{along, around, beside};
use super::page::{Page, CONTENT};
use super::panel::Panel;
use super::scale::Scale;
use super::scene::{Anchor, Area, Scene};
use super::text::{shorten, text_area, text_width};
use super::theme::{FontSpec, Ink, HAIR, LABEL, LINE, MARGIN, MARKER, PANEL, THIN, TICK};
use super::Figure;
use crate::error::{Error, Result};
use crate::eval::report::{median, Ceilings, KernelRun, Kernels};
use std::path::Path;

/// One case with its share of the binding ceiling.
#[derive(Debug, Clone, PartialEq)]
struct Case {
    /// Kernel and case.
    name: String,
    /// Element type and sizes.
    detail: String,
    /// Element type alone.
    dtype: String,
    /// Index of the kernel's colour.
    style: usize,
    /// Arithmetic intensity in FLOP per byte.
    intensity: f64,
    /// Throughput at the median time, in TFLOP/s.
    tflop_s: f64,
    /// Share of the ceiling at the median time.
    share: f64,
    /// Share of the ceiling at the slowest sample.
    slowest: f64,
    /// Share of the ceiling at the fastest sample.
    fastest: f64,
    /// Rate at the median time, in the unit of the ceiling.
    reached: String,
}

/// Returns the roof at an arithmetic intensity, in TFLOP/s.
fn roof(c: &Ceilings, intensity: f64) -> f64 {
    c.matmul_tflop_s.min(intensity * c.copy_gb_s / 1e3)
}

impl Case {
    fn of(run: &KernelRun, style: usize, c: &Ceilings) -> Option<Self> {
        let seconds = median(&run.samples_s).filter(|s| *s > 0.0)?;
        let intensity = run.flop / run.bytes;
        let share = |s: f64| run.share_of_ceiling(c, s);
        let reached = match run.bound_by_copy(c) {
            true => format!("{} GB/s", brief(run.bytes / seconds / 1e9)),
            false => format!("{} TFLOP/s", brief(run.flop / seconds / 1e12)),
        };
        let shape: Vec<String> = run.shape.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let ends = |f: fn(f64, f64) -> f64| run.samples_s.iter().copied().reduce(f).map_or(0.0, share);
        Some(Self {
            name: format!("{} · {}", run.kernel, run.case),
            detail: format!("{} {}", run.dtype, shape.join(" ")),
            dtype: run.dtype.clone(),
            style,
            intensity,
            tflop_s: run.flop / seconds / 1e12,
            share: share(seconds),
            slowest: ends(f64::max),
            fastest: ends(f64::min),
            reached,
        })
    }
}

/// Draws the figure of the report read from `path`.
///
/// # Errors
/// A report without kernels, or with numbers that are not positive.
pub fn figures(report: &Kernels, path: &Path) -> Result<Vec<Figure>> {
    let fail = |message: String| Err(Error::format(path.display(), message));
    let c = &report.ceilings;
    let usable = |v: f64| v.is_finite() && v > 0.0;
    if report.kernels.is_empty() {
        return fail("is a report without kernels".into());
    }
    if !usable(c.copy_gb_s) || !usable(c.matmul_tflop_s) {
        return fail("has a ceiling that is not above 0".into());
    }
    let mut names: Vec<&str> = vec![];
    let mut cases = vec![];
    for run in &report.kernels {
        let style = names.iter().position(|n| *n == run.kernel).unwrap_or_else(|| {
            names.push(&run.kernel);
            names.len() - 1
        });
        let what = format!("{} ({})", run.kernel, run.case);
        if !(usable(run.bytes) && run.flop.is_finite() && run.flop >= 0.0) {
            return fail(format!("{what} has no bytes, or a negative FLOP count"));
        }
        if run.samples_s.iter().any(|s| !usable(*s)) {
            return fail(format!("{what} has a sample that is not above 0 seconds"));
        }
        match Case::of(run, style, c) {
            Some(case) => cases.push(case),
            None => return fail(format!("{what} has no samples")),
        }
    }
    Ok(vec![Figure { name: "roofline".into(), scene: scene(report, &cases) }])
}

/// Height of a bar with its name.
const ROW: f64 = 33.0;

fn scene(report: &Kernels, cases: &[Case]) -> Scene {
    let c = &report.ceilings;
    let what = format!("{} · medians; whiskers from the slowest to the fastest launch", report.machine.device);
    let ceilings = format!(
        "Ceilings measured in the same process: copy {} GB/s, matmul {} TFLOP/s ({}, {size} × {size})",
        brief(c.copy_gb_s),
        brief(c.matmul_tflop_s),
        c.matmul_dtype,
        size = c.matmul_size
    );
    let mut page = Page::new("Kernels against the machine's own ceilings", &[what, ceilings], &[]);
    let gap = 28.0;
    let w = (CONTENT - gap) * 0.44;
    let h = (44.0 + ROW * cases.len() as f64).max(360.0);
    let left = Area { x: MARGIN, y: page.y, w, h: h.min(460.0) };
    roofline(&mut page.scene, left, c, cases);
    shares(&mut page.scene, Area { x: MARGIN + w + gap, y: page.y, w: CONTENT - gap - w, h }, cases);
    page.y += h;
    let none: Vec<String> = (1..).zip(cases).filter(|(_, c)| c.intensity == 0.0).map(|(i, _)| i.to_string()).collect();
    let note = format!("Without floating-point work, and so not on the roofline: {}.", none.join(", "));
    page.finish(&if none.is_empty() { vec![] } else { vec![note] })
}

fn roofline(scene: &mut Scene, area: Area, c: &Ceilings, cases: &[Case]) {
    let drawn = || cases.iter().filter(|c| c.intensity > 0.0);
    let ridge = c.matmul_tflop_s * 1e3 / c.copy_gb_s;
    let xs = Scale::log(drawn().map(|c| c.intensity).chain([ridge / 4.0, ridge * 4.0]));
    let ys = Scale::log(drawn().map(|c| c.tflop_s).chain([c.matmul_tflop_s / 20.0, c.matmul_tflop_s * 1.5]));
    let (Some(x), Some(y)) = (xs, ys) else { return };
    let panel = Panel {
        title: "Roofline, TFLOP/s",
        x: &x,
        x_name: "arithmetic intensity, FLOP per byte",
        y: &y,
        shaded_from: None,
        crosses: None,
    };
    let drawn = panel.draw(scene, area);
    let (plot, at) = (drawn.area, |intensity: f64, rate: f64| drawn.at(intensity, rate));

    let start = x.low.max(y.low * 1e3 / c.copy_gb_s);
    let corners = [start, ridge, x.high].map(|i| at(i, roof(c, i)));
    scene.path(corners.to_vec(), Ink::Text, LINE);
    let matmul = format!("matmul {} TFLOP/s", brief(c.matmul_tflop_s));
    scene.text_on(Ink::Paper, (plot.right() - 4.0, corners[2].1 - 9.0), Anchor::End, TICK, &matmul);
    let copy = format!("copy {} GB/s", brief(c.copy_gb_s));
    let at_share =
        |k: f64| (corners[0].0 + (corners[1].0 - corners[0].0) * k, corners[0].1 + (corners[1].1 - corners[0].1) * k);
    // The numbers of cases must not overlap the roof or its labels.
    let mut taken: Vec<Area> = along(corners[0], corners[1]).collect();
    taken.push(Area { x: corners[1].0, y: corners[1].1 - 16.0, w: plot.right() - corners[1].0, h: 18.0 });
    let left_of = |k: f64| (at_share(k).0 - 10.0, at_share(k).1);
    let fits = |at: &(f64, f64)| at.0 - text_width(&copy, TICK) > plot.x + 4.0 && at.1 > corners[1].1 + 8.0;
    if let Some(at) = [0.5, 0.6, 0.7, 0.8, 0.9].map(left_of).into_iter().find(fits) {
        taken.push(text_area(at, Anchor::End, TICK, &copy));
        scene.text_on(Ink::Paper, at, Anchor::End, TICK, &copy);
    }
    let marks: Vec<(usize, (f64, f64))> =
        (0..).zip(cases).filter(|(_, c)| c.intensity > 0.0).map(|(i, c)| (i, at(c.intensity, c.tflop_s))).collect();
    for (i, place) in &marks {
        scene.marker(cases[*i].style, *place);
        taken.push(around(*place));
    }
    for (i, place) in marks {
        beside(scene, &mut taken, plot, place, &(i + 1).to_string());
    }
}

fn shares(scene: &mut Scene, area: Area, cases: &[Case]) {
    scene.text((area.x, area.y + 8.0), Anchor::Start, PANEL, "Share of the ceiling that applies");
    let most = cases.iter().map(|c| c.fastest).fold(1.0, f64::max);
    let plot = Area { x: area.x, y: area.y + 24.0, w: area.w - 128.0, h: ROW * cases.len() as f64 };
    let x = |share: f64| plot.x + plot.w * share / most;
    for percent in [0, 25, 50, 75, 100] {
        let at = x(f64::from(percent) / 100.0);
        let ink = if percent == 0 || percent == 100 { Ink::Axis } else { Ink::Grid };
        for row in 0..cases.len() {
            let top = plot.y + ROW * row as f64 + 16.0;
            scene.line((at, top), (at, top + 14.0), ink, HAIR);
        }
        scene.text((at, plot.bottom() + 8.0), Anchor::Middle, TICK, format!("{percent}%"));
    }
    for (row, case) in cases.iter().enumerate() {
        let y = plot.y + ROW * row as f64;
        let number = format!("{}", row + 1);
        scene.marker(case.style, (plot.x + MARKER + 1.0, y + 8.0));
        let name = FontSpec { bold: true, ..LABEL };
        let mut at = plot.x + 15.0;
        for (text, kind) in [(&number, name), (&case.name, LABEL)] {
            let text = shorten(text, kind, area.right() - at);
            scene.text((at, y + 8.0), Anchor::Start, kind, &text);
            at += text_width(&text, kind) + 7.0;
        }
        // Type and shape where there is room for both, else the type alone; never cut within a number.
        let fits = |text: &&String| at + text_width(text, TICK) <= area.right();
        if let Some(text) = [&case.detail, &case.dtype].into_iter().find(fits) {
            scene.text((at, y + 8.0), Anchor::Start, TICK, text);
        }
        let bar = Area { x: plot.x, y: y + 18.0, w: x(case.share) - plot.x, h: 10.0 };
        scene.rect(bar, Ink::Series(case.style));
        let middle = bar.y + bar.h / 2.0;
        // Outlined in the paper's colour, to be visible on dark bars too.
        for (ink, width, cap) in [(Ink::Paper, 3.0 * THIN, 4.0), (Ink::Text, THIN, 3.0)] {
            scene.line((x(case.slowest), middle), (x(case.fastest), middle), ink, width);
            for end in [case.slowest, case.fastest] {
                scene.line((x(end), middle - cap), (x(end), middle + cap), ink, width);
            }
        }
        let percent = format!("{:.0}%, {}", 100.0 * case.share, case.reached);
        scene.text((area.right(), middle), Anchor::End, LABEL, percent);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn ceilings() -> Ceilings {
        Ceilings {
            copy_s: vec![],
            copy_bytes: 0,
            copy_gb_s: 1000.0,
            matmul_s: vec![],
            matmul_size: 8192,
            matmul_dtype: "bf16".into(),
            matmul_tflop_s: 100.0,
        }
    }

    fn run(flop: f64, bytes: f64, samples_s: &[f64]) -> KernelRun {
        KernelRun {
            kernel: "k".into(),
            case: "c".into(),
            dtype: "bf16".into(),
            shape: BTreeMap::new(),
            flop,
            bytes,
            samples_s: samples_s.into(),
            tflop_s: 0.0,
            gb_s: 0.0,
        }
    }

    #[test]
    fn a_case_has_its_share_of_the_binding_ceiling() {
        let c = ceilings();
        // The ridge is at 100 FLOP per byte.
        assert_eq!([50.0, 100.0, 200.0].map(|i| roof(&c, i)), [50.0, 100.0, 100.0]);
        // 10 GB in 20 ms is 500 GB/s of 1000.
        let memory = Case::of(&run(1e11, 1e10, &[0.02, 0.04, 0.01]), 0, &c).unwrap();
        assert_eq!((memory.share, memory.slowest, memory.fastest), (0.5, 0.25, 1.0));
        assert_eq!((memory.intensity, memory.reached.as_str()), (10.0, "500 GB/s"));
        // 4 TFLOP in 50 ms is 80 TFLOP/s of 100.
        let compute = Case::of(&run(4e12, 1e10, &[0.05]), 0, &c).unwrap();
        assert_eq!((compute.share, compute.tflop_s, compute.reached.as_str()), (0.8, 80.0, "80.0 TFLOP/s"));
        assert_eq!(Case::of(&run(1.0, 1.0, &[]), 0, &c), None);
    }
}
