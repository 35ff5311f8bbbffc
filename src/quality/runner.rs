//! One set of weights, run as one variant after another.

use crate::bench::variant::Variant;
use crate::error::{Error, ErrorKind, Result};
use crate::model::Model;

/// A loaded model that changes what it is run as without being read again.
pub struct Runner {
    /// Taken out while it is changed.
    model: Option<Model>,
}

impl Runner {
    /// Runs `model`.
    pub fn new(model: Model) -> Self {
        Self { model: Some(model) }
    }

    /// Hands `f` the model as `variant`, provisioned for `ctx` positions.
    ///
    /// # Errors
    /// A variant that does not fit the model, and those of `f`, with the variant named.
    pub fn run<T>(&mut self, variant: &Variant, ctx: usize, f: impl FnOnce(&Model) -> Result<T>) -> Result<T> {
        let place = || format!("{} at {ctx}", variant.name);
        let lost = || Error::new(ErrorKind::Backend, place(), "the model was lost in an earlier run");
        let model = self.model.take().ok_or_else(lost)?.with_plan(variant.method(), ctx)?;
        let model = self.model.insert(model);
        f(model).map_err(|e| e.within(place()))
    }

    /// What it was built from.
    ///
    /// # Errors
    /// A model that was lost when a plan did not fit it.
    pub fn model(&self) -> Result<&Model> {
        self.model
            .as_ref()
            .ok_or_else(|| Error::new(ErrorKind::Backend, "runner", "the model was lost in an earlier run"))
    }
}
