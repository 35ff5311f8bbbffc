//! Resuming a run: what it has found after a round, as one safetensors file.

use super::learn::{Learned, Run};
use super::product::Product;
use super::Settings;
use crate::error::{At, Error, Result};
use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

const PLACE: &str = "state";
/// Key of the metadata.
const KEY: &str = "bfly-transform";

/// All but the products.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    /// What the run was of, by the caller's words.
    of: String,
    settings: Settings,
    rounds: usize,
    /// Seconds that it had taken.
    seconds: f64,
    starts: Vec<Start>,
    best: Option<Best>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Start {
    start: usize,
    tried: usize,
    /// Errors of what annealing changes and of the best; none for infinity, which JSON has not.
    now: Option<f64>,
    best: Option<f64>,
    polished: Option<f64>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Best {
    error: f64,
    start: usize,
    rounds: usize,
}

fn finite(x: f64) -> Option<f64> {
    x.is_finite().then_some(x)
}

impl Run<'_> {
    /// The run after some rounds and so many seconds; none before the first descents. `of` names what is learned.
    ///
    /// # Errors
    /// None that a user can mend.
    pub fn save(&self, of: &str, seconds: f64) -> Result<Option<Vec<u8>>> {
        let Some(rounds) = self.rounds else { return Ok(None) };
        let starts = self.searches.iter().map(|s| Start {
            start: s.start,
            tried: s.tried,
            now: finite(s.now.1),
            best: finite(s.best.1),
            polished: finite(s.polished),
        });
        let best = self.best.as_ref().map(|b| Best { error: b.error, start: b.start, rounds: b.rounds });
        let state =
            State { of: of.into(), settings: self.settings.clone(), rounds, seconds, starts: starts.collect(), best };
        let json = serde_json::to_string(&state).map_err(|e| Error::format(PLACE, e))?;
        let own = self.searches.iter().flat_map(|s| [&s.now.0, &s.best.0]);
        let flat: Vec<f32> = own.chain(self.best.as_ref().map(|b| &b.product)).flat_map(Product::flat).collect();
        let products = Tensor::from_vec(flat, self.products(), &Device::Cpu).at(PLACE)?;
        let metadata = HashMap::from([(KEY.to_string(), json)]);
        let bytes = safetensors::serialize([("products", &products)], Some(metadata));
        bytes.map(Some).map_err(candle_core::Error::wrap).at(PLACE)
    }

    /// Rows and numbers of the products of a saved run.
    fn products(&self) -> (usize, usize) {
        let (factors, logits) = self.searches.first().map_or((0, 0), |s| s.now.0.parameters());
        (2 * self.searches.len() + usize::from(self.best.is_some()), factors + logits)
    }

    /// Resumes from what [`save`](Self::save) gave; the rounds that had been done, and the seconds that they had taken.
    ///
    /// # Errors
    /// Bytes that no run has saved, or one of something else or with other settings.
    pub fn restore(&mut self, bytes: &[u8], of: &str) -> Result<(usize, f64)> {
        let wrong = |message: &str| Error::format(PLACE, message);
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| wrong(&format!("is no safetensors: {e}")))?;
        let json = header.metadata().as_ref().and_then(|m| m.get(KEY)).ok_or_else(|| wrong("is of no run"))?;
        let state: State = serde_json::from_str(json).map_err(|e| wrong(&format!("cannot be read: {e}")))?;
        if state.of != of || state.settings != *self.settings {
            return Err(wrong("is of another run"));
        }
        let mut searches = vec![];
        for saved in &state.starts {
            let at = self.searches.iter().position(|s| s.start == saved.start);
            let mut search = self.searches.swap_remove(at.ok_or_else(|| wrong("has a start that this run has not"))?);
            let error = |x: Option<f64>| x.unwrap_or(f64::INFINITY);
            (search.now.1, search.best.1) = (error(saved.now), error(saved.best));
            (search.tried, search.polished) = (saved.tried, error(saved.polished));
            searches.push(search);
        }
        self.searches = searches;
        self.best = state.best.and_then(|b| {
            let product = self.searches.first()?.now.0.clone();
            Some(Learned { product, error: b.error, start: b.start, rounds: b.rounds })
        });
        let tensors = candle_core::safetensors::load_buffer(bytes, &Device::Cpu).at(PLACE)?;
        let products = tensors.get("products").ok_or_else(|| wrong("has no products"))?;
        if products.dims2().ok() != Some(self.products()) {
            return Err(wrong(&format!("has products of {:?}, not {:?}", products.dims(), self.products())));
        }
        let rows: Vec<Vec<f32>> = products.to_vec2().at(PLACE)?;
        let own = self.searches.iter_mut().flat_map(|s| [&mut s.now.0, &mut s.best.0]);
        let all = own.chain(self.best.as_mut().map(|b| &mut b.product));
        all.zip(&rows).for_each(|(product, row)| product.set_flat(row));
        self.rounds = Some(state.rounds);
        Ok((state.rounds, state.seconds))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Transform;
    use super::*;

    #[test]
    fn a_resumed_run_finds_what_one_that_never_stopped_does() -> Result<()> {
        let settings = Settings {
            drawn: 6,
            drawn_steps: 20,
            starts: 5,
            rounds: 4,
            changes: 3,
            relaxed_steps: 60,
            fit_steps: 40,
            kept: 2,
            ..Settings::new("BPP", true, 2, false)
        };
        let matrix = Transform::Dct.matrix(16, 0);
        let mut whole = Run::new((&matrix).into(), &settings, &Device::Cpu)?;
        assert!(whole.save("dct", 1.5)?.is_none(), "nothing is there to save");
        let mut saved = vec![];
        loop {
            let ended = whole.advance(&|_| ())?;
            saved.extend(whole.save("dct", 1.5)?);
            if ended {
                break;
            }
        }
        let want = whole.into_best();
        assert_eq!(saved.len(), 5, "the first descents and four rounds");
        for (rounds, bytes) in saved.iter().enumerate() {
            let mut run = Run::new((&matrix).into(), &settings, &Device::Cpu)?;
            assert_eq!(run.restore(bytes, "dct")?, (rounds, 1.5));
            while rounds < 4 && !run.advance(&|_| ())? {}
            assert_eq!(run.into_best(), want, "from round {rounds}");
        }
        for (of, settings) in [("dst", settings.clone()), ("dct", Settings { seed: 3, ..settings.clone() })] {
            let mut run = Run::new((&matrix).into(), &settings, &Device::Cpu)?;
            let refused = run.restore(&saved[1], of).expect_err("another run").to_string();
            assert!(refused.contains("is of another run"), "{refused}");
        }
        for bytes in [&saved[1][..40], b"{}"] {
            assert!(Run::new((&matrix).into(), &settings, &Device::Cpu)?.restore(bytes, "dct").is_err());
        }
        Ok(())
    }
}
