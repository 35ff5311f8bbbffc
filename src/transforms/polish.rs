//! L-BFGS on the factors of a product, in f64.

use super::objective::{Objective, Room};
use super::product::Product;
use argmin::core::{CostFunction, Error, Executor, Gradient, State};
use argmin::solver::linesearch::MoreThuenteLineSearch;
use argmin::solver::quasinewton::LBFGS;
use std::cell::RefCell;

/// Vectors of a tile in f64.
pub(super) const LANES: usize = 8;
/// Steps whose gradients are kept.
const MEMORY: usize = 20;

struct Problem<'a> {
    product: &'a Product,
    index: Vec<Vec<u32>>,
    objective: &'a Objective<f64, LANES>,
    complex: bool,
    /// The line search asks for cost and gradient at one place in two calls.
    last: RefCell<Last>,
}

#[derive(Default)]
struct Last {
    at: Vec<f64>,
    cost: f64,
    gradient: Vec<f64>,
    room: Room<f64, LANES>,
}

/// Splits a flat vector into factors as long as those of `product`.
fn factors(product: &Product, mut flat: &[f64]) -> Vec<Vec<f64>> {
    let mut take = |n: usize| {
        let (own, rest) = flat.split_at(n);
        flat = rest;
        own.to_vec()
    };
    product.factors().iter().map(|f| take(f.len())).collect()
}

impl Problem<'_> {
    fn evaluate(&self, at: &[f64]) -> std::cell::RefMut<'_, Last> {
        let mut last = self.last.borrow_mut();
        if last.at != at {
            let factors = factors(self.product, at);
            let mut gradient = vec![0.0; at.len()];
            let steps = self.product.hard(&factors, &self.index);
            // Mean square times N, so that costs of all sizes are alike; the gradient is of half the sum of squares.
            let error = self.objective.evaluate(&steps, self.complex, &mut gradient, &mut last.room);
            let n = self.product.shape().size as f64;
            gradient.iter_mut().for_each(|g| *g *= 2.0 / n);
            (last.at, last.cost, last.gradient) = (at.to_vec(), error * error * n, gradient);
        }
        last
    }
}

impl CostFunction for Problem<'_> {
    type Param = Vec<f64>;
    type Output = f64;

    fn cost(&self, at: &Vec<f64>) -> Result<f64, Error> {
        Ok(self.evaluate(at).cost)
    }
}

impl Gradient for Problem<'_> {
    type Param = Vec<f64>;
    type Gradient = Vec<f64>;

    fn gradient(&self, at: &Vec<f64>) -> Result<Vec<f64>, Error> {
        Ok(self.evaluate(at).gradient.clone())
    }
}

/// Returns the product with better factors and its error on every column: after `iterations`, or once the error is
/// below `enough`.
pub(super) fn polish(
    product: &Product,
    (objective, complex): (&Objective<f64, LANES>, bool),
    iterations: u64,
    enough: f64,
) -> (Product, f64) {
    let start: Vec<f64> = product.factors().iter().flatten().map(|w| f64::from(*w)).collect();
    let index = product.permuted();
    let n = product.shape().size as f64;
    let problem = Problem { product, index, objective, complex, last: RefCell::default() };
    let solver = LBFGS::new(MoreThuenteLineSearch::new(), MEMORY);
    let found = Executor::new(problem, solver)
        .configure(|state| state.param(start).max_iters(iterations).target_cost(enough * enough * n))
        .timer(false)
        .run();
    let mut better = product.clone();
    // A line search that fails ends the descent; what it had found is lost, and the product stays.
    if let Some(flat) = found.ok().and_then(|f| f.state().get_best_param().cloned()) {
        let flat = factors(product, &flat);
        for (to, from) in better.factors_mut().iter_mut().zip(flat) {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = from as f32);
        }
    }
    let error = error_of(&better, (objective, complex));
    match error_of(product, (objective, complex)) {
        before if before < error => (product.clone(), before),
        _ => (better, error),
    }
}

/// The error of a product on every column, of its factors in f32, computed in f64.
pub(super) fn error_of(product: &Product, (objective, complex): (&Objective<f64, LANES>, bool)) -> f64 {
    let wide: Vec<Vec<f64>> = product.factors().iter().map(|f| f.iter().map(|w| f64::from(*w)).collect()).collect();
    objective.error(&product.hard(&wide, &product.permuted()), complex)
}
