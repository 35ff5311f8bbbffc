//! Milliseconds between new tokens by context: median and 95th percentile.

use super::page::{Key, Page, CONTENT};
use super::panel::{draw, Panel};
use super::scene::Area;
use super::series::Metric;
use super::sheet::Sheet;
use super::theme::MARGIN;
use super::Figure;

/// The figure.
pub fn figure(sheet: &Sheet) -> Figure {
    let lines = sheet.runs.lines(Metric::InterToken);
    let extra = [Key::Dashes("95th percentile".into()), Key::Sample("medians of single runs".into())];
    let keys = sheet.keys(&lines, &extra);
    let mut page = Page::new(&sheet.title("Time between new tokens by context"), &[sheet.subtitle()], &keys);
    let area = Area { x: MARGIN, y: page.y, w: CONTENT, h: 340.0 };
    let panel = Panel {
        title: "Median time between tokens, milliseconds",
        lines: &lines,
        scale: &lines,
        unit: 1e-3,
        contexts: &sheet.runs.contexts(),
        trained: sheet.ladder.header.trained_positions,
        reference: None,
        label_ends: false,
    };
    draw(&mut page.scene, area, &panel);
    page.y = area.bottom();
    Figure { name: "decode".into(), scene: page.finish(&sheet.missed()) }
}
