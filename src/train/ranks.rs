//! Ranks of a data-parallel run: each computes the gradient of its part of a step, all take the same step.
//!
//! Threads of one process here; processes with a GPU each in `nccl` (feature `nccl`).

use super::Partials;
use crate::error::{Error, ErrorKind, Result};
use candle_core::Tensor;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What the ranks of a run exchange.
pub trait Ranks: Send {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn count(&self) -> usize;

    /// The sum of all ranks' vectors, f32 of one length; the same on every rank, bit for bit.
    ///
    /// # Errors
    /// A rank that has ended, by number, or a backend's failure.
    fn sum(&self, vector: Tensor) -> Result<Tensor>;

    /// The sums of all ranks' numbers.
    ///
    /// # Errors
    /// As of [`Self::sum`].
    fn sum_numbers(&self, numbers: [f64; 2]) -> Result<[f64; 2]>;
}

/// A run of one rank.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alone;

impl Ranks for Alone {
    fn rank(&self) -> usize {
        0
    }

    fn count(&self) -> usize {
        1
    }

    fn sum(&self, vector: Tensor) -> Result<Tensor> {
        Ok(vector)
    }

    fn sum_numbers(&self, numbers: [f64; 2]) -> Result<[f64; 2]> {
        Ok(numbers)
    }
}

/// What a rank brings to a round.
#[derive(Clone)]
enum Brought {
    Vector(Tensor),
    Numbers([f64; 2]),
}

#[derive(Default)]
struct Round {
    brought: Vec<Option<Brought>>,
    /// The result, and how many ranks have yet to take it.
    made: Option<(std::result::Result<Brought, String>, usize)>,
    ended: Option<usize>,
}

/// A rank of a run whose ranks are threads of one process.
///
/// Vectors are summed as a binary tree over the ranks, so that any power of two of ranks gives the same bits
/// ([`Partials`]).
pub struct Thread {
    rank: usize,
    count: usize,
    timeout: Duration,
    shared: Arc<(Mutex<Round>, Condvar)>,
}

impl Thread {
    /// The ranks of a run. A rank that waits longer than `timeout` gives up and names the ranks that did not come.
    pub fn run_of(count: usize, timeout: Duration) -> Vec<Self> {
        let round = Round { brought: vec![None; count], ..Round::default() };
        let shared = Arc::new((Mutex::new(round), Condvar::new()));
        (0..count).map(|rank| Self { rank, count, timeout, shared: shared.clone() }).collect()
    }

    fn lock(&self) -> MutexGuard<'_, Round> {
        self.shared.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn exchange(&self, own: Brought) -> Result<Brought> {
        let lost = |rank: usize| Error::new(ErrorKind::Backend, "training", format!("rank {rank} has ended"));
        let (start, mut round) = (Instant::now(), self.lock());
        let mut own = Some(own);
        loop {
            // A rank may have ended after its last round, whose result is still to be taken.
            if let Some(rank) = round.ended.filter(|_| own.is_some() || round.made.is_none()) {
                return Err(lost(rank));
            }
            // The result of the round before may still be waited for.
            if own.is_some() && round.made.is_none() {
                round.brought[self.rank] = own.take();
                if round.brought.iter().all(Option::is_some) {
                    let all: Vec<Brought> = round.brought.iter_mut().filter_map(Option::take).collect();
                    round.made = Some((sum(all).map_err(|e| e.to_string()), self.count));
                    self.shared.1.notify_all();
                }
            }
            if own.is_none() {
                if let Some((result, left)) = &mut round.made {
                    let result = result.clone();
                    *left -= 1;
                    if *left == 0 {
                        round.made = None;
                        self.shared.1.notify_all();
                    }
                    return result.map_err(|e| Error::new(ErrorKind::Backend, "training", e));
                }
            }
            let Some(left) = self.timeout.checked_sub(start.elapsed()) else {
                let absent: Vec<String> =
                    (0..self.count).filter(|r| round.brought[*r].is_none()).map(|r| r.to_string()).collect();
                let message = format!("rank {} did not come within {:?}", absent.join(", "), self.timeout);
                return Err(Error::new(ErrorKind::Backend, "training", message));
            };
            round = self.shared.1.wait_timeout(round, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The sum of what all ranks brought, which must be of one kind.
fn sum(all: Vec<Brought>) -> Result<Brought> {
    let unlike = || Error::new(ErrorKind::Backend, "training", "the ranks are not at the same place");
    if let Some(Brought::Numbers(_)) = all.first() {
        let mut sum = [0f64; 2];
        for one in all {
            let Brought::Numbers(x) = one else { return Err(unlike()) };
            sum = [sum[0] + x[0], sum[1] + x[1]];
        }
        return Ok(Brought::Numbers(sum));
    }
    let mut partials = Partials::default();
    for one in all {
        let Brought::Vector(x) = one else { return Err(unlike()) };
        partials.push(x)?;
    }
    partials.sum()?.map(Brought::Vector).ok_or_else(unlike)
}

impl Ranks for Thread {
    fn rank(&self) -> usize {
        self.rank
    }

    fn count(&self) -> usize {
        self.count
    }

    fn sum(&self, vector: Tensor) -> Result<Tensor> {
        match self.exchange(Brought::Vector(vector))? {
            Brought::Vector(sum) => Ok(sum),
            Brought::Numbers(_) => Err(Error::new(ErrorKind::Backend, "training", "expected a vector")),
        }
    }

    fn sum_numbers(&self, numbers: [f64; 2]) -> Result<[f64; 2]> {
        match self.exchange(Brought::Numbers(numbers))? {
            Brought::Numbers(sum) => Ok(sum),
            Brought::Vector(_) => Err(Error::new(ErrorKind::Backend, "training", "expected numbers")),
        }
    }
}

impl Drop for Thread {
    /// Tells the others, who would wait for it.
    fn drop(&mut self) {
        self.lock().ended.get_or_insert(self.rank);
        self.shared.1.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn threads<T: Send>(count: usize, f: impl Fn(Thread) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let all: Vec<_> = Thread::run_of(count, Duration::from_secs(20))
                .into_iter()
                .map(|rank| scope.spawn(|| f(rank)))
                .collect();
            all.into_iter().filter_map(|t| t.join().ok()).collect()
        })
    }

    #[test]
    fn every_rank_gets_every_sum_in_order() -> Result<()> {
        let sums = threads(3, |rank| -> Result<Vec<f32>> {
            let mut all = vec![];
            for round in 0..50 {
                let own = Tensor::new(&[(round * 10 + rank.rank()) as f32], &Device::Cpu)?;
                all.push(rank.sum(own)?.to_vec1::<f32>()?[0]);
                let numbers = rank.sum_numbers([rank.rank() as f64, 1.0])?;
                assert_eq!(numbers, [3.0, 3.0]);
            }
            Ok(all)
        });
        for own in sums {
            assert_eq!(own?, (0..50).map(|round| (round * 30 + 3) as f32).collect::<Vec<_>>());
        }
        Ok(())
    }

    #[test]
    fn a_rank_that_ends_is_named_by_the_others() {
        let start = Instant::now();
        let errors = threads(4, |rank| {
            let one = || Tensor::ones(1, candle_core::DType::F32, &Device::Cpu).map_err(Error::from);
            let mut round = 0;
            loop {
                if rank.rank() == 2 && round == 3 {
                    return None;
                }
                round += 1;
                if let Err(e) = one().and_then(|x| rank.sum(x)) {
                    return Some(e.to_string());
                }
            }
        });
        let errors: Vec<String> = errors.into_iter().flatten().collect();
        assert_eq!(errors.len(), 3);
        assert!(errors.iter().all(|e| e.contains("rank 2 has ended")), "{errors:?}");
        assert!(start.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_rank_that_does_not_come_is_named() {
        let all = Thread::run_of(2, Duration::from_millis(50));
        let error = all[0].sum_numbers([0.0; 2]).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(error.contains("rank 1 did not come within 50ms"), "{error}");
    }
}
