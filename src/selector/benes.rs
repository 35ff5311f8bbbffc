//! `benes`: `xor` with stages up and down again, as in a Beneš network: 0, 1, .., S_t - 1, S_t - 2, .., 1.

use super::{xor, Grid, Selector};

#[derive(Debug)]
pub(super) struct Benes;

fn bit(grid: &Grid, stage: usize) -> usize {
    let top = grid.stages() - 1;
    top - top.abs_diff(stage)
}

impl Selector for Benes {
    fn name(&self) -> &'static str {
        "benes"
    }

    fn about(&self) -> &'static str {
        "xor with stages up and down again, as in a Beneš network"
    }

    fn stages(&self, grid: &Grid) -> usize {
        (2 * (grid.stages() - 1)).max(1)
    }

    fn propose(&self, grid: &Grid, _: usize, stage: usize, block: usize) -> Vec<usize> {
        xor::partner(grid, bit(grid, stage), block).into_iter().collect()
    }

    fn rows(&self, grid: &Grid, stage: usize) -> usize {
        grid.offset(bit(grid, stage))
    }
}
