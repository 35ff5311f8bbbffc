//! Matrix-vector products of a decode step: supported weight formats, and the launches.

use super::step::Builder;
use crate::error::{Error, Result};
use crate::nn::{Linear, RmsNorm, Weight};
use crate::ops::cuda::{address, address_or_null};
use crate::ops::on_gpu::{blocks_address, Form, Format, Matrix, Product};
use crate::spec::Activation;

/// Returns a weight's format if a kernel supports it.
pub(super) fn format(w: &Weight) -> Option<Format> {
    let (_, columns) = w.dims().ok()?;
    match w {
        Weight::Dense(w) => Format::dense(w.dtype(), columns).filter(|_| w.is_contiguous()),
        Weight::Quantised(w) => Format::blocks(w.dtype(), columns),
    }
}

/// Returns the kernel argument of a weight at `bias`, the address of its bias or 0.
pub(super) fn matrix(w: &Weight, bias: u64) -> Result<Matrix> {
    let format =
        format(w).ok_or_else(|| Error::unsupported("decode graph", "a matrix is held in a form without a kernel"))?;
    let (rows, columns) = w.dims()?;
    let at = match w {
        Weight::Dense(w) => address(w)?,
        Weight::Quantised(w) => blocks_address(w)?,
    };
    Ok(Matrix { format, rows, columns, at, bias })
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
        let mut product = Product { form, x, norm, activation, out, logits: self.logits, state: self.state };
        for run in matrices.chunk_by(|a, b| a.format == b.format) {
            self.launches.push(product.launch(self.gpu, run)?);
            product.out += 4 * run.iter().map(|m| m.rows as u64).sum::<u64>();
        }
        Ok(())
    }
}
