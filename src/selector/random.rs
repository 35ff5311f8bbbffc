//! `random`: an earlier block drawn per layer, stage and block from a seed, as a control for the structured rules.

use super::{Grid, Selector};

#[derive(Debug)]
pub(super) struct Random;

/// SplitMix64's output function (Steele, Lea and Flood 2014): a stateless hash of one word.
fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Selector for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn about(&self) -> &'static str {
        "an earlier block drawn at random per layer and block (--seed)"
    }

    fn propose(&self, grid: &Grid, layer: usize, stage: usize, block: usize) -> Vec<usize> {
        let Some(earlier) = block.checked_sub(grid.window).filter(|n| *n > 0) else { return vec![] };
        let word = mix(mix(mix(grid.seed ^ layer as u64) ^ stage as u64) ^ block as u64);
        vec![(word % earlier as u64) as usize]
    }

    fn rows(&self, grid: &Grid, _: usize) -> usize {
        grid.readable()
    }
}
