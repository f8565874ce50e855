//! A clock that a test moves, for the pace of background scrubbing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vm_scrub::pool::Clock;

/// How long until somebody sleeps, on a host that has other things to do.
const LIMIT: Duration = Duration::from_secs(30);

/// A clock that stands still unless it is told to go on: with a limit, background scrubbing then stops after its first piece.
#[derive(Debug, Clone, Default)]
pub struct StoppedClock {
    now: Arc<AtomicU64>,
    asleep: Arc<AtomicBool>,
}

impl Clock for StoppedClock {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.now.load(Ordering::SeqCst))
    }

    fn sleep(&self, _time: Duration) {
        self.asleep.store(true, Ordering::SeqCst);
        std::thread::sleep(Duration::from_micros(100));
    }
}

impl StoppedClock {
    /// Returns when somebody has begun to sleep since. Panics if nobody does: what was to be paced is over, or goes on unpaced.
    #[track_caller]
    pub fn wait_until_asleep(&self) {
        self.asleep.store(false, Ordering::SeqCst);
        let since = Instant::now();
        while !self.asleep.load(Ordering::SeqCst) {
            assert!(since.elapsed() < LIMIT, "nobody waits for this clock");
            std::thread::yield_now();
        }
    }

    /// Lets so much time pass.
    pub fn go_on(&self, time: Duration) {
        self.now.fetch_add(time.as_nanos() as u64, Ordering::SeqCst);
    }

    /// Lets so much time pass, and returns when what could be done in it is done.
    #[track_caller]
    pub fn let_work(&self, time: Duration) {
        self.go_on(time);
        // The first may be one who fell asleep before, and looks up only now.
        self.wait_until_asleep();
        self.wait_until_asleep();
    }
}
