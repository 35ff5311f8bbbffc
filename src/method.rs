//! Methods: how the full-attention layers run (stock, retrofit or eviction).

use crate::error::Result;
use crate::eviction::EvictionPlan;
use crate::retrofit::RetrofitPlan;
use crate::spec::ModelSpec;

/// How the full-attention layers run; sliding-window layers do not change.
///
/// Functions that take `impl Into<Method>` accept plans: an `Option<&RetrofitPlan>` (`None` is stock), a
/// `&RetrofitPlan` or an `&EvictionPlan`.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Method {
    /// The unmodified model.
    #[default]
    Stock,
    /// Butterfly attention in the layers that the plan lists, dense attention in the others.
    Butterfly(RetrofitPlan),
    /// Dense attention over the tokens that a rule keeps, in every full-attention layer.
    Evict(EvictionPlan),
}

impl Method {
    /// Checks the method's plan against the model `spec`.
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

    /// Returns the retrofit plan, if the method has one.
    pub fn plan(&self) -> Option<&RetrofitPlan> {
        match self {
            Self::Butterfly(plan) => Some(plan),
            _ => None,
        }
    }

    /// Returns the eviction plan, if the method has one.
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
