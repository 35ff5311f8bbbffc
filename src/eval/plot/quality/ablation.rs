//! Figure of an ablation: paired differences of every change from the base, with confidence intervals.

use super::{read_line, share_of, title, ScoreFigure};
use crate::error::{Error, Result};
use crate::eval::plot::axis::grouped;
use crate::eval::plot::page::{LegendEntry, Page, CONTENT};
use crate::eval::plot::scale::Scale;
use crate::eval::plot::scene::{Anchor, Area, Scene};
use crate::eval::plot::target::target;
use crate::eval::plot::text::{shorten, Thinning};
use crate::eval::plot::theme::{Ink, GROUP, HAIR, LABEL, MARGIN, PANEL, THIN, TICK};
use crate::eval::plot::Figure;
use crate::eval::report::{Ablation, AblationAxis, AblationChange, Estimate};
use std::path::Path;

/// Height of a row.
const ROW: f64 = 19.0;
/// Room on the left for the names of changes.
const NAMES: f64 = 176.0;
/// Room on the right for summaries per query.
const SUMMARIES: f64 = 66.0;
/// Room right of each column for its numbers.
const NUMBERS: f64 = 62.0;
/// Room between columns.
const GAP: f64 = 14.0;

/// A column of differences.
struct Column<'a> {
    /// Quantity and unit.
    title: &'static str,
    /// Decimals of the numbers.
    decimals: usize,
    /// Difference of a score from the base's.
    difference: ScoreFigure<'a>,
}

/// Draws the figure of the ablation read from `path`.
///
/// # Errors
/// An ablation in which no change was measured.
pub fn figures(ablation: &Ablation, path: &Path) -> Result<Vec<Figure>> {
    let base = &ablation.base;
    let all = [
        Column {
            title: "KL on text, nats",
            decimals: 4,
            difference: Box::new(|s| Estimate::of_differences(&s.texts(|t| t.kl), &base.texts(|t| t.kl))),
        },
        Column {
            title: "Loss on answers, nats",
            decimals: 3,
            difference: Box::new(|s| Estimate::of_differences(&s.answer_losses(), &base.answer_losses())),
        },
    ];
    let scores = || ablation.changes.iter().filter_map(|c| c.score.as_ref());
    let columns: Vec<&Column> = all.iter().filter(|c| scores().any(|s| (c.difference)(s).is_some())).collect();
    if columns.is_empty() {
        return Err(Error::format(path.display(), "is an ablation without a change that was measured"));
    }
    let differences = || columns.iter().flat_map(|c| scores().filter_map(&c.difference).collect::<Vec<_>>());
    let mut keys = vec![
        LegendEntry::Marker(0, "better than the base".into()),
        LegendEntry::Marker(1, "worse than the base".into()),
        LegendEntry::Faint("not told apart: the interval holds 0".into()),
    ];
    keys.extend(differences().any(|e| e.low.is_some()).then(|| LegendEntry::Interval("95% interval".into())));
    let kl = Estimate::of(&base.texts(|t| t.kl)).map_or(String::new(), |e| format!(", KL {}", e.show(4)));
    let loss =
        Estimate::of(&base.answer_losses()).map_or(String::new(), |e| format!(", loss on answers {}", e.show(3)));
    let kv_share = share_of([&base.record]).map_or(String::new(), |h| format!(", KV {h} of dense"));
    let about = [
        target(&ablation.header),
        read_line(&ablation.header, &ablation.probed, base.texts.len(), base.answers.len()),
        format!("Base: {}{kv_share}{kl}{loss}", base.record.variant),
        "One setting is changed at a time. Each difference is paired, text by text and question by question".into(),
    ];
    let heading = title(&ablation.header, "What each setting is worth: differences from the base");
    let mut page = Page::new(&heading, &about, &keys);
    let rows = Rows::of(&ablation.changes, page.y + 40.0);
    let areas = column_areas(columns.len(), rows.top, rows.bottom);
    for (area, column) in areas.iter().zip(columns) {
        draw(&mut page.scene, *area, column, &rows);
    }
    let right = areas[areas.len() - 1].right() + NUMBERS;
    labels(&mut page.scene, &rows, ablation, (areas[0], right));
    page.y = rows.bottom + 34.0;
    Ok(vec![Figure { name: "ablation".into(), scene: page.finish(&[]) }])
}

/// Rows of the figure.
struct Rows<'a> {
    /// Changes, each with the vertical middle of its row.
    changes: Vec<(&'a AblationChange, f64)>,
    /// Headings of the changed settings, each with the vertical middle of its row.
    headings: Vec<(&'static str, f64)>,
    /// Top of the first row.
    top: f64,
    /// Bottom of the last row.
    bottom: f64,
}

impl<'a> Rows<'a> {
    fn of(changes: &'a [AblationChange], top: f64) -> Self {
        let mut rows = Self { changes: vec![], headings: vec![], top, bottom: top };
        let mut axes: Vec<AblationAxis> = vec![];
        for change in changes {
            if !axes.contains(&change.axis) {
                axes.push(change.axis);
            }
        }
        for axis in axes {
            rows.headings.push((heading(axis), rows.bottom + ROW / 2.0));
            rows.bottom += ROW;
            for change in changes.iter().filter(|c| c.axis == axis) {
                rows.changes.push((change, rows.bottom + ROW / 2.0));
                rows.bottom += ROW;
            }
        }
        rows
    }
}

/// Returns the heading of the changes of a setting.
fn heading(axis: AblationAxis) -> &'static str {
    match axis {
        AblationAxis::Partner => "partner rule, at no more bytes",
        AblationAxis::Window => "window, tokens",
        AblationAxis::Sinks => "sinks, tokens",
        AblationAxis::Block => "block, tokens",
        AblationAxis::Pool => "pooling of keys",
        AblationAxis::Bias => "bias on summaries, β",
        AblationAxis::Count => "stages read at once",
        AblationAxis::Recall => "tokens fetched per KV head",
        AblationAxis::Code => "key code, bits per channel",
        AblationAxis::Rest => "estimate of the rest",
        AblationAxis::Fit => "what codes decode to",
    }
}

/// Returns the plot areas of the columns.
fn column_areas(count: usize, top: f64, bottom: f64) -> Vec<Area> {
    let each = (CONTENT - NAMES - SUMMARIES) / count as f64;
    let left = |i: usize| MARGIN + NAMES + each * i as f64 + GAP;
    (0..count).map(|i| Area { x: left(i), y: top, w: each - NUMBERS - GAP, h: bottom - top }).collect()
}

fn draw(scene: &mut Scene, area: Area, column: &Column, rows: &Rows) {
    let values: Vec<(f64, Estimate)> =
        rows.changes.iter().filter_map(|(c, y)| Some((*y, (column.difference)(c.score.as_ref()?)?))).collect();
    let ends = values.iter().flat_map(|(_, e)| [Some(e.mean), e.low, e.high]).flatten();
    let Some(scale) = Scale::linear(ends.chain([0.0]), (f64::NEG_INFINITY, f64::INFINITY)) else { return };
    let axis = scale.on(area.x, area.right());
    scene.text((area.x, area.y - 24.0), Anchor::Start, PANEL, column.title);
    let mut labels = Thinning::new(5.0);
    for tick in &scale.ticks {
        let x = axis.at(tick.value);
        let (ink, width) = if tick.value == 0.0 { (Ink::Text, THIN) } else { (Ink::Grid, HAIR) };
        scene.line((x, area.y), (x, area.bottom()), ink, width);
        if labels.keeps_text(x, &tick.label, TICK) {
            scene.text((x, area.bottom() + 10.0), Anchor::Middle, TICK, &tick.label);
        }
    }
    let middle = area.x + area.w / 2.0;
    scene.text((middle, area.bottom() + 25.0), Anchor::Middle, TICK, "change from the base");
    for (y, e) in values {
        let ink = match e.differs() {
            true if e.mean < 0.0 => Ink::Series(0),
            true => Ink::Series(1),
            false => Ink::Muted,
        };
        if let (Some(low), Some(high)) = (e.low, e.high) {
            scene.whisker((axis.at(low), y), (axis.at(high), y), ink);
        }
        let at = (axis.at(e.mean), y);
        match ink {
            Ink::Series(style) => scene.marker(style, at),
            ink => scene.hollow(0, at, ink),
        }
        let sign = if e.mean > 0.0 { "+" } else { "" };
        let number = format!("{sign}{}", grouped(e.mean, column.decimals)).replace('-', "−");
        let kind = if e.differs() { LABEL } else { TICK };
        scene.text((area.right() + NUMBERS - 8.0, y), Anchor::End, kind, number);
    }
}

/// Draws the names of changes, the reason where a change was not measured, and summaries per query where there are any.
fn labels(scene: &mut Scene, rows: &Rows, ablation: &Ablation, (first, right): (Area, f64)) {
    let (end, base) = (MARGIN + CONTENT, &ablation.base.record.variant);
    if !ablation.recalls() {
        scene.text((end, rows.top - 24.0), Anchor::End, TICK, "summaries");
        scene.text((end, rows.top - 11.0), Anchor::End, TICK, "per query");
    }
    for (heading, y) in &rows.headings {
        scene.line((MARGIN, y - ROW / 2.0), (end, y - ROW / 2.0), Ink::Grid, HAIR);
        scene.text((MARGIN, *y), Anchor::Start, GROUP, *heading);
    }
    for (change, y) in &rows.changes {
        let name = shorten(&change.value, LABEL, NAMES - 12.0);
        scene.text((MARGIN + 10.0, *y), Anchor::Start, LABEL, name);
        if !ablation.recalls() {
            scene.text((end, *y), Anchor::End, LABEL, format!("{:.2}", change.summaries_per_query));
        }
        if change.score.is_none() {
            let why = match &change.same_as {
                Some(same) if same == base => "reads the same as the base: not measured".into(),
                Some(same) => format!("reads the same as “{same}”: not measured"),
                None => "not measured".into(),
            };
            let text = shorten(&why, TICK, right - first.x - 16.0);
            scene.text_on(Ink::Paper, (first.x + 6.0, *y), Anchor::Start, TICK, &text);
        }
    }
}
