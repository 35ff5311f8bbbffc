//! Figure of scores by task: a row per task and one for their mean (two where some tasks use question files), a column
//! per length, a marker with its interval per variant.

use super::cells::Cells;
use super::{share_of, title};
use crate::cli::short_count;
use crate::eval::plot::page::{LegendEntry, Page, CONTENT};
use crate::eval::plot::panel::grid;
use crate::eval::plot::scene::{Anchor, Area, Scene};
use crate::eval::plot::target::target;
use crate::eval::plot::text::{shorten, text_width};
use crate::eval::plot::theme::{Ink, GROUP, HAIR, LABEL, MARGIN, PANEL, THIN, TICK};
use crate::eval::plot::Figure;
use crate::eval::report::{means, Estimate};

/// Maximum number of lengths per row.
const PER_ROW: usize = 4;

/// Draws the figure.
pub fn figure(cells: &Cells) -> Figure {
    let (lengths, tasks, variants) = (cells.lengths(), cells.tasks(), cells.variants());
    let named = |(variant, style): &(&str, usize)| {
        let kv_share = share_of(cells.of(variant, None).map(|c| &c.record));
        let kv_share = kv_share.map_or(String::new(), |h| format!(" · KV {h} of dense"));
        LegendEntry::Marker(*style, format!("{variant}{kv_share}"))
    };
    let mut keys: Vec<LegendEntry> = variants.iter().map(named).collect();
    if cells.cells.iter().any(|c| c.answers.len() > 1) {
        keys.push(LegendEntry::Interval("95% interval of the mean".into()));
    }
    if cells.cells.len() < lengths.len() * tasks.len() * variants.len() {
        keys.push(LegendEntry::Missed("not run".into()));
    }
    let samples = cells.cells.iter().map(|c| c.answers.len());
    let about =
        format!("{}; KV is the most that was allocated at once", cells.prompting_line("task and length", samples));
    let heading = title(&cells.answers.header, "Scores by task, at each length");
    let mut page = Page::new(&heading, &[target(&cells.answers.header), about], &keys);
    let names = tasks.iter().map(|t| text_width(t, LABEL)).fold(30.0, f64::max).min(150.0) + 18.0;
    let row = (8.0 * variants.len() as f64 + 8.0).max(20.0);
    let means = if tasks.len() > 1 { means(&tasks) } else { vec![] };
    let rows = tasks.len() + means.len();
    let height = 24.0 + row * rows as f64 + 34.0;
    let (left, width) = (MARGIN + names, CONTENT - names);
    let areas = grid(lengths.len(), PER_ROW, (left, width), page.y, height);
    for (i, (area, length)) in areas.into_iter().zip(&lengths).enumerate() {
        let beyond = if cells.answers.header.extrapolates(*length) { ", beyond trained" } else { "" };
        let name = format!("{} tokens{beyond}", short_count(*length));
        page.scene.text((area.x, area.y + 8.0), Anchor::Start, PANEL, shorten(&name, PANEL, area.w));
        let plot = Area { x: area.x, y: area.y + 24.0, w: area.w - 8.0, h: row * rows as f64 };
        frame(&mut page.scene, plot, row);
        for (at, task) in tasks.iter().enumerate() {
            let band = Area { y: plot.y + row * at as f64, h: row, ..plot };
            if i % PER_ROW == 0 {
                let middle = (area.x - 16.0, band.y + row / 2.0);
                page.scene.text(middle, Anchor::End, LABEL, shorten(task, LABEL, names - 18.0));
            }
            dots(&mut page.scene, band, variants.iter().map(|(v, s)| (*s, cells.score(v, task, *length))));
        }
        for (at, (name, of)) in (tasks.len()..).zip(&means) {
            let band = Area { y: plot.y + row * at as f64, h: row, ..plot };
            page.scene.line((plot.x, band.y), (plot.right(), band.y), Ink::Axis, THIN);
            if i % PER_ROW == 0 {
                page.scene.text((area.x - 16.0, band.y + row / 2.0), Anchor::End, GROUP, name);
            }
            dots(&mut page.scene, band, variants.iter().map(|(v, s)| (*s, cells.mean_of(of, v, *length))));
        }
        page.y = area.bottom();
    }
    Figure { name: "tasks".into(), scene: page.finish(&[]) }
}

/// Draws grid and labels of one length.
fn frame(scene: &mut Scene, plot: Area, row: f64) {
    for percent in [0, 25, 50, 75, 100] {
        let x = plot.x + plot.w * f64::from(percent) / 100.0;
        let ink = if percent == 0 { Ink::Axis } else { Ink::Grid };
        scene.line((x, plot.y), (x, plot.bottom()), ink, HAIR);
        // More labels would touch in a narrow panel.
        if percent % 50 == 0 {
            scene.text((x, plot.bottom() + 9.0), Anchor::Middle, TICK, percent.to_string());
        }
    }
    let middle = plot.x + plot.w / 2.0;
    scene.text((middle, plot.bottom() + 24.0), Anchor::Middle, TICK, "mean score, %");
    for i in 1..(plot.h / row).round() as usize {
        let y = plot.y + row * i as f64;
        scene.line((plot.x, y), (plot.right(), y), Ink::Grid, HAIR);
    }
}

/// Draws the scores of the variants within a row, one below the other, with a cross left of the axis for a variant
/// without answers.
fn dots(scene: &mut Scene, band: Area, scores: impl ExactSizeIterator<Item = (usize, Option<Estimate>)>) {
    let step = band.h / (scores.len() + 1) as f64;
    for (i, (style, score)) in scores.enumerate() {
        let y = band.y + step * (i + 1) as f64;
        let x = |percent: f64| band.x + band.w * percent / 100.0;
        let Some(score) = score else {
            scene.cross(Ink::Series(style), (band.x - 6.0, y));
            continue;
        };
        if let (Some(low), Some(high)) = (score.low, score.high) {
            scene.whisker((x(low), y), (x(high), y), Ink::Series(style));
        }
        scene.marker(style, (x(score.mean), y));
    }
}
