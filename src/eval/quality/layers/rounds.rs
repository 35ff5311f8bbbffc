//! Backward elimination of layers (sequential backward selection, Marill and Green 1963,
//! <https://doi.org/10.1109/TIT.1963.1057810>).
//!
//! Where two layers can stand in for each other, swapping either alone does nothing, and a ranking by single swaps ends
//! with neither. Here every round scores the layers that are still dense on top of those already swapped:
//!
//! ```text
//! S = {}                                                  // swapped
//! while layers are left:
//!     harm(l) = what swapping S + {l} does, for every l not in S
//!     S += the quarter of the layers left, at least one, with the least harm
//! ```
//!
//! The order in which layers are kept is the reverse of that in which they were swapped. It costs about three times as
//! many scores as swapping every layer once.

use crate::error::Result;
use crate::eval::report::{by_sensitivity, EliminationRound, LayerScore};

/// The number of layers that a round swaps, of `left`.
fn quarter(left: usize) -> usize {
    (left / 4).max(1)
}

/// The number of scores that the rounds after the first take, of so many layers.
pub fn scores_after_first(layers: usize) -> usize {
    let after = |left: &usize| Some(left - quarter(*left)).filter(|left| *left > 1);
    std::iter::successors(after(&layers), after).sum()
}

/// All layers of `first`, the one to keep longest first, and the rounds after it. `score` takes the layers that are
/// swapped already and those to swap on top of them, one at a time.
///
/// # Errors
/// Those of `score`.
pub fn eliminate(
    first: &[LayerScore],
    sensitivity: impl Fn(&LayerScore) -> f64,
    mut score: impl FnMut(&[usize], &[usize]) -> Result<Vec<LayerScore>>,
) -> Result<(Vec<usize>, Vec<EliminationRound>)> {
    let (mut gone, mut rounds): (Vec<usize>, Vec<EliminationRound>) = (vec![], vec![]);
    let mut left = by_sensitivity(first, &sensitivity);
    while !left.is_empty() {
        // The least harm is at the end.
        let stay = left.len() - quarter(left.len());
        gone.extend(left.drain(stay..).rev());
        if left.len() > 1 {
            let mut swapped = gone.clone();
            swapped.sort_unstable();
            left.sort_unstable();
            let tried = score(&swapped, &left)?;
            left = by_sensitivity(&tried, &sensitivity);
            rounds.push(EliminationRound { swapped, tried });
        }
    }
    gone.reverse();
    Ok((gone, rounds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::report::{AnswerScore, Score, VariantRecord};

    fn single(layer: usize, loss: f64) -> LayerScore {
        let answers = vec![AnswerScore { loss, right: false }];
        LayerScore { layer, score: Score { record: VariantRecord::test("x"), texts: vec![], answers } }
    }

    /// Layers 2 and 5 stand in for each other; layer 3 is a little useful of itself.
    fn sensitivity_of(swapped: &[usize]) -> f64 {
        let has = |l| swapped.contains(&l);
        0.001 * swapped.len() as f64 + f64::from(u8::from(has(2) && has(5))) + 0.1 * f64::from(u8::from(has(3)))
    }

    #[test]
    fn one_of_two_layers_that_stand_in_for_each_other_is_kept() -> Result<()> {
        let sensitivity = |s: &LayerScore| s.score.answers[0].loss;
        let first: Vec<LayerScore> = (0..8).map(|l| single(l, sensitivity_of(&[l]))).collect();
        assert!(!by_sensitivity(&first, sensitivity)[..2].contains(&5), "alone they look harmless");
        let mut seen = vec![];
        let (order, rounds) = eliminate(&first, sensitivity, |swapped, left| {
            seen.push((swapped.to_vec(), left.to_vec()));
            let all = |l: &usize| [swapped, &[*l]].concat();
            Ok(left.iter().map(|l| single(*l, sensitivity_of(&all(l)))).collect())
        })?;
        assert!([2, 5].contains(&order[0]) && order[1] == 3, "{order:?}");
        let mut all = order.clone();
        all.sort_unstable();
        assert_eq!(all, (0..8).collect::<Vec<_>>());
        assert_eq!(seen.len(), rounds.len());
        assert_eq!(rounds.iter().map(|r| r.tried.len()).sum::<usize>(), scores_after_first(8));
        for (swapped, left) in seen {
            let mut both = [swapped, left].concat();
            both.sort_unstable();
            assert_eq!(both, all, "every layer is either swapped or tried");
        }
        Ok(())
    }

    #[test]
    fn rounds_shrink_to_one() {
        // 28 layers are judged one by one first; then 21, 16, 12, 9, 7, 6, 5, 4, 3 and 2.
        assert_eq!(scores_after_first(28), 85);
        assert_eq!((scores_after_first(1), scores_after_first(2), scores_after_first(3)), (0, 0, 2));
    }
}
