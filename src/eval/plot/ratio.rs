//! The headline: the retrofit's time and memory over the better stock's, by context.

use super::page::{Key, Page, CONTENT};
use super::panel::{draw, Panel};
use super::scene::{Area, Scene};
use super::series::{Line, Metric};
use super::sheet::Sheet;
use super::theme::MARGIN;
use super::Figure;

/// What is compared, under which name and in which style.
const METRICS: [(Metric, &str, usize); 3] = [
    (Metric::EndToEnd, "end-to-end time", 0),
    (Metric::PeakMemory, "peak device memory", 1),
    (Metric::Kv, "KV capacity", 2),
];

/// One figure per variant of the retrofit, and remarks on variants that nothing can be compared with.
pub fn figures(sheet: &Sheet) -> (Vec<Figure>, Vec<String>) {
    let (mut figures, mut remarks) = (vec![], vec![]);
    let variants: Vec<&str> = sheet.runs.retrofits().collect();
    if variants.is_empty() {
        remarks.push("no ratios: the ladder has no retrofit".into());
    }
    for variant in &variants {
        let lines = lines(sheet, variant);
        if lines.iter().all(|l| l.points.is_empty()) {
            remarks.push(format!("no ratios for {variant}: it and a stock ran at no common context"));
            continue;
        }
        let name = match figures.len() {
            0 => "ratio".into(),
            n => format!("ratio-{}", n + 1),
        };
        figures.push(Figure { name, scene: scene(sheet, variant, &lines) });
    }
    (figures, remarks)
}

fn lines(sheet: &Sheet, variant: &str) -> Vec<Line> {
    let line = |(metric, label, style): (Metric, &str, usize)| Line {
        label: label.into(),
        style,
        points: sheet.runs.ratios(variant, metric),
        missed: vec![],
    };
    METRICS.map(line).into()
}

fn scene(sheet: &Sheet, variant: &str, lines: &[Line]) -> Scene {
    let shown: Vec<Line> = lines.iter().filter(|l| !l.points.is_empty()).cloned().collect();
    let mut keys = sheet.keys(&shown, &[Key::Sample("single runs".into())]);
    let alone = sheet.runs.without_stock(variant);
    // One row of crosses, for want of a stock; the plot has no line for it.
    let no_stock = Line { label: "no stock fits".into(), style: 5, points: vec![], missed: alone };
    if !no_stock.missed.is_empty() {
        let at = keys.iter().position(|k| matches!(k, Key::Patch(..))).unwrap_or(keys.len());
        keys.insert(at, Key::Missed("no stock fits: no ratio".into()));
    }
    let mut drawn = shown.clone();
    drawn.extend((!no_stock.missed.is_empty()).then_some(no_stock));

    let explained = format!(
        "bfly {variant}: time over the fastest stock's, memory over the smallest's, at the same context. Lower is better."
    );
    let title = sheet.title("The retrofit over the better stock");
    let mut page = Page::new(&title, &[sheet.subtitle(), explained], &keys);
    let area = Area { x: MARGIN, y: page.y, w: CONTENT, h: 340.0 };
    let panel = Panel {
        title: "Ratio",
        lines: &drawn,
        scale: &drawn,
        unit: 1.0,
        contexts: &sheet.runs.contexts(),
        trained: sheet.ladder.header.trained_positions,
        reference: Some((1.0, "1 = the better stock".into())),
        label_ends: true,
    };
    draw(&mut page.scene, area, &panel);
    page.y = area.bottom();
    let mut notes = sheet.missed();
    for (_, label, _) in METRICS {
        if !shown.iter().any(|l| l.label == label) {
            notes.push(format!("No ratio of {label}: not reported on both sides."));
        }
    }
    page.finish(&notes)
}
