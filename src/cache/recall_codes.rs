//! Codes of exact recall in ordinary memory, by KV head.

use super::HostStore;
use crate::error::Result;
use crate::layout::RecallLayer;
use crate::ops::recall::Rest;
use crate::ops::view;
use crate::recall::{HeadCode, KeyFit, LayerTables, ValueFit};
use crate::retrofit::{CodeFit, RestKind};
use std::sync::Arc;

/// Key codes, and value codes or block means.
#[derive(Debug)]
pub struct CpuCodes {
    /// What codes are written with.
    tables: Arc<LayerTables>,
    /// What codes are read with: the same, unless they follow the text.
    read: Arc<LayerTables>,
    /// Sums of the text so far, by KV head; empty where codes stay those of the calibration.
    fits: Vec<(KeyFit, ValueFit)>,
    /// `[positions, bytes]`.
    keys: Vec<Vec<u8>>,
    /// `[positions, bytes]`; empty without them.
    values: Vec<Vec<u8>>,
    /// Means of values, `[blocks, D]`; empty without them.
    means: Vec<Vec<f32>>,
    block: usize,
    sink_tokens: usize,
    rest: RestKind,
    ctx: usize,
    dim: usize,
}

impl CpuCodes {
    /// Allocates the codes of `layer`, with heads of `dim` channels.
    pub fn new(layer: &RecallLayer, tables: Arc<LayerTables>, dim: usize) -> Self {
        let (s, ctx) = (&layer.settings, layer.ctx);
        let of = |kind: RestKind| tables.values.iter().filter(move |_| s.rest == kind);
        let fits = tables.keys.iter().filter(|_| s.code_fit == CodeFit::Text);
        Self {
            read: tables.clone(),
            fits: fits.map(|_| (KeyFit::new(dim), ValueFit::new(dim))).collect(),
            keys: tables.keys.iter().map(|k| vec![0; layer.coded() * k.bytes()]).collect(),
            values: of(RestKind::Codes).map(|v| vec![0; layer.coded() * v.bytes()]).collect(),
            means: of(RestKind::Means).map(|_| vec![0.0; ctx.div_ceil(s.block) * dim]).collect(),
            block: s.block,
            sink_tokens: s.sink_tokens,
            rest: s.rest,
            tables,
            ctx,
            dim,
        }
    }

    /// Codes `tokens` positions from `start` on, which are in `store`. Those of a prompt, but for sinks, are among the
    /// tokens that codes which follow the text are refitted to.
    ///
    /// # Errors
    /// A store for a GPU.
    pub fn push(&mut self, store: &HostStore, start: usize, tokens: usize, prompt: bool) -> Result<()> {
        let rows = view(store.rows()?, "recall store")?;
        let (dim, from, end) = (self.dim, start.max(self.sink_tokens), start + tokens);
        let fits = if prompt && from < end { self.fits.as_mut_slice() } else { &mut [] };
        let mut fits = fits.iter_mut();
        // Cloned once, when the first tokens of a text come.
        let mut read = (fits.len() > 0).then(|| Arc::make_mut(&mut self.read));
        for (g, exact) in rows.values::<f32>()?.chunks_exact(self.ctx * 2 * self.dim).enumerate() {
            let row = |p: usize, part: usize| &exact[(2 * p + part) * self.dim..][..self.dim];
            let code = &self.tables.keys[g];
            let mut fit = fits.next().zip(read.as_deref_mut());
            let first = start / code.page() * code.page();
            let keys: Vec<f32> = (first..end).flat_map(|p| row(p, 0)).copied().collect();
            code.encode(&keys, &mut self.keys[g][first * code.bytes()..]);
            if let (Some(((fit, _), read)), Some(code)) = (&mut fit, code.scalar()) {
                fit.add(code, &keys[(from - first) * dim..], &self.keys[g][from * code.bytes..end * code.bytes]);
                read.keys[g] = Arc::new(fit.fitted(code));
            }
            if let Some(codes) = self.values.get_mut(g) {
                let code = &self.tables.values[g];
                let values: Vec<f32> = (start..end).flat_map(|p| row(p, 1)).copied().collect();
                code.encode(&values, &mut codes[start * code.bytes()..]);
                if let Some(((_, fit), read)) = &mut fit {
                    let codes = &codes[from * code.bytes()..end * code.bytes()];
                    fit.add(&mut read.values[g], dim, &values[(from - start) * dim..], codes);
                }
            }
            if let Some(means) = self.means.get_mut(g) {
                for p in from..end {
                    let n = p / self.block;
                    // The block's far positions up to this one: sinks are not among them.
                    let count = (p + 1 - (n * self.block).max(self.sink_tokens)) as f32;
                    let mean = &mut means[n * self.dim..][..self.dim];
                    mean.iter_mut().zip(row(p, 1)).for_each(|(m, v)| *m += (v - *m) / count);
                }
            }
        }
        Ok(())
    }

    /// Returns the key codes by KV head.
    pub fn keys(&self) -> Vec<&[u8]> {
        slices(&self.keys)
    }

    /// Returns the rows that estimate values, by KV head.
    pub fn value_rows(&self) -> ValueRows<'_> {
        ValueRows { codes: slices(&self.values), means: slices(&self.means) }
    }

    /// Returns what estimates values, over slices of [`CpuCodes::value_rows`].
    pub fn rest<'a>(&'a self, rows: &'a ValueRows<'a>) -> Rest<'a> {
        match self.rest {
            RestKind::None => Rest::None,
            RestKind::Means => Rest::Means { block: self.block, means: &rows.means },
            RestKind::Codes => Rest::Codes { code: &self.read.values, codes: &rows.codes },
        }
    }

    /// Returns the codes that keys are scored with, by KV head.
    pub fn key_codes(&self) -> &[Arc<dyn HeadCode>] {
        &self.read.keys
    }

    /// Returns the allocated bytes of key codes, and of value codes or means.
    pub fn bytes(&self) -> (u64, u64) {
        let values: usize = self.values.iter().map(Vec::len).sum();
        let means: usize = self.means.iter().map(|m| 4 * m.len()).sum();
        (self.keys.iter().map(|c| c.len() as u64).sum(), (values + means) as u64)
    }
}

/// Slices of a layer's value codes and means, by KV head.
#[derive(Debug)]
pub struct ValueRows<'a> {
    codes: Vec<&'a [u8]>,
    means: Vec<&'a [f32]>,
}

fn slices<T>(rows: &[Vec<T>]) -> Vec<&[T]> {
    rows.iter().map(Vec::as_slice).collect()
}
