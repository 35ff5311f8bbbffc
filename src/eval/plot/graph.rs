//! The blocks that each block reads, stage by stage, and the reach through the layers, drawn from the routes that the
//! attention operator uses.

use super::page::{LegendEntry, Page, CONTENT};
use super::scene::{Anchor, Area, Scene};
use super::theme::{Ink, HAIR, LABEL, MARGIN, PANEL, THIN, TICK};
use super::Figure;
use crate::cli::short_count;
use crate::error::{Error, Result};
use crate::retrofit::Settings;
use crate::selector::{self, find, route, Grid, Selector};

/// Maximum number of blocks: with more, a block is smaller than a pixel.
const MAX_BLOCKS: usize = 512;
/// Maximum number of blocks whose edges are drawn as single squares; with more, edges are joined into diagonal lines.
const SINGLE_EDGES: usize = 128;
/// Panels per row.
const COLUMNS: usize = 4;

/// Draws the figure of `settings` at `ctx` positions, for a model with `layers` swapped layers.
///
/// # Errors
/// Invalid settings, and grids with too few or too many blocks.
pub fn figure(settings: &Settings, ctx: usize, layers: usize) -> Result<Figure> {
    settings.validate()?;
    let grid = settings.grid(ctx);
    if !(2..=MAX_BLOCKS).contains(&grid.blocks) {
        let message = format!(
            "{ctx} positions are {} blocks of {}; 2 to {MAX_BLOCKS} can be drawn: change --ctx or --block",
            grid.blocks, settings.block
        );
        return Err(Error::usage("--ctx", message));
    }
    let rule = find(&settings.partner)?;
    let drawing = Drawing { rule, grid, partners: settings.partner_count, layers };
    Ok(Figure { name: settings.partner.clone(), scene: drawing.scene(settings, ctx) })
}

struct Drawing {
    rule: &'static dyn Selector,
    grid: Grid,
    partners: usize,
    layers: usize,
}

impl Drawing {
    fn scene(&self, settings: &Settings, ctx: usize) -> Scene {
        let (n, w) = (self.grid.blocks, self.grid.window);
        let cycle = self.rule.stages(&self.grid).max(1);
        let title = format!("Which blocks a block reads: {}, stage by stage", settings.partner);
        let subtitle = format!(
            "{} positions, N = {n} blocks of {} · window {} (w = {w}) · {} per layer · {cycle} {}, repeated through {} swapped {}",
            short_count(ctx),
            settings.block,
            settings.window,
            counted(settings.partner_count, "stage"),
            plural(cycle, "stage"),
            self.layers,
            plural(self.layers, "layer"),
        );
        let mut keys = vec![
            LegendEntry::Patch(Ink::Band, "raw: own block and window".into()),
            LegendEntry::Patch(Ink::Series(1), "summary of one block".into()),
        ];
        if settings.sink_tokens > 0 {
            keys.push(LegendEntry::Patch(
                Ink::Series(2),
                format!("raw: the first {} tokens (sinks)", settings.sink_tokens),
            ));
        }
        let rows = "Rows: the block that reads, from the top. Columns: the block that is read.".to_string();
        let mut page = Page::new(&title, &[subtitle, rows], &keys);
        let (gap, first) = (22.0, 24.0);
        let side = (CONTENT - first - gap * (COLUMNS as f64 - 1.0)) / COLUMNS as f64;
        let row = side + 64.0;
        for stage in 0..cycle {
            let (column, line) = ((stage % COLUMNS) as f64, (stage / COLUMNS) as f64);
            let plot =
                Area { x: MARGIN + first + column * (side + gap), y: page.y + line * row + 34.0, w: side, h: side };
            self.stage(&mut page.scene, plot, stage, settings.sink_tokens > 0);
        }
        page.y += row * cycle.div_ceil(COLUMNS) as f64 + 8.0;
        let share = |layers| selector::reach(self.rule, &self.grid, layers, self.partners);
        let enough = (1..=self.layers).find(|k| share(*k) >= 1.0);
        page.y = self.reach(&mut page.scene, page.y, enough);
        let whole = share(self.layers);
        let need = enough.map_or(String::new(), |k| format!("; {} would do", counted(k, "layer")));
        let note = format!(
            "Reach: {:.0}% of the {} earlier blocks reach the last one through {}{need}. Reach is necessary for using far \
             text, not sufficient: a summary is a mean.",
            100.0 * whole,
            n - 1,
            counted(self.layers, "swapped layer"),
        );
        page.finish(&[note])
    }

    /// Draws one stage: a row per query block, a column per block that is read.
    fn stage(&self, scene: &mut Scene, plot: Area, stage: usize, sinks: bool) {
        let n = self.grid.blocks;
        let cell = plot.w / n as f64;
        let at = |b: usize| b as f64 * cell;
        let cycle = self.rule.stages(&self.grid).max(1);
        let title = match self.rule.name() {
            "causal_shift" if self.partners == 1 => format!("stage {stage}: b − {}", self.grid.offset(stage)),
            _ => format!("stage {stage}"),
        };
        scene.text((plot.x, plot.y - 25.0), Anchor::Start, PANEL, title);
        scene.text((plot.x, plot.y - 10.0), Anchor::Start, TICK, users(stage, cycle, self.layers));

        let left = |b: usize| plot.x + at(b.saturating_sub(self.grid.window));
        let down = |b: usize| plot.y + at(b);
        let mut band: Vec<_> = (0..n).flat_map(|b| [(left(b), down(b)), (left(b), down(b + 1))]).collect();
        band.extend((0..n).rev().flat_map(|b| [(plot.x + at(b + 1), down(b + 1)), (plot.x + at(b + 1), down(b))]));
        scene.polygon(band, Ink::Band);
        if sinks && self.grid.window + 1 < n {
            let x = plot.x + (cell / 4.0).max(0.5);
            scene.line((x, down(self.grid.window + 1)), (x, plot.bottom()), Ink::Series(2), (cell / 2.0).max(1.0));
        }
        for (b, m, length) in self.edges(stage) {
            if n <= SINGLE_EDGES {
                scene.rect(Area { x: plot.x + at(m), y: down(b), w: cell, h: cell }, Ink::Series(1));
            } else {
                let half = cell / 2.0;
                let from = (plot.x + at(m), down(b));
                let to = (plot.x + at(m + length - 1) + 2.0 * half, down(b + length - 1) + 2.0 * half);
                scene.line(from, to, Ink::Series(1), cell.max(1.25));
            }
        }
        frame(scene, plot);
        for b in [0, n / 2, n - 1] {
            let mid = at(b) + cell / 2.0;
            scene.text((plot.x + mid, plot.bottom() + 9.0), Anchor::Middle, TICK, b.to_string());
            if stage.is_multiple_of(COLUMNS) {
                scene.text((plot.x - 5.0, plot.y + mid), Anchor::End, TICK, b.to_string());
            }
        }
        if stage < COLUMNS || stage + COLUMNS >= cycle {
            scene.text((plot.x + plot.w / 2.0, plot.bottom() + 22.0), Anchor::Middle, TICK, "block read");
        }
    }

    /// Returns the edges of a layer at `stage` as (query block, block read, length): joined along diagonals, or of
    /// length 1 where the blocks are few.
    fn edges(&self, stage: usize) -> Vec<(usize, usize, usize)> {
        let mut runs: Vec<(usize, usize, usize)> = vec![];
        let mut open: Vec<usize> = vec![];
        for b in 0..self.grid.blocks {
            let mut next = vec![];
            for m in route(self.rule, &self.grid, stage, self.partners, b) {
                let longer = open.iter().copied().find(|i| {
                    let (b0, m0, length) = runs[*i];
                    (b0 + length, m0 + length) == (b, m)
                });
                match longer.filter(|_| self.grid.blocks > SINGLE_EDGES) {
                    Some(i) => {
                        runs[i].2 += 1;
                        next.push(i);
                    }
                    None => {
                        runs.push((b, m, 1));
                        next.push(runs.len() - 1);
                    }
                }
            }
            open = next;
        }
        runs
    }

    /// Returns the blocks whose state reaches the last block through the first `layers` swapped layers.
    fn reached(&self, layers: usize) -> Vec<bool> {
        let n = self.grid.blocks;
        let mut reached = vec![false; n];
        reached[n - 1] = true;
        for layer in (0..layers).rev() {
            for b in (0..n).filter(|b| reached[*b]).collect::<Vec<_>>() {
                reached[b.saturating_sub(self.grid.window)..b].fill(true);
                for m in route(self.rule, &self.grid, layer, self.partners, b) {
                    reached[m] = true;
                }
            }
        }
        reached
    }

    /// Draws a row per number of layers, filled where a block reaches the last one, and returns the bottom of the rows;
    /// all blocks reach it through `enough` layers.
    fn reach(&self, scene: &mut Scene, top: f64, enough: Option<usize>) -> f64 {
        let n = self.grid.blocks;
        let title = format!("Blocks whose state reaches block {} through the first k swapped layers", n - 1);
        scene.text((MARGIN, top + 8.0), Anchor::Start, PANEL, title);
        let rows = self.layers.min(enough.unwrap_or(0).max(self.rule.stages(&self.grid) + 1)).min(16);
        let (x, w) = (MARGIN + 40.0, CONTENT - 40.0 - 44.0);
        let (cell, height) = (w / n as f64, 15.0);
        let mut y = top + 24.0;
        for k in 1..=rows {
            let reached = self.reached(k);
            let mut b = 0;
            while b < n {
                let length = reached[b..].iter().take_while(|r| **r == reached[b]).count();
                if reached[b] {
                    let area = Area { x: x + b as f64 * cell, y: y + 3.0, w: length as f64 * cell, h: height - 6.0 };
                    scene.rect(area, Ink::Series(0));
                }
                b += length;
            }
            scene.line((x, y + height), (x + w, y + height), Ink::Grid, HAIR);
            scene.text((x - 6.0, y + height / 2.0), Anchor::End, TICK, format!("k = {k}"));
            let share = reached[..n - 1].iter().filter(|r| **r).count() as f64 / (n - 1) as f64;
            scene.text((x + w + 44.0, y + height / 2.0), Anchor::End, LABEL, format!("{:.0}%", 100.0 * share));
            y += height;
        }
        for b in [0, n / 4, n / 2, 3 * n / 4, n - 1] {
            let at = x + (b as f64 + 0.5) * cell;
            scene.text((at, y + 9.0), Anchor::Middle, TICK, b.to_string());
        }
        scene.text((x + w / 2.0, y + 23.0), Anchor::Middle, TICK, "block");
        y + 30.0
    }
}

fn frame(scene: &mut Scene, plot: Area) {
    let (x, y, right, bottom) = (plot.x, plot.y, plot.right(), plot.bottom());
    scene.path(vec![(x, y), (x, bottom), (right, bottom)], Ink::Axis, THIN);
}

fn plural(n: usize, noun: &str) -> String {
    if n == 1 {
        noun.into()
    } else {
        format!("{noun}s")
    }
}

fn counted(n: usize, noun: &str) -> String {
    format!("{n} {}", plural(n, noun))
}

/// Lists the ordinals of the swapped layers at a stage, such as `layers 0, 4, .., 20`.
fn users(stage: usize, cycle: usize, layers: usize) -> String {
    let all: Vec<String> = (stage..layers).step_by(cycle).map(|l| l.to_string()).collect();
    match all.as_slice() {
        [] => "no layer".into(),
        [one] => format!("layer {one}"),
        [a, b] => format!("layers {a}, {b}"),
        [a, b, .., last] if all.len() > 3 => format!("layers {a}, {b}, .., {last}"),
        few => format!("layers {}", few.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawing(blocks: usize, window: usize, partner: &str, partners: usize) -> Drawing {
        let grid = Grid { blocks, window, unit: window + 1, seed: 3 };
        Drawing { rule: find(partner).unwrap(), grid, partners, layers: 24 }
    }

    #[test]
    fn drawn_edges_are_the_routes_single_or_joined_into_lines() {
        for rule in selector::SELECTORS {
            for blocks in [40, 200] {
                let d = drawing(blocks, 4, rule.name(), 2);
                for stage in 0..d.rule.stages(&d.grid) {
                    let along = |(b, m, length): (usize, usize, usize)| (0..length).map(move |i| (b + i, m + i));
                    let mut drawn: Vec<_> = d.edges(stage).into_iter().flat_map(along).collect();
                    drawn.sort_unstable();
                    let routes = |b| route(d.rule, &d.grid, stage, 2, b).into_iter().map(move |m| (b, m));
                    let wanted: Vec<_> = (0..blocks).flat_map(routes).collect();
                    assert_eq!(drawn, wanted, "{} at stage {stage}", rule.name());
                }
            }
        }
        assert_eq!(drawing(200, 4, "causal_shift", 1).edges(0), [(5, 0, 195)], "one diagonal");
    }

    #[test]
    fn the_drawn_reach_is_that_of_the_selector() {
        for rule in selector::SELECTORS {
            let d = drawing(64, 4, rule.name(), 1);
            for k in 1..6 {
                let reached = d.reached(k);
                let share = reached[..63].iter().filter(|r| **r).count() as f64 / 63.0;
                assert_eq!(share, selector::reach(d.rule, &d.grid, k, 1), "{} through {k}", rule.name());
            }
        }
    }

    #[test]
    fn layers_of_a_stage_are_listed_shortly() {
        assert_eq!(users(0, 4, 24), "layers 0, 4, .., 20");
        assert_eq!([users(1, 4, 3), users(3, 4, 3), users(0, 2, 3)], ["layer 1", "no layer", "layers 0, 2"]);
    }

    #[test]
    fn grids_that_cannot_be_drawn_are_refused() {
        for ctx in [64, 128 * 513] {
            let e = figure(&Settings::default(), ctx, 24).err().unwrap().to_string();
            assert!(e.starts_with("--ctx: ") && e.contains("2 to 512 can be drawn"), "{e}");
        }
        assert!(figure(&Settings { window: 100, ..Settings::default() }, 8192, 24).is_err());
    }
}
