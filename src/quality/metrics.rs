//! How far one set of next-token distributions is from another, position by position, over the whole vocabulary.
//!
//! With `p = softmax(a)` of the reference and `q = softmax(b)` of what is judged:
//!
//! | metric | formula |
//! |---|---|
//! | KL | `Σ p (ln p - ln q)`, in nats: what is lost by coding the reference's text with `q` |
//! | reverse KL | `Σ q (ln q - ln p)` |
//! | top 1 | whether both have the same likeliest token |
//! | overlap | how many tokens are among the likeliest [`TOP`] of both |
//! | loss | `-ln q(next token)`; its mean's exponential is the perplexity |
//!
//! Everything is summed in f64 on the host, over every token: a distance between two lists of likely tokens is another quantity,
//! and says nothing of what lies outside the lists. Equal logits give exactly 0, equal likeliest tokens and the whole overlap.

use crate::error::{Error, ErrorKind, Result};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

/// Tokens whose overlap is counted.
pub const TOP: usize = 50;

/// One position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Position {
    /// KL from the reference, in nats.
    pub kl: f64,
    /// KL from what is judged.
    pub kl_reverse: f64,
    /// Whether the likeliest token is the same.
    pub top1: bool,
    /// Tokens among the likeliest [`TOP`] of both.
    pub overlap: usize,
    /// The reference's loss on the next token, in nats.
    pub reference_loss: f64,
    /// The loss of what is judged.
    pub loss: f64,
}

/// Compares row by row. `next` are the tokens that follow.
///
/// # Shapes
/// `reference` and `judged` f32 `[K, vocab]`, on any device; `next` `[K]`.
///
/// # Errors
/// Shapes that differ, a next token outside the vocabulary, or a logit that is not finite.
pub fn compare(reference: &Tensor, judged: &Tensor, next: &[u32]) -> Result<Vec<Position>> {
    let ((rows, vocab), other) = (reference.dims2()?, judged.dims2()?);
    if other != (rows, vocab) || next.len() != rows || next.iter().any(|id| *id as usize >= vocab) {
        let message = format!("[{rows}, {vocab}] and {other:?} logits and {} next tokens do not fit", next.len());
        return Err(Error::new(ErrorKind::Usage, "metrics", message));
    }
    let (a, b) = (values(reference)?, values(judged)?);
    let row = |(i, id): (usize, &u32)| position(&a[i * vocab..][..vocab], &b[i * vocab..][..vocab], *id as usize);
    next.par_iter().enumerate().map(row).collect()
}

/// The loss of every row alone.
///
/// # Shapes
/// `logits` f32 `[K, vocab]`; `next` `[K]`; the result `[K]`, in nats.
///
/// # Errors
/// As [`compare`].
pub fn losses(logits: &Tensor, next: &[u32]) -> Result<Vec<f64>> {
    Ok(compare(logits, logits, next)?.iter().map(|p| p.loss).collect())
}

fn values(logits: &Tensor) -> Result<Vec<f32>> {
    Ok(logits.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

fn position(a: &[f32], b: &[f32], next: usize) -> Result<Position> {
    let (norm_a, norm_b) = (log_sum(a)?, log_sum(b)?);
    let (mut kl, mut kl_reverse) = (0.0, 0.0);
    for (x, y) in a.iter().zip(b) {
        let (p, q) = (f64::from(*x) - norm_a, f64::from(*y) - norm_b);
        kl += p.exp() * (p - q);
        kl_reverse += q.exp() * (q - p);
    }
    let (top_a, top_b) = (likeliest(a), likeliest(b));
    let overlap = top_a.iter().filter(|id| top_b.contains(id)).count();
    Ok(Position {
        kl,
        kl_reverse,
        top1: argmax(a) == argmax(b),
        overlap,
        reference_loss: norm_a - f64::from(a[next]),
        loss: norm_b - f64::from(b[next]),
    })
}

/// `ln Σ exp(x)`.
fn log_sum(x: &[f32]) -> Result<f64> {
    let most = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = x.iter().map(|v| (f64::from(*v) - f64::from(most)).exp()).sum();
    match x.iter().all(|v| v.is_finite()) {
        true => Ok(f64::from(most) + sum.ln()),
        false => Err(Error::new(ErrorKind::Backend, "metrics", "a logit is not a finite number")),
    }
}

/// The first of the largest, as greedy decode chooses.
fn argmax(x: &[f32]) -> usize {
    (0..x.len()).rev().max_by(|i, j| x[*i].total_cmp(&x[*j])).unwrap_or(0)
}

/// The [`TOP`] largest, of equals the first.
fn likeliest(x: &[f32]) -> Vec<usize> {
    let mut ids: Vec<usize> = (0..x.len()).collect();
    let order = |i: &usize, j: &usize| x[*j].total_cmp(&x[*i]).then(i.cmp(j));
    if TOP < ids.len() {
        ids.select_nth_unstable_by(TOP, order);
        ids.truncate(TOP);
    }
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(rows: &[&[f32]]) -> Tensor {
        let flat: Vec<f32> = rows.concat();
        Tensor::from_vec(flat, (rows.len(), rows[0].len()), &Device::Cpu).unwrap()
    }

    #[test]
    fn two_tokens_by_hand() -> Result<()> {
        // p = (1/4, 3/4), q = (1/2, 1/2).
        let (a, b) = (logits(&[&[0.0, 3f32.ln()]]), logits(&[&[7.0, 7.0]]));
        let got = compare(&a, &b, &[1])?[0];
        let kl = 0.25 * 0.5f64.ln() + 0.75 * 1.5f64.ln();
        let reverse = 0.5 * 2f64.ln() + 0.5 * (2.0 / 3.0f64).ln();
        assert!((got.kl - kl).abs() < 1e-7 && (got.kl_reverse - reverse).abs() < 1e-7, "{got:?}");
        assert!((got.loss - 2f64.ln()).abs() < 1e-12 && (got.reference_loss - (4.0 / 3.0f64).ln()).abs() < 1e-7);
        // Of equals the first is the likeliest.
        assert!(!got.top1 && got.overlap == 2);
        Ok(())
    }

    #[test]
    fn equal_logits_give_exactly_nothing() -> Result<()> {
        let a = (Tensor::randn(0f32, 9.0, (7, 300), &Device::Cpu)?, [3u32, 299, 0, 17, 5, 5, 100]);
        for p in compare(&a.0, &a.0, &a.1)? {
            assert_eq!((p.kl, p.kl_reverse, p.top1, p.overlap), (0.0, 0.0, true, TOP));
            assert_eq!(p.loss, p.reference_loss);
        }
        Ok(())
    }

    #[test]
    fn shifts_change_nothing_and_permutations_do() -> Result<()> {
        let a = Tensor::randn(0f32, 2.0, (3, 400), &Device::Cpu)?;
        for p in compare(&a, &(&a + 5.0)?, &[1, 2, 3])? {
            assert!(p.kl.abs() < 1e-6 && p.top1 && p.overlap >= TOP - 1, "{p:?}");
        }
        let reversed = Tensor::cat(&[a.narrow(1, 200, 200)?, a.narrow(1, 0, 200)?], 1)?;
        for p in compare(&a, &reversed, &[1, 2, 3])? {
            assert!(p.kl > 1.0 && p.kl_reverse > 1.0 && p.overlap < TOP / 2, "{p:?}");
        }
        Ok(())
    }

    #[test]
    fn overlap_counts_the_likeliest_fifty_of_both() -> Result<()> {
        // The likeliest are 0..50 of one, 20..70 of the other.
        let falling = |from: usize| (0..200).map(|i| if i < from { -500.0 - i as f32 } else { -(i as f32) }).collect();
        let (a, b): (Vec<f32>, Vec<f32>) = (falling(0), falling(20));
        let got = compare(&logits(&[&a]), &logits(&[&b]), &[0])?[0];
        assert_eq!(got.overlap, 30);
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_refused() -> Result<()> {
        let (a, b) = (logits(&[&[0.0, 1.0]]), logits(&[&[0.0, f32::NAN]]));
        assert!(compare(&a, &b, &[0]).unwrap_err().to_string().contains("not a finite"));
        assert!(compare(&a, &a, &[2]).is_err() && compare(&a, &a, &[0, 1]).is_err());
        assert!(compare(&a, &logits(&[&[0.0, 1.0, 2.0]]), &[0]).is_err());
        Ok(())
    }
}
