//! `causal_shift`, the default: block `b` reads block `b - o_s`.
//!
//! Distances double from stage to stage, so that several layers together cover any distance by its binary digits
//! (docs/theory.md). Only the last `o_s` summaries are read, which bounds the pool.

use super::{Grid, Selector};

#[derive(Debug)]
pub(super) struct CausalShift;

impl Selector for CausalShift {
    fn name(&self) -> &'static str {
        "causal_shift"
    }

    fn about(&self) -> &'static str {
        "the block (w + 1) * 2^s blocks back at stage s, w the window in blocks"
    }

    fn propose(&self, grid: &Grid, _: usize, stage: usize, block: usize) -> Vec<usize> {
        block.checked_sub(grid.offset(stage)).into_iter().collect()
    }

    fn rows(&self, grid: &Grid, stage: usize) -> usize {
        grid.offset(stage)
    }
}
