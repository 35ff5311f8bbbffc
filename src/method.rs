//! How a model's full-attention layers are run: the one choice that cache, mixers and budgets are made from.

use crate::error::Result;
use crate::eviction::EvictionPlan;
use crate::retrofit::{RetrofitPlan, Settings};
use crate::spec::ModelSpec;

/// A way to run the full-attention layers; sliding layers are the same under each.
///
/// Functions that take `impl Into<Method>` accept a plan as it is: `Some(&plan)` or `None` of a retrofit, `&plan` of an eviction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method<'a> {
    /// As the model came.
    Stock,
    /// Butterfly attention in the layers that the plan names, the others as they came.
    Butterfly(&'a RetrofitPlan),
    /// Dense attention over the tokens that a rule keeps, in every layer.
    Evict(&'a EvictionPlan),
}

impl<'a> Method<'a> {
    /// Whether it can run `spec`.
    ///
    /// # Errors
    /// Those of [`RetrofitPlan::check`] and [`EvictionPlan::check`].
    pub fn check(&self, spec: &ModelSpec) -> Result<()> {
        match self {
            Self::Stock => Ok(()),
            Self::Butterfly(plan) => plan.check(spec),
            Self::Evict(plan) => plan.check(),
        }
    }

    /// The retrofit, if it is one.
    pub fn plan(&self) -> Option<&'a RetrofitPlan> {
        match self {
            Self::Butterfly(plan) => Some(plan),
            _ => None,
        }
    }

    /// The eviction, if it is one.
    pub fn eviction(&self) -> Option<&'a EvictionPlan> {
        match self {
            Self::Evict(plan) => Some(plan),
            _ => None,
        }
    }

    /// Settings of layer `i` and its ordinal among the layers with butterfly attention, if it has that.
    pub(crate) fn swapped(&self, i: usize) -> Option<(&'a Settings, usize)> {
        let plan = self.plan()?;
        plan.ordinal(i).map(|j| (&plan.settings, j))
    }
}

impl<'a> From<Option<&'a RetrofitPlan>> for Method<'a> {
    fn from(plan: Option<&'a RetrofitPlan>) -> Self {
        plan.map_or(Self::Stock, Self::Butterfly)
    }
}

impl<'a> From<&'a EvictionPlan> for Method<'a> {
    fn from(plan: &'a EvictionPlan) -> Self {
        Self::Evict(plan)
    }
}
