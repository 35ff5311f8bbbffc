//! Selectors: rules that choose the earlier blocks whose summaries a block reads.
//!
//! A rule is one file with one [`Selector`] and one line in [`SELECTORS`]. It proposes blocks; [`route`] drops
//! duplicates and blocks that are not entirely left of the window.

mod all;
mod benes;
mod bit_reversal;
mod causal_shift;
mod fixed_stride;
mod local;
mod random;
mod xor;

use crate::error::{Error, Result};

/// Supported rules; the first is the default.
pub static SELECTORS: &[&dyn Selector] = &[
    &causal_shift::CausalShift,
    &xor::Xor,
    &bit_reversal::BitReversal,
    &benes::Benes,
    &fixed_stride::FixedStride,
    &random::Random,
    &local::Local,
    &all::All,
];

/// The grid of blocks that routes connect: the context in blocks of `B` positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// `N`, blocks in the context.
    pub blocks: usize,
    /// `w`, blocks in the window besides the query's own.
    pub window: usize,
    /// `u`, the distance of stage 0 in blocks; `w + 1` by default.
    pub unit: usize,
    /// Seed of the `random` rule.
    pub seed: u64,
}

impl Grid {
    /// Returns the number of stages, `S_t = max(1, ceil(log2(ceil(N / u))))`.
    pub fn stages(&self) -> usize {
        let units = self.blocks.div_ceil(self.unit).max(1);
        (units.next_power_of_two().trailing_zeros() as usize).max(1)
    }

    /// Returns the distance of a stage in blocks, `o_s = u · 2^s`.
    pub fn offset(&self, stage: usize) -> usize {
        self.unit.saturating_mul(1usize.checked_shl(stage as u32).unwrap_or(usize::MAX))
    }

    /// Returns the number of blocks that any block can read: `0..readable` are left of the last block's window.
    /// Summaries of later blocks are not stored, so a pool of this many rows suffices for every rule.
    pub fn readable(&self) -> usize {
        self.blocks.saturating_sub(self.window + 1)
    }
}

/// A rule that chooses the blocks to read, per swapped layer, stage and block.
pub trait Selector: std::fmt::Debug + Sync {
    /// Returns the rule's name for `--partner`.
    fn name(&self) -> &'static str;

    /// Returns a one-line description for help texts.
    fn about(&self) -> &'static str;

    /// Returns the length of the cycle in which stages repeat over the swapped layers.
    fn stages(&self, grid: &Grid) -> usize {
        grid.stages()
    }

    /// Returns the blocks that `block` reads in the `layer`-th swapped layer at `stage`.
    fn propose(&self, grid: &Grid, layer: usize, stage: usize, block: usize) -> Vec<usize>;

    /// Returns the number of newest summaries that must be stored for `stage`.
    fn rows(&self, grid: &Grid, stage: usize) -> usize;
}

/// Finds a rule by name.
///
/// # Errors
/// The name is unknown; the message lists the known ones.
pub fn find(name: &str) -> Result<&'static dyn Selector> {
    SELECTORS.iter().find(|s| s.name() == name).copied().ok_or_else(|| {
        let names: Vec<_> = SELECTORS.iter().map(|s| s.name()).collect();
        Error::usage("--partner", format!("`{name}` is not one of {}", names.join(", ")))
    })
}

/// Returns the stages of the `layer`-th swapped layer with `partners` stages per layer (`--partner-count`).
pub fn stages_of(rule: &dyn Selector, grid: &Grid, layer: usize, partners: usize) -> Vec<usize> {
    let cycle = rule.stages(grid).max(1);
    (0..partners.min(cycle)).map(|i| (layer + i) % cycle).collect()
}

/// Returns the blocks whose summaries `block` reads, in ascending order.
pub fn route(rule: &dyn Selector, grid: &Grid, layer: usize, partners: usize, block: usize) -> Vec<usize> {
    let Some(readable) = block.checked_sub(grid.window) else { return vec![] };
    let stages = stages_of(rule, grid, layer, partners);
    let mut blocks: Vec<usize> = stages.iter().flat_map(|s| rule.propose(grid, layer, *s, block)).collect();
    blocks.retain(|n| *n < readable);
    blocks.sort_unstable();
    blocks.dedup();
    blocks
}

/// Returns the number of summary rows that a layer's pool needs.
pub fn rows_needed(rule: &dyn Selector, grid: &Grid, layer: usize, partners: usize) -> usize {
    let most = stages_of(rule, grid, layer, partners).iter().map(|s| rule.rows(grid, *s)).max();
    most.unwrap_or(0).min(grid.readable())
}

/// Returns the share of earlier blocks whose state reaches the last block through `layers` swapped layers, by
/// enumeration.
pub fn reach(rule: &dyn Selector, grid: &Grid, layers: usize, partners: usize) -> f64 {
    if grid.blocks <= 1 {
        return 1.0;
    }
    let mut reached = vec![false; grid.blocks];
    reached[grid.blocks - 1] = true;
    for layer in (0..layers).rev() {
        if reached.iter().all(|r| *r) {
            break;
        }
        let now: Vec<usize> = (0..grid.blocks).filter(|b| reached[*b]).collect();
        for b in now {
            reached[b.saturating_sub(grid.window)..b].fill(true);
            for n in route(rule, grid, layer, partners, b) {
                reached[n] = true;
            }
        }
    }
    let count = reached[..grid.blocks - 1].iter().filter(|r| **r).count();
    count as f64 / (grid.blocks - 1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(blocks: usize, window: usize) -> Grid {
        Grid { blocks, window, unit: window + 1, seed: 7 }
    }

    #[test]
    fn stages_and_offsets_follow_the_definition() {
        let g = grid(64, 4);
        assert_eq!(g.stages(), 4);
        assert_eq!((0..4).map(|s| g.offset(s)).collect::<Vec<_>>(), [5, 10, 20, 40]);
        assert_eq!(grid(512, 0).stages(), 9, "at w = 0 this is the published rule");
    }

    #[test]
    fn no_rule_reads_the_window_the_future_or_a_block_twice() {
        for rule in SELECTORS {
            for (blocks, window) in [(1, 0), (7, 2), (40, 4), (65, 0)] {
                let g = grid(blocks, window);
                for (layer, block) in (0..9).flat_map(|j| (0..blocks).map(move |b| (j, b))) {
                    for partners in 1..4 {
                        let blocks = route(*rule, &g, layer, partners, block);
                        assert!(blocks.windows(2).all(|p| p[0] < p[1]), "{}: {blocks:?}", rule.name());
                        assert!(blocks.iter().all(|n| n + window < block), "{}: {block} reads {blocks:?}", rule.name());
                    }
                }
            }
        }
    }

    #[test]
    fn every_rule_reads_only_rows_that_its_pool_stores() {
        for rule in SELECTORS {
            for (blocks, window) in [(7, 2), (40, 4), (41, 4), (44, 4), (65, 0)] {
                let g = grid(blocks, window);
                for (layer, block) in (0..9).flat_map(|j| (0..blocks).map(move |b| (j, b))) {
                    let rows = rows_needed(*rule, &g, layer, 2);
                    for n in route(*rule, &g, layer, 2, block) {
                        assert!(
                            n + rows >= block.min(g.readable()),
                            "{} stores {rows} rows, {block} reads {n}",
                            rule.name()
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn xor_follows_its_definition() {
        let g = grid(64, 4);
        // Block 37 is place 2 of unit 7; stage 1 pairs unit 7 with unit 5.
        assert_eq!(route(&xor::Xor, &g, 1, 1, 37), [27]);
        // Unit 5 pairs with unit 7, which lies ahead.
        assert_eq!(route(&xor::Xor, &g, 1, 1, 27), Vec::<usize>::new());
    }

    #[test]
    fn bit_reversal_and_benes_order_their_stages() {
        let g = grid(64, 4);
        let first = |rule: &dyn Selector, layers| -> Vec<_> {
            (0..layers).map(|j| 63 - route(rule, &g, j, 1, 63)[0]).collect()
        };
        // Block 63 is unit 12 = 0b1100: only the two high bits point back.
        assert_eq!(route(&bit_reversal::BitReversal, &g, 0, 1, 63), [23]);
        assert_eq!(route(&bit_reversal::BitReversal, &g, 1, 1, 63), [43]);
        assert_eq!(benes::Benes.stages(&g), 6);
        assert_eq!(first(&causal_shift::CausalShift, 5), [5, 10, 20, 40, 5]);
    }

    #[test]
    fn causal_shift_reaches_everything_within_one_more_layer_than_stages() {
        for window in 0..4 {
            for blocks in 1..200 {
                let g = grid(blocks, window);
                assert_eq!(reach(&causal_shift::CausalShift, &g, g.stages() + 1, 1), 1.0, "N {blocks}, w {window}");
            }
        }
        assert!(reach(&local::Local, &grid(64, 1), 5, 1) < 0.1);
    }
}
