//! Figure of the mean score against the bytes of the KV cache.

use super::cells::Cells;
use super::{family, recalls, title, KEPT};
use crate::cli::short_count;
use crate::eval::plot::page::{LegendEntry, Page, CONTENT};
use crate::eval::plot::panel::{grid, Panel};
use crate::eval::plot::scale::Scale;
use crate::eval::plot::target::target;
use crate::eval::plot::theme::{Ink, MARGIN, SERIES, THIN};
use crate::eval::plot::Figure;
use crate::eval::report::{Estimate, VariantRecord};
use std::path::Path;

/// A variant at one length.
struct Point<'a> {
    variant: &'a str,
    style: usize,
    length: usize,
    /// Peak bytes of the cache, as a share of a dense cache.
    share: f64,
    /// Bytes of the cache after eviction, as a share of a dense cache, where they are below the peak.
    evicted: Option<f64>,
    score: Estimate,
}

/// Draws the figure; `None` where no variant answered every task at any length.
pub fn figure(cells: &Cells) -> Option<Figure> {
    let mut points = vec![];
    let mut families: Vec<(String, usize)> = vec![];
    let mut left_out = vec![];
    let most = cells.cells.iter().filter_map(|c| c.record.plan.as_ref()).map(|p| p.layers.len()).max().unwrap_or(0);
    let recall = cells.cells.iter().any(|c| recalls(&c.record));
    let set_of = |record: &VariantRecord, variant| (recalls(record), plans(variant));
    let mut sets: Vec<(bool, Option<&str>)> = vec![];
    for cell in cells.cells.iter().filter(|c| family(&c.record, most, recall).1 == KEPT) {
        let set = set_of(&cell.record, &cell.record.variant);
        if !sets.contains(&set) {
            sets.push(set);
        }
    }
    for length in cells.lengths() {
        for (variant, _) in cells.variants() {
            let Some(record) = cells.record(variant, length) else { continue };
            let share = record.share_of_dense();
            let Some(score) = cells.mean(variant, length).filter(|_| share.is_finite() && share > 0.0) else {
                left_out.push(format!("{variant} at {}", short_count(length)));
                continue;
            };
            let (mut family, mut style) = family(record, most, recall);
            // Each folder of plans is one way of choosing layers, shown as its own method, and so is exact recall in some.
            let own = set_of(record, variant);
            if let Some(place) = (style == KEPT).then(|| sets.iter().position(|s| *s == own)).flatten() {
                style += place * SERIES;
                if sets.iter().filter(|s| s.0 == own.0).count() > 1 {
                    family = format!("{family}: {}", plans(variant).unwrap_or("as listed"));
                }
            }
            if families.iter().all(|(f, _)| *f != family) {
                families.push((family, style));
            }
            points.push(Point { variant, style, length, share, evicted: after_eviction(record), score });
        }
    }
    if points.is_empty() {
        return None;
    }
    points.sort_by(|a, b| a.share.total_cmp(&b.share));
    let mut keys: Vec<LegendEntry> =
        families.iter().map(|(name, style)| LegendEntry::Series(*style, name.clone())).collect();
    if points.iter().any(|p| p.evicted.is_some()) {
        keys.push(LegendEntry::Linked("hollow: after eviction; dashes lead to the peak".into()));
    }
    if points.iter().any(|p| p.score.low.is_some()) {
        keys.push(LegendEntry::Interval("95% interval".into()));
    }
    let tasks = cells.tasks();
    let what = if tasks.len() > 1 { format!("the {} tasks' mean", tasks.len()) } else { tasks[0].into() };
    let about = [
        format!("Score: {what}, in percent. KV: the most that was allocated at once, prefill included, over a dense cache's bytes"),
        cells.prompting_line("task and length", cells.cells.iter().map(|c| c.answers.len())),
    ];
    let heading = title(&cells.answers.header, "Score against the bytes of the KV cache");
    let mut page = Page::new(&heading, &[vec![target(&cells.answers.header)], about.to_vec()].concat(), &keys);
    let x = Scale::shares(points.iter().flat_map(|p| [Some(p.share), p.evicted]).flatten());
    let lengths: Vec<usize> = cells.lengths().into_iter().filter(|l| points.iter().any(|p| p.length == *l)).collect();
    let columns = lengths.len().min(if lengths.len() == 4 { 2 } else { 3 });
    let areas = grid(lengths.len(), columns, (MARGIN, CONTENT), page.y, 290.0);
    for (area, length) in areas.into_iter().zip(lengths) {
        let beyond = if cells.answers.header.extrapolates(length) { ", beyond the trained length" } else { "" };
        let panel = Panel {
            title: &format!("{} tokens{beyond}: score, %", short_count(length)),
            x: &x,
            x_name: "peak KV bytes, relative to dense",
            y: &Scale::percent(),
            shaded_from: None,
            crosses: None,
        };
        let plot = panel.draw(&mut page.scene, area);
        for (_, style) in families.iter().rev() {
            let own: Vec<&Point> = points.iter().filter(|p| (p.length, p.style) == (length, *style)).collect();
            let at = |p: &Point| plot.at(p.share, p.score.mean);
            // Settings of exact recall differ in more than their bytes: no line leads from one to the next.
            if *style > 0 || !recall {
                page.scene.series(*style, &own.iter().map(|p| at(p)).collect::<Vec<_>>());
            }
            for point in own {
                if let Some(evicted) = point.evicted {
                    let end = plot.at(evicted, point.score.mean);
                    page.scene.dashes(&[at(point), end], Ink::Series(*style), THIN);
                    page.scene.hollow(*style, end, Ink::Series(*style));
                }
                plot.interval(&mut page.scene, point.share, 0.0, &point.score, Ink::Series(*style));
                page.scene.marker(*style, at(point));
            }
        }
        page.y = area.bottom();
    }
    let mut notes = order(&points, &families);
    if !left_out.is_empty() {
        notes.push(format!("Left out, for want of an answer to every task or of bytes: {}.", left_out.join(", ")));
    }
    Some(Figure { name: "bytes".into(), scene: page.finish(&notes) })
}

/// Returns the folder of a variant's plan, such as `needles` for `retrofit:plan=plans/needles/dense-4.json`.
fn plans(variant: &str) -> Option<&str> {
    let (_, path) = variant.split_once("plan=")?;
    Path::new(path.split(',').next()?).parent()?.file_name()?.to_str()
}

/// Returns the bytes of the cache after eviction as a share of a dense cache, where they are below the peak.
fn after_eviction(record: &VariantRecord) -> Option<f64> {
    let kv = &record.kv;
    kv.peak_bytes.filter(|peak| *peak > kv.total_bytes).map(|_| kv.total_bytes as f64 / kv.dense_bytes as f64)
}

/// Returns notes that identify the points: the variants of each family in the order of their bytes.
fn order(points: &[Point], families: &[(String, usize)]) -> Vec<String> {
    let own = |style: usize| {
        let mut found: Vec<&Point> = vec![];
        for point in points.iter().filter(|p| p.style == style) {
            if found.iter().all(|p| p.variant != point.variant) {
                found.push(point);
            }
        }
        found
    };
    let names = |found: &[&Point]| {
        let mut names = found[0].variant.to_string();
        for pair in found.windows(2) {
            names += if pair[0].share < pair[1].share { " < " } else { " = " };
            names += pair[1].variant;
        }
        names
    };
    let several = families.iter().map(|(name, style)| (name, own(*style))).filter(|(_, found)| found.len() > 1);
    several.map(|(name, found)| format!("{name}, from the fewest bytes to the most: {}.", names(&found))).collect()
}
