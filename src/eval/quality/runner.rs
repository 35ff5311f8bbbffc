//! Running variants over one copy of the weights, on one worker or on several in parallel.

use crate::checkpoint::OnProgress;
use crate::error::{Error, ErrorKind, Result};
use crate::eval::target::Target;
use crate::eval::variant::Variant;
use crate::retrofit::Settings;
use crate::run::Run;
use crate::weights::Weights;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

/// Runs any variant over one copy of the weights.
#[derive(Clone)]
pub struct Runner {
    weights: Arc<Weights>,
}

impl Runner {
    /// Creates a runner over `weights`.
    pub fn new(weights: Arc<Weights>) -> Self {
        Self { weights }
    }

    /// Calls `f` with a fresh run of `variant`, provisioned for `ctx` positions.
    ///
    /// # Errors
    /// A variant that does not fit the model, and the errors of `f`; the message names the variant.
    pub fn run<T>(&self, variant: &Variant, ctx: usize, f: impl FnOnce(&mut Run) -> Result<T>) -> Result<T> {
        let run = || f(&mut Run::new(&self.weights, &variant.method, ctx)?);
        run().map_err(|e| e.within(format!("{} at {ctx}", variant.name)))
    }
}

/// Workers over one copy of the weights; on a GPU each run has its own stream.
///
/// Decode of a small model leaves most of a GPU idle, since a step is a sequence of small kernels; several workers use
/// more of it.
pub struct Workers(Vec<Runner>);

impl Workers {
    /// Loads the weights for `jobs` workers.
    ///
    /// # Errors
    /// As [`Target::load`].
    pub fn load(target: &Target, recalls: Option<&Settings>, jobs: usize, progress: OnProgress) -> Result<Self> {
        Ok(Self(vec![Runner::new(target.load(recalls, progress)?); jobs.max(1)]))
    }

    /// Returns the first worker, for work that is done once.
    pub fn first(&self) -> &Runner {
        &self.0[0]
    }

    /// Calls `f` for every index below `count` and returns the results in order; the next index goes to the first free
    /// worker.
    ///
    /// # Errors
    /// An error of `f`, after which no further index is started; a thread that panicked.
    pub fn each<T: Send>(&mut self, count: usize, f: impl Fn(&Runner, usize) -> Result<T> + Sync) -> Result<Vec<T>> {
        parallel_map(&mut self.0, count, &|runner: &mut Runner, i| f(runner, i))
    }
}

/// Creates the progress callback of one worker. It takes the tokens that this worker has read so far, adds the increase
/// to `all`, and calls `show` with the sum over all workers.
pub fn shared_progress<'a>(all: &'a AtomicUsize, show: impl Fn(usize) + 'a) -> impl FnMut(usize) + 'a {
    let mut own = 0;
    move |n: usize| {
        let more = n.saturating_sub(own);
        show(all.fetch_add(more, Ordering::Relaxed) + more);
        own += more;
    }
}

/// [`Workers::each`] for workers of any type.
fn parallel_map<W: Send, T: Send>(
    workers: &mut [W],
    count: usize,
    f: &(impl Fn(&mut W, usize) -> Result<T> + Sync),
) -> Result<Vec<T>> {
    if let [one] = workers {
        return (0..count).map(|i| f(one, i)).collect();
    }
    let next = AtomicUsize::new(0);
    let work = |worker: &mut W| {
        let mut made = vec![];
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                return Ok(made);
            }
            match f(worker, i) {
                Ok(t) => made.push((i, t)),
                Err(e) => {
                    next.store(count, Ordering::Relaxed);
                    return Err(e);
                }
            }
        }
    };
    let work = &work;
    let parts = std::thread::scope(|scope| {
        let threads: Vec<_> = workers.iter_mut().map(|w| scope.spawn(move || work(w))).collect();
        let panicked = |_| Err(Error::new(ErrorKind::Backend, "--jobs", "a worker thread panicked"));
        threads.into_iter().map(|t| t.join().unwrap_or_else(panicked)).collect::<Result<Vec<_>>>()
    })?;
    let mut made: Vec<(usize, T)> = parts.into_iter().flatten().collect();
    made.sort_by_key(|(i, _)| *i);
    Ok(made.into_iter().map(|(_, t)| t).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    #[test]
    fn every_index_once_in_order_by_all_workers() -> Result<()> {
        let (mut workers, meet) = ([0usize; 3], Barrier::new(3));
        let made = parallel_map(&mut workers, 50, &|worker: &mut usize, i| {
            // Each worker's first call waits for the others, so that all take part.
            if *worker == 0 {
                meet.wait();
            }
            *worker += 1;
            Ok(i * i)
        })?;
        assert_eq!(made, (0..50).map(|i| i * i).collect::<Vec<_>>());
        assert!(workers.iter().all(|n| *n > 0) && workers.iter().sum::<usize>() == 50, "{workers:?}");
        Ok(())
    }

    #[test]
    fn progress_is_the_sum_over_workers() {
        let (all, shown) = (AtomicUsize::new(10), std::cell::RefCell::new(vec![]));
        let show = |n| shown.borrow_mut().push(n);
        let (mut one, mut two) = (shared_progress(&all, show), shared_progress(&all, show));
        one(5);
        two(3);
        one(7);
        one(7);
        two(4);
        assert_eq!(*shown.borrow(), [15, 18, 20, 20, 21]);
    }

    #[test]
    fn errors_and_panics_of_workers_are_returned() {
        for workers in [1, 4] {
            let told = parallel_map(&mut vec![(); workers], 100, &|(), i| match i {
                7 => Err(Error::usage("sample 7", "cannot be read")),
                _ => Ok(i),
            });
            assert_eq!(told.map(drop).map_err(|e| e.to_string()), Err("sample 7: cannot be read".into()));
        }
        let told = parallel_map(&mut [(); 2], 9, &|(), i| if i == 3 { panic!("a defect") } else { Ok(i) });
        assert!(told.is_err_and(|e| e.to_string().contains("a worker thread panicked")));
    }
}
