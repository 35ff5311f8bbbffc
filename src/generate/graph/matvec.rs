//! Matrix-vector products of a decode step: supported weight formats, and the launches.

use super::step::Builder;
use crate::error::{Error, Result};
use crate::nn::{Linear, RmsNorm, Weight};
use crate::ops::cuda::{address, address_or_null};
use crate::ops::on_gpu::{DeviceMatrix, Form, Format, Matvec, MOST};
use crate::spec::Activation;
use crate::storage::Storage;

/// The format of a weight, if a captured step can multiply by it.
pub(super) fn format(w: &Weight) -> Option<Format> {
    let (_, columns) = w.dims().ok()?;
    match w {
        Weight::Dense(w) if w.is_contiguous() => Format::new(Storage::of_tensor(w.dtype())?, columns),
        Weight::Dense(_) | Weight::Factored(_) => None,
        Weight::Blocks(w) => Format::new(w.storage(), columns),
    }
}

/// A weight on the device, with its bias.
pub(super) fn matrix(w: &Weight, bias: u64) -> Result<DeviceMatrix> {
    let format =
        format(w).ok_or_else(|| Error::unsupported("decode graph", "a matrix has no kernel for its format"))?;
    let (rows, columns) = w.dims()?;
    let at = match w {
        Weight::Dense(w) => address(w)?,
        Weight::Blocks(w) => address(w.data())?,
        Weight::Factored(w) => address(w.factors())?,
    };
    Ok(DeviceMatrix { format, rows, columns, at, bias })
}

impl Builder<'_> {
    /// Adds the products of `x` (or of its norm, if given) with `layers`, outputs concatenated: one launch per run of
    /// equal formats.
    pub(super) fn matvec(
        &mut self,
        form: Form,
        layers: &[&Linear],
        x: u64,
        norm: Option<&RmsNorm>,
        out: u64,
        activation: Option<Activation>,
    ) -> Result<()> {
        let norm = norm.map(RmsNorm::parts).map(|(w, eps)| address(w).map(|w| (w, eps))).transpose()?;
        let matrices = layers.iter().map(|l| matrix(l.weight(), address_or_null(l.bias())?));
        let matrices = matrices.collect::<Result<Vec<_>>>()?;
        let mut product = Matvec { form, x, norm, activation, out, logits: self.logits, state: self.state };
        for run in matrices.chunk_by(|a, b| a.format == b.format).flat_map(|run| run.chunks(MOST)) {
            self.launches.push(product.launch(self.gpu, run)?);
            product.out += 4 * run.iter().map(|m| m.rows as u64).sum::<u64>();
        }
        Ok(())
    }
}
