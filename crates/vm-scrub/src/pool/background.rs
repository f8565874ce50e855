//! Work that waits until there is time for it.
//!
//! One thread for each pool, at the lowest priority, works on what has been retired, most urgent first, one piece at a time;
//! between two pieces it looks whether to stop, to wait for the throttle, or to turn to something more urgent. Whoever is
//! waiting for memory helps with all of the pool's threads.

use super::throttle::Throttle;
use crate::scrub::Workers;
use crate::sys::numa::Numbers;
use crate::sys::thread as native;
use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// How urgent background scrubbing is, among what waits in the same pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[non_exhaustive]
pub enum Priority {
    /// After everything else.
    Low,
    /// In the order in which leases were retired.
    #[default]
    Normal,
    /// Before everything else; what is being worked on is put aside.
    High,
}

/// Something to be done in pieces, by anybody who has time.
pub(crate) trait Chore: Debug + Send + Sync {
    /// How urgent it is now.
    fn priority(&self) -> Priority;

    /// Takes pieces until there are none left or `go_on`, asked with the length in bytes of each before it is begun, says no.
    fn work(&self, go_on: &mut dyn FnMut(usize) -> bool);

    /// Takes pieces with all of `workers` until there are none left.
    fn work_with(&self, workers: &Workers);

    /// Concludes it if its last piece is done and nobody has yet.
    fn conclude(&self);

    /// Whether there is something that one more thread could do: take a piece, or conclude it.
    fn has_work(&self) -> bool;

    /// Whether it is concluded or given up.
    fn is_over(&self) -> bool;

    /// Returns when it is concluded or given up.
    fn wait(&self);
}

#[derive(Debug)]
struct Queue {
    /// In the order of arrival.
    chores: Mutex<Vec<Arc<dyn Chore>>>,
    changed: Condvar,
    stop: AtomicBool,
    throttle: Throttle,
}

/// The queue of a pool and the thread that works on it.
#[derive(Debug)]
pub(crate) struct Background {
    queue: Arc<Queue>,
    thread: Option<JoinHandle<()>>,
}

impl Queue {
    fn chores(&self) -> MutexGuard<'_, Vec<Arc<dyn Chore>>> {
        // The list is changed by single calls only.
        self.chores.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The most urgent chore for which `wanted` says yes; the oldest of them. Those that are over are forgotten.
    fn most_urgent(
        chores: &mut Vec<Arc<dyn Chore>>,
        wanted: impl Fn(&dyn Chore) -> bool,
    ) -> Option<Arc<dyn Chore>> {
        chores.retain(|chore| !chore.is_over());
        let mut best: Option<&Arc<dyn Chore>> = None;
        for chore in chores.iter().filter(|chore| wanted(chore.as_ref())) {
            if best.is_none_or(|best| chore.priority() > best.priority()) {
                best = Some(chore);
            }
        }
        best.cloned()
    }

    fn run(&self) {
        while let Some(chore) = self.next() {
            let outranked = || {
                let mine = chore.priority();
                self.chores()
                    .iter()
                    .any(|other| other.priority() > mine && other.has_work())
            };
            let stop = || self.stop.load(Ordering::Relaxed) || chore.is_over() || outranked();
            // A panic in an embedder's progress callback: the chore gives itself up, and the others go on.
            let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                chore.work(&mut |bytes| self.throttle.allow(bytes, stop));
                chore.conclude();
            }));
            if worked.is_err() {
                log::error!("background scrubbing panicked; the memory concerned is quarantined");
            }
        }
    }

    /// Waits for something to do; `None` when it is time to stop.
    fn next(&self) -> Option<Arc<dyn Chore>> {
        let mut chores = self.chores();
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            if let Some(chore) = Self::most_urgent(&mut chores, |chore| chore.has_work()) {
                return Some(chore);
            }
            chores = self
                .changed
                .wait(chores)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Background {
    /// Starts the thread, which runs on `cpus`, where these are given.
    pub(crate) fn start(throttle: Throttle, cpus: Option<Numbers>) -> std::io::Result<Self> {
        let queue = Arc::new(Queue {
            chores: Mutex::default(),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            throttle,
        });
        let worker = Arc::clone(&queue);
        let thread = thread::Builder::new()
            .name("vm-scrub-back".into())
            .spawn(move || {
                if let Err(error) = native::lowest_priority() {
                    log::warn!("background scrubbing runs at normal priority: {error}");
                }
                if let Some(cpus) = cpus
                    && let Err(error) = native::pin(native::id(), &cpus)
                {
                    log::warn!("background scrubbing is not kept on its NUMA node: {error}");
                }
                worker.run();
            })?;
        Ok(Self {
            queue,
            thread: Some(thread),
        })
    }

    /// The pace of the background thread.
    pub(crate) fn throttle(&self) -> &Throttle {
        &self.queue.throttle
    }

    /// Hands a chore in.
    pub(crate) fn add(&self, chore: Arc<dyn Chore>) {
        self.queue.chores().push(chore);
        self.queue.changed.notify_one();
    }

    /// Says that a chore has become more or less urgent.
    pub(crate) fn reorder(&self) {
        self.queue.changed.notify_one();
    }

    /// Finishes the most urgent chore with all of `workers`; `false` if there is none.
    pub(crate) fn help(&self, workers: &Workers) -> bool {
        let chore = Queue::most_urgent(&mut self.queue.chores(), |_| true);
        let Some(chore) = chore else {
            return false;
        };
        chore.work_with(workers);
        chore.conclude();
        chore.wait();
        true
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        {
            // Under the lock, so that the thread cannot miss it between looking and waiting.
            let _chores = self.queue.chores();
            self.queue.stop.store(true, Ordering::Relaxed);
        }
        self.queue.changed.notify_all();
        if let Some(thread) = self.thread.take()
            // The last owner of the pool may have been a chore, and then this is that thread.
            && thread.thread().id() != thread::current().id()
        {
            // It stops after the piece it is at. What is left was owned by nobody but the queue.
            let _ = thread.join();
        }
    }
}
