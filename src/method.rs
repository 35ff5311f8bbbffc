//! How a model's full-attention layers are run: stock, retrofit or eviction.

use crate::error::Result;
use crate::eviction::EvictionPlan;
use crate::retrofit::RetrofitPlan;
use crate::spec::ModelSpec;

/// A way to run the full-attention layers; sliding layers are the same under each.
///
/// Functions that take `impl Into<Method>` accept a plan as it is: `Some(&plan)` or `None` of a retrofit, `&plan` of an eviction.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Method {
    /// As the model came.
    #[default]
    Stock,
    /// Butterfly attention in the layers that the plan names, the others as they came.
    Butterfly(RetrofitPlan),
    /// Dense attention over the tokens that a rule keeps, in every layer.
    Evict(EvictionPlan),
}

impl Method {
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
    pub fn plan(&self) -> Option<&RetrofitPlan> {
        match self {
            Self::Butterfly(plan) => Some(plan),
            _ => None,
        }
    }

    /// The eviction, if it is one.
    pub fn eviction(&self) -> Option<&EvictionPlan> {
        match self {
            Self::Evict(plan) => Some(plan),
            _ => None,
        }
    }
}

impl From<Option<&RetrofitPlan>> for Method {
    fn from(plan: Option<&RetrofitPlan>) -> Self {
        plan.map_or(Self::Stock, Self::from)
    }
}

impl From<&RetrofitPlan> for Method {
    fn from(plan: &RetrofitPlan) -> Self {
        Self::Butterfly(plan.clone())
    }
}

impl From<&EvictionPlan> for Method {
    fn from(plan: &EvictionPlan) -> Self {
        Self::Evict(plan.clone())
    }
}

impl From<&Self> for Method {
    fn from(method: &Self) -> Self {
        method.clone()
    }
}
