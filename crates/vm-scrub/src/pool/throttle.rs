//! How fast background scrubbing may go.
//!
//! A token bucket that may run into debt: a piece is always allowed once there is no debt, and is then paid for by waiting.
//! So pieces need no splitting to fit, and over time the rate is exact.

use std::fmt::Debug;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A clock that tests can replace. Times are counted from some moment in the past.
pub trait Clock: Debug + Send + Sync {
    /// How long ago that moment was.
    fn now(&self) -> Duration;

    /// Does nothing for `time`.
    fn sleep(&self, time: Duration);
}

/// The host's monotonic clock.
#[derive(Debug)]
pub(crate) struct SystemClock {
    origin: Instant,
}

impl SystemClock {
    pub(crate) fn new() -> Self {
        Self {
            origin: Instant::now(),
        }
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// A limit on background scrubbing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScrubRate {
    /// Bytes in a second, on average. 0 counts as 1, which is as good as stopping: then only who waits for memory, or for a
    /// ticket, gets on.
    pub bytes_per_second: u64,
    /// Bytes that may be scrubbed at once after a pause, before the average is enforced. What one step does (256
    /// KiB; 2 MiB where clean memory is given back to the kernel) may come on top.
    pub burst: u64,
}

/// Bytes that may be scrubbed; negative while there is debt.
#[derive(Debug)]
struct Bucket {
    rate: Option<ScrubRate>,
    tokens: f64,
    filled: Duration,
}

impl Bucket {
    /// How long to wait, at `now`, until there is no debt.
    fn wait(&mut self, now: Duration) -> Duration {
        let Some(rate) = self.rate else {
            return Duration::ZERO;
        };
        let per_second = rate.bytes_per_second.max(1) as f64;
        let passed = now.saturating_sub(self.filled).as_secs_f64();
        self.tokens = (self.tokens + passed * per_second).min(rate.burst as f64);
        // Whoever asked the clock earlier may come later.
        self.filled = self.filled.max(now);
        // A wait of more than a day is as good as any.
        Duration::from_secs_f64((-self.tokens / per_second).clamp(0.0, 86_400.0))
    }
}

/// Paces background scrubbing; the limit can be changed at any time.
#[derive(Debug)]
pub(crate) struct Throttle {
    clock: Box<dyn Clock>,
    bucket: Mutex<Bucket>,
}

/// The longest that is slept before the question whether to go on is asked again.
const NAP: Duration = Duration::from_micros(500);

impl Throttle {
    pub(crate) fn new(rate: Option<ScrubRate>, clock: Box<dyn Clock>) -> Self {
        let bucket = Bucket {
            rate,
            tokens: rate.map_or(0.0, |rate| rate.burst as f64),
            filled: clock.now(),
        };
        Self {
            clock,
            bucket: Mutex::new(bucket),
        }
    }

    fn bucket(&self) -> std::sync::MutexGuard<'_, Bucket> {
        // Three numbers, each valid by itself.
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the limit from now on. What was scrubbed so far is neither forgiven nor charged again.
    pub(crate) fn set(&self, rate: Option<ScrubRate>) {
        // Asked before the lock is taken: it may be the embedder's.
        let now = self.clock.now();
        let mut bucket = self.bucket();
        bucket.wait(now);
        bucket.filled = bucket.filled.max(now);
        if bucket.rate.is_none() {
            bucket.tokens = rate.map_or(0.0, |rate| rate.burst as f64);
        }
        bucket.rate = rate;
    }

    /// Waits until `bytes` may be scrubbed and charges them, or gives up as soon as `stop` says so. Whether to go on.
    pub(crate) fn allow(&self, bytes: usize, stop: impl Fn() -> bool) -> bool {
        loop {
            if stop() {
                return false;
            }
            let now = self.clock.now();
            let wait = self.bucket().wait(now);
            if wait.is_zero() {
                break;
            }
            self.clock.sleep(wait.min(NAP));
        }
        let mut bucket = self.bucket();
        if bucket.rate.is_some() {
            bucket.tokens -= bytes as f64;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Time passes only by sleeping.
    #[derive(Debug, Clone, Default)]
    struct FakeClock(Arc<AtomicU64>);

    impl Clock for FakeClock {
        fn now(&self) -> Duration {
            Duration::from_nanos(self.0.load(Ordering::Relaxed))
        }

        fn sleep(&self, time: Duration) {
            assert!(time <= NAP, "slept too long to notice a cancellation");
            self.0
                .fetch_add(time.as_nanos().max(1) as u64, Ordering::Relaxed);
        }
    }

    #[test]
    fn the_hosts_clock_goes_on_while_one_sleeps() {
        let clock = SystemClock::new();
        let before = clock.now();
        clock.sleep(Duration::from_millis(2));
        assert!(clock.now() - before >= Duration::from_millis(2));
    }

    fn throttle(rate: Option<ScrubRate>) -> (Throttle, FakeClock) {
        let clock = FakeClock::default();
        (Throttle::new(rate, Box::new(clock.clone())), clock)
    }

    proptest! {
        /// At no moment has more been allowed than burst + rate * time (to the clock's nanosecond) + one piece, and not much
        /// less than that in the end.
        #[test]
        fn the_rate_is_kept_from_both_sides(
            per_second in 1_000_000..100_000_000_000_u64,
            burst in 0..10_000_000_u64,
            pieces in prop::collection::vec(1..300_000_usize, 1..200),
        ) {
            let (throttle, clock) = throttle(Some(ScrubRate { bytes_per_second: per_second, burst }));
            let mut allowed = 0.0;
            for piece in &pieces {
                prop_assert!(throttle.allow(*piece, || false));
                let passed = clock.now().as_secs_f64();
                prop_assert!(allowed <= burst as f64 + (passed + 2e-9) * per_second as f64 + 1.0, "too fast");
                allowed += *piece as f64;
            }
            let needed = (allowed - burst as f64).max(0.0) / per_second as f64;
            let slack = (pieces.len() + 1) as f64 * 1e-8 + 0.0006;
            prop_assert!(clock.now().as_secs_f64() <= needed + slack, "too slow");
        }
    }

    #[test]
    fn who_asked_the_clock_earlier_is_given_nothing_twice() {
        let rate = ScrubRate {
            bytes_per_second: 1000,
            burst: 10_000,
        };
        let mut bucket = Bucket {
            rate: Some(rate),
            tokens: -5000.0,
            filled: Duration::ZERO,
        };
        let (earlier, later) = (Duration::from_millis(500), Duration::from_secs(1));
        let wait = bucket.wait(later);
        assert_eq!(wait, Duration::from_secs(4));
        assert_eq!(bucket.wait(earlier), wait);
        assert_eq!(bucket.wait(later), wait);
    }

    #[test]
    fn no_limit_never_waits() {
        let (throttle, clock) = throttle(None);
        for _ in 0..100 {
            assert!(throttle.allow(1 << 30, || false));
        }
        assert_eq!(clock.now(), Duration::ZERO);
    }

    #[test]
    fn a_limit_can_be_set_changed_and_lifted_while_running() {
        let (throttle, clock) = throttle(None);
        throttle.set(Some(ScrubRate {
            bytes_per_second: 1000,
            burst: 0,
        }));
        assert!(throttle.allow(1000, || false));
        assert!(throttle.allow(1000, || false));
        assert!(
            (clock.now().as_secs_f64() - 1.0).abs() < 0.01,
            "{:?}",
            clock.now()
        );
        throttle.set(Some(ScrubRate {
            bytes_per_second: 10_000,
            burst: 0,
        }));
        assert!(throttle.allow(1, || false));
        assert!(
            (clock.now().as_secs_f64() - 1.1).abs() < 0.01,
            "{:?}",
            clock.now()
        );
        throttle.set(None);
        assert!(throttle.allow(1 << 40, || false));
        assert!(throttle.allow(1, || false));
        assert!((clock.now().as_secs_f64() - 1.1).abs() < 0.01);
    }

    fn limit(bytes_per_second: u64) -> Option<ScrubRate> {
        Some(ScrubRate {
            bytes_per_second,
            burst: 0,
        })
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn the_time_before_a_change_counts_at_the_rate_of_then() {
        let (throttle, clock) = throttle(limit(1000));
        assert!(throttle.allow(3000, || false));
        clock.0.store(1_000_000_000, Ordering::Relaxed);
        throttle.set(limit(10));
        assert_eq!(throttle.bucket().wait(clock.now()), seconds(200));
    }

    /// The clock is asked before the lock is taken, and somebody who asked it later may have been quicker.
    #[test]
    fn who_asked_the_clock_earlier_and_changes_the_limit_gives_nothing_twice() {
        let (throttle, clock) = throttle(limit(1000));
        assert!(throttle.allow(5000, || false));
        assert_eq!(throttle.bucket().wait(seconds(2)), seconds(3));
        clock.0.store(1_000_000_000, Ordering::Relaxed);
        throttle.set(limit(100));
        assert_eq!(throttle.bucket().wait(seconds(2)), seconds(30));
    }

    #[test]
    fn a_rate_of_zero_counts_as_one() {
        let (throttle, clock) = throttle(Some(ScrubRate {
            bytes_per_second: 0,
            burst: 0,
        }));
        assert!(throttle.allow(2, || false));
        assert!(throttle.allow(1, || false));
        assert!((clock.now().as_secs_f64() - 2.0).abs() < 0.01);
    }

    #[test]
    fn a_wait_ends_when_it_is_told_to() {
        let (throttle, clock) = throttle(Some(ScrubRate {
            bytes_per_second: 1,
            burst: 0,
        }));
        assert!(throttle.allow(1 << 20, || false));
        let until = Duration::from_millis(3);
        assert!(!throttle.allow(1, || clock.now() >= until));
        assert!(clock.now() < until + Duration::from_millis(1));
    }
}
