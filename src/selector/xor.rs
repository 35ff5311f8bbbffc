//! `xor`: the partner block of a butterfly network, if it is earlier.

use super::{Grid, Selector};

#[derive(Debug)]
pub(super) struct Xor;

/// Returns the block at the same place in the unit whose index differs in bit `stage`, if it is earlier.
pub(super) fn partner(grid: &Grid, stage: usize, block: usize) -> Option<usize> {
    let unit = block / grid.unit;
    let other = unit ^ (1 << stage);
    (other < unit).then(|| other * grid.unit + block % grid.unit)
}

impl Selector for Xor {
    fn name(&self) -> &'static str {
        "xor"
    }

    fn about(&self) -> &'static str {
        "the block whose unit index differs in bit s, if earlier"
    }

    fn propose(&self, grid: &Grid, _: usize, stage: usize, block: usize) -> Vec<usize> {
        partner(grid, stage, block).into_iter().collect()
    }

    fn rows(&self, grid: &Grid, stage: usize) -> usize {
        // An earlier partner has the bit cleared, so it lies exactly this far back.
        grid.offset(stage)
    }
}
