//! Figure of memory by context: peak device memory and KV cache of every engine and variant.

use super::lines::{draw, LinePanel};
use super::series::Quantity;
use super::view::LadderView;
use crate::eval::plot::axis::brief;
use crate::eval::plot::page::{LegendEntry, Page, CONTENT};
use crate::eval::plot::scene::Area;
use crate::eval::plot::theme::MARGIN;
use crate::eval::plot::Figure;

const GIB: f64 = (1u64 << 30) as f64;

/// Draws the figure.
pub fn figure(view: &LadderView) -> Figure {
    let keys = view.keys(&view.runs.lines(Quantity::PeakMemory), &[LegendEntry::Dots("single runs".into())]);
    let explained =
        "Peak: the highest of all samples that the device's allocator handed out. KV cache: bytes allocated.";
    let mut page = Page::new(&view.title("Memory by context"), &[view.subtitle(), explained.into()], &keys);
    let (gap, y) = (24.0, page.y);
    let w = (CONTENT - gap) / 2.0;
    let device = view.ladder.header.machine.memory_bytes as f64;
    let limit = (device > 0.0).then(|| (device, format!("the device has {} GiB", brief(device / GIB))));
    let panels = [(Quantity::PeakMemory, "Peak device memory, GiB", limit), (Quantity::Kv, "KV cache, GiB", None)];
    for (i, (quantity, title, reference)) in panels.into_iter().enumerate() {
        let area = Area { x: MARGIN + i as f64 * (w + gap), y, w, h: 340.0 };
        let shown = view.runs.lines(quantity);
        let lines = LinePanel {
            title,
            lines: &shown,
            scale: &shown,
            unit: GIB,
            contexts: &view.runs.contexts(),
            trained: view.ladder.header.trained_positions,
            reference,
            label_ends: false,
        };
        draw(&mut page.scene, area, &lines);
        page.y = area.bottom();
    }
    let mut notes = view.missed();
    let silent: Vec<String> = view
        .runs
        .lines(Quantity::Kv)
        .into_iter()
        .filter(|l| l.points.is_empty() && l.missed.len() < view.runs.contexts().len())
        .map(|l| l.label)
        .collect();
    if !silent.is_empty() {
        notes.push(format!("KV cache not reported: {}.", silent.join(", ")));
    }
    Figure { name: "memory".into(), scene: page.finish(&notes) }
}
