//! Seconds by context: prefill and end to end, every engine and variant.

use super::page::{Key, Page, CONTENT};
use super::panel::{draw, Panel};
use super::scene::Area;
use super::series::Metric;
use super::sheet::Sheet;
use super::theme::MARGIN;
use super::Figure;

/// The figure.
pub fn figure(sheet: &Sheet) -> Figure {
    let panels = [(Metric::Prefill, "Prefill, seconds"), (Metric::EndToEnd, "End to end, seconds")];
    let keys = sheet.keys(&sheet.runs.lines(Metric::Prefill), &[Key::Sample("single runs".into())]);
    let mut page = Page::new(&sheet.title("Time by context"), &[sheet.subtitle()], &keys);
    // One scale for both, so that what decode adds can be seen.
    let scale: Vec<_> = panels.iter().flat_map(|(metric, _)| sheet.runs.lines(*metric)).collect();
    let (gap, y) = (24.0, page.y);
    let w = (CONTENT - gap) / 2.0;
    for (i, (metric, title)) in panels.into_iter().enumerate() {
        let area = Area { x: MARGIN + i as f64 * (w + gap), y, w, h: 340.0 };
        let panel = Panel {
            title,
            lines: &sheet.runs.lines(metric),
            scale: &scale,
            unit: 1.0,
            contexts: &sheet.runs.contexts(),
            trained: sheet.ladder.header.trained_positions,
            reference: None,
            label_ends: false,
        };
        draw(&mut page.scene, area, &panel);
        page.y = area.bottom();
    }
    Figure { name: "time".into(), scene: page.finish(&sheet.missed()) }
}
