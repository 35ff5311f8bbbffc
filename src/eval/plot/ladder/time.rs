//! Figure of time by context: prefill and end to end, every engine and variant.

use super::lines::{draw, LinePanel};
use super::series::Quantity;
use super::view::LadderView;
use crate::eval::plot::page::{LegendEntry, Page, CONTENT};
use crate::eval::plot::scene::Area;
use crate::eval::plot::theme::MARGIN;
use crate::eval::plot::Figure;

/// Draws the figure.
pub fn figure(view: &LadderView) -> Figure {
    let panels = [(Quantity::Prefill, "Prefill, seconds"), (Quantity::EndToEnd, "End to end, seconds")];
    let keys = view.keys(&view.runs.lines(Quantity::Prefill), &[LegendEntry::Dots("single runs".into())]);
    let mut page = Page::new(&view.title("Time by context"), &[view.subtitle()], &keys);
    // Both panels share one scale, so that their difference shows the decode time.
    let scale: Vec<_> = panels.iter().flat_map(|(quantity, _)| view.runs.lines(*quantity)).collect();
    let (gap, y) = (24.0, page.y);
    let w = (CONTENT - gap) / 2.0;
    for (i, (quantity, title)) in panels.into_iter().enumerate() {
        let area = Area { x: MARGIN + i as f64 * (w + gap), y, w, h: 340.0 };
        let lines = LinePanel {
            title,
            lines: &view.runs.lines(quantity),
            scale: &scale,
            unit: 1.0,
            contexts: &view.runs.contexts(),
            trained: view.ladder.header.trained_positions,
            reference: None,
            label_ends: false,
        };
        draw(&mut page.scene, area, &lines);
        page.y = area.bottom();
    }
    Figure { name: "time".into(), scene: page.finish(&view.missed()) }
}
