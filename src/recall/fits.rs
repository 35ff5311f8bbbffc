//! Codes fitted to a calibration, kept for the runs that follow: fitting `qpq` takes seconds a layer.

use super::LayerTables;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Entries kept at most; above it all are dropped.
const MOST: usize = 1024;

/// What a layer's codes depend on, given the calibration.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Fit {
    /// Index of the layer.
    pub layer: usize,
    /// Key code, as `--key-code` names it.
    pub key_code: String,
    /// Positions of the context.
    pub ctx: usize,
}

/// Fitted codes by layer, key code and context.
#[derive(Debug, Default)]
pub struct Fits(Mutex<HashMap<Fit, Arc<LayerTables>>>);

impl Fits {
    /// Returns the codes of `fit`: those of an earlier call, or those that `make` returns. Two threads may make the same
    /// at the same time.
    ///
    /// # Errors
    /// Those of `make`.
    pub fn get<E>(&self, fit: Fit, make: impl FnOnce() -> Result<LayerTables, E>) -> Result<Arc<LayerTables>, E> {
        let kept = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tables) = kept().get(&fit) {
            return Ok(tables.clone());
        }
        let made = Arc::new(make()?);
        let mut all = kept();
        if all.len() >= MOST {
            all.clear();
        }
        Ok(all.entry(fit).or_insert(made).clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_fitted_once_per_layer_code_and_context() {
        let fits = Fits::default();
        let fit = |layer: usize, key_code: &str, ctx: usize| Fit { layer, key_code: key_code.into(), ctx };
        let make = || Ok::<_, ()>(LayerTables { keys: vec![], values: vec![] });
        let first = fits.get(fit(0, "pair:1bit", 64), make);
        let again = fits.get(fit(0, "pair:1bit", 64), || Err(()));
        assert!(first.is_ok_and(|a| again.is_ok_and(|b| Arc::ptr_eq(&a, &b))));
        for other in [fit(1, "pair:1bit", 64), fit(0, "pair:2bit", 64), fit(0, "pair:1bit", 65)] {
            assert!(fits.get(other, || Err(())).is_err());
        }
        for ctx in 0..3 * MOST {
            assert!(fits.get(fit(0, "exact", ctx), make).is_ok());
        }
        assert!(fits.0.lock().is_ok_and(|all| all.len() <= MOST));
    }
}
