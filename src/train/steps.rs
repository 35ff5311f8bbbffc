//! Optimiser steps over micro-batches.

use super::ranks::{Alone, Ranks};
use super::{AdamW, Layout, Schedule};
use crate::error::{At, Error, ErrorKind, Result};
use candle_core::Tensor;

/// A model with a loss.
pub trait Objective {
    /// Examples of one micro-batch.
    type Batch;

    /// The parameters.
    fn layout(&self) -> &Layout;

    /// The sum of losses over `batch`, how many losses were summed, and the gradient of the sum times `scale`, f32 `[len]`,
    /// given the `weights`, f32 `[len]`.
    ///
    /// # Errors
    /// A batch that does not fit the model, or a backend's failure.
    fn gradient(&self, weights: &Tensor, batch: &Self::Batch, scale: f32) -> Result<(f64, usize, Tensor)>;
}

/// Sums of consecutive gradients as a binary counter keeps them: adjacent pairs, then pairs of pairs. A sum over `2^n` terms
/// is the same, bit for bit, whether one rank makes it or several make aligned parts of it.
#[derive(Debug, Default)]
pub struct Partials(Vec<Option<Tensor>>);

impl Partials {
    /// Adds the next term.
    ///
    /// # Errors
    /// Tensors of different shapes.
    pub fn push(&mut self, mut term: Tensor) -> Result<()> {
        for slot in &mut self.0 {
            match slot.take() {
                Some(earlier) => term = (earlier + term).at("sum of gradients")?,
                None => {
                    *slot = Some(term);
                    return Ok(());
                }
            }
        }
        self.0.push(Some(term));
        Ok(())
    }

    /// The sum of all terms, if any.
    ///
    /// # Errors
    /// Tensors of different shapes.
    pub fn sum(self) -> Result<Option<Tensor>> {
        let mut all: Option<Tensor> = None;
        for part in self.0.into_iter().flatten() {
            all = Some(match all {
                Some(later) => (part + later).at("sum of gradients")?,
                None => part,
            });
        }
        Ok(all)
    }
}

/// What a step did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainStep {
    /// Number of the step, from 1.
    pub step: u64,
    /// Mean loss, nats.
    pub loss: f64,
    /// Norm of the gradient before clipping.
    pub norm: f64,
    /// Learning rate.
    pub rate: f64,
}

/// An objective under training.
pub struct Trainer<O: Objective> {
    objective: O,
    optimiser: AdamW,
    schedule: Schedule,
    ranks: Box<dyn Ranks>,
}

impl<O: Objective> Trainer<O> {
    /// Trains `objective` from the state of `optimiser`.
    pub fn new(objective: O, optimiser: AdamW, schedule: Schedule) -> Self {
        Self { objective, optimiser, schedule, ranks: Box::new(Alone) }
    }

    /// Trains as one of several ranks, all of which start from the same state.
    pub fn among(self, ranks: Box<dyn Ranks>) -> Self {
        Self { ranks, ..self }
    }

    /// The ranks of the run.
    pub fn ranks(&self) -> &dyn Ranks {
        &*self.ranks
    }

    /// The model.
    pub fn objective(&self) -> &O {
        &self.objective
    }

    /// Weights and moments.
    pub fn optimiser(&self) -> &AdamW {
        &self.optimiser
    }

    /// One optimiser step over the mean loss of all ranks' `batches`; this rank's have `examples` losses in all.
    ///
    /// # Errors
    /// No examples, a loss or gradient that is not finite (the weights stay as they were), or a backend's failure.
    pub fn step(&mut self, batches: &[O::Batch], examples: usize) -> Result<TrainStep> {
        let all = self.ranks.sum_numbers([examples as f64, 0.0])?[0];
        let (mut partials, mut loss, mut count) = (Partials::default(), 0f64, 0);
        for batch in batches {
            let (sum, n, gradient) =
                self.objective.gradient(self.optimiser.weights(), batch, (1.0 / all.max(1.0)) as f32)?;
            (loss, count) = (loss + sum, count + n);
            partials.push(gradient)?;
        }
        let Some(gradient) = partials.sum()?.filter(|_| all > 0.0) else {
            return Err(Error::new(ErrorKind::Usage, "training step", "no examples"));
        };
        let gradient = self.ranks.sum(gradient)?;
        let [loss, count] = self.ranks.sum_numbers([loss, count as f64])?;
        let (step, rate) = (self.optimiser.steps() + 1, self.schedule.rate(self.optimiser.steps()));
        let before = self.optimiser.clone();
        let norm = self.optimiser.step(&gradient, rate)?;
        let loss = loss / count;
        if !(loss.is_finite() && norm.is_finite()) {
            self.optimiser = before;
            let message = format!("the loss is {loss}, the gradient's norm {norm}");
            return Err(Error::new(ErrorKind::NotFinite, format!("step {step}"), message));
        }
        Ok(TrainStep { step, loss, norm, rate })
    }
}
