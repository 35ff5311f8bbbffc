//! `fixed_stride`: the block just left of the window, at every stage.

use super::{Grid, Selector};

#[derive(Debug)]
pub(super) struct FixedStride;

impl Selector for FixedStride {
    fn name(&self) -> &'static str {
        "fixed_stride"
    }

    fn about(&self) -> &'static str {
        "the block just left of the window, at every stage"
    }

    fn propose(&self, grid: &Grid, _: usize, _: usize, block: usize) -> Vec<usize> {
        block.checked_sub(grid.window + 1).into_iter().collect()
    }

    fn rows(&self, grid: &Grid, _: usize) -> usize {
        grid.window + 1
    }
}
