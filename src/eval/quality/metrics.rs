//! Distances between two sets of next-token distributions, position by position, over the whole vocabulary.
//!
//! With `p = softmax(a)` of the reference and `q = softmax(b)` of the variant:
//!
//! | metric | formula |
//! |---|---|
//! | KL | `Σ p (ln p - ln q)`, in nats |
//! | reverse KL | `Σ q (ln q - ln p)` |
//! | top 1 | whether both have the same likeliest token |
//! | overlap | number of tokens among the [`TOP`] likeliest of both |
//! | loss | `-ln q(next token)`; the exponential of its mean is the perplexity |
//!
//! Sums run in f64 on the host, over the whole vocabulary, not over the likeliest tokens alone. Equal logits give KL
//! exactly 0, the same likeliest token and full overlap.

use crate::error::{Error, ErrorKind, Result};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

/// Number of likeliest tokens whose overlap is counted.
pub const TOP: usize = 50;

/// Metrics at one position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PositionMetrics {
    /// KL(reference ‖ variant), in nats.
    pub kl: f64,
    /// KL(variant ‖ reference), in nats.
    pub kl_reverse: f64,
    /// Whether the likeliest token is the same.
    pub top1: bool,
    /// Number of tokens among the [`TOP`] likeliest of both.
    pub overlap: usize,
    /// Loss of the reference on the next token, in nats.
    pub reference_loss: f64,
    /// Loss of the variant on the next token, in nats.
    pub loss: f64,
}

/// Logits on the host, one row per position, with the statistics that comparisons need.
pub struct LogitRows {
    vocab: usize,
    values: Vec<f32>,
    rows: Vec<RowStats>,
}

struct RowStats {
    /// `ln Σ exp(x)`.
    log_sum: f64,
    /// Ids of the [`TOP`] likeliest tokens, rising; ties go to the lower id.
    likeliest: Vec<u32>,
    /// Id of the likeliest token; ties go to the lower id, as in greedy decoding.
    argmax: usize,
}

impl LogitRows {
    /// Copies `logits` to the host and computes the statistics.
    ///
    /// # Shapes
    /// `logits` f32 `[K, vocab]`, on any device.
    ///
    /// # Errors
    /// A logit that is not finite.
    pub fn of(logits: &Tensor) -> Result<Self> {
        let (_, vocab) = logits.dims2()?;
        let values: Vec<f32> = logits.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
        let rows = values.par_chunks(vocab).map(RowStats::of).collect::<Result<_>>()?;
        Ok(Self { vocab, values, rows })
    }

    fn row(&self, i: usize) -> (&[f32], &RowStats) {
        (&self.values[i * self.vocab..][..self.vocab], &self.rows[i])
    }
}

impl RowStats {
    fn of(x: &[f32]) -> Result<Self> {
        if !x.iter().all(|v| v.is_finite()) {
            return Err(Error::new(ErrorKind::Backend, "metrics", "a logit is not a finite number"));
        }
        let argmax = (0..x.len()).rev().max_by(|i, j| x[*i].total_cmp(&x[*j])).unwrap_or(0);
        let most = x.get(argmax).copied().unwrap_or(0.0);
        let sum: f64 = x.iter().map(|v| (f64::from(*v) - f64::from(most)).exp()).sum();
        Ok(Self { log_sum: f64::from(most) + sum.ln(), likeliest: likeliest(x), argmax })
    }
}

/// Compares `reference` and `variant` row by row; `next[i]` is the token that follows the position of row `i`.
///
/// # Errors
/// Shapes that differ, or a next token outside the vocabulary.
pub fn compare(reference: &LogitRows, variant: &LogitRows, next: &[u32]) -> Result<Vec<PositionMetrics>> {
    let (a, b) = ((reference.rows.len(), reference.vocab), (variant.rows.len(), variant.vocab));
    if a != b || next.len() != a.0 || next.iter().any(|id| *id as usize >= a.1) {
        let message = format!("logits of shapes {a:?} and {b:?} and {} next tokens do not match", next.len());
        return Err(Error::new(ErrorKind::Usage, "metrics", message));
    }
    let one = |(i, id): (usize, &u32)| position(reference.row(i), variant.row(i), *id as usize);
    Ok(next.par_iter().enumerate().map(one).collect())
}

/// Returns the loss on the next token at every row, in nats.
///
/// # Shapes
/// `next` `[K]`; the result `[K]`.
///
/// # Errors
/// As [`compare`].
pub fn losses(logits: &LogitRows, next: &[u32]) -> Result<Vec<f64>> {
    Ok(compare(logits, logits, next)?.iter().map(|p| p.loss).collect())
}

fn position((a, of_a): (&[f32], &RowStats), (b, of_b): (&[f32], &RowStats), next: usize) -> PositionMetrics {
    let (mut kl, mut kl_reverse) = (0.0, 0.0);
    for (x, y) in a.iter().zip(b) {
        let (p, q) = (f64::from(*x) - of_a.log_sum, f64::from(*y) - of_b.log_sum);
        kl += p.exp() * (p - q);
        kl_reverse += q.exp() * (q - p);
    }
    PositionMetrics {
        kl,
        kl_reverse,
        top1: of_a.argmax == of_b.argmax,
        overlap: of_a.likeliest.iter().filter(|id| of_b.likeliest.binary_search(id).is_ok()).count(),
        reference_loss: of_a.log_sum - f64::from(a[next]),
        loss: of_b.log_sum - f64::from(b[next]),
    }
}

/// Returns the indices of the [`TOP`] largest values of `x`, rising; ties go to the lower index.
fn likeliest(x: &[f32]) -> Vec<u32> {
    if x.len() <= TOP {
        return (0..x.len() as u32).collect();
    }
    let mut sorted = x.to_vec();
    let (_, least, _) = sorted.select_nth_unstable_by(TOP - 1, |a, b| b.total_cmp(a));
    let least = *least;
    let above = x.iter().filter(|v| **v > least).count();
    // Of the values that tie with the least, the first ones.
    let mut room = TOP - above;
    let mut taken = vec![];
    for (i, v) in x.iter().enumerate() {
        if *v > least || (*v == least && room > 0) {
            room -= usize::from(*v == least);
            taken.push(i as u32);
        }
    }
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(rows: &[&[f32]]) -> LogitRows {
        let flat: Vec<f32> = rows.concat();
        LogitRows::of(&Tensor::from_vec(flat, (rows.len(), rows[0].len()), &Device::Cpu).unwrap()).unwrap()
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
        // The tie goes to the lower id.
        assert!(!got.top1 && got.overlap == 2);
        Ok(())
    }

    #[test]
    fn equal_logits_give_kl_exactly_zero() -> Result<()> {
        let a = LogitRows::of(&Tensor::randn(0f32, 9.0, (7, 300), &Device::Cpu)?)?;
        for p in compare(&a, &a, &[3, 299, 0, 17, 5, 5, 100])? {
            assert_eq!((p.kl, p.kl_reverse, p.top1, p.overlap), (0.0, 0.0, true, TOP));
            assert_eq!(p.loss, p.reference_loss);
        }
        Ok(())
    }

    #[test]
    fn shifts_do_not_change_metrics_and_permutations_do() -> Result<()> {
        let a = Tensor::randn(0f32, 2.0, (3, 400), &Device::Cpu)?;
        for p in compare(&LogitRows::of(&a)?, &LogitRows::of(&(&a + 5.0)?)?, &[1, 2, 3])? {
            assert!(p.kl.abs() < 1e-6 && p.top1 && p.overlap >= TOP - 1, "{p:?}");
        }
        let reversed = Tensor::cat(&[a.narrow(1, 200, 200)?, a.narrow(1, 0, 200)?], 1)?;
        for p in compare(&LogitRows::of(&a)?, &LogitRows::of(&reversed)?, &[1, 2, 3])? {
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
    fn ties_go_to_the_lower_id() -> Result<()> {
        let mut x = vec![1.0f32; 120];
        (x[70], x[110]) = (2.0, 3.0);
        let got = RowStats::of(&x)?;
        let wanted: Vec<u32> = (0..48).chain([70, 110]).collect();
        assert_eq!((got.likeliest, got.argmax), (wanted, 110));
        Ok(())
    }

    #[test]
    fn nan_and_mismatched_shapes_are_refused() -> Result<()> {
        let nan = LogitRows::of(&Tensor::new(&[[0.0, f32::NAN]], &Device::Cpu)?);
        assert!(nan.err().ok_or("refused").unwrap().to_string().contains("not a finite"));
        let a = logits(&[&[0.0, 1.0]]);
        assert!(compare(&a, &a, &[2]).is_err() && compare(&a, &a, &[0, 1]).is_err());
        assert!(compare(&a, &logits(&[&[0.0, 1.0, 2.0]]), &[0]).is_err());
        Ok(())
    }
}
