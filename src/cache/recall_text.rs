//! Tables on a GPU that follow a prompt: what codes decode to, and the sums that it is refitted from.

use crate::error::Result;
use crate::layout::RecallLayer;
use crate::ops::cuda::{address, device};
use crate::ops::recall::{kind, text, Recall, Text};
use crate::recall::{ScalarCode, SUB};
use crate::retrofit::CodeFit;
use candle_core::{DType, Device, Tensor};

/// Tables of a layer under [`CodeFit::Text`].
#[derive(Debug)]
pub(super) struct TextTables {
    /// Means and scales that key codes decode with, f32 `[G, D]`, and sums over the keys, f64 `[G, 5, D]`; `None` without
    /// scalar codes.
    keys: Option<[Tensor; 3]>,
    /// Codewords, f16 `[G · ceil(D / 16) · 256 · 16]`, and how many values each has, u32; `None` without value codes.
    values: Option<[Tensor; 2]>,
    sinks: usize,
}

impl TextTables {
    /// Allocates the tables of `layer`, equal to those of the calibration's key `codes` and of its `codebook` of values; `None`
    /// where codes stay those of the calibration.
    ///
    /// # Errors
    /// Too little memory.
    pub fn new(
        layer: &RecallLayer,
        codes: Option<&[&ScalarCode]>,
        codebook: Option<&Tensor>,
        (kv_heads, dim): (usize, usize),
        on: &Device,
    ) -> Result<Option<Self>> {
        if layer.settings.code_fit == CodeFit::Calibration || (codes.is_none() && codebook.is_none()) {
            return Ok(None);
        }
        let keys = codes.map(|codes| -> Result<_> {
            let all = |f: fn(&ScalarCode) -> &[f32]| codes.iter().flat_map(|c| f(c)).copied().collect::<Vec<f32>>();
            let of = |x: Vec<f32>| Tensor::from_vec(x, (kv_heads, dim), on);
            let sums = Tensor::zeros((kv_heads, 5, dim), DType::F64, on)?;
            Ok([of(all(|c| &c.mean))?, of(all(|c| &c.scale))?, sums])
        });
        let values = codebook.map(|words| -> Result<_> {
            Ok([words.copy()?, Tensor::zeros(words.elem_count() / SUB, DType::U32, on)?])
        });
        Ok(Some(Self { keys: keys.transpose()?, values: values.transpose()?, sinks: layer.settings.sink_tokens }))
    }

    /// Puts the tables' addresses into the parameters of a step.
    ///
    /// # Errors
    /// The device fails.
    pub fn enter(&self, p: &mut Recall) -> Result<()> {
        if let Some([mean, scale, _]) = &self.keys {
            (p.read_mean, p.read_scale) = (address(mean)?, address(scale)?);
        }
        if let Some([words, _]) = &self.values {
            p.read_codebook = address(words)?;
        }
        Ok(())
    }

    /// Refits the tables to a prompt's chunk from position `start` on, which is coded in the layer of `p`.
    ///
    /// # Shapes
    /// `k`, `v` `[T, G, D]`, contiguous.
    ///
    /// # Errors
    /// The device fails.
    pub fn refit(&mut self, p: &Recall, (k, v): (&Tensor, &Tensor), start: usize) -> Result<()> {
        if start + k.dim(0)? <= self.sinks {
            return Ok(());
        }
        let of = |tensors: Option<&Tensor>| tensors.map_or(Ok(0), address);
        let p = Text {
            k: address(k)?,
            v: address(v)?,
            key_codes: p.key_codes,
            value_codes: p.value_codes,
            mean: p.mean,
            scale: p.scale,
            read_mean: p.read_mean,
            read_scale: p.read_scale,
            fields: p.fields,
            first: p.first,
            levels: p.levels,
            lines: of(self.keys.as_ref().map(|[.., lines]| lines))?,
            read_codebook: p.read_codebook,
            counts: of(self.values.as_ref().map(|[_, counts]| counts))?,
            tokens: k.dim(0)? as i32,
            start: start as i32,
            ctx: p.ctx,
            kv_heads: p.kv_heads,
            dim: p.dim,
            bytes: p.bytes,
            dtype: kind(k.dtype())?,
            sinks: p.sinks,
        };
        for launch in text(device(k)?, p)? {
            // SAFETY: the addresses are those of tensors borrowed or held here, or in the layer of `p`, in the layouts that
            // the kernel's header names.
            unsafe { launch.enqueue(false)? };
        }
        Ok(())
    }
}
