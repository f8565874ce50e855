//! The background queue: nothing that is handed in is forgotten, nobody sleeps while there is work, and the end is clean.
//!
//! A notification that gets lost is a deadlock, which loom reports.

use super::check;
use crate::pool::{Background, Chore, Errand, Priority, SystemClock, Throttle};
use crate::scrub::Workers;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, thread};
use crate::sys::fault::{self, Call, FaultGuard};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// A queue with its thread, at the priority of the test.
fn start() -> (FaultGuard, Background) {
    // loom's threads share one of the kernel's, which is not to be put last.
    let priority = fault::inject(Call::SetPriority, 0, 1, libc::EPERM);
    let throttle = Throttle::new(None, Box::new(SystemClock::new()));
    (priority, Background::start(throttle, None).unwrap())
}

/// So many pieces of nothing, and one conclusion.
#[derive(Debug)]
struct Pieces {
    priority: Priority,
    left: AtomicUsize,
    done: AtomicUsize,
    of: usize,
    concluded: Mutex<bool>,
    changed: Condvar,
}

impl Pieces {
    fn new(of: usize, priority: Priority) -> Arc<Self> {
        Arc::new(Self {
            priority,
            left: AtomicUsize::new(of),
            done: AtomicUsize::new(0),
            of,
            concluded: Mutex::new(false),
            changed: Condvar::new(),
        })
    }

    fn take(&self) -> bool {
        self.left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(1)
            })
            .is_ok()
    }

    fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire) == self.of
    }
}

impl Chore for Pieces {
    fn priority(&self) -> Priority {
        self.priority
    }

    fn work(&self, go_on: &mut dyn FnMut(usize) -> bool) {
        while self.left.load(Ordering::Relaxed) > 0 && go_on(1) && self.take() {
            self.done.fetch_add(1, Ordering::AcqRel);
        }
        if self.is_done() {
            *self.concluded.lock().unwrap() = true;
            self.changed.notify_all();
        }
    }

    fn work_with(&self, _: &Workers) {
        self.work(&mut |_| true);
    }

    fn has_work(&self) -> bool {
        !self.is_over() && (self.left.load(Ordering::Relaxed) > 0 || self.is_done())
    }

    fn is_wanted(&self) -> bool {
        false
    }

    fn is_over(&self) -> bool {
        *self.concluded.lock().unwrap()
    }

    fn wait(&self) {
        let mut concluded = self.concluded.lock().unwrap();
        while !*concluded {
            concluded = self.changed.wait(concluded).unwrap();
        }
    }
}

#[test]
fn what_is_handed_in_is_done() {
    check(2, || {
        let (_priority, background) = start();
        let chore = Pieces::new(1, Priority::Normal);
        background.add(Arc::clone(&chore) as Arc<dyn Chore>);
        chore.wait();
        assert!(chore.is_done());
    });
}

#[test]
fn chores_of_two_threads_are_both_done() {
    check(1, || {
        let (_priority, background) = start();
        let background = Arc::new(background);
        let (mine, others) = (
            Pieces::new(1, Priority::Low),
            Pieces::new(1, Priority::High),
        );
        let other = thread::spawn({
            let (background, chore) = (Arc::clone(&background), Arc::clone(&others));
            move || background.add(chore)
        });
        background.add(Arc::clone(&mine) as Arc<dyn Chore>);
        mine.wait();
        others.wait();
        other.join().unwrap();
    });
}

#[test]
fn who_helps_and_the_thread_share_one_chore() {
    check(2, || {
        let (_priority, background) = start();
        let chore = Pieces::new(2, Priority::Normal);
        background.add(Arc::clone(&chore) as Arc<dyn Chore>);
        // `false` if the thread was faster.
        background.help(&Workers::caller());
        chore.wait();
        assert_eq!(chore.done.load(Ordering::Relaxed), 2);
    });
}

#[test]
fn the_thread_ends_when_the_queue_is_dropped_whatever_is_left() {
    check(2, || {
        let (_priority, background) = start();
        background.add(Pieces::new(1, Priority::Normal));
        drop(background);
    });
}

/// Done when it was looked after so often; wants to be looked after again at once until then.
struct Visits {
    left: Mutex<usize>,
    changed: Condvar,
}

impl Visits {
    fn new(visits: usize) -> Arc<Self> {
        Arc::new(Self {
            left: Mutex::new(visits),
            changed: Condvar::new(),
        })
    }

    fn wait(&self) {
        let mut left = self.left.lock().unwrap();
        while *left > 0 {
            left = self.changed.wait(left).unwrap();
        }
    }
}

impl Errand for Visits {
    fn run(&self, allow: &mut dyn FnMut(usize) -> bool) -> Option<Duration> {
        if !allow(1) {
            return Some(Duration::ZERO);
        }
        let mut left = self.left.lock().unwrap();
        *left = left.saturating_sub(1);
        self.changed.notify_all();
        (*left > 0).then_some(Duration::ZERO)
    }

    fn is_wanted(&self) -> bool {
        false
    }
}

#[test]
fn an_errand_is_looked_after_when_it_is_due() {
    check(2, || {
        let (_priority, background) = start();
        let errand = Visits::new(2);
        let weak: Weak<Visits> = Arc::downgrade(&errand);
        background.entrust(weak);
        // Far off, so that the thread waits; then at once, which must wake it.
        background.look_again(Duration::from_secs(3600));
        background.look_again(Duration::ZERO);
        errand.wait();
    });
}

#[test]
fn an_errand_does_not_keep_chores_from_being_done() {
    check(1, || {
        let (_priority, background) = start();
        let errand = Visits::new(1);
        let weak: Weak<Visits> = Arc::downgrade(&errand);
        background.entrust(weak);
        background.look_again(Duration::ZERO);
        let chore = Pieces::new(1, Priority::Normal);
        background.add(Arc::clone(&chore) as Arc<dyn Chore>);
        chore.wait();
        errand.wait();
    });
}
