//! Figures of results: SVG and PNG, for light and dark pages, drawn from results JSON alone.
//!
//! ```text
//! report (JSON) --> kinds --> one file per figure --> Scene (plain shapes) --> render --> save
//! selector -----------------> graph -----------------^
//! ```
//!
//! | file | draws |
//! |---|---|
//! | `ladder/` | time, memory and decode of every engine by context, and ratios to the best stock |
//! | `kernels` | a roofline with each case's share of its ceiling |
//! | `quality/` | answers, distributions, layers, settings, positions |
//! | `character/` | training, bits per character by position and context, and recall of the character model |
//! | `transforms/` | errors and seconds of learned transforms by size |
//! | `graph` | the blocks that each block reads, and the reach |
//!
//! A figure is a function from a record to a [`scene::Scene`]. Its colours, type sizes and line widths come from
//! [`theme`] alone, so a change there changes every figure.
//!
//! | file | what figures share |
//! |---|---|
//! | `page` | title, legend and notes around the panels |
//! | `panel`, `axis`, `scale` | a plot with axes, the mapping of values to places, ticks |
//! | `text`, `labels` | text width, line breaking and shortening, placement of labels |
//! | `scene`, `theme`, `render`, `save` | shapes, colours, SVG and PNG, files |
//! | `kinds` | the kinds of results files that have figures, one line each |

mod args;
mod axis;
mod character;
mod graph;
mod kernels;
mod kinds;
mod labels;
mod ladder;
mod page;
mod panel;
mod quality;
pub mod render;
mod save;
mod scale;
pub mod scene;
mod target;
mod text;
pub mod theme;
mod transforms;

pub use args::{run, Cli, Command, FactorsArgs, FileArgs, GraphArgs};

/// A drawn figure.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// Name of the figure in file names.
    pub name: String,
    /// Drawing of the figure.
    pub scene: scene::Scene,
}

#[cfg(test)]
mod tests {
    use super::scene::{Area, Scene, Shape};
    use super::text::text_area;
    use super::*;
    use crate::eval::report::{read, Kernels, Ladder, KERNELS, LADDER};
    use crate::retrofit::Settings;
    use std::path::Path;

    fn ladder_of(change: impl FnOnce(&mut Ladder)) -> Vec<Figure> {
        let path = Path::new("tests/fixtures/bench/ladder.json");
        let mut ladder: Ladder = read(path, LADDER).unwrap();
        change(&mut ladder);
        ladder::figures(&ladder, path).unwrap().0
    }

    fn kernels_of(change: impl FnOnce(&mut Kernels)) -> Vec<Figure> {
        let path = Path::new("tests/fixtures/bench/kernels.json");
        let mut report: Kernels = read(path, KERNELS).unwrap();
        change(&mut report);
        kernels::figures(&report, path).unwrap()
    }

    /// Asserts that texts overlap neither each other nor the edge of the page, and that marks are on the page.
    pub(super) fn assert_tidy(what: &str, scene: &Scene) {
        let page = Area { x: 0.0, y: 0.0, w: theme::WIDTH, h: scene.height };
        let on_page = |x: f64, y: f64| (0.0..=page.w).contains(&x) && (0.0..=page.h).contains(&y);
        let mut texts: Vec<(Area, &str)> = vec![];
        for shape in &scene.shapes {
            match shape {
                Shape::Text { at, anchor, kind, text } => {
                    let area = text_area(*at, *anchor, *kind, text);
                    assert!(
                        on_page(area.x, area.y) && on_page(area.right(), area.bottom()),
                        "{what}: `{text}` leaves the page: {area:?}"
                    );
                    if let Some((_, other)) = texts.iter().find(|(a, _)| a.overlaps(&area)) {
                        panic!("{what}: `{text}` overlaps `{other}`");
                    }
                    texts.push((area, text));
                }
                Shape::Path { points, .. } | Shape::Polygon { points, .. } => {
                    assert!(points.iter().all(|p| on_page(p.0, p.1)), "{what}: a line leaves the page: {points:?}");
                }
                Shape::Rect { area, .. } => {
                    assert!(on_page(area.x, area.y) && on_page(area.right(), area.bottom()), "{what}: {area:?}");
                }
                Shape::Dot { at, .. } => assert!(on_page(at.0, at.1), "{what}: a dot leaves the page: {at:?}"),
            }
        }
    }

    #[test]
    fn no_text_overlaps_another_or_is_clipped() {
        let mut all = vec![("as measured", ladder_of(|_| ()))];
        all.push(("no run ended well", {
            ladder_of(|l| l.runs.iter_mut().for_each(|r| (r.status, r.samples) = ("CUDA out of memory".into(), vec![])))
        }));
        all.push(("one context", ladder_of(|l| l.runs.truncate(3))));
        all.push(("long names", {
            ladder_of(|l| {
                l.header.name = "Some-Organisation/A-Model-With-A-Remarkably-Long-Name-0.5B-Instruct".repeat(3);
                l.header.machine.device = "A device whose driver is proud of it, revision 17".into();
                l.runs.iter_mut().filter(|r| r.variant == "sdpa").for_each(|r| r.variant = "x".repeat(200));
            })
        }));
        all.push(("many variants", {
            ladder_of(|l| {
                let own: Vec<_> = l.runs.iter().filter(|r| r.variant == "retrofit").cloned().collect();
                for window in [64, 128, 256, 1024, 2048, 4096] {
                    let variant = format!("retrofit:window={window},partner=bit_reversal");
                    l.runs.extend(
                        own.iter().cloned().map(|r| crate::eval::report::LadderRun { variant: variant.clone(), ..r }),
                    );
                }
            })
        }));
        all.push(("odd contexts", {
            ladder_of(|l| (0..).zip(&mut l.runs).for_each(|(i, r)| r.ctx = 30_000 + 777 * i))
        }));
        all.push(("kernels", kernels_of(|_| ())));
        all.push(("many kernels in one place", {
            kernels_of(|k| {
                let one = k.kernels[0].clone();
                k.kernels.extend(std::iter::repeat_n(one, 20));
            })
        }));
        all.push(("slow kernels", kernels_of(|k| k.kernels.iter_mut().for_each(|k| k.samples_s = vec![1e3, 2e3]))));
        for partner in crate::selector::SELECTORS {
            for (ctx, window) in [(8192, 512), (65536, 512), (1000, 0), (4096, 8192)] {
                let settings = Settings { partner: partner.name().into(), window, ..Settings::default() };
                all.push(("graph", vec![graph::figure(&settings, ctx, 24).unwrap()]));
            }
        }
        for (what, figures) in &all {
            for figure in figures {
                assert_tidy(&format!("{what}, {}", figure.name), &figure.scene);
            }
        }
    }
}
