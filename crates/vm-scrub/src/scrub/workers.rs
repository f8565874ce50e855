//! The threads that scrub.
//!
//! They are started when a pool is built: VMM threads often run under a seccomp filter that forbids new ones later.

use crate::sys::numa::Numbers;
#[cfg(feature = "rayon")]
use crate::sys::{fork, thread};
#[cfg(feature = "rayon")]
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
#[cfg(feature = "rayon")]
use std::sync::{Mutex, PoisonError};

/// A fixed set of threads, or the calling thread alone.
#[derive(Debug)]
pub(crate) struct Workers {
    #[cfg(feature = "rayon")]
    threads: Option<Threads>,
}

#[cfg(feature = "rayon")]
#[derive(Debug)]
struct Threads {
    pool: rayon::ThreadPool,
    /// Where they are: a forked child has none of them, and would wait for them for ever.
    address_space: u64,
    /// Whether they run where they are told, which may be on another node than the caller.
    pinned: bool,
}

/// Why the threads could not be started.
pub(crate) type StartError = Box<dyn std::error::Error + Send + Sync>;

impl Workers {
    /// No threads of its own: the caller does the work.
    pub(crate) fn caller() -> Self {
        Self {
            #[cfg(feature = "rayon")]
            threads: None,
        }
    }

    /// Starts `threads` threads that run on `cpus`, where these are given. With one that may run anywhere, or without the
    /// `rayon` feature, the caller does the work: where its thread runs is its own affair.
    pub(crate) fn start(threads: usize, cpus: Option<&Numbers>) -> Result<Self, StartError> {
        #[cfg(feature = "rayon")]
        if threads > 1 || cpus.is_some() {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .thread_name(|index| format!("vm-scrub-{index}"))
                .build()?;
            // Threads begin with system calls of their own, which the VMM may forbid as soon as there is a pool.
            let threads = pool.broadcast(|_| thread::id());
            if let Some(cpus) = cpus {
                pin(&threads, cpus);
            }
            let threads = Threads {
                pool,
                address_space: fork::address_space()?,
                pinned: cpus.is_some(),
            };
            return Ok(Self {
                threads: Some(threads),
            });
        }
        let _ = (threads, cpus);
        Ok(Self::caller())
    }

    #[cfg(feature = "rayon")]
    fn threads_here(&self) -> Option<&Threads> {
        let threads = self.threads.as_ref()?;
        fork::is_here(threads.address_space).then_some(threads)
    }

    /// How many threads work at the same time.
    pub(crate) fn threads(&self) -> usize {
        #[cfg(feature = "rayon")]
        if let Some(threads) = self.threads_here() {
            return threads.pool.current_num_threads();
        }
        1
    }

    /// The results of `one` for each number below `count`, in order. Where there is only one it is the caller who works.
    #[cfg(feature = "vm-memory")]
    pub(crate) fn map<T: Send>(
        &self,
        count: usize,
        one: impl Fn(usize) -> T + Send + Sync,
    ) -> Vec<T> {
        #[cfg(feature = "rayon")]
        if let Some(threads) = self.threads_here()
            && count > 1
        {
            use rayon::prelude::*;
            return threads
                .pool
                .install(|| (0..count).into_par_iter().map(one).collect());
        }
        (0..count).map(one).collect()
    }

    /// As many threads as there are call `work` once; returns when all have.
    ///
    /// The calling thread is one of them, in place of the first, unless they are pinned: it is awake, and on a processor. Were it to wait
    /// for all of them instead, the one that wakes up on its processor would now and then do the work of two.
    ///
    /// A panic of `work`, which may be the embedder's, goes on in the caller when all have returned. If there are several, what the others
    /// threw is not dropped: that may panic too, where rayon does not expect it and goes back to the caller before its threads are done.
    pub(crate) fn all(&self, work: impl Fn() + Sync) {
        #[cfg(feature = "rayon")]
        if let Some(Threads { pool, pinned, .. }) = self.threads_here() {
            let thrown = Mutex::new(None);
            let work = || {
                let Err(panic) = catch_unwind(AssertUnwindSafe(&work)) else {
                    return;
                };
                match &mut *thrown.lock().unwrap_or_else(PoisonError::into_inner) {
                    first @ None => *first = Some(panic),
                    Some(_) => std::mem::forget(panic),
                }
            };
            if *pinned {
                pool.broadcast(|_| work());
            } else {
                pool.in_place_scope(|scope| {
                    scope.spawn_broadcast(|_, thread| {
                        if thread.index() != 0 {
                            work();
                        }
                    });
                    work();
                });
            }
            if let Some(panic) = thrown.into_inner().unwrap_or_else(PoisonError::into_inner) {
                resume_unwind(panic);
            }
            return;
        }
        work();
    }
}

/// Pins all threads to `cpus`. They scrub as well where this is refused, only not as fast.
#[cfg(feature = "rayon")]
fn pin(threads: &[libc::pid_t], cpus: &Numbers) {
    for worker in threads {
        if let Err(error) = thread::pin(*worker, cpus) {
            log::warn!("scrubbing thread {worker} is not kept on its NUMA node: {error}");
        }
    }
}

#[cfg(all(test, feature = "rayon"))]
mod tests {
    use super::*;
    use crate::sys::thread::cpus_of_this_thread;
    use std::sync::Arc;

    fn cpus_of(workers: &Workers) -> Vec<Numbers> {
        let seen = Mutex::default();
        workers.all(|| {
            let cpus = cpus_of_this_thread();
            let mut seen: std::sync::MutexGuard<'_, Vec<Numbers>> = seen.lock().unwrap();
            seen.push(cpus);
        });
        seen.into_inner().unwrap()
    }

    #[test]
    fn every_thread_runs_where_it_is_told_and_the_callers_where_it_did() {
        let mine = cpus_of_this_thread();
        for cpu in &mine {
            let one = Numbers::from([*cpu]);
            for threads in [1, 3] {
                let workers = Workers::start(threads, Some(&one)).unwrap();
                assert_eq!(cpus_of(&workers), vec![one.clone(); threads]);
            }
        }
        assert_eq!(cpus_of_this_thread(), mine);
        assert_eq!(
            cpus_of(&Workers::start(2, None).unwrap()),
            [mine.clone(), mine]
        );
    }

    fn who_works(workers: &Workers) -> Vec<std::thread::ThreadId> {
        let seen = Mutex::default();
        workers.all(|| {
            let mut seen: std::sync::MutexGuard<'_, Vec<_>> = seen.lock().unwrap();
            seen.push(std::thread::current().id());
        });
        seen.into_inner().unwrap()
    }

    #[test]
    fn the_caller_is_one_of_the_threads_unless_they_are_pinned() {
        let me = std::thread::current().id();
        let is_me = |worker: &&std::thread::ThreadId| **worker == me;
        for threads in [2, 5] {
            let at_work = who_works(&Workers::start(threads, None).unwrap());
            assert_eq!(at_work.len(), threads);
            assert_eq!(at_work.iter().filter(is_me).count(), 1);
        }
        let mine = cpus_of_this_thread();
        for threads in [1, 3] {
            let at_work = who_works(&Workers::start(threads, Some(&mine)).unwrap());
            assert_eq!(at_work.len(), threads);
            assert_eq!(at_work.iter().filter(is_me).count(), 0);
        }
        assert_eq!(who_works(&Workers::caller()), [me]);
    }

    #[cfg(feature = "vm-memory")]
    #[test]
    fn the_caller_works_where_there_is_one_thing_to_do() {
        let me = std::thread::current().id();
        let workers = Workers::start(2, None).unwrap();
        let who = |_| std::thread::current().id();
        assert_eq!(workers.map(1, who), [me]);
        assert_eq!((workers.threads(), Workers::caller().threads()), (2, 1));
        assert!(workers.map(2, who).iter().all(|worker| *worker != me));
        assert_eq!(workers.map(3, |number| number), [0, 1, 2]);
    }

    #[test]
    fn of_several_panics_one_goes_on_and_none_is_dropped() {
        let thrown = Arc::new(());
        for pinned in [None, Some(cpus_of_this_thread())] {
            let workers = Workers::start(3, pinned.as_ref()).unwrap();
            let before = Arc::strong_count(&thrown);
            let work = || std::panic::panic_any(Arc::clone(&thrown));
            let panic = catch_unwind(AssertUnwindSafe(|| workers.all(work))).unwrap_err();
            assert_eq!(Arc::strong_count(&thrown), before + 3);
            assert!(panic.is::<Arc<()>>());
        }
    }

    #[test]
    fn processors_that_are_not_there_are_not_waited_for() {
        let mine = cpus_of_this_thread();
        let workers = Workers::start(2, Some(&Numbers::from([60_000]))).unwrap();
        assert_eq!(cpus_of(&workers), [mine.clone(), mine]);
    }
}
