//! Running variants over one copy of the weights, on one worker or on several in parallel.

use crate::checkpoint::OnProgress;
use crate::error::{Error, ErrorKind, Result};
use crate::eval::target::Target;
use crate::eval::variant::Variant;
use crate::layout::Layout;
use crate::method::Method;
use crate::retrofit::Settings;
use crate::run::Run;
use crate::weights::Weights;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{channel, Sender};
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

    /// Returns whether `variant` can answer in a fork of the stock model's run ([`Runner::fork`]).
    ///
    /// # Errors
    /// A variant that does not fit the model.
    pub fn forks(&self, variant: &Variant, ctx: usize) -> Result<bool> {
        Ok(Layout::new(self.weights.spec(), &variant.method, ctx)?.prefills_exactly())
    }

    /// Returns a run of the stock model, provisioned for `ctx` positions, after `read` has read a context with it.
    ///
    /// # Errors
    /// A cache that does not fit, and the errors of `read`.
    pub fn stock(&self, ctx: usize, read: impl FnOnce(&mut Run) -> Result<usize>) -> Result<Run> {
        let run = || {
            let mut run = Run::new(&self.weights, Method::Stock, ctx)?;
            read(&mut run)?;
            // The time of kernels that still run is that of the context, not of the variant that answers first.
            run.device().synchronize()?;
            Ok(run)
        };
        run().map_err(|e: Error| shared(e).within(format!("stock at {ctx}")))
    }

    /// Calls `f` with a fork of `stock` as `variant`, or with `stock` itself where that is the variant.
    ///
    /// # Errors
    /// A variant that needs a prefill of its own ([`Runner::forks`]), and the errors of `f`; the message names the
    /// variant.
    pub fn fork<T>(&self, stock: &mut Run, variant: &Variant, f: impl FnOnce(&mut Run) -> Result<T>) -> Result<T> {
        match variant.method {
            Method::Stock => f(stock).map_err(|e| e.within(format!("{} at {}", variant.name, stock.cache().ctx()))),
            _ => self.branch(stock, variant, f),
        }
    }

    /// Calls `f` with a fork of `stock` as `variant`, the stock model included, so that `stock` does not change.
    ///
    /// # Errors
    /// Those of [`Runner::fork`].
    pub fn branch<T>(&self, stock: &Run, variant: &Variant, f: impl FnOnce(&mut Run) -> Result<T>) -> Result<T> {
        let ctx = stock.cache().ctx();
        let run = || {
            let own = || Error::new(ErrorKind::Backend, "fork", "needs a prefill of its own");
            f(&mut stock.fork(&variant.method).map_err(shared)?.ok_or_else(own)?)
        };
        run().map_err(|e| e.within(format!("{} at {ctx}", variant.name)))
    }
}

/// Adds to an out-of-memory error that variants which share a context need the stock model's cache as well.
fn shared(e: Error) -> Error {
    match e.kind() {
        ErrorKind::Memory => {
            let message = format!("{e}; the stock model's cache is needed as well: give one variant at a time");
            Error::new(ErrorKind::Memory, "shared context", message)
        }
        _ => e,
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
        let mut made = vec![];
        self.each_in_order(count, f, |t| {
            made.push(t);
            Ok(())
        })?;
        Ok(made)
    }

    /// Calls `f` like [`Workers::each`], and `take` with each result in order, as soon as those before it are there.
    ///
    /// # Errors
    /// An error of `f` or `take`, after which no further index is started; `take` has then been called with every
    /// result up to the first missing one. A thread that panicked.
    pub fn each_in_order<T: Send>(
        &mut self,
        count: usize,
        f: impl Fn(&Runner, usize) -> Result<T> + Sync,
        take: impl FnMut(T) -> Result<()>,
    ) -> Result<()> {
        parallel_in_order(&mut self.0, count, &|runner: &mut Runner, i| f(runner, i), take)
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

/// [`Workers::each_in_order`] for workers of any type.
fn parallel_in_order<W: Send, T: Send>(
    workers: &mut [W],
    count: usize,
    f: &(impl Fn(&mut W, usize) -> Result<T> + Sync),
    mut take: impl FnMut(T) -> Result<()>,
) -> Result<()> {
    if let [one] = workers {
        return (0..count).try_for_each(|i| take(f(one, i)?));
    }
    let next = &AtomicUsize::new(0);
    let stop = || next.store(count, Ordering::Relaxed);
    let work = |worker: &mut W, results: Sender<(usize, Result<T>)>| loop {
        let i = next.fetch_add(1, Ordering::Relaxed);
        if i >= count {
            break;
        }
        let made = f(worker, i);
        if made.is_err() {
            stop();
        }
        if results.send((i, made)).is_err() {
            break;
        }
    };
    let work = &work;
    std::thread::scope(|scope| {
        let (sender, results) = channel();
        let start = |w| {
            let sender = sender.clone();
            scope.spawn(move || work(w, sender))
        };
        let threads: Vec<_> = workers.iter_mut().map(start).collect();
        drop(sender);
        // Results that wait for an earlier one.
        let (mut early, mut due, mut outcome, mut taking) = (BTreeMap::new(), 0, Ok(()), true);
        for (i, made) in results {
            match made {
                Ok(t) => drop(early.insert(i, t)),
                Err(e) => outcome = outcome.and(Err(e)),
            }
            while let Some(t) = early.remove(&due).filter(|_| taking) {
                due += 1;
                if let Err(e) = take(t) {
                    stop();
                    (taking, outcome) = (false, outcome.and(Err(e)));
                }
            }
        }
        let panicked = |_| Error::new(ErrorKind::Backend, "--jobs", "a worker thread panicked");
        threads.into_iter().try_for_each(|t| t.join().map_err(panicked))?;
        outcome
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    /// Results that were taken, and how it ended.
    fn taken<W: Send, T: Send>(
        workers: &mut [W],
        count: usize,
        f: &(impl Fn(&mut W, usize) -> Result<T> + Sync),
    ) -> (Vec<T>, Result<()>) {
        let mut made = vec![];
        let outcome = parallel_in_order(workers, count, f, |t| {
            made.push(t);
            Ok(())
        });
        (made, outcome)
    }

    #[test]
    fn every_index_once_in_order_by_all_workers() -> Result<()> {
        let (mut workers, meet) = ([0usize; 3], Barrier::new(3));
        let (made, outcome) = taken(&mut workers, 50, &|worker: &mut usize, i| {
            // Each worker's first call waits for the others, so that all take part.
            if *worker == 0 {
                meet.wait();
            }
            *worker += 1;
            Ok(i * i)
        });
        outcome?;
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
            let (made, told) = taken(&mut vec![(); workers], 100, &|(), i| match i {
                7 => Err(Error::usage("sample 7", "cannot be read")),
                _ => Ok(i),
            });
            assert_eq!(told.map_err(|e| e.to_string()), Err("sample 7: cannot be read".into()));
            assert_eq!(made, (0..7).collect::<Vec<_>>(), "{workers} workers: results before the missing one are kept");
            let mut count = 0;
            let told = parallel_in_order(&mut vec![(); workers], 100, &|(), i| Ok(i), |i| {
                count += 1;
                if i == 3 {
                    Err(Error::usage("--out", "disk full"))
                } else {
                    Ok(())
                }
            });
            assert_eq!((told.map_err(|e| e.to_string()), count), (Err("--out: disk full".into()), 4));
        }
        let (_, told) = taken(&mut [(); 2], 9, &|(), i| if i == 3 { panic!("a defect") } else { Ok(i) });
        assert!(told.is_err_and(|e| e.to_string().contains("a worker thread panicked")));
    }
}
