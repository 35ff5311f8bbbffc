//! Bytes by context: the device's peak and the KV cache, every engine and variant.

use super::axis::brief;
use super::page::{Key, Page, CONTENT};
use super::panel::{draw, Panel};
use super::scene::Area;
use super::series::Metric;
use super::sheet::Sheet;
use super::theme::MARGIN;
use super::Figure;

const GIB: f64 = (1u64 << 30) as f64;

/// The figure.
pub fn figure(sheet: &Sheet) -> Figure {
    let keys = sheet.keys(&sheet.runs.lines(Metric::PeakMemory), &[Key::Sample("single runs".into())]);
    let explained =
        "Peak: the highest of all samples that the device's allocator handed out. KV cache: bytes allocated.";
    let mut page = Page::new(&sheet.title("Memory by context"), &[sheet.subtitle(), explained.into()], &keys);
    let (gap, y) = (24.0, page.y);
    let w = (CONTENT - gap) / 2.0;
    let device = sheet.ladder.header.machine.memory_bytes as f64;
    let limit = (device > 0.0).then(|| (device, format!("the device has {} GiB", brief(device / GIB))));
    let panels = [(Metric::PeakMemory, "Peak device memory, GiB", limit), (Metric::Kv, "KV cache, GiB", None)];
    for (i, (metric, title, reference)) in panels.into_iter().enumerate() {
        let area = Area { x: MARGIN + i as f64 * (w + gap), y, w, h: 340.0 };
        let lines = sheet.runs.lines(metric);
        let panel = Panel {
            title,
            lines: &lines,
            scale: &lines,
            unit: GIB,
            contexts: &sheet.runs.contexts(),
            trained: sheet.ladder.header.trained_positions,
            reference,
            label_ends: false,
        };
        draw(&mut page.scene, area, &panel);
        page.y = area.bottom();
    }
    let mut notes = sheet.missed();
    let silent: Vec<String> = sheet
        .runs
        .lines(Metric::Kv)
        .into_iter()
        .filter(|l| l.points.is_empty() && l.missed.len() < sheet.runs.contexts().len())
        .map(|l| l.label)
        .collect();
    if !silent.is_empty() {
        notes.push(format!("KV cache not reported: {}.", silent.join(", ")));
    }
    Figure { name: "memory".into(), scene: page.finish(&notes) }
}
