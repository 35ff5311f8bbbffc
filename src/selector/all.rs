//! `all`: every completed block left of the window; the only rule whose work per query grows with the text.

use super::{Grid, Selector};

#[derive(Debug)]
pub(super) struct All;

impl Selector for All {
    fn name(&self) -> &'static str {
        "all"
    }

    fn about(&self) -> &'static str {
        "all completed blocks left of the window (work grows with the text)"
    }

    fn propose(&self, grid: &Grid, _: usize, _: usize, block: usize) -> Vec<usize> {
        (0..block.saturating_sub(grid.window)).collect()
    }

    fn rows(&self, grid: &Grid, _: usize) -> usize {
        grid.readable()
    }
}
