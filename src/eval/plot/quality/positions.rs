//! Figure of the loss on the next token by position in the text.

use super::{count, share_of, title, variants};
use crate::cli::short_count;
use crate::error::{Error, Result};
use crate::eval::plot::page::{trained_key, LegendEntry, Page, CONTENT};
use crate::eval::plot::panel::Panel;
use crate::eval::plot::scale::Scale;
use crate::eval::plot::scene::{Area, Coord};
use crate::eval::plot::target::target;
use crate::eval::plot::theme::{Ink, MARGIN};
use crate::eval::plot::Figure;
use crate::eval::report::{Estimate, LossByPosition, PositionRun};
use std::path::Path;

/// Maximum number of points of a line with a marker each.
const MARKED: usize = 16;

/// Draws the figure of the losses read from `path`.
///
/// # Errors
/// A file without losses, or an inconsistent one.
pub fn figures(positions: &LossByPosition, path: &Path) -> Result<Vec<Figure>> {
    let fail = |message: String| Err(Error::format(path.display(), message));
    if positions.bucket == 0 || positions.ctx == 0 {
        return fail("has a bucket or a context of 0 positions".into());
    }
    let runs: Vec<&PositionRun> =
        positions.runs.iter().filter(|r| r.documents.iter().any(|d| !d.losses.is_empty())).collect();
    if runs.is_empty() {
        return fail("holds no losses".into());
    }
    let buckets = positions.ctx.div_ceil(positions.bucket);
    if let Some(run) = runs.iter().find(|r| r.documents.iter().any(|d| d.losses.len() > buckets)) {
        return fail(format!("{} has more losses than the {buckets} buckets there are", run.record.variant));
    }
    // A file of an interrupted run has fewer buckets.
    let buckets = runs.iter().flat_map(|r| &r.documents).map(|d| d.losses.len()).max().unwrap_or(0);
    let names = variants(runs.iter().map(|r| &r.record));
    if names.len() < runs.len() {
        return fail("has two runs of one variant".into());
    }
    let lines: Vec<(usize, Vec<Option<Estimate>>)> = runs
        .iter()
        .zip(&names)
        .map(|(run, (_, style))| (*style, (0..buckets).map(|b| loss(run, b)).collect()))
        .collect();
    let x = Scale::positions(positions.ctx);
    let named = |(run, (name, style)): (&&PositionRun, &(&str, usize))| {
        let kv_share = share_of([&run.record]).map_or(String::new(), |h| format!(" · KV {h} of dense"));
        LegendEntry::Series(*style, format!("{name}{kv_share}"))
    };
    let mut keys: Vec<LegendEntry> = runs.iter().zip(&names).map(named).collect();
    if lines.iter().any(|(_, l)| l.iter().flatten().any(|e| e.low.is_some())) {
        keys.push(LegendEntry::Patch(Ink::Haze(5), "95% interval of the mean".into()));
    }
    keys.extend(trained_key(&positions.header, x.high, "extrapolated"));
    let about = format!(
        "Means over {}; a point is the mean of {} positions, of which every {} judged",
        count(runs.iter().map(|r| r.documents.len()), "text"),
        short_count(positions.bucket),
        ordinal(positions.stride)
    );
    let heading = title(&positions.header, "Loss on the next token, by its position in the text");
    let mut page = Page::new(&heading, &[target(&positions.header), about], &keys);
    let ends = lines.iter().flat_map(|(_, l)| l.iter().flatten());
    let ends = ends.flat_map(|e| [Some(e.mean), e.low, e.high]).flatten();
    let Some(y) = Scale::linear(ends, (f64::NEG_INFINITY, f64::INFINITY)) else {
        return fail("holds no losses".into());
    };
    let panel = Panel {
        title: "Loss on the next token, nats",
        x: &x,
        x_name: "position, tokens",
        y: &y,
        shaded_from: Some(positions.header.trained_positions as f64),
        crosses: None,
    };
    let area = Area { x: MARGIN, y: page.y, w: CONTENT, h: 360.0 };
    let plot = panel.draw(&mut page.scene, area);
    let middle = |bucket: usize| {
        let from = bucket * positions.bucket;
        (from as f64 + from.saturating_add(positions.bucket).min(positions.ctx) as f64) / 2.0
    };
    // Bands are drawn before all lines, so that they hide no line.
    for (style, line) in &lines {
        let known = || line.iter().enumerate().filter_map(|(b, e)| Some((middle(b), (*e)?)));
        let edge = |f: fn(&Estimate) -> Option<f64>| -> Vec<Coord> {
            known().filter_map(|(x, e)| Some(plot.at(x, f(&e)?))).collect()
        };
        let (low, high) = (edge(|e| e.low), edge(|e| e.high));
        if low.len() > 1 {
            page.scene.polygon(low.into_iter().chain(high.into_iter().rev()).collect(), Ink::Haze(*style));
        } else if let Some((x, e)) = known().next() {
            plot.interval(&mut page.scene, x, 0.0, &e, Ink::Series(*style));
        }
    }
    for (style, line) in lines.iter().rev() {
        let points: Vec<Coord> =
            line.iter().enumerate().filter_map(|(b, e)| Some(plot.at(middle(b), (*e)?.mean))).collect();
        page.scene.series(*style, &points);
        let every = points.len().div_ceil(MARKED).max(1);
        points.into_iter().step_by(every).for_each(|at| page.scene.marker(*style, at));
    }
    page.y = area.bottom();
    Ok(vec![Figure { name: "positions".into(), scene: page.finish(&[]) }])
}

/// Estimates the mean loss of a bucket over documents.
fn loss(run: &PositionRun, bucket: usize) -> Option<Estimate> {
    Estimate::of(&run.documents.iter().filter_map(|d| d.losses.get(bucket).copied()).collect::<Vec<_>>())
}

/// Formats an ordinal for "of which every ..", such as `one is`, `2nd is` or `16th is`.
fn ordinal(n: usize) -> String {
    let ending = match (n % 10, n % 100) {
        (_, 11..=13) => "th",
        (1, _) => "st",
        (2, _) => "nd",
        (3, _) => "rd",
        _ => "th",
    };
    match n {
        1 => "one is".into(),
        n => format!("{n}{ending} is"),
    }
}
