//! Figure of the time between new tokens by context: median and 95th percentile.

use super::lines::{draw, LinePanel};
use super::series::Quantity;
use super::view::LadderView;
use crate::eval::plot::page::{LegendEntry, Page, CONTENT};
use crate::eval::plot::scene::Area;
use crate::eval::plot::theme::MARGIN;
use crate::eval::plot::Figure;

/// Draws the figure.
pub fn figure(view: &LadderView) -> Figure {
    let shown = view.runs.lines(Quantity::InterToken);
    let extra = [LegendEntry::Dashes("95th percentile".into()), LegendEntry::Dots("medians of single runs".into())];
    let keys = view.keys(&shown, &extra);
    let mut page = Page::new(&view.title("Time between new tokens by context"), &[view.subtitle()], &keys);
    let area = Area { x: MARGIN, y: page.y, w: CONTENT, h: 340.0 };
    let lines = LinePanel {
        title: "Median time between tokens, milliseconds",
        lines: &shown,
        scale: &shown,
        unit: 1e-3,
        contexts: &view.runs.contexts(),
        trained: view.ladder.header.trained_positions,
        reference: None,
        label_ends: false,
    };
    draw(&mut page.scene, area, &lines);
    page.y = area.bottom();
    Figure { name: "decode".into(), scene: page.finish(&view.missed()) }
}
