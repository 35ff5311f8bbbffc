//! Descents on a CPU: a start a thread.

use super::examples::Examples;
use super::objective::{Objective, Room};
use super::product::Product;
use super::search::Search;
use super::{Settings, HOPELESS};
use crate::stats::normal;
use crate::train::Adam;
use rand::Rng;

/// Vectors of a tile in f32.
const LANES: usize = 16;

/// The descents of one start.
struct Descent<'a> {
    settings: &'a Settings,
    objective: Objective<f32, LANES>,
    complex: bool,
    room: Room<f32, LANES>,
}

impl<'a> Descent<'a> {
    fn new(settings: &'a Settings, examples: &Examples, search: &Search) -> Self {
        let objective = Objective::of_columns(search.now.0.shape(), examples, &search.columns);
        Self { settings, objective, complex: examples.complex(), room: Room::default() }
    }

    /// Fits the factors with hardened permutations, at a rate that falls to 0; returns the best product on the way.
    fn fit(&mut self, mut product: Product, steps: usize, hopeless: f64) -> (Product, f64) {
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
            let rate = self.settings.fit_rate(i, steps);
            adam.step(product.factors_mut().iter_mut().flatten(), &gradient, rate);
        }
        product.factors_mut().clone_from_slice(&best);
        (product, least)
    }
}

/// Descends on the relaxed product of a start.
pub(super) fn relax(search: &mut Search, settings: &Settings, examples: &Examples) {
    let mut descent = Descent::new(settings, examples, search);
    let mut product = search.now.0.clone();
    let (factors, logits) = product.parameters();
    let (mut gradient, mut adam) = (vec![0f32; factors + logits], Adam::new(factors + logits));
    for i in 0..settings.relaxed_steps {
        let [rate, logit_noise, weight_noise] = settings.relaxed_rates(i);
        let clean: Vec<Vec<f32>> = product.logits_mut().to_vec();
        if logit_noise > 0.0 {
            for logit in product.logits_mut().iter_mut().flatten() {
                let u = search.rng.random_range(1e-6..1.0 - 1e-6f32);
                *logit += logit_noise * (u / (1.0 - u)).ln();
            }
        }
        descent.objective.evaluate(&product.relaxed(), descent.complex, &mut gradient, &mut descent.room);
        product.logits_mut().clone_from_slice(&clean);
        adam.step(product.all_mut(), &gradient, rate);
        if weight_noise > 0.0 {
            product.all_mut().for_each(|w| *w += weight_noise * normal(&mut search.rng) as f32);
        }
    }
    search.now.0 = product;
}

/// Fits the factors of a start with hardened permutations.
pub(super) fn fit(search: &mut Search, settings: &Settings, steps: usize, examples: &Examples) {
    let found = Descent::new(settings, examples, search).fit(search.now.0.clone(), steps, f64::INFINITY);
    search.begin(found);
}

/// Tries the changes of a round.
pub(super) fn anneal(search: &mut Search, settings: &Settings, examples: &Examples) {
    let mut descent = Descent::new(settings, examples, search);
    for _ in 0..settings.changes {
        let Some(change) = search.change(settings) else { return };
        let fitted = descent.fit(change.product, settings.change_steps, HOPELESS * change.bound);
        search.consider(fitted, change.bound);
    }
}
