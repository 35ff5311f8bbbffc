//! `causal_shift`: block `b` reads block `b - o_s`. The default.
//!
//! Distances double from stage to stage, so that the binary digits of any distance are reached through the layers
//! (docs/theory.md). Only the last `o_s` summaries are ever read, which bounds the pool.

use super::{Grid, Selector};

#[derive(Debug)]
pub(super) struct CausalShift;

impl Selector for CausalShift {
    fn name(&self) -> &'static str {
        "causal_shift"
    }

    fn about(&self) -> &'static str {
        "the block o_s = (w + 1) * 2^s earlier (default)"
    }

    fn propose(&self, grid: &Grid, _: usize, stage: usize, block: usize) -> Vec<usize> {
        block.checked_sub(grid.offset(stage)).into_iter().collect()
    }

    fn rows(&self, grid: &Grid, stage: usize) -> usize {
        grid.offset(stage)
    }
}
