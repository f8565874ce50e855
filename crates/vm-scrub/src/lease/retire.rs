//! Leases that are revoked at once and scrubbed when there is time.

use super::stages::{End, Left, Next, Stage};
use super::steps::take_away;
use super::teardown::DirtyMemory;
use super::{Lease, Quiesced, ScrubReceipt, TeardownError};
use crate::embedder::survive;
use crate::pool::{Chore, LeaseId, OnProgress, Priority, Progress, Shared};
use crate::scrub::{Job, Workers};
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::sys::fork;
use log::Level;
use std::sync::{Arc, PoisonError, Weak};

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
    /// It had been finished already; or the memory of a shareable lease was sealed already, which nobody can zero any more: then
    /// the receipt says that it is in quarantine, from which it comes back when it has been read back
    /// ([`Pool::withheld`](crate::Pool::withheld)); or all was proven to be clean, and but for [`Policy::retain`](crate::Policy::retain)
    /// it would have been finished: then the rest stays populated.
    Finished(Box<Result<ScrubReceipt, TeardownError>>),
}

/// Where the memory of a retired lease is.
#[derive(Debug)]
enum State {
    /// In the hands of whoever works on the stage's job.
    Waiting(Box<Stage>),
    /// One thread's, which goes on to the next stage.
    Busy,
    /// Finished, with the receipt, until somebody takes it.
    Finished(Option<Box<End>>),
    /// Given up: cancelled, or quarantined because of a panic.
    GivenUp,
}

struct Retired {
    lease: LeaseId,
    /// Kept by the memory, for as long as it is not back.
    pool: Weak<Shared>,
    /// Where the memory is, and the threads that scrub it: not in a forked child.
    address_space: u64,
    priority: AtomicU8,
    cancelled: AtomicBool,
    /// How many threads are at a piece, or about to take one.
    active: AtomicUsize,
    /// How many callers are at it with all threads, and want the background to leave it to them.
    wanted: AtomicUsize,
    /// How many bytes there are to be done in each of the stages that count.
    bytes: u64,
    /// And in all of them.
    total: u64,
    done: AtomicU64,
    on_progress: Option<OnProgress>,
    state: Mutex<State>,
    changed: Condvar,
}

/// A thread at work on a retired lease. Keeps the pool's memory mapped, and gives the lease up if the thread panics.
struct Active<'a> {
    retired: &'a Retired,
    /// Whether the work has returned. Not whether the thread is unwinding: it may have been before.
    has_returned: bool,
    _pool: Arc<Shared>,
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        let retired = self.retired;
        if !self.has_returned {
            retired.give_up();
        }
        {
            // Under the lock, as whoever waits for this looks: it cannot fall between its look and its wait.
            let _state = retired.state();
            retired.active.fetch_sub(1, Ordering::SeqCst);
        }
        if retired.cancelled.load(Ordering::SeqCst) || retired.is_wanted() {
            retired.changed.notify_all();
        }
    }
}

/// A thread that has the stage of a retired lease to itself. If it panics (in a logger of the embedder's), nobody waits for it for
/// ever.
struct Alone<'a> {
    retired: &'a Retired,
    /// Whether it has left: then the next thread may be at it, and what is busy is that one's.
    has_left: bool,
}

impl<'a> Alone<'a> {
    /// For the thread that has made the state [`State::Busy`].
    fn with(retired: &'a Retired) -> Self {
        Self {
            retired,
            has_left: false,
        }
    }

    /// Leaves the lease in this state.
    fn leave(mut self, state: State) {
        *self.retired.state() = state;
        self.has_left = true;
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        if !self.has_left {
            *self.retired.state() = State::GivenUp;
        }
        self.retired.changed.notify_all();
    }
}

/// Somebody who is at a retired lease with all threads.
struct Wanted<'a>(&'a Retired);

impl<'a> Wanted<'a> {
    fn of(retired: &'a Retired) -> Self {
        retired.wanted.fetch_add(1, Ordering::SeqCst);
        Self(retired)
    }
}

impl Drop for Wanted<'_> {
    fn drop(&mut self) {
        self.0.wanted.fetch_sub(1, Ordering::SeqCst);
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
        let steps = take_away(self, quiesced)?;
        let pool = Arc::clone(&steps.pool);
        let lease = steps.lease();
        let is_file = steps.file.is_some();
        let stage = Stage::first(steps);
        let bytes = stage.job().map_or(0, |job| job.progress().1);
        // What is sealed is gone through a second time, and so is what does not all stay populated.
        let twice = is_file || pool.retain < bytes;
        let retired = Arc::new(Retired {
            lease,
            pool: pool.visit(),
            address_space: pool.address_space(),
            priority: AtomicU8::new(Priority::Normal as u8),
            cancelled: AtomicBool::new(false),
            active: AtomicUsize::new(0),
            wanted: AtomicUsize::new(0),
            bytes,
            total: if twice { 2 * bytes } else { bytes },
            done: AtomicU64::new(0),
            on_progress: pool.on_progress.clone(),
            state: Mutex::new(State::Waiting(Box::new(stage))),
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

    /// How far it is, in bytes of the lease: the kernel is asked which of them can hold data when the work gets there, and what was
    /// never populated is done at once. All bytes count twice if the lease is shareable (zeroed, then read back once the file is
    /// sealed; in whole blocks), or if not all of them may stay populated ([`Policy::retain`](crate::Policy::retain)). What is done never
    /// becomes less; it does not grow while shareable memory is zeroed again because it could not be sealed.
    pub fn progress(&self) -> Progress {
        self.retired
            .progress(self.retired.done.load(Ordering::Relaxed))
    }

    /// Whether it is finished, so that [`wait`](Self::wait) returns at once.
    pub fn is_finished(&self) -> bool {
        !self.retired.is_here()
            || matches!(&*self.retired.state(), State::Finished(_) | State::GivenUp)
    }

    /// Makes it more or less urgent than what else is waiting: the background heeds it after 256 KiB at most, which takes less than a
    /// millisecond of its thread. That runs at the lowest priority; where all processors are busy it may have to wait for one first.
    pub fn set_priority(&self, priority: Priority) {
        self.retired
            .priority
            .store(priority as u8, Ordering::Relaxed);
        if self.retired.is_here()
            && let Some(pool) = self.retired.pool()
        {
            pool.background.reorder();
        }
    }

    /// Finishes it with all of the pool's threads, at normal priority and without the throttle, and returns the receipt.
    ///
    /// # Errors
    ///
    /// [`TeardownError::Unaccounted`] if the numbers do not add up, [`TeardownError::Panicked`] if a progress callback
    /// panicked: everything is quarantined then. [`TeardownError::Forked`] in a forked child, at once.
    pub fn wait(self) -> Result<ScrubReceipt, TeardownError> {
        if self.retired.is_here()
            && let Some(pool) = self.retired.pool()
        {
            self.retired.work_with(pool.engine.workers());
        }
        self.wait_in_background()
    }

    /// Waits until the background has finished it, at its own pace.
    ///
    /// # Errors
    ///
    /// As for [`Ticket::wait`].
    pub fn wait_in_background(self) -> Result<ScrubReceipt, TeardownError> {
        let lease = self.retired.lease;
        if !self.retired.is_here() {
            return Err(TeardownError::Forked { lease });
        }
        Chore::wait(&*self.retired);
        self.retired.take_outcome()
    }

    /// Stops scrubbing and hands the memory back, dirty. Waits for whoever is at a piece of it: that takes less than a millisecond, if
    /// the background thread, which runs at the lowest priority, has a processor to finish its piece on.
    ///
    /// What cannot be handed back dirty is [`Cancelled::Finished`]: above all the memory of a shareable lease that is sealed already,
    /// which stays in quarantine until it has been read back. One step cannot be stopped: when a shareable lease was read back and found
    /// to be zero, its file goes back to the kernel as a whole, which takes some hundred milliseconds for a gigabyte of 4 KiB
    /// pages.
    pub fn cancel(self) -> Cancelled {
        let retired = &self.retired;
        if !retired.is_here() {
            let lease = retired.lease;
            return Cancelled::Finished(Box::new(Err(TeardownError::Forked { lease })));
        }
        retired.cancelled.store(true, Ordering::SeqCst);
        let mut state = retired.state();
        loop {
            let busy = retired.active.load(Ordering::SeqCst) > 0;
            match &mut *state {
                State::Waiting(_) if !busy => {
                    if let State::Waiting(stage) = std::mem::replace(&mut *state, State::Busy) {
                        drop(state);
                        let _alone = Alone::with(retired);
                        return match stage.give_up() {
                            Left::Dirty(steps) => {
                                Cancelled::Dirty(Box::new(DirtyMemory { steps: *steps }))
                            }
                            Left::Over(end) => Cancelled::Finished(end),
                        };
                    }
                }
                State::Finished(_) | State::GivenUp => {
                    drop(state);
                    return Cancelled::Finished(Box::new(retired.take_outcome()));
                }
                State::Waiting(_) | State::Busy => {}
            }
            state = retired
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Retired {
    /// Not in a forked child, which does not even look at the state: whoever had it locked is not there to unlock it.
    fn is_here(&self) -> bool {
        fork::is_here(self.address_space)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Changed by single assignments only.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pool, while the memory is not yet back in it.
    fn pool(&self) -> Option<Arc<Shared>> {
        match &*self.state() {
            State::Waiting(_) | State::Busy => self.pool.upgrade(),
            State::Finished(_) | State::GivenUp => None,
        }
    }

    fn progress(&self, bytes_done: u64) -> Progress {
        Progress {
            lease: self.lease,
            bytes_done,
            bytes_total: self.total,
        }
    }

    /// Takes down, and tells, that so many bytes are done; not if it is known that more are.
    fn tell(&self, done: u64) {
        let done = done.min(self.total);
        if self.done.fetch_max(done, Ordering::Relaxed) < done
            && let Some(on_progress) = &self.on_progress
        {
            on_progress(self.progress(done));
        }
    }

    /// Quarantines the memory, unless one thread has it to itself or has finished it: then it was zeroed and read back, and the
    /// receipt says what became of it.
    fn give_up(&self) {
        let mut state = self.state();
        let State::Waiting(_) = &*state else {
            return;
        };
        let stage = std::mem::replace(&mut *state, State::GivenUp);
        self.cancelled.store(true, Ordering::SeqCst);
        drop(state);
        // Outside the lock: this is what quarantines.
        drop(stage);
        self.changed.notify_all();
    }

    fn take_outcome(&self) -> Result<ScrubReceipt, TeardownError> {
        match &mut *self.state() {
            State::Finished(outcome) => outcome.take().map(|outcome| *outcome),
            _ => None,
        }
        .unwrap_or(Err(TeardownError::Panicked { lease: self.lease }))
    }

    /// Joins the work on a job, if there is one. Whoever cancels sets its flag first and then waits for the count to be zero; a
    /// thread that joins counts itself first and then looks at the flag before each piece.
    fn enter(&self) -> Option<(Active<'_>, Arc<Job>, Option<u64>)> {
        let state = self.state();
        let State::Waiting(stage) = &*state else {
            return None;
        };
        let job = Arc::clone(stage.job()?);
        let pool = self.pool.upgrade()?;
        self.active.fetch_add(1, Ordering::SeqCst);
        let active = Active {
            retired: self,
            has_returned: false,
            _pool: pool,
        };
        Some((active, job, stage.done_before(self.bytes)))
    }

    /// Takes pieces until there are none left, it is cancelled, or `go_on` says no.
    fn take_batches(&self, go_on: &mut dyn FnMut(usize) -> bool) {
        if let Some((mut active, job, before)) = self.enter() {
            let go_on = |bytes| !self.cancelled.load(Ordering::SeqCst) && go_on(bytes);
            let watch = |done, _| {
                if let Some(before) = before {
                    self.tell(before + done);
                }
            };
            job.work(go_on, Some(&watch));
            active.has_returned = true;
        }
    }

    /// Does what one thread has to do between two jobs, and goes on to the next one or to the end, unless somebody else does, it is
    /// cancelled, or `go_on` says no. Whether there is a next one.
    fn proceed(&self, go_on: &mut dyn FnMut(usize) -> bool) -> bool {
        let mut stopped = false;
        let mut go_on = |bytes| {
            stopped = self.cancelled.load(Ordering::SeqCst) || !go_on(bytes);
            !stopped
        };
        if self.cancelled.load(Ordering::SeqCst) {
            return false;
        }
        let stage = {
            let mut state = self.state();
            match std::mem::replace(&mut *state, State::Busy) {
                State::Waiting(stage) if stage.is_for_one() => stage,
                other => {
                    *state = other;
                    return false;
                }
            }
        };
        let alone = Alone::with(self);
        // The end of this lease may be the pool's.
        let _pool = self.pool.upgrade();
        let before = stage.done_before(self.bytes).unwrap_or(self.bytes);
        match stage.proceed(&mut go_on, &|done| self.tell(before + done)) {
            Next::Stage(stage) => {
                alone.leave(State::Waiting(Box::new(stage)));
                !stopped
            }
            Next::Over(end) => {
                let (level, said) = match &*end {
                    Ok(receipt) => (
                        Level::Info,
                        format!("scrubbed in the background: {:?}", receipt.outcome),
                    ),
                    Err(error) => (Level::Error, format!("in the background: {error}")),
                };
                self.done.store(self.total, Ordering::Relaxed);
                alone.leave(State::Finished(Some(end)));
                // Last: the embedder's logger may panic, and nothing is wrong with the memory then.
                log::log!(level, "{} {said}", self.lease);
                false
            }
        }
    }

    /// Waits until one more thread could do something. Whether there is going to be anything to do.
    fn wait_for_work(&self) -> bool {
        let mut state = self.state();
        loop {
            match &*state {
                State::Finished(_) | State::GivenUp => return false,
                State::Waiting(stage)
                    if stage.has_work() && !self.cancelled.load(Ordering::SeqCst) =>
                {
                    return true;
                }
                State::Waiting(_) | State::Busy => {}
            }
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
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
        loop {
            self.take_batches(go_on);
            if !self.proceed(go_on) {
                return;
            }
        }
    }

    fn work_with(&self, workers: &Workers) {
        let _wanted = Wanted::of(self);
        let work = || {
            while self.wait_for_work() {
                workers.all(|| self.take_batches(&mut |_| true));
                while self.proceed(&mut |_| true) {}
            }
        };
        // Who helps is not who made the callback: it has given the lease up, and that is all that it should do.
        if survive(work).is_none() {
            log::error!("{}: a thread panicked while it scrubbed", self.lease);
        }
    }

    fn has_work(&self) -> bool {
        let has_work = matches!(&*self.state(), State::Waiting(stage) if stage.has_work());
        has_work && !self.cancelled.load(Ordering::SeqCst) && !self.is_wanted()
    }

    fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst) > 0
    }

    fn is_over(&self) -> bool {
        self.cancelled.load(Ordering::SeqCst)
            || matches!(&*self.state(), State::Finished(_) | State::GivenUp)
    }

    fn wait(&self) {
        let mut state = self.state();
        while matches!(&*state, State::Waiting(_) | State::Busy) {
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
            .field("done", &self.done)
            .field("total", &self.total)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
