//! Figure of a retrofit's time and memory as ratios to the best stock, by context.

use super::lines::{draw, LinePanel};
use super::series::{Line, Quantity};
use super::view::LadderView;
use crate::eval::plot::page::{LegendEntry, Page, CONTENT};
use crate::eval::plot::scene::{Area, Scene};
use crate::eval::plot::theme::MARGIN;
use crate::eval::plot::Figure;

/// Compared quantities, with their names and styles.
const COMPARED: [(Quantity, &str, usize); 3] = [
    (Quantity::EndToEnd, "end-to-end time", 0),
    (Quantity::PeakMemory, "peak device memory", 1),
    (Quantity::Kv, "KV capacity", 2),
];

/// Draws one figure per retrofit, with remarks about retrofits that cannot be compared with a stock.
pub fn figures(view: &LadderView) -> (Vec<Figure>, Vec<String>) {
    let (mut figures, mut remarks) = (vec![], vec![]);
    let variants: Vec<&str> = view.runs.retrofits().collect();
    if variants.is_empty() {
        remarks.push("no ratios: the ladder has no retrofit".into());
    }
    for variant in &variants {
        let compared = lines(view, variant);
        if compared.iter().all(|l| l.points.is_empty()) {
            remarks.push(format!("no ratios for {variant}: there is no context at which both it and a stock ran"));
            continue;
        }
        let name = match figures.len() {
            0 => "ratio".into(),
            n => format!("ratio-{}", n + 1),
        };
        figures.push(Figure { name, scene: scene(view, variant, &compared) });
    }
    (figures, remarks)
}

fn lines(view: &LadderView, variant: &str) -> Vec<Line> {
    let line = |(quantity, label, style): (Quantity, &str, usize)| Line {
        label: label.into(),
        style,
        points: view.runs.ratios(variant, quantity),
        missed: vec![],
    };
    COMPARED.map(line).into()
}

fn scene(view: &LadderView, variant: &str, compared: &[Line]) -> Scene {
    let shown: Vec<Line> = compared.iter().filter(|l| !l.points.is_empty()).cloned().collect();
    let mut keys = view.keys(&shown, &[LegendEntry::Dots("single runs".into())]);
    let alone = view.runs.without_stock(variant);
    // A row of crosses, without a line, at contexts where no stock runs.
    let no_stock = Line { label: "no stock fits".into(), style: 5, points: vec![], missed: alone };
    if !no_stock.missed.is_empty() {
        let at = keys.iter().position(|k| matches!(k, LegendEntry::Patch(..))).unwrap_or(keys.len());
        keys.insert(at, LegendEntry::Missed("no stock fits: no ratio".into()));
    }
    let mut drawn = shown.clone();
    drawn.extend((!no_stock.missed.is_empty()).then_some(no_stock));

    let explained = format!(
        "bfly {variant}: time over the fastest stock's, memory over the smallest's, at the same context. Lower is better."
    );
    let title = view.title("The retrofit over the better stock");
    let mut page = Page::new(&title, &[view.subtitle(), explained], &keys);
    let area = Area { x: MARGIN, y: page.y, w: CONTENT, h: 340.0 };
    let lines = LinePanel {
        title: "Ratio",
        lines: &drawn,
        scale: &drawn,
        unit: 1.0,
        contexts: &view.runs.contexts(),
        trained: view.ladder.header.trained_positions,
        reference: Some((1.0, "1 = the better stock".into())),
        label_ends: true,
    };
    draw(&mut page.scene, area, &lines);
    page.y = area.bottom();
    let mut notes = view.missed();
    for (_, label, _) in COMPARED {
        if !shown.iter().any(|l| l.label == label) {
            notes.push(format!("No ratio of {label}: not reported on both sides."));
        }
    }
    page.finish(&notes)
}
