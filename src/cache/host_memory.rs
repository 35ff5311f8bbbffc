//! Page-locked host memory kept for reuse: locking takes about 0.3 s per GB, and an evaluation makes a run per sample.

use std::sync::atomic::{AtomicBool, Ordering};

/// Page-locked memory of all runs over one copy of the weights, which lives as long as they do. In a build without CUDA
/// support there is none.
#[derive(Debug, Default)]
pub struct HostMemory {
    /// Slices that no store uses.
    #[cfg(feature = "cuda")]
    pub(super) pinned: Pool<candle_core::cuda_backend::cudarc::driver::PinnedHostSlice<u8>>,
    /// Whether the system has refused to lock memory.
    refused: AtomicBool,
}

impl HostMemory {
    /// Returns whether host stores are page-locked, as far as is known: the system has not refused to lock memory.
    pub fn is_locked(&self) -> bool {
        !self.refused.load(Ordering::Relaxed)
    }

    /// Makes later host stores ordinary memory, as where the system refuses to lock any: decode steps are not captured,
    /// and the host gathers their rows.
    pub fn lock_nothing(&self) {
        self.refused.store(true, Ordering::Relaxed);
    }
}

#[cfg(any(test, feature = "cuda"))]
pub(super) use pool::Pool;

#[cfg(any(test, feature = "cuda"))]
mod pool {
    use std::sync::{Mutex, MutexGuard, PoisonError};

    /// Allocations of type `T`, reused by size. Those in use and those kept are together never more bytes than were in
    /// use at one time.
    #[derive(Debug)]
    pub struct Pool<T>(Mutex<State<T>>);

    #[derive(Debug)]
    struct State<T> {
        /// Size in bytes and allocation, the one given back first at the front.
        kept: Vec<(usize, T)>,
        /// Bytes in use.
        used: usize,
        /// Largest `used` so far.
        most: usize,
    }

    impl<T> Default for Pool<T> {
        fn default() -> Self {
            Self(Mutex::new(State { kept: vec![], used: 0, most: 0 }))
        }
    }

    impl<T> Pool<T> {
        fn state(&self) -> MutexGuard<'_, State<T>> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }

        /// Returns an allocation of `bytes`: a kept one with undefined content, or one that `allocate` makes. Where it
        /// fails, it is called again after all kept allocations have been freed.
        ///
        /// # Errors
        /// That of `allocate`.
        pub fn take<E>(&self, bytes: usize, allocate: impl Fn() -> Result<T, E>) -> Result<T, E> {
            let mut state = self.state();
            let same = state.kept.iter().position(|(size, _)| *size == bytes);
            let taken = match same {
                Some(at) => state.kept.remove(at).1,
                None => {
                    let used = state.used + bytes;
                    let room = state.most.max(used) - used;
                    state.free_down_to(room);
                    match allocate() {
                        Err(_) if !state.kept.is_empty() => {
                            state.free_down_to(0);
                            allocate()?
                        }
                        made => made?,
                    }
                }
            };
            state.used += bytes;
            state.most = state.most.max(state.used);
            Ok(taken)
        }

        /// Keeps `allocation`, taken with `bytes`, for reuse.
        pub fn give_back(&self, bytes: usize, allocation: T) {
            let mut state = self.state();
            state.used -= bytes;
            state.kept.push((bytes, allocation));
        }
    }

    impl<T> State<T> {
        /// Frees the oldest kept allocations until the others take at most `bytes`.
        fn free_down_to(&mut self, bytes: usize) {
            let mut kept: usize = self.kept.iter().map(|(size, _)| size).sum();
            while kept > bytes {
                kept -= self.kept.remove(0).0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Pool;
    use std::cell::Cell;
    use std::rc::Rc;

    #[test]
    fn a_second_run_of_the_same_sizes_allocates_nothing() {
        let (pool, made) = (Pool::default(), Cell::new(0));
        let allocate = || -> Result<i32, ()> {
            made.set(made.get() + 1);
            Ok(made.get())
        };
        for _ in 0..3 {
            let run = [7, 5, 7].map(|bytes| (bytes, pool.take(bytes, allocate).expect("an allocation")));
            let mut distinct = run.map(|(_, allocation)| allocation);
            distinct.sort_unstable();
            assert_eq!(distinct, [1, 2, 3], "none is handed out twice at a time");
            run.into_iter().for_each(|(bytes, allocation)| pool.give_back(bytes, allocation));
        }
        assert_eq!(made.get(), 3);
    }

    #[test]
    fn no_more_is_kept_than_was_in_use_at_once() {
        let (pool, alive) = (Pool::default(), Rc::new(()));
        let take = |bytes| pool.take(bytes, || Ok::<_, ()>(alive.clone())).expect("an allocation");
        let allocated = || Rc::strong_count(&alive) - 1;
        let (a, b) = (take(10), take(20));
        pool.give_back(10, a);
        pool.give_back(20, b);
        assert_eq!(allocated(), 2);
        // 30 bytes were in use, so that 15 leave room for 15.
        let c = take(15);
        assert_eq!(allocated(), 1);
        pool.give_back(15, c);
        let d = take(15);
        assert_eq!(allocated(), 1, "the same one again");
        let e = take(15);
        assert_eq!(allocated(), 2);
        pool.give_back(15, d);
        pool.give_back(15, e);
        drop(pool);
        assert_eq!(Rc::strong_count(&alive), 1, "all is freed with the pool");
    }

    #[test]
    fn kept_memory_gives_way_where_an_allocation_fails() {
        let (pool, alive, room) = (Pool::default(), Rc::new(()), Cell::new(2));
        let allocate = || if Rc::strong_count(&alive) <= room.get() { Ok(alive.clone()) } else { Err("no room") };
        let (a, b) = (pool.take(4, allocate).expect("the first"), pool.take(6, allocate).expect("the second"));
        assert!(pool.take(3, allocate).is_err(), "nothing is kept that could give way");
        pool.give_back(4, a);
        pool.give_back(6, b);
        room.set(1);
        assert!(pool.take(3, allocate).is_ok(), "10 bytes were in use at once, but 6 and 3 do not fit any longer");
        assert_eq!(Rc::strong_count(&alive) - 1, 0);
    }
}
