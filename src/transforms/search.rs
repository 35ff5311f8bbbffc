//! One start: what it has found, and the changes of its permutations that it tries.

use super::product::{Choices, Product};
use super::Settings;
use crate::error::Result;
use crate::ops::factored::Shape;
use crate::train::random;
use rand::rngs::StdRng;
use rand::{seq::index, Rng};

/// A start and where it is.
pub(super) struct Search {
    /// Which start it is.
    pub start: usize,
    /// Columns of the matrix that it compares.
    pub columns: Vec<usize>,
    /// What annealing changes, and its error.
    pub now: (Product, f64),
    /// The best so far, and its error on the columns.
    pub best: (Product, f64),
    /// Its random numbers in this round.
    pub rng: StdRng,
    /// Changes tried.
    pub tried: usize,
    /// Error of `best` when it was last polished.
    pub polished: f64,
}

/// Rounds whose random numbers do not overlap with another start's.
const ROUNDS: u64 = 1 << 32;

/// A change of a permutation that is about to be fitted.
pub(super) struct Change {
    /// The changed product.
    pub product: Product,
    /// Error below which the change is kept, by Metropolis' rule.
    pub bound: f64,
}

impl Search {
    /// Start `start` with random factors, and its columns out of `columns`. Permutations of the first `settings.drawn`
    /// starts are drawn (see [`drawn`]), those of the others relaxed.
    ///
    /// # Errors
    /// As of [`Product::random`].
    pub fn new(settings: &Settings, shape: Shape, columns: usize, start: usize) -> Result<Self> {
        let mut rng = random(settings.seed, start as u64 * ROUNDS);
        let mut product = Product::random(shape, &settings.product, &mut rng)?;
        if start < settings.drawn {
            product.choose(&drawn(settings.seed, start as u64, product.permutations()));
        }
        let columns = index::sample(&mut rng, columns, settings.columns.min(columns)).into_vec();
        let now = (product, f64::INFINITY);
        Ok(Self { start, columns, best: now.clone(), now, rng, tried: 0, polished: f64::INFINITY })
    }

    /// Begins the random numbers of round `round`, from 1 on: a resumed run draws what one that never stopped does.
    pub fn begin_round(&mut self, settings: &Settings, round: usize) {
        self.rng = random(settings.seed, self.start as u64 * ROUNDS + round as u64);
    }

    /// Takes what relaxed steps and the fit after them have found.
    pub fn begin(&mut self, found: (Product, f64)) {
        (self.now, self.best) = (found.clone(), found);
    }

    /// Draws a change of one step of one permutation; none where there is nothing to change or no need.
    pub fn change(&mut self, settings: &Settings) -> Option<Change> {
        let levels = self.now.0.shape().levels();
        if self.now.0.permutations() == 0 || levels < 2 || self.best.1 < settings.tolerance {
            return None;
        }
        let total = settings.rounds * settings.changes;
        let heat = settings.heat * (1.0 - self.tried as f64 / total as f64).max(0.0);
        self.tried += 1;
        let mut product = self.now.0.clone();
        let permutation = self.rng.random_range(0..product.permutations());
        let (level, flips) = (self.rng.random_range(0..levels - 1), self.rng.random_range(1..8usize));
        for (i, logit) in product.logits_mut()[permutation][3 * level..][..3].iter_mut().enumerate() {
            if flips >> i & 1 == 1 {
                *logit = -*logit;
            }
        }
        let bound = self.now.1 * (1.0 - heat * (1.0 - self.rng.random::<f64>()).ln());
        Some(Change { product, bound })
    }

    /// Keeps a fitted change if its error is below its bound.
    pub fn consider(&mut self, fitted: (Product, f64), bound: f64) {
        if fitted.1 < bound {
            self.now = fitted;
        }
        if self.now.1 < self.best.1 {
            self.best = self.now.clone();
        }
    }
}

/// Forms of a permutation that are drawn.
const FORMS: u64 = 15;

/// Permutations of start `start`: each has the same of 8 choices at all steps, or one of the 7 that change something at the
/// first step alone. None of the `15^permutations` comes again before all have come, in an order that the seed moves.
///
/// Logits shared by the steps and a step alone are the permutations of the paper's authors:
/// <https://github.com/HazyResearch/butterfly>, `learning_transforms.py` and `permutation.py`.
fn drawn(seed: u64, start: u64, permutations: usize) -> Vec<Choices> {
    /// A prime that shares no factor with 15.
    const STRIDE: u64 = 7919;
    let all = FORMS.saturating_pow(permutations.min(8) as u32);
    let mut code = (random(seed, u64::MAX).random_range(0..all) + start * STRIDE) % all;
    let mut form = || {
        let form = (code % FORMS) as u8;
        code /= FORMS;
        if form < 8 {
            Choices::EveryStep(form)
        } else {
            Choices::FirstStep(form - 7)
        }
    };
    (0..permutations).map(|_| form()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_two_permutations_is_drawn_once() {
        let all: std::collections::HashSet<_> = (0..225).map(|start| drawn(3, start, 2)).collect();
        assert_eq!(all.len(), 225);
        assert_eq!(drawn(3, 225, 2), drawn(3, 0, 2));
        assert_ne!(drawn(4, 0, 2), drawn(3, 0, 2), "the seed moves the order");
    }
}
