//! `--record`: first weights and batches of a run, for a comparison with another implementation.

use crate::char::{checkpoint, Batch, CharConfig};
use crate::error::{At, Error, Result};
use crate::ops::training::NO_TARGET;
use crate::train::Layout;
use candle_core::{Device, Tensor};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// What the steps have read so far.
pub(super) struct Record {
    dir: PathBuf,
    symbols: Vec<u8>,
    /// -1 where there is no target.
    targets: Vec<i64>,
    steps: usize,
}

impl Record {
    /// Makes the directory and writes `config.json` and `weights.safetensors`, f32 by parameter.
    pub fn new(dir: &Path, config: &CharConfig, layout: &Layout, weights: &Tensor) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        let path = dir.join("weights.safetensors");
        candle_core::safetensors::save(&checkpoint::named(layout, weights)?, &path).at(path.display())?;
        let text = serde_json::to_string_pretty(config).map_err(|e| Error::format("config.json", e))?;
        std::fs::write(dir.join("config.json"), text).map_err(|e| Error::io(dir.join("config.json"), e))?;
        Ok(Self { dir: dir.into(), symbols: vec![], targets: vec![], steps: 0 })
    }

    /// Adds a step.
    pub fn push(&mut self, batches: &[Batch]) {
        self.steps += 1;
        for batch in batches {
            self.symbols.extend(batch.symbols.iter().map(|s| *s as u8));
            self.targets.extend(batch.targets.iter().map(|t| if *t == NO_TARGET { -1 } else { i64::from(*t) }));
        }
    }

    /// Writes `batches.safetensors`: `symbols` u8 and `targets` i64, `[steps, batch, window]`.
    pub fn finish(self, batch: usize) -> Result<()> {
        let path = self.dir.join("batches.safetensors");
        let shape = (self.steps, batch, self.symbols.len() / (self.steps * batch).max(1));
        let symbols = Tensor::from_vec(self.symbols, shape, &Device::Cpu).at("record")?;
        let targets = Tensor::from_vec(self.targets, shape, &Device::Cpu).at("record")?;
        let all = HashMap::from([("symbols", symbols), ("targets", targets)]);
        candle_core::safetensors::save(&all, &path).at(path.display())
    }
}
