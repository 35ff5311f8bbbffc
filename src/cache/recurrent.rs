//! State of a recurrent layer: of constant size, whatever was read.

use crate::ops::DeltaState;
use crate::spec::DeltaSpec;

/// State of a Gated DeltaNet layer.
#[derive(Debug, Clone)]
pub struct Recurrent(pub(crate) DeltaState);

impl Recurrent {
    /// The state before the first token.
    pub fn new(spec: &DeltaSpec) -> Self {
        Self(DeltaState::new(spec))
    }

    /// Returns the allocated bytes.
    pub fn bytes(&self) -> u64 {
        self.0.bytes()
    }
}
