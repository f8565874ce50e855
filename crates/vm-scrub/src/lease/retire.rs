//! Leases that are revoked at once and scrubbed when there is time.

use super::steps::{Steps, take_away};
use super::teardown::DirtyMemory;
use super::{Lease, Quiesced, ScrubReceipt, TeardownError};
use crate::pool::blocks::Dirty;
use crate::pool::{Chore, LeaseId, Priority, Progress, Shared};
use crate::scrub::{Job, Watch, Work, Workers};
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard};
use std::sync::{Arc, PoisonError};

/// A lease that is being scrubbed in the background.
///
/// Dropping the ticket changes nothing: the scrubbing goes on, and the receipt is logged.
#[derive(Debug)]
#[must_use = "the ticket leads to the receipt"]
pub struct Ticket {
    retired: Arc<Retired>,
}

/// What was left when background scrubbing was cancelled.
#[derive(Debug)]
pub enum Cancelled {
    /// The memory, still dirty: scrub it with [`DirtyMemory::scrub_and_verify`], or drop it and have it quarantined.
    Dirty(Box<DirtyMemory>),
    /// It had been finished already.
    Finished(Box<Result<ScrubReceipt, TeardownError>>),
}

/// Where the memory of a retired lease is.
#[derive(Debug)]
enum State {
    /// In the hands of whoever works on the job.
    Waiting(Box<Steps<Dirty>>),
    /// Being settled by somebody.
    Settling,
    /// Finished, with the receipt, until somebody takes it.
    Finished(Option<Box<Result<ScrubReceipt, TeardownError>>>),
    /// Given up: cancelled, or quarantined because of a panic.
    GivenUp,
}

struct Retired {
    lease: LeaseId,
    job: Job,
    priority: AtomicU8,
    cancelled: AtomicBool,
    /// How many threads are at a piece, or about to take one.
    active: AtomicUsize,
    watch: Option<Box<Watch>>,
    state: Mutex<State>,
    changed: Condvar,
}

/// A thread at work on a retired lease. Keeps the pool's memory mapped, and gives the lease up if the thread panics.
struct Active<'a> {
    retired: &'a Retired,
    /// Whether the thread was unwinding before: then it is not this work that has panicked.
    unwinding: bool,
    _pool: Arc<Shared>,
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        let retired = self.retired;
        if std::thread::panicking() && !self.unwinding {
            retired.give_up();
        }
        retired.active.fetch_sub(1, Ordering::SeqCst);
        if retired.cancelled.load(Ordering::SeqCst) {
            // Whoever cancels looks at the count under the lock: this cannot fall between its look and its wait.
            drop(retired.state());
            retired.changed.notify_all();
        }
    }
}

/// A thread that settles a retired lease. If it panics (in a logger of the embedder's), nobody waits for it for ever.
struct Settling<'a>(&'a Retired);

impl Drop for Settling<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        if matches!(&*state, State::Settling) {
            *state = State::GivenUp;
        }
        drop(state);
        self.0.changed.notify_all();
    }
}

impl Lease {
    /// Takes the memory away from the guest now, and scrubs it in the background.
    ///
    /// The guest's addresses fault from the return on, as after [`Lease::teardown`]; the memory can be leased again when the
    /// ticket is finished. A lease request that finds too little clean memory helps to scrub instead of failing.
    ///
    /// # Errors
    ///
    /// [`TeardownError::Refused`], as for [`Lease::teardown`].
    pub fn retire(self, quiesced: Quiesced) -> Result<Ticket, TeardownError> {
        let mut steps = take_away(self, quiesced)?;
        steps.find_populated();
        // Shared memory is sealed before it is read back: when it is concluded.
        let work = if steps.file.is_some() {
            Work::Zero
        } else {
            Work::ZeroAndRead
        };
        let job = steps.job(work);
        let pool = Arc::clone(&steps.pool);
        let retired = Arc::new(Retired {
            lease: steps.lease(),
            job,
            priority: AtomicU8::new(Priority::Normal as u8),
            cancelled: AtomicBool::new(false),
            active: AtomicUsize::new(0),
            watch: pool.watch(steps.lease()),
            state: Mutex::new(State::Waiting(Box::new(steps))),
            changed: Condvar::new(),
        });
        pool.background.add(Arc::clone(&retired) as Arc<dyn Chore>);
        Ok(Ticket { retired })
    }
}

impl Ticket {
    /// The lease that was retired.
    pub fn lease(&self) -> LeaseId {
        self.retired.lease
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let (bytes_done, bytes_total) = self.retired.job.progress();
        Progress {
            lease: self.retired.lease,
            bytes_done,
            bytes_total,
        }
    }

    /// Whether it is finished, so that [`wait`](Self::wait) returns at once.
    pub fn is_finished(&self) -> bool {
        matches!(&*self.retired.state(), State::Finished(_) | State::GivenUp)
    }

    /// Makes it more or less urgent than what else is waiting, within a millisecond.
    pub fn set_priority(&self, priority: Priority) {
        self.retired
            .priority
            .store(priority as u8, Ordering::Relaxed);
        if let Some(pool) = self.retired.pool() {
            pool.background.reorder();
        }
    }

    /// Finishes it with all of the pool's threads, at normal priority and without the throttle, and returns the receipt.
    ///
    /// # Errors
    ///
    /// [`TeardownError::Unaccounted`] if the numbers do not add up, [`TeardownError::Panicked`] if a progress callback
    /// panicked: everything is quarantined then.
    pub fn wait(self) -> Result<ScrubReceipt, TeardownError> {
        if let Some(pool) = self.retired.pool() {
            self.retired.work_with(pool.engine.workers());
            self.retired.conclude();
        }
        self.wait_in_background()
    }

    /// Waits until the background has finished it, at its own pace.
    ///
    /// # Errors
    ///
    /// As for [`Ticket::wait`].
    pub fn wait_in_background(self) -> Result<ScrubReceipt, TeardownError> {
        Chore::wait(&*self.retired);
        self.retired.take_outcome()
    }

    /// Stops scrubbing within a millisecond and hands the memory back, dirty.
    pub fn cancel(self) -> Cancelled {
        let retired = &self.retired;
        retired.cancelled.store(true, Ordering::SeqCst);
        let mut state = retired.state();
        loop {
            let busy = retired.active.load(Ordering::SeqCst) > 0;
            match &mut *state {
                State::Waiting(_) if !busy => {
                    if let State::Waiting(steps) = std::mem::replace(&mut *state, State::GivenUp) {
                        retired.changed.notify_all();
                        return Cancelled::Dirty(Box::new(DirtyMemory { steps: *steps }));
                    }
                }
                State::Finished(_) | State::GivenUp => {
                    drop(state);
                    return Cancelled::Finished(Box::new(retired.take_outcome()));
                }
                State::Waiting(_) | State::Settling => {}
            }
            state = retired
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Retired {
    fn state(&self) -> MutexGuard<'_, State> {
        // Changed by single assignments only.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pool, while the memory is not yet back in it.
    fn pool(&self) -> Option<Arc<Shared>> {
        match &*self.state() {
            State::Waiting(steps) => Some(Arc::clone(&steps.pool)),
            _ => None,
        }
    }

    /// Quarantines the memory, unless somebody settles it or has settled it: then it was zeroed and read back, and the receipt
    /// says what became of it.
    fn give_up(&self) {
        let mut state = self.state();
        let State::Waiting(_) = &*state else {
            return;
        };
        let steps = std::mem::replace(&mut *state, State::GivenUp);
        self.cancelled.store(true, Ordering::SeqCst);
        drop(state);
        // Outside the lock: this is what quarantines.
        drop(steps);
        self.changed.notify_all();
    }

    fn take_outcome(&self) -> Result<ScrubReceipt, TeardownError> {
        match &mut *self.state() {
            State::Finished(outcome) => outcome.take().map(|outcome| *outcome),
            _ => None,
        }
        .unwrap_or(Err(TeardownError::Panicked { lease: self.lease }))
    }

    /// Joins the work, if there is still work to join. Whoever cancels sets its flag first and then waits for the count to be
    /// zero; a thread that joins counts itself first and then looks at the flag before each piece.
    fn enter(&self) -> Option<Active<'_>> {
        let state = self.state();
        let State::Waiting(steps) = &*state else {
            return None;
        };
        self.active.fetch_add(1, Ordering::SeqCst);
        Some(Active {
            retired: self,
            unwinding: std::thread::panicking(),
            _pool: Arc::clone(&steps.pool),
        })
    }

    /// Takes pieces until there are none left, it is cancelled, or `go_on` says no.
    fn take_batches(&self, go_on: &mut dyn FnMut(usize) -> bool) {
        if let Some(_active) = self.enter() {
            let go_on = |bytes| go_on(bytes) && !self.cancelled.load(Ordering::SeqCst);
            self.job.work(go_on, self.watch.as_deref());
        }
    }
}

impl Chore for Retired {
    fn priority(&self) -> Priority {
        match self.priority.load(Ordering::Relaxed) {
            0 => Priority::Low,
            1 => Priority::Normal,
            _ => Priority::High,
        }
    }

    fn work(&self, go_on: &mut dyn FnMut(usize) -> bool) {
        self.take_batches(go_on);
    }

    fn work_with(&self, workers: &Workers) {
        // Who helps is not who made the callback: it has given the lease up, and that is all that it should do.
        let work = || workers.all(|| self.take_batches(&mut |_| true));
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err() {
            log::error!("{}: a thread panicked while it scrubbed", self.lease);
        }
    }

    fn conclude(&self) {
        if !self.job.is_done() {
            return;
        }
        let steps = {
            let mut state = self.state();
            match std::mem::replace(&mut *state, State::Settling) {
                State::Waiting(steps) => steps,
                other => {
                    *state = other;
                    return;
                }
            }
        };
        let _settling = Settling(self);
        // Threads came and went: what counts is how long they worked, all together.
        let Some((zeroed, verdict)) = self.job.settle(self.job.thread_time()) else {
            // Not possible: it was done above. Dropping the steps quarantines.
            return;
        };
        let steps = steps.scrubbed(&zeroed);
        let outcome = if steps.file.is_some() {
            steps.verified_sealed().recycle()
        } else {
            steps.verified(&verdict).recycle()
        };
        match &outcome {
            Ok(receipt) => log::info!(
                "{} scrubbed in the background: {:?}",
                self.lease,
                receipt.outcome
            ),
            Err(error) => log::error!("{} in the background: {error}", self.lease),
        }
        *self.state() = State::Finished(Some(Box::new(outcome)));
    }

    fn has_work(&self) -> bool {
        let waiting = matches!(&*self.state(), State::Waiting(_));
        let to_do = self.job.has_batches() || self.job.is_done();
        waiting && to_do && !self.cancelled.load(Ordering::SeqCst)
    }

    fn is_over(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
            || matches!(&*self.state(), State::Finished(_) | State::GivenUp)
    }

    fn wait(&self) {
        let mut state = self.state();
        while matches!(&*state, State::Waiting(_) | State::Settling) {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl std::fmt::Debug for Retired {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Retired")
            .field("lease", &self.lease)
            .field("job", &self.job)
            .finish_non_exhaustive()
    }
}
