//! Backward elimination of layers (sequential backward selection, Marill and Green 1963,
//! <https://doi.org/10.1109/TIT.1963.1057810>).
//!
//! Where two layers can compensate for each other, swapping either alone has no effect, and a ranking by single swaps
//! places both last. Backward elimination scores, in every round, each layer that is still dense in addition to those
//! already swapped:
//!
//! ```text
//! S = {}                                                  // swapped
//! while layers are left:
//!     sensitivity(l) = degradation of the model with S + {l} swapped, for every l not in S
//!     S += the least sensitive quarter of the layers left, at least one
//! ```
//!
//! Layers are kept dense in the reverse of the order in which they were swapped. This takes about three times as many
//! scores as swapping every layer once.

use crate::error::Result;
use crate::eval::report::{by_sensitivity, EliminationRound, LayerScore};

/// Returns the number of layers that a round swaps, of `left`.
fn quarter(left: usize) -> usize {
    (left / 4).max(1)
}

/// Returns the number of scores computed in the rounds after the first, for `layers` layers.
pub fn scores_after_first(layers: usize) -> usize {
    let after = |left: &usize| Some(left - quarter(*left)).filter(|left| *left > 1);
    std::iter::successors(after(&layers), after).sum()
}

/// Ranks the layers of `first`, most sensitive first, and returns the ranking with the rounds after the first.
/// `score(swapped, left)` scores each layer of `left`, swapped in addition to `swapped`.
///
/// # Errors
/// The errors of `score`.
pub fn eliminate(
    first: &[LayerScore],
    sensitivity: impl Fn(&LayerScore) -> f64,
    mut score: impl FnMut(&[usize], &[usize]) -> Result<Vec<LayerScore>>,
) -> Result<(Vec<usize>, Vec<EliminationRound>)> {
    let (mut gone, mut rounds): (Vec<usize>, Vec<EliminationRound>) = (vec![], vec![]);
    let mut left = by_sensitivity(first, &sensitivity);
    while !left.is_empty() {
        // The least sensitive layers are at the end.
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

    /// Degradation of a model in which layers 2 and 5 compensate for each other and layer 3 matters a little by itself.
    fn sensitivity_of(swapped: &[usize]) -> f64 {
        let has = |l| swapped.contains(&l);
        0.001 * swapped.len() as f64 + f64::from(u8::from(has(2) && has(5))) + 0.1 * f64::from(u8::from(has(3)))
    }

    #[test]
    fn one_of_two_layers_that_compensate_for_each_other_is_kept() -> Result<()> {
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
        // The first round scores 28 layers; the others 21, 16, 12, 9, 7, 6, 5, 4, 3 and 2.
        assert_eq!(scores_after_first(28), 85);
        assert_eq!((scores_after_first(1), scores_after_first(2), scores_after_first(3)), (0, 0, 2));
    }
}
