//! Work that waits until there is time for it.
//!
//! One thread for each pool, at the lowest priority, works on what has been retired, most urgent first, one piece at a time;
//! between two pieces it looks whether to stop, to wait for the throttle, or to turn to something more urgent. Whoever is
//! waiting for memory helps with all of the pool's threads.

use super::throttle::Throttle;
use crate::embedder::survive;
use crate::scrub::Workers;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::thread::{self, JoinHandle};
use crate::sync::{Condvar, Mutex, MutexGuard, mpsc};
use crate::sys::numa::Numbers;
use crate::sys::thread as native;
use std::fmt::Debug;
use std::sync::{Arc, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

/// How long an errand waits that has panicked: what it had not come to may be in order.
const AFTER_A_PANIC: Duration = Duration::from_millis(100);

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
    /// Concludes it if the last piece is done and nobody has yet.
    fn work(&self, go_on: &mut dyn FnMut(usize) -> bool);

    /// As [`work`](Self::work) with all of `workers`, until it is concluded or given up.
    fn work_with(&self, workers: &Workers);

    /// Whether there is something that one more thread could do: take a piece, or conclude it.
    fn has_work(&self) -> bool;

    /// Whether somebody is [at it with all workers](Self::work_with), to whom the background is to leave it.
    fn is_wanted(&self) -> bool;

    /// Whether it is concluded or given up.
    fn is_over(&self) -> bool;

    /// Returns when it is concluded or given up.
    fn wait(&self);
}

/// Something to look after again from time to time.
pub(crate) trait Errand: Send + Sync {
    /// Does what can be done now; `allow`, asked with the length in bytes of each piece before it is begun, may say no. How
    /// long until the next time, if there is to be one.
    fn run(&self, allow: &mut dyn FnMut(usize) -> bool) -> Option<Duration>;

    /// Whether somebody else wants to do it now, without waiting for the throttle.
    fn is_wanted(&self) -> bool;
}

/// What the thread is to do next.
enum Task {
    Chore(Arc<dyn Chore>),
    Errand,
}

struct Queue {
    /// In the order of arrival.
    chores: Mutex<Vec<Arc<dyn Chore>>>,
    changed: Condvar,
    stop: AtomicBool,
    throttle: Throttle,
    /// When to look after the errand. Locked after the chores, or alone.
    due: Mutex<Option<Instant>>,
    errand: OnceLock<Weak<dyn Errand>>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("chores", &self.chores)
            .field("due", &self.due)
            .finish_non_exhaustive()
    }
}

/// The queue of a pool and the thread that works on it.
#[derive(Debug)]
pub(crate) struct Background {
    queue: Arc<Queue>,
    thread: Mutex<Option<JoinHandle<()>>>,
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

    fn due(&self) -> MutexGuard<'_, Option<Instant>> {
        // Changed by single assignments only.
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that the errand is looked after in so long at the latest.
    fn look_again(&self, after: Duration) {
        let at = Instant::now() + after;
        // Under the lock, so that the thread cannot miss it between looking and waiting.
        let _chores = self.chores();
        let mut due = self.due();
        *due = Some(due.map_or(at, |due| due.min(at)));
        self.changed.notify_one();
    }

    fn look_after_errand(&self) {
        let Some(errand) = self.errand.get().and_then(Weak::upgrade) else {
            return;
        };
        let stop = || {
            self.stop.load(Ordering::Relaxed)
                || errand.is_wanted()
                || self.chores().iter().any(|chore| chore.has_work())
        };
        let run = || errand.run(&mut |bytes| self.throttle.allow(bytes, stop));
        match survive(run) {
            Some(Some(after)) => self.look_again(after),
            Some(None) => {}
            None => {
                self.look_again(AFTER_A_PANIC);
                survive(|| {
                    log::error!("trying shared memory again panicked; it stays in quarantine");
                });
            }
        }
    }

    fn run(&self) {
        while let Some(task) = self.next() {
            let chore = match task {
                Task::Chore(chore) => chore,
                Task::Errand => {
                    self.look_after_errand();
                    continue;
                }
            };
            let outranked = || {
                let mine = chore.priority();
                self.chores()
                    .iter()
                    .any(|other| other.priority() > mine && other.has_work())
            };
            let stop = || {
                self.stop.load(Ordering::Relaxed)
                    || chore.is_over()
                    || chore.is_wanted()
                    || outranked()
            };
            // A panic in an embedder's progress callback: the chore gives itself up, and the others go on.
            let worked = survive(|| chore.work(&mut |bytes| self.throttle.allow(bytes, stop)));
            if worked.is_none() {
                survive(|| {
                    log::error!(
                        "background scrubbing panicked; the memory concerned is quarantined"
                    );
                });
            }
        }
    }

    /// Waits for something to do; `None` when it is time to stop.
    fn next(&self) -> Option<Task> {
        let mut chores = self.chores();
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            if let Some(chore) = Self::most_urgent(&mut chores, |chore| chore.has_work()) {
                return Some(Task::Chore(chore));
            }
            let due = *self.due();
            chores = match due.map(|at| at.saturating_duration_since(Instant::now())) {
                None => self
                    .changed
                    .wait(chores)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => {
                    *self.due() = None;
                    return Some(Task::Errand);
                }
                Some(left) => {
                    let waited = self.changed.wait_timeout(chores, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

impl Background {
    /// Starts the thread, which runs on `cpus`, where these are given. It is ready for work when this returns, and has made every
    /// system call that only a thread that begins makes: the VMM may forbid them now.
    pub(crate) fn start(throttle: Throttle, cpus: Option<Numbers>) -> std::io::Result<Self> {
        let queue = Arc::new(Queue {
            chores: Mutex::default(),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            throttle,
            due: Mutex::new(None),
            errand: OnceLock::new(),
        });
        let worker = Arc::clone(&queue);
        let (started, ready) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("vm-scrub-back".into())
            .spawn(move || {
                let priority = native::lowest_priority();
                let pinned = cpus.map_or(Ok(()), |cpus| native::pin(native::id(), &cpus));
                survive(|| {
                    if let Err(error) = priority {
                        log::warn!("background scrubbing runs at normal priority: {error}");
                    }
                    if let Err(error) = pinned {
                        log::warn!("background scrubbing is not kept on its NUMA node: {error}");
                    }
                });
                // Nobody listens only if the pool is not to be.
                let _ = started.send(());
                drop(started);
                worker.run();
            })?;
        // It says so before it ends.
        let _ = ready.recv();
        Ok(Self {
            queue,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// The pace of the background thread.
    pub(crate) fn throttle(&self) -> &Throttle {
        &self.queue.throttle
    }

    /// Says what is to be looked after from time to time; once.
    pub(crate) fn entrust(&self, errand: Weak<dyn Errand>) {
        // The second of two would be lost, and there is one for each pool.
        let _ = self.queue.errand.set(errand);
    }

    /// Sees to it that the errand is looked after in so long at the latest.
    pub(crate) fn look_again(&self, after: Duration) {
        self.queue.look_again(after);
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
        chore.wait();
        true
    }
}

impl Background {
    /// Ends the thread after the piece it is at, and returns when it has ended; at once if this is that thread.
    pub(crate) fn end(&self) {
        {
            // Under the lock, so that the thread cannot miss it between looking and waiting.
            let _chores = self.queue.chores();
            self.queue.stop.store(true, Ordering::Relaxed);
        }
        self.queue.changed.notify_all();
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(thread) = thread
            // The last owner of the pool may have been a chore, and then this is that thread.
            && thread.thread().id() != thread::current().id()
        {
            // What is left was owned by nobody but the queue.
            let _ = thread.join();
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.end();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::throttle::SystemClock;
    use super::*;

    #[derive(Debug)]
    struct Fake {
        priority: Priority,
        over: bool,
    }

    impl Chore for Fake {
        fn priority(&self) -> Priority {
            self.priority
        }
        fn work(&self, _: &mut dyn FnMut(usize) -> bool) {}
        fn work_with(&self, _: &Workers) {}
        fn has_work(&self) -> bool {
            !self.over
        }
        fn is_wanted(&self) -> bool {
            false
        }
        fn is_over(&self) -> bool {
            self.over
        }
        fn wait(&self) {}
    }

    #[test]
    fn the_oldest_of_the_most_urgent_comes_first_and_what_is_over_is_forgotten() {
        use Priority::{High, Low, Normal};
        let all: Vec<Arc<dyn Chore>> = [
            (High, true),
            (Low, false),
            (Normal, false),
            (Normal, false),
            (Low, false),
        ]
        .into_iter()
        .map(|(priority, over)| Arc::new(Fake { priority, over }) as Arc<dyn Chore>)
        .collect();
        let mut chores = all.clone();
        let mut left = 4;
        for next in [2, 3, 1, 4] {
            let chore = Queue::most_urgent(&mut chores, |_| true).unwrap();
            assert!(Arc::ptr_eq(&chore, &all[next]), "number {next}");
            assert_eq!(chores.len(), left);
            chores.retain(|other| !Arc::ptr_eq(other, &chore));
            left -= 1;
        }
        assert!(Queue::most_urgent(&mut chores, |_| true).is_none());
        let mut chores = all.clone();
        let urgent = Queue::most_urgent(&mut chores, |chore| chore.priority() == Low).unwrap();
        assert!(Arc::ptr_eq(&urgent, &all[1]), "the first that is wanted");
    }

    /// Asks whether it may do one piece, and says what the answer was.
    struct Asking {
        wanted: bool,
        answer: std::sync::Mutex<mpsc::Sender<bool>>,
    }

    impl Errand for Asking {
        fn run(&self, allow: &mut dyn FnMut(usize) -> bool) -> Option<Duration> {
            self.answer.lock().unwrap().send(allow(1)).unwrap();
            None
        }
        fn is_wanted(&self) -> bool {
            self.wanted
        }
    }

    fn asking(wanted: bool) -> (Arc<dyn Errand>, mpsc::Receiver<bool>) {
        let (answer, answers) = mpsc::channel();
        let answer = std::sync::Mutex::new(answer);
        (Arc::new(Asking { wanted, answer }), answers)
    }

    fn unlimited() -> Throttle {
        Throttle::new(None, Box::new(SystemClock::new()))
    }

    fn queue() -> Queue {
        Queue {
            chores: Mutex::default(),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            throttle: unlimited(),
            due: Mutex::new(None),
            errand: OnceLock::new(),
        }
    }

    #[test]
    fn an_errand_stops_for_whoever_wants_it_for_work_and_for_the_end() {
        for [stop, wanted, work] in [
            [false, false, false],
            [true, false, false],
            [false, true, false],
            [false, false, true],
        ] {
            let (errand, answers) = asking(wanted);
            let queue = queue();
            assert!(queue.errand.set(Arc::downgrade(&errand)).is_ok());
            queue.stop.store(stop, Ordering::Relaxed);
            let (priority, over) = (Priority::Normal, !work);
            queue.chores().push(Arc::new(Fake { priority, over }));
            queue.look_after_errand();
            let goes_on = !stop && !wanted && !work;
            assert_eq!(answers.try_recv(), Ok(goes_on), "{stop} {wanted} {work}");
        }
    }

    #[test]
    fn an_errand_is_not_looked_after_before_it_is_time() {
        const HOUR: Duration = Duration::from_secs(3600);
        let queue = queue();
        let now = Instant::now();
        queue.look_again(HOUR);
        let due = *queue.due();
        assert!(due.is_some_and(|due| due >= now + HOUR));
        queue.look_again(2 * HOUR);
        assert_eq!(*queue.due(), due, "that is in time for both");
        queue.look_again(Duration::ZERO);
        assert!(queue.due().is_some_and(|due| due < now + HOUR));
    }

    #[test]
    fn an_errand_that_panics_is_looked_after_again() {
        #[derive(Debug)]
        struct Panics;
        impl Errand for Panics {
            fn run(&self, _: &mut dyn FnMut(usize) -> bool) -> Option<Duration> {
                panic!("on purpose")
            }
            fn is_wanted(&self) -> bool {
                false
            }
        }
        let (queue, errand) = (queue(), Arc::new(Panics));
        let weak = Arc::downgrade(&errand);
        assert!(queue.errand.set(weak).is_ok());
        queue.look_after_errand();
        assert!(queue.due().is_some());
    }

    #[test]
    fn the_thread_looks_after_what_it_was_entrusted_with() {
        let (errand, answers) = asking(false);
        let background = Background::start(unlimited(), None).unwrap();
        background.entrust(Arc::downgrade(&errand));
        background.look_again(Duration::ZERO);
        assert_eq!(answers.recv_timeout(Duration::from_secs(60)), Ok(true));
    }
}
