//! `bit_reversal`: `xor` with stages from the highest bit down.

use super::{xor, Grid, Selector};

#[derive(Debug)]
pub(super) struct BitReversal;

fn bit(grid: &Grid, stage: usize) -> usize {
    grid.stages() - 1 - stage
}

impl Selector for BitReversal {
    fn name(&self) -> &'static str {
        "bit_reversal"
    }

    fn about(&self) -> &'static str {
        "xor with stages from the highest bit down"
    }

    fn propose(&self, grid: &Grid, _: usize, stage: usize, block: usize) -> Vec<usize> {
        xor::partner(grid, bit(grid, stage), block).into_iter().collect()
    }

    fn rows(&self, grid: &Grid, stage: usize) -> usize {
        grid.offset(bit(grid, stage))
    }
}
