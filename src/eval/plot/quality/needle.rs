//! Figure of needle grids: heat maps of scores by length and depth, one per variant.

use super::cells::Cells;
use super::{share_of, title};
use crate::cli::short_count;
use crate::eval::plot::page::{LegendEntry, Page, CONTENT};
use crate::eval::plot::panel::grid as panel_grid;
use crate::eval::plot::scene::{Anchor, Area, Scene};
use crate::eval::plot::target::target;
use crate::eval::plot::text::{shorten, text_width, Thinning};
use crate::eval::plot::theme::{FontSpec, Ink, GROUP, LABEL, MARGIN, PANEL, THIN, TICK};
use crate::eval::plot::Figure;
use crate::eval::report::{Cell, Estimate};
use std::collections::{BTreeMap, BTreeSet};

/// Maximum number of heat maps per figure.
const AT_ONCE: usize = 9;
/// Room left of a map for the labels of its depths.
const DEPTHS: f64 = 38.0;
/// Room above a map for the variant, its mean score and its bytes.
const HEAD: f64 = 52.0;

/// Rows and columns of every heat map of a file.
struct Grid {
    /// Lengths, rising.
    lengths: Vec<usize>,
    /// Depths in percent, rising.
    depths: Vec<f64>,
    /// Number of lengths within the trained length.
    within: usize,
}

impl Grid {
    /// Returns the labelled rows: all where the row height `h` has room for a label, else those at multiples of 10%.
    fn rows(&self, h: f64) -> Vec<(f64, String)> {
        let label = |depth: f64| format!("{depth:.0}%");
        if h >= TICK.size * 1.3 || self.depths.len() < 2 {
            return self.depths.iter().enumerate().map(|(row, depth)| (row as f64, label(*depth))).collect();
        }
        let place = |depth: f64| {
            let (row, pair) = self.depths.windows(2).enumerate().find(|(_, p)| p[0] <= depth && depth <= p[1])?;
            Some((row as f64 + (depth - pair[0]) / (pair[1] - pair[0]), label(depth)))
        };
        let mut rows: Vec<(f64, String)> = (0..=10).filter_map(|i| place(10.0 * f64::from(i))).collect();
        // Depths need not be evenly spaced.
        let (mut labels, half) = (Thinning::new(0.0), TICK.size * 1.3 / 2.0);
        rows.retain(|(row, _)| labels.keeps(h * row, half));
        rows
    }
}

/// The scores of a variant by length and depth.
struct HeatMap<'a> {
    variant: &'a str,
    /// Shortest unique name of the variant.
    name: String,
    /// Mean score in percent and number of samples, by length and bits of the depth.
    means: BTreeMap<(usize, u64), (f64, usize)>,
}

/// Draws the figure, or several where there are many variants.
pub fn figures(cells: &Cells) -> Vec<Figure> {
    let lengths = cells.lengths();
    let mut depths: Vec<f64> = cells.cells.iter().flat_map(|c| scores(c)).map(|(depth, _)| depth).collect();
    depths.sort_by(f64::total_cmp);
    depths.dedup();
    let within = lengths.iter().filter(|l| **l <= cells.answers.header.trained_positions).count();
    let grid = Grid { lengths, depths, within };
    let variants: Vec<&str> = cells.variants().into_iter().map(|(variant, _)| variant).collect();
    let folders = folders(&variants);
    let maps: Vec<HeatMap> = variants.iter().map(|variant| HeatMap::of(cells, variant, folders)).collect();
    let name = |i: usize| if i == 0 { "needle".into() } else { format!("needle-{}", i + 1) };
    let parts = maps.chunks(AT_ONCE).enumerate();
    parts.map(|(i, part)| Figure { name: name(i), scene: scene(cells, &grid, part) }).collect()
}

/// Returns depth and score of every answer, in percent.
fn scores(cell: &Cell) -> impl Iterator<Item = (f64, f64)> + '_ {
    cell.answers.iter().filter_map(|a| Some((100.0 * a.depth?, 100.0 * a.score)))
}

impl<'a> HeatMap<'a> {
    fn of(cells: &Cells, variant: &'a str, folders: usize) -> Self {
        let mut groups: BTreeMap<(usize, u64), Vec<f64>> = BTreeMap::new();
        for cell in cells.of(variant, None) {
            for (depth, score) in scores(cell) {
                groups.entry((cell.length, depth.to_bits())).or_default().push(score);
            }
        }
        let mean = |v: Vec<f64>| (v.iter().sum::<f64>() / v.len() as f64, v.len());
        let means = groups.into_iter().map(|(place, v)| (place, mean(v))).collect();
        Self { variant, name: short(variant, folders), means }
    }

    fn at(&self, length: usize, depth: f64) -> Option<f64> {
        self.means.get(&(length, depth.to_bits())).map(|(mean, _)| *mean)
    }
}

fn scene(cells: &Cells, grid: &Grid, maps: &[HeatMap]) -> Scene {
    let trained = cells.answers.header.trained_positions;
    let mut keys = vec![LegendEntry::Heat("mean score of a cell".into())];
    if grid.within < grid.lengths.len() {
        keys.push(LegendEntry::Dashes(format!("right of it beyond the trained length ({})", short_count(trained))));
    }
    if maps.iter().any(|m| m.means.len() < grid.lengths.len() * grid.depths.len()) {
        keys.push(LegendEntry::Missed("not run".into()));
    }
    let heading = title(&cells.answers.header, "Where a needle is found, by length and depth");
    let about = "Across: tokens of the text. Down: depth of the needle in it, 0% its beginning, 100% its end".into();
    let prompting = cells.prompting_line("cell", maps.iter().flat_map(|m| m.means.values().map(|(_, n)| *n)));
    let mut page = Page::new(&heading, &[target(&cells.answers.header), about, prompting], &keys);
    let columns = grid.lengths.len() as f64;
    let most = ((CONTENT + 24.0) / (DEPTHS + 26.0 * columns + 24.0)).floor().clamp(1.0, 3.0) as usize;
    let per_row = most.min(maps.len());
    let cell = (220.0 / grid.depths.len() as f64).clamp(3.0, 22.0);
    let height = HEAD + cell * grid.depths.len() as f64 + 20.0;
    for (area, map) in panel_grid(maps.len(), per_row, (MARGIN, CONTENT), page.y, height).into_iter().zip(maps) {
        let kv_share = share_of(cells.of(map.variant, None).map(|c| &c.record));
        let groups: Vec<Vec<f64>> = cells.of(map.variant, None).map(Cell::independent).collect();
        let mean = Estimate::of_groups(&groups).map(|e| e.show(0).replacen(' ', "% ", 1));
        let mean = mean.map(|m| format!("mean {m}{}", if m.contains('%') { "" } else { "%" }));
        let about = [mean, kv_share.map(|h| format!("KV {h} of dense"))];
        head(&mut page.scene, area, &map.name, about.into_iter().flatten());
        draw(&mut page.scene, area, grid, map, cell);
        page.y = area.bottom();
    }
    page.finish(&[])
}

/// Draws the name of a variant above its heat map, and `about` below the name.
fn head(scene: &mut Scene, area: Area, variant: &str, about: impl Iterator<Item = String>) {
    // A long name loses the prefix that all plans share, then gets a smaller size, then is shortened.
    let fits = text_width(variant, GROUP) <= area.w;
    let variant = variant.strip_prefix("retrofit:plan=").filter(|_| !fits).unwrap_or(variant);
    let kind = if text_width(variant, PANEL) > area.w { GROUP } else { PANEL };
    scene.text((area.x, area.y + 8.0), Anchor::Start, kind, shorten(variant, kind, area.w));
    for (i, line) in about.enumerate() {
        let y = area.y + 24.0 + 14.0 * i as f64;
        scene.text((area.x, y), Anchor::Start, TICK, shorten(&line, TICK, area.w));
    }
}

/// Returns the smallest number of parent folders in plan paths that makes the short names of all variants different.
pub(super) fn folders(variants: &[&str]) -> usize {
    let deepest = variants.iter().map(|v| v.matches('/').count()).max().unwrap_or(0);
    let apart = |folders: &usize| {
        let names: BTreeSet<String> = variants.iter().map(|v| short(v, *folders)).collect();
        names.len() == variants.len()
    };
    (0..deepest).find(apart).unwrap_or(deepest)
}

/// Shortens the plan's path in a variant's name to its last `folders` folders and file name; 0 gives
/// `retrofit:plan=dense-4.json`.
pub(super) fn short(variant: &str, folders: usize) -> String {
    let item = |item: &str| match item.split_once("plan=") {
        Some((before, path)) => {
            let parts: Vec<&str> = path.split('/').collect();
            format!("{before}plan={}", parts[parts.len().saturating_sub(folders + 1)..].join("/"))
        }
        None => item.to_string(),
    };
    variant.split(',').map(item).collect::<Vec<_>>().join(",")
}

fn draw(scene: &mut Scene, area: Area, grid: &Grid, map: &HeatMap, h: f64) {
    // A heat map of few lengths is narrower than its area.
    let w = ((area.w - DEPTHS) / grid.lengths.len() as f64).min(84.0);
    let (left, top) = (area.x + DEPTHS, area.y + HEAD);
    for (row, depth) in grid.depths.iter().enumerate() {
        for (column, length) in grid.lengths.iter().enumerate() {
            let cell = Area { x: left + w * column as f64, y: top + h * row as f64, w, h };
            let middle = (cell.x + w / 2.0, cell.y + h / 2.0);
            match map.at(*length, *depth) {
                None if w > 12.0 && h > 9.0 => scene.cross(Ink::Axis, middle),
                None => scene.line((middle.0 - 2.0, middle.1), (middle.0 + 2.0, middle.1), Ink::Axis, THIN),
                Some(score) => {
                    let percent = score.round() as u8;
                    // A thin gap between cells, where there is room for it.
                    let gap = if h > 8.0 { 0.5 } else { 0.0 };
                    let inner = Area { x: cell.x + gap, y: cell.y + gap, w: w - 2.0 * gap, h: h - 2.0 * gap };
                    scene.rect(inner, Ink::Heat(percent));
                    let (kind, text) = (FontSpec { ink: Ink::OnHeat(percent), ..LABEL }, percent.to_string());
                    if h >= 14.0 && text_width(&text, kind) + 4.0 <= w {
                        scene.text(middle, Anchor::Middle, kind, text);
                    }
                }
            }
        }
    }
    for (row, label) in grid.rows(h) {
        scene.text((left - 5.0, top + h * (row + 0.5)), Anchor::End, TICK, label);
    }
    let bottom = top + h * grid.depths.len() as f64;
    let mut labels = Thinning::new(4.0);
    for (column, length) in grid.lengths.iter().enumerate() {
        let (x, label) = (left + w * (column as f64 + 0.5), short_count(*length));
        if labels.keeps_text(x, &label, TICK) {
            scene.text((x, bottom + 9.0), Anchor::Middle, TICK, label);
        }
    }
    if grid.within < grid.lengths.len() {
        let x = left + w * grid.within as f64;
        let line = [(x, top - 4.0), (x, bottom + 3.0)];
        // Outlined in the paper's colour, since cells may be as light or as dark as the line.
        scene.line(line[0], line[1], Ink::Paper, 4.0 * THIN);
        scene.dashes(&line, Ink::Text, 1.5 * THIN);
    }
}
