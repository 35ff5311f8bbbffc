//! Reading a CPU tensor's values in place.

use crate::error::{At, Error, ErrorKind, Result};
use candle_core::{Storage, Tensor, WithDType};
use std::ops::Deref;

/// A contiguous CPU tensor's storage, locked for reading.
pub struct View<G> {
    guard: G,
    start: usize,
    len: usize,
}

/// Locks a tensor's storage; fails where it is not contiguous or not on the CPU. `what` names it.
pub fn view<'a>(tensor: &'a Tensor, what: &str) -> Result<View<impl Deref<Target = Storage> + 'a>> {
    let (guard, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else {
        return Err(Error::new(ErrorKind::Backend, what, "must be contiguous"));
    };
    match &*guard {
        Storage::Cpu(_) => Ok(View { guard, start, len: end - start }),
        _ => Err(Error::unsupported(what, "this operator has no kernel for the device yet")),
    }
}

/// Locks the storage of a tensor `[rows, G, D]` whose rows and heads may be at any stride; returns the strides too, in
/// elements.
#[allow(clippy::type_complexity)]
pub fn rows_view<'a>(
    tensor: &'a Tensor,
    what: &str,
) -> Result<(View<impl Deref<Target = Storage> + 'a>, (usize, usize))> {
    let (rows, heads, dim) = tensor.dims3()?;
    let (guard, layout) = tensor.storage_and_layout();
    let [row, head, 1] = layout.stride() else {
        return Err(Error::new(ErrorKind::Backend, what, "must have contiguous heads"));
    };
    let (start, strides) = (layout.start_offset(), (*row, *head));
    let len = if rows * heads == 0 { 0 } else { (rows - 1) * row + (heads - 1) * head + dim };
    match &*guard {
        Storage::Cpu(_) => Ok((View { guard, start, len }, strides)),
        _ => Err(Error::unsupported(what, "this operator has no kernel for the device yet")),
    }
}

impl<G: Deref<Target = Storage>> View<G> {
    /// The values.
    ///
    /// # Errors
    /// A tensor of another type than `T`.
    pub fn values<T: WithDType>(&self) -> Result<&[T]> {
        match &*self.guard {
            Storage::Cpu(cpu) => Ok(&cpu.as_slice::<T>().at("tensor")?[self.start..self.start + self.len]),
            _ => Err(Error::unsupported("tensor", "not on the CPU")),
        }
    }
}
