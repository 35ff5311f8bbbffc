//! One start: Adam on a relaxed product, fits of hardened ones, annealing of the permutations.

use super::objective::{Objective, Room};
use super::product::Product;
use super::Settings;
use crate::stats::normal;
use rand::rngs::StdRng;
use rand::Rng;

/// Vectors of a tile in f32.
pub(super) const LANES: usize = 16;
/// A fit of changed permutations ends after a third of its steps if its error is above this times what would be kept.
const HOPELESS: f64 = 3.0;

/// Adam (Kingma and Ba 2014, arXiv:1412.6980).
struct Adam {
    mean: Vec<f32>,
    square: Vec<f32>,
    steps: i32,
}

impl Adam {
    const DECAYS: [f32; 2] = [0.9, 0.99];

    fn new(len: usize) -> Self {
        Self { mean: vec![0.0; len], square: vec![0.0; len], steps: 0 }
    }

    fn step<'a>(&mut self, weights: impl Iterator<Item = &'a mut f32>, gradient: &[f32], rate: f32) {
        self.steps += 1;
        let [a, b] = Self::DECAYS;
        let (unbias_mean, unbias_square) = (1.0 / (1.0 - a.powi(self.steps)), 1.0 / (1.0 - b.powi(self.steps)));
        for (((w, g), mean), square) in weights.zip(gradient).zip(&mut self.mean).zip(&mut self.square) {
            *mean = a * *mean + (1.0 - a) * g;
            *square = b * *square + (1.0 - b) * g * g;
            *w -= rate * (*mean * unbias_mean) / ((*square * unbias_square).sqrt() + 1e-12);
        }
    }
}

/// A start and where it is.
pub(super) struct Search<'a> {
    settings: &'a Settings,
    objective: Objective<f32, LANES>,
    complex: bool,
    rng: StdRng,
    room: Room<f32, LANES>,
    /// Which start it is.
    pub start: usize,
    /// What annealing changes, and its error.
    pub now: (Product, f64),
    /// The best so far, and its error on the columns of this start.
    pub best: (Product, f64),
    /// Changes tried.
    tried: usize,
}

impl<'a> Search<'a> {
    pub fn new(
        settings: &'a Settings,
        start: usize,
        product: Product,
        (objective, complex): (Objective<f32, LANES>, bool),
        rng: StdRng,
    ) -> Self {
        let now = (product, f64::INFINITY);
        Self { settings, objective, complex, rng, room: Room::default(), start, best: now.clone(), now, tried: 0 }
    }

    /// Steps 1 and 2 of the module's text.
    pub fn relax(&mut self) {
        let (s, product) = (self.settings, &mut self.now.0);
        let (factors, logits) = product.parameters();
        let (mut gradient, mut adam) = (vec![0f32; factors + logits], Adam::new(factors + logits));
        for i in 0..s.relaxed_steps {
            let done = i as f32 / s.relaxed_steps as f32;
            let clean: Vec<Vec<f32>> = product.logits_mut().to_vec();
            for logit in product.logits_mut().iter_mut().flatten() {
                let u = self.rng.random_range(1e-6..1.0 - 1e-6f32);
                *logit += s.logit_noise as f32 * (1.0 - done) * (u / (1.0 - u)).ln();
            }
            self.objective.evaluate(&product.relaxed(), self.complex, &mut gradient, &mut self.room);
            product.logits_mut().clone_from_slice(&clean);
            // A cosine that the fit below goes on from.
            let rate = s.rate as f32 * 0.5 * (1.0 + (0.6 * std::f32::consts::PI * done).cos());
            adam.step(product.all_mut(), &gradient, rate);
            let noise = s.weight_noise as f32 * rate;
            product.all_mut().for_each(|w| *w += noise * normal(&mut self.rng) as f32);
        }
        let product = self.now.0.clone();
        self.now = self.fit(product, s.fit_steps, s.rate / 2.0, f64::INFINITY);
        self.best = self.now.clone();
    }

    /// Tries `count` changes.
    pub fn anneal(&mut self, count: usize) {
        let s = self.settings;
        let levels = self.now.0.shape().levels();
        if self.now.0.permutations() == 0 || levels < 2 {
            return;
        }
        for _ in 0..count {
            if self.best.1 < s.tolerance {
                return;
            }
            let heat = s.heat * (1.0 - self.tried as f64 / (s.rounds * s.changes) as f64);
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
            let tried = self.fit(product, s.change_steps, s.rate / 2.0, HOPELESS * bound);
            if tried.1 < bound {
                self.now = tried;
            }
            if self.now.1 < self.best.1 {
                self.best = self.now.clone();
            }
        }
    }

    /// Fits the factors with hardened permutations, at a rate that falls to 0; returns the best product on the way.
    fn fit(&mut self, mut product: Product, steps: usize, rate: f64, hopeless: f64) -> (Product, f64) {
        let len = product.parameters().0;
        let (mut gradient, mut adam, index) = (vec![0f32; len], Adam::new(len), product.permuted());
        let (mut best, mut least) = (product.factors().to_vec(), f64::INFINITY);
        for i in 0..steps {
            let steps_now = product.hard(product.factors(), &index);
            let error = self.objective.evaluate(&steps_now, self.complex, &mut gradient, &mut self.room);
            if error < least {
                least = error;
                best.clone_from_slice(product.factors());
            }
            if error < self.settings.tolerance || (i == steps / 3 && least > hopeless) {
                break;
            }
            let rate = rate as f32 * (1.0 - i as f32 / steps as f32);
            adam.step(product.factors_mut().iter_mut().flatten(), &gradient, rate);
        }
        product.factors_mut().clone_from_slice(&best);
        (product, least)
    }
}
