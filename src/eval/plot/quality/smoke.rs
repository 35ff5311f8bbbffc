//! Figure of a smoke test: the distance of variants from stock on real text, by context.

use super::{count, title, variants};
use crate::cli::short_count;
use crate::error::{Error, Result};
use crate::eval::plot::page::{trained_key, LegendEntry, Page, CONTENT};
use crate::eval::plot::panel::{grid, Panel};
use crate::eval::plot::scale::Scale;
use crate::eval::plot::target::target;
use crate::eval::plot::theme::{Ink, LINE, MARGIN, SAMPLE};
use crate::eval::plot::Figure;
use crate::eval::report::{DocumentMetric, Estimate, Smoke, SmokeRun};
use std::collections::BTreeSet;
use std::path::Path;

/// A metric of the distance from stock on a document.
struct Distance {
    /// Quantity and unit.
    title: String,
    /// Metric of a document.
    of: DocumentMetric,
    /// Whether the axis is logarithmic.
    log: bool,
    /// Range of the metric.
    limits: (f64, f64),
}

fn distances(top: usize) -> [Distance; 4] {
    let free = (f64::NEG_INFINITY, f64::INFINITY);
    let distance = |title: &str, of: DocumentMetric, log, limits| Distance { title: title.into(), of, log, limits };
    [
        distance("KL from stock, nats", |d| d.kl, true, free),
        distance("Same likeliest token as stock, %", |d| 100.0 * d.top1, false, (0.0, 100.0)),
        distance(&format!("Shared of the {top} likeliest tokens"), |d| d.overlap, false, (0.0, top as f64)),
        distance("Loss added to stock's, nats", |d| d.loss - d.stock_loss, false, free),
    ]
}

/// Draws the figure of the smoke test read from `path`.
///
/// # Errors
/// A test without documents, or an inconsistent one.
pub fn figures(smoke: &Smoke, path: &Path) -> Result<Vec<Figure>> {
    let fail = |message: String| Err(Error::format(path.display(), message));
    let runs: Vec<&SmokeRun> = smoke.runs.iter().filter(|r| !r.documents.is_empty()).collect();
    if runs.is_empty() {
        return fail("is a smoke test without runs".into());
    }
    let mut seen = BTreeSet::new();
    for run in &runs {
        let what = format!("{} at context {}", run.record.variant, run.ctx);
        if run.ctx == 0 {
            return fail(format!("has a run of {what}; a context is at least 1"));
        }
        if !seen.insert((run.ctx, &run.record.variant)) {
            return fail(format!("has two runs of {what}"));
        }
    }
    let contexts: Vec<usize> = runs.iter().map(|r| r.ctx).collect::<BTreeSet<_>>().into_iter().collect();
    let variants = variants(runs.iter().map(|r| &r.record));
    let x = Scale::contexts(&contexts);
    let mut keys: Vec<LegendEntry> =
        variants.iter().map(|(name, style)| LegendEntry::Series(*style, name.to_string())).collect();
    keys.push(LegendEntry::Dots(if smoke.answers.is_some() { "single samples" } else { "single texts" }.into()));
    if runs.iter().any(|r| r.documents.len() > 1) {
        keys.push(LegendEntry::Interval("95% interval of the mean".into()));
    }
    let farthest = contexts.iter().max().map_or(0.0, |c| *c as f64);
    let past = farthest > smoke.header.trained_positions as f64;
    keys.extend(trained_key(&smoke.header, farthest, "extrapolated"));
    let (at, of, on) = match &smoke.answers {
        Some(a) => (format!("Over stock's answers to {}", a.tasks.join(", ")), "sample", "over answers to tasks"),
        None => (format!("At the last {} positions of each text", smoke.positions), "text", "on real text"),
    };
    let about = format!(
        "{at}; {} per context; means over {of}s, intervals by bootstrap",
        count(runs.iter().map(|r| r.documents.len()), of)
    );
    let heading = title(&smoke.header, &format!("Distance from the stock model {on}, by context"));
    let mut page = Page::new(&heading, &[target(&smoke.header), about], &keys);
    let areas = grid(4, 2, (MARGIN, CONTENT), page.y, 230.0);
    let mut zeros = vec![];
    for (area, distance) in areas.iter().zip(distances(smoke.top)) {
        let values = runs.iter().flat_map(|r| r.documents.iter().map(distance.of));
        let scale = match distance.log {
            true => Scale::log(values.clone()),
            false => Scale::linear(values.clone().chain((distance.limits.0 != 0.0).then_some(0.0)), distance.limits),
        };
        // No value is above 0: all variants equal stock.
        let scale = scale.unwrap_or(Scale { low: 0.0, high: 1.0, log: false, ticks: vec![] });
        let panel = Panel {
            title: &distance.title,
            x: &x,
            x_name: "context, tokens",
            y: &scale,
            shaded_from: past.then_some(smoke.header.trained_positions as f64),
            crosses: None,
        };
        let plot = panel.draw(&mut page.scene, *area);
        // Variants are drawn next to each other, within the axis and apart from those of the next context.
        let room = 2.0 * (plot.at(contexts[0] as f64, scale.low).0 - plot.area.x) - 14.0;
        let step = (room.min(0.6 * plot.area.w / contexts.len() as f64) / variants.len() as f64).min(13.0);
        // The first variant is the most important one: drawn last, so on top.
        for (i, (name, style)) in variants.iter().enumerate().rev() {
            let shift = step * (i as f64 - (variants.len() - 1) as f64 / 2.0);
            let (ink, mut last) = (Ink::Series(*style), None);
            let mut own: Vec<&&SmokeRun> = runs.iter().filter(|r| r.record.variant == *name).collect();
            own.sort_by_key(|r| r.ctx);
            for run in own {
                let values: Vec<f64> = run.documents.iter().map(distance.of).collect();
                let Some(mean) = Estimate::of(&values) else { continue };
                if scale.log && mean.mean <= 0.0 {
                    zeros.push(format!("{name} at {}", short_count(run.ctx)));
                    last = None;
                    continue;
                }
                let at = |v: f64| {
                    let (x, y) = plot.at(run.ctx as f64, v);
                    (x + shift, y)
                };
                for value in values {
                    let (x, y) = at(value);
                    page.scene.dot((x + (step / 2.0).min(5.5), y), SAMPLE, ink);
                }
                plot.interval(&mut page.scene, run.ctx as f64, shift, &mean, ink);
                if let Some(from) = last.replace(at(mean.mean)) {
                    page.scene.line(from, at(mean.mean), ink, LINE);
                }
                page.scene.marker(*style, at(mean.mean));
            }
        }
        page.y = area.bottom();
    }
    let note = format!("KL 0, which has no place on a logarithmic axis: {}.", zeros.join(", "));
    let notes = if zeros.is_empty() { vec![] } else { vec![note] };
    Ok(vec![Figure { name: "smoke".into(), scene: page.finish(&notes) }])
}
