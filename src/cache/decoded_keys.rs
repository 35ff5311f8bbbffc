//! Keys on a GPU whose code has no kernels: coded on the host, stored decoded on the device, scored by a matrix
//! product.
//!
//! An aid for evaluation. A token takes `2 F` bytes of device memory, whatever its code takes, and a step waits for the
//! host twice.

use crate::error::{Error, ErrorKind, Result};
use crate::recall::{HeadCode, HeadRows, LayerTables};
use candle_core::{DType, Device, Tensor};
use half::f16;
use rayon::prelude::*;
use std::f64::consts::LOG2_E;
use std::ops::Range;
use std::sync::Arc;

/// Tokens that one task codes, at least; a multiple of [`crate::recall::PAGE`].
const PIECE: usize = 256;
/// Largest finite f16, to which decoded rows and scores are clamped.
const LARGEST: f32 = 65504.0;

/// Decoded keys of a layer.
#[derive(Debug)]
pub(super) struct DecodedKeys {
    codes: Vec<Arc<dyn HeadCode>>,
    /// Rows of [`HeadCode::decode`], f16 `[G, ctx, F]`.
    rows: Tensor,
    /// Keys `[n, D]` of each KV head from position `from` on: those of a record that may still grow.
    open: Vec<Vec<f32>>,
    from: usize,
    dim: usize,
}

impl DecodedKeys {
    /// Allocates rows for `ctx` positions of heads of `dim` channels.
    ///
    /// # Errors
    /// Too little memory.
    pub fn new(tables: &LayerTables, ctx: usize, dim: usize, on: &Device) -> Result<Self> {
        let codes = tables.keys.clone();
        let length = codes.first().map_or(dim, |c| c.lift(&vec![0.0; dim]).len());
        let rows = Tensor::zeros((codes.len(), ctx, length), DType::F16, on)?;
        Ok(Self { open: vec![vec![]; codes.len()], codes, rows, from: 0, dim })
    }

    /// Returns the allocated bytes of device memory.
    pub fn bytes(&self) -> u64 {
        (self.rows.elem_count() * self.rows.dtype().size_in_bytes()) as u64
    }

    /// Codes and decodes keys from position `start` on, with the tokens that share a record with the first.
    ///
    /// # Shapes
    /// `k [T, G, D]`.
    ///
    /// # Errors
    /// Positions that do not follow those before; the device fails.
    pub fn push(&mut self, k: &Tensor, start: usize) -> Result<()> {
        let (tokens, dim) = (k.dim(0)?, self.dim);
        if self.open.iter().any(|keys| self.from + keys.len() / dim != start) {
            let message = format!("keys at position {start} do not follow those at {}", self.from);
            return Err(Error::new(ErrorKind::Backend, "recall", message));
        }
        let new = k.transpose(0, 1)?.to_dtype(DType::F32)?.contiguous()?.flatten_all()?.to_vec1::<f32>()?;
        for (open, new) in self.open.iter_mut().zip(new.chunks_exact(tokens * dim)) {
            open.extend_from_slice(new);
        }
        let count = start + tokens - self.from;
        let length = self.rows.dim(2)?;
        let pieces: Vec<_> = self
            .codes
            .iter()
            .zip(&self.open)
            .flat_map(|(code, keys)| keys.chunks(PIECE * dim).map(move |keys| (code, keys)))
            .collect();
        let decoded: Vec<Vec<f16>> =
            pieces.into_par_iter().map(|(code, keys)| decoded(code.as_ref(), keys, dim, length)).collect();
        let decoded = Tensor::from_vec(decoded.concat(), (self.codes.len(), count, length), self.rows.device())?;
        self.rows.slice_set(&decoded, 1, self.from)?;
        let page = self.codes.first().map_or(1, |c| c.page());
        let from = (start + tokens) / page * page;
        self.open.iter_mut().for_each(|keys| drop(keys.drain(..(from - self.from) * dim)));
        self.from = from;
        Ok(())
    }

    /// Writes what `recall_scan` writes (kernels/recall.cuh): the scores of the `far` tokens relative to `near`, the
    /// near zone's log-sum-exp, and per slice the largest and the sum of `exp` relative to it, all in the first slice.
    ///
    /// # Shapes
    /// `q [1, H, D]`, `near` f32 `[1, H]`, `scores` f16 `[H, ctx]`, `slices` f32 `[H, slices, 2]`.
    ///
    /// # Errors
    /// The device fails.
    pub fn score(
        &self,
        (q, near): (&Tensor, &Tensor),
        far: Range<usize>,
        factor: f32,
        (scores, slices): (&Tensor, &Tensor),
    ) -> Result<()> {
        let (kv_heads, _, length) = self.rows.dims3()?;
        let (heads, count) = (q.dim(1)?, slices.dim(1)?);
        let group = heads / kv_heads;
        let queries: Vec<f32> =
            q.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?.iter().map(|x| x * factor).collect();
        let lifted = queries.chunks_exact(self.dim).enumerate().flat_map(|(h, q)| self.codes[h / group].lift(q));
        let lifted = Tensor::from_vec(lifted.collect::<Vec<f32>>(), (kv_heads, group, length), q.device())?;
        let rows = self.rows.narrow(1, 0, far.end)?.to_dtype(DType::F32)?;
        let products = lifted.matmul(&rows.t()?)?.reshape((heads, far.end))?;
        let products = products.broadcast_sub(&near.reshape((heads, 1))?)?;
        let new = products.clamp(-LARGEST, LARGEST)?.to_dtype(DType::F16)?;
        scores.slice_set(&new, 1, 0)?;
        // Of the rounded scores, as the kernels' sums are.
        let of_far = new.narrow(1, far.start, far.len())?.to_dtype(DType::F32)?;
        let top = of_far.max_keepdim(1)?;
        let sum = of_far.broadcast_sub(&top)?.exp()?.sum_keepdim(1)?;
        let first = Tensor::stack(&[(top * LOG2_E)?, sum], 2)?;
        // The value of a slice without tokens.
        let empty = Tensor::new(&[-1e30f32, 0.0], q.device())?.broadcast_as((heads, count - 1, 2))?;
        let all = if count > 1 { Tensor::cat(&[&first, &empty], 1)? } else { first };
        Ok(slices.slice_set(&all.contiguous()?, 0, 0)?)
    }
}

/// Returns the decoded rows of the codes of `keys [n, D]`, of which the first begins a record, `[n, length]`.
fn decoded(code: &dyn HeadCode, keys: &[f32], dim: usize, length: usize) -> Vec<f16> {
    let n = keys.len() / dim;
    let mut codes = vec![0; n.next_multiple_of(code.page()) * code.bytes()];
    code.encode(keys, &mut codes);
    // The oracle reads exact keys; no code reads values.
    let exact: Vec<f32> = keys.chunks_exact(dim).flat_map(|k| [k, k]).flatten().copied().collect();
    let mut out = vec![0f32; n * length];
    code.decode(&HeadRows { codes: &codes, exact: &exact }, 0..n, &mut out);
    out.into_iter().map(|x| f16::from_f32(x.clamp(-LARGEST, LARGEST))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recall::{HeadMoments, KeyCodeChoice, ValueCode, SUB, WORDS};

    #[test]
    fn rows_and_sums_are_those_of_the_codes_however_tokens_arrive() -> Result<()> {
        let (dim, n, kv_heads, group, on) = (32, 100, 2, 3, Device::Cpu);
        let moments = HeadMoments {
            key_mean: vec![0.1; dim],
            key_square: vec![1.0; dim],
            key_cross: vec![0.0; dim / 2],
            query_square: vec![1.0; dim],
            query_cross: vec![0.0; dim / 2],
        };
        let statistics = moments.rotated((&vec![0.0; dim / 2], 1.0), 0..n, 0..n);
        let (q, k) = (
            Tensor::randn(0f32, 1.0, (1, kv_heads * group, dim), &on)?,
            Tensor::randn(0f32, 1.0, (n, kv_heads, dim), &on)?,
        );
        for name in ["qpq:1bit", "scalar2", "page", "exact", "pair:2bit"] {
            let choice = KeyCodeChoice::parse(name)?;
            let value = ValueCode::new(dim, vec![0.0; dim.div_ceil(SUB) * WORDS * SUB]);
            let tables = LayerTables {
                keys: vec![choice.fit(&statistics); kv_heads],
                values: value.into_iter().cycle().take(kv_heads).collect(),
            };
            let mut stored = DecodedKeys::new(&tables, 128, dim, &on)?;
            let length = if name == "page" { 2 * dim } else { dim };
            assert_eq!(stored.bytes(), 2 * (kv_heads * 128 * length) as u64);
            let mut start = 0;
            for tokens in [1usize, 36, 1, 1, 61] {
                stored.push(&k.narrow(0, start, tokens)?, start)?;
                start += tokens;
            }
            assert!(stored.push(&k.narrow(0, 0, 1)?, 3).is_err());
            let (scores, slices) =
                (Tensor::zeros((6, 128), DType::F16, &on)?, Tensor::zeros((6, 4, 2), DType::F32, &on)?);
            let near = Tensor::new(&[[0f32, 0.5, 1.0, 1.5, 2.0, 2.5]], &on)?;
            stored.score((&q, &near), 3..90, 0.5, (&scores, &slices))?;
            for h in 0..kv_heads * group {
                let g = h / group;
                let keys = k.narrow(1, g, 1)?.flatten_all()?.to_vec1::<f32>()?;
                let code = &tables.keys[g];
                let mut codes = vec![0; n.next_multiple_of(code.page()) * code.bytes()];
                code.encode(&keys, &mut codes);
                let exact: Vec<f32> = keys.chunks(dim).flat_map(|k| [k, k]).flatten().copied().collect();
                let query: Vec<f32> = q.get(0)?.get(h)?.to_vec1::<f32>()?.iter().map(|x| x * 0.5).collect();
                let mut want = vec![vec![]];
                code.scores(&query, &HeadRows { codes: &codes, exact: &exact }, 3..90, &mut want);
                want[0].iter_mut().for_each(|x| *x -= 0.5 * h as f32);
                let got = scores.get(h)?.narrow(0, 3, 87)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
                assert!(got.iter().zip(&want[0]).all(|(a, b)| (a - b).abs() < 2e-2), "{name}: {got:?} {want:?}");
                // log2 Σ exp over all slices.
                let sums = slices.get(h)?.to_vec2::<f32>()?;
                let total =
                    |top: f64| sums.iter().map(|s| f64::from(s[1]) * (f64::from(s[0]) - top).exp2()).sum::<f64>();
                let top = f64::from(sums[0][0]);
                let lse = (top + total(top).log2()) / LOG2_E;
                let want = want[0].iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
                assert!((lse - want).abs() < 1e-2, "{name}: {lse}, not {want}");
            }
        }
        Ok(())
    }
}
