//! What a model makes of distance: bits per character by position, and what a longer context gains.

use super::{Batch, CharModel, Windows};
use crate::error::{Error, Result};
use candle_core::Tensor;
use std::ops::Range;

/// Ranges of positions: the first `least`, then octaves up to `window`.
pub fn octaves(least: usize, window: usize) -> Vec<Range<usize>> {
    let mut all: Vec<_> = std::iter::once(0..least.min(window)).collect();
    while let Some(end) = all.last().map(|r: &Range<usize>| r.end).filter(|end| *end < window) {
        all.push(end..(2 * end).min(window));
    }
    all
}

fn mean_bits(losses: &[f32]) -> f64 {
    losses.iter().map(|l| f64::from(*l)).sum::<f64>() / losses.len().max(1) as f64 / std::f64::consts::LN_2
}

/// Mean bits per character of each window, in each of `ranges` of positions.
///
/// # Errors
/// A window that is not whole chunks, or a backend's failure.
pub fn bits_by_position(
    model: &CharModel,
    weights: &Tensor,
    windows: &mut Windows,
    count: usize,
    ranges: &[Range<usize>],
    mut progress: impl FnMut(usize),
) -> Result<Vec<Vec<f64>>> {
    let mut all = vec![];
    for i in 0..count {
        let losses = model.losses(weights, &windows.batch(i as u64, 1))?;
        all.push(ranges.iter().map(|r| mean_bits(&losses[r.clone()])).collect());
        progress(i + 1);
    }
    Ok(all)
}

/// Mean bits per character of the last `segment` characters of each window, given the last `context` characters before them
/// alone, for each of `contexts`.
///
/// # Errors
/// A context that the windows do not hold, or lengths that are not whole chunks.
pub fn bits_by_context(
    model: &CharModel,
    weights: &Tensor,
    windows: &mut Windows,
    count: usize,
    (segment, contexts): (usize, &[usize]),
    mut progress: impl FnMut(usize),
) -> Result<Vec<Vec<f64>>> {
    let mut all = vec![];
    for i in 0..count {
        let whole = windows.batch(i as u64, 1);
        let mut own = vec![];
        for context in contexts {
            let from = whole.symbols.len().checked_sub(segment + context).ok_or_else(|| {
                Error::usage("--contexts", format!("{context} and {segment} characters exceed the window"))
            })?;
            let cut = Batch {
                symbols: whole.symbols[from..].to_vec(),
                targets: whole.targets[from..].to_vec(),
                sequences: 1,
            };
            own.push(mean_bits(&model.losses(weights, &cut)?[*context..]));
        }
        all.push(own);
        progress(i + 1);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octaves_cover_the_window() {
        assert_eq!(octaves(1024, 5000), [0..1024, 1024..2048, 2048..4096, 4096..5000]);
        assert_eq!(octaves(1024, 512).last(), Some(&(0..512)));
    }
}
