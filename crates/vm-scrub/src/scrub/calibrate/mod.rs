//! Measures which loops are fastest on this host.
//!
//! The widest vector does not win, and no loop wins everywhere: streaming stores gain on one processor what they lose on
//! the next, and lose on all of them for what fits into a cache. So each loop is tried, by size and by what comes after
//! (reading back finds zeros in the cache only if the loop left them there). Once in a process, on the calling thread, for
//! at most 50 ms. Who cannot wait for that has the same measured on a single page, in a third of a millisecond.

mod scratch;

use super::plan::PIECE;
use crate::arch::{VerifyLoop, ZeroLoop, flush_from_cache};
use scratch::Scratch;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// After this time no measurement is begun that would not end within it. The whole may take 50 ms, less than a VM's boot; the
/// rest is for a thread that has to wait for its processor, and for giving the memory back.
const BUDGET: Duration = Duration::from_millis(40);

/// The shortest measurement: several hundred times what reading the clock takes.
const SHORTEST: Duration = Duration::from_micros(20);

/// How often each loop is measured at each size, if time allows; the fastest counts.
const ROUNDS: usize = 5;

/// The smallest size in bytes: a page, which a thread's stack has room for.
const SMALLEST: usize = 4 << 10;

/// Sizes in bytes that are worked on again and again: what fits into one or another cache stays there.
const IN_CACHE: [usize; 5] = [SMALLEST, 32 << 10, 256 << 10, 2 << 20, 8 << 20];

/// Stands for memory that no cache holds. So much need not be populated to measure it: a part of it will do, if its lines are
/// flushed beforehand.
const BEYOND_CACHES: usize = 64 << 20;

/// That part, in bytes: long enough for the clock.
const FLUSHED: usize = 2 << 20;

/// So many bytes are worth a calibration to who scrubs them without a pool: zeroing and reading back takes milliseconds, most of
/// it beyond the caches, where one page says least about the loops.
const WORTH_MEASURING: u64 = BEYOND_CACHES as u64;

/// What is done to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Operation {
    /// Zeros are written.
    Zero,
    /// Bytes are read.
    Verify,
    /// Zeros are written and read back, a chunk at a time.
    ZeroAndVerify,
}

/// Every operation.
const OPERATIONS: [Operation; 3] = [Operation::Zero, Operation::Verify, Operation::ZeroAndVerify];

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Operation::Zero => "zero",
            Operation::Verify => "verify",
            Operation::ZeroAndVerify => "zero-and-verify",
        })
    }
}

/// How fast one loop was.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Rate {
    /// What was done.
    pub operation: Operation,
    /// To how many bytes: those up to 8 MiB again and again, so that a cache holds what it can; 64 MiB stands for memory
    /// that no cache holds.
    pub bytes: u64,
    /// The name of the loop: the zeroing one, if both kinds were used.
    #[cfg_attr(feature = "serde", serde(rename = "loop"))]
    pub loop_name: String,
    /// Bytes in a second: the best of several measurements, on one thread.
    pub bytes_per_second: u64,
}

/// What was measured on this host.
#[derive(Debug)]
pub struct Calibration {
    measured: Vec<Measured>,
    took: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Measured {
    bytes: usize,
    loops: Loops,
    /// Seconds for a byte; infinite if the time ran out before it was measured.
    cost: f64,
}

/// An operation, and what carries it out.
#[derive(Debug, Clone, Copy)]
enum Loops {
    Zero(ZeroLoop),
    Verify(VerifyLoop),
    ZeroAndVerify(ZeroLoop),
}

/// How often it is tried to measure more than a page, on a host that has no time for it.
const TRIES: u32 = 3;

static CALIBRATION: OnceLock<Calibration> = OnceLock::new();

/// What was measured on this host. The first call in a process measures, on the calling thread and for at most 50 ms. Pools
/// call it when they are built, unless they are told which loops to use, and so does the first
/// [`scrub_raw`](crate::scrub_raw) that finds 64 MiB or more to scrub.
///
/// Where the host is so busy, or has so little memory, that only a single page can be measured, that is what is returned. Later
/// calls try again, three times in all.
pub fn calibration() -> &'static Calibration {
    static FAILED: Mutex<u32> = Mutex::new(0);
    if let Some(done) = CALIBRATION.get() {
        return done;
    }
    // What it guards is the processor: two who measure at the same time disturb each other.
    let mut failed = FAILED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(done) = CALIBRATION.get() {
        return done;
    }
    if *failed >= TRIES {
        return quick_calibration();
    }
    match Calibration::measure(BUDGET) {
        Some(calibration) => {
            calibration.log("loops measured");
            CALIBRATION.get_or_init(|| calibration)
        }
        None => {
            *failed += 1;
            log::warn!(
                "loops not measured beyond {SMALLEST} bytes: the host is too busy or has too little memory ({failed} of {TRIES} \
                 attempts)"
            );
            quick_calibration()
        }
    }
}

/// The same for whoever is about to scrub `bytes` bytes and has no pool: what was measured already, or else as much as is worth
/// it. At most one of them in a process stops for 50 ms.
pub(crate) fn calibration_for(bytes: u64) -> &'static Calibration {
    static TRIED: AtomicBool = AtomicBool::new(false);
    if let Some(done) = CALIBRATION.get() {
        return done;
    }
    if bytes >= WORTH_MEASURING && !TRIED.swap(true, Ordering::Relaxed) {
        return calibration();
    }
    quick_calibration()
}

/// Every loop on a single page: measured once in a process, without a system call, in a third of a millisecond.
fn quick_calibration() -> &'static Calibration {
    static QUICK: OnceLock<Calibration> = OnceLock::new();
    QUICK.get_or_init(|| {
        let calibration = Calibration::quick();
        calibration.log("loops measured on one page only");
        calibration
    })
}

impl Calibration {
    /// The loop that zeroed `bytes` bytes fastest, or as many as come nearest to it among those that were tried.
    pub fn fastest_zero(&self, bytes: u64) -> ZeroLoop {
        self.fastest(Operation::Zero, bytes)
            .and_then(Loops::zero_loop)
            .unwrap_or_else(ZeroLoop::best_guess)
    }

    /// The loop that read `bytes` bytes fastest, or as many as come nearest to it among those that were tried.
    pub fn fastest_verify(&self, bytes: u64) -> VerifyLoop {
        match self.fastest(Operation::Verify, bytes) {
            Some(Loops::Verify(verify_loop)) => verify_loop,
            _ => VerifyLoop::portable(),
        }
    }

    /// The loops that zeroed `bytes` bytes and read them back fastest, or as many as come nearest to it among those that were
    /// tried.
    pub fn fastest_zero_and_verify(&self, bytes: u64) -> (ZeroLoop, VerifyLoop) {
        let zero_loop = self
            .fastest(Operation::ZeroAndVerify, bytes)
            .and_then(Loops::zero_loop)
            .unwrap_or_else(ZeroLoop::best_guess);
        (zero_loop, self.partner(zero_loop))
    }

    /// What reads back fastest what `zero_loop` has just written.
    fn partner(&self, zero_loop: ZeroLoop) -> VerifyLoop {
        self.fastest_verify(read_back_from(zero_loop))
    }

    /// Every rate that was measured.
    pub fn rates(&self) -> impl Iterator<Item = Rate> {
        self.measured
            .iter()
            .filter(|one| one.cost.is_finite())
            .map(Measured::rate)
    }

    /// The rates between which the choice for `bytes` bytes was made.
    pub fn rates_for(&self, operation: Operation, bytes: u64) -> Vec<Rate> {
        self.at(operation, bytes).map(Measured::rate).collect()
    }

    /// How long measuring took.
    pub fn took(&self) -> Duration {
        self.took
    }

    fn fastest(&self, operation: Operation, bytes: u64) -> Option<Loops> {
        self.at(operation, bytes)
            .min_by(|a, b| a.cost.total_cmp(&b.cost))
            .map(|one| one.loops)
    }

    /// The measurements that stand for `bytes` bytes: at the nearest size, or where time ran out before that, at the next
    /// size below at which all loops had their turn.
    fn at(&self, operation: Operation, bytes: u64) -> impl Iterator<Item = &Measured> {
        let wanted = nearest(bytes);
        let size = [BEYOND_CACHES]
            .into_iter()
            .chain(IN_CACHE.into_iter().rev())
            .find(|size| *size <= wanted && self.is_complete(operation, *size));
        self.of(operation)
            .filter(move |one| Some(one.bytes) == size)
    }

    fn of(&self, operation: Operation) -> impl Iterator<Item = &Measured> {
        self.measured
            .iter()
            .filter(move |one| one.loops.operation() == operation)
    }

    /// Whether every loop was measured at this size.
    fn is_complete(&self, operation: Operation, size: usize) -> bool {
        let mut at_size = self
            .of(operation)
            .filter(|one| one.bytes == size)
            .peekable();
        at_size.peek().is_some() && at_size.all(|one| one.cost.is_finite())
    }

    /// Measures what time allows. `None` if that is not even a guest's size, or there is no memory.
    fn measure(budget: Duration) -> Option<Self> {
        let begun = Instant::now();
        let mut scratch = Scratch::populate(IN_CACHE[IN_CACHE.len() - 1])?;
        let mut calibration = Self::untried(trials());
        for _ in 0..ROUNDS {
            calibration.round(scratch.bytes(), |expected| {
                begun.elapsed() + expected < budget
            });
        }
        calibration.took = begun.elapsed();
        OPERATIONS
            .into_iter()
            .all(|operation| calibration.is_complete(operation, BEYOND_CACHES))
            .then_some(calibration)
    }

    /// Measures the smallest size, twice: the first time instructions and wide registers are being woken up.
    fn quick() -> Self {
        let begun = Instant::now();
        let mut page = Page([0; SMALLEST]);
        let smallest = trials().into_iter().filter(|one| one.bytes == SMALLEST);
        let mut calibration = Self::untried(smallest.collect());
        for _ in 0..2 {
            calibration.round(&mut page.0, |_| true);
        }
        calibration.took = begun.elapsed();
        calibration
    }

    fn untried(measured: Vec<Measured>) -> Self {
        Self {
            measured,
            took: Duration::ZERO,
        }
    }

    /// Everything takes a turn for which there is time.
    fn round(&mut self, memory: &mut [u8], has_time: impl Fn(Duration) -> bool) {
        for trial in 0..self.measured.len() {
            let mut one = self.measured[trial];
            if has_time(one.expected()) {
                let cost = one.try_on(memory, self.reader_for(one.loops));
                one.cost = one.cost.min(cost);
                self.measured[trial] = one;
            }
        }
    }

    /// Says what was measured: a line for each operation and size.
    fn log(&self, what: &str) {
        log::info!(
            "{what} in {:?}; for large ranges: zeroing by {}, with reading back by {}",
            self.took,
            self.fastest_zero(u64::MAX),
            self.fastest_zero_and_verify(u64::MAX).0,
        );
        for operation in OPERATIONS {
            for size in IN_CACHE.into_iter().chain([BEYOND_CACHES]) {
                let rates: Vec<String> = self
                    .of(operation)
                    .filter(|one| one.bytes == size && one.cost.is_finite())
                    .map(|one| {
                        let gib_per_s = 1.0 / one.cost / (1_u64 << 30) as f64;
                        format!("{} {gib_per_s:.1}", one.loops.name())
                    })
                    .collect();
                if !rates.is_empty() {
                    log::info!("{operation}, {size} bytes: {} GiB/s", rates.join(", "));
                }
            }
        }
    }

    /// What to read with, as far as is known already.
    fn reader_for(&self, loops: Loops) -> VerifyLoop {
        match loops {
            Loops::Verify(verify_loop) => verify_loop,
            Loops::Zero(zero_loop) | Loops::ZeroAndVerify(zero_loop) => self.partner(zero_loop),
        }
    }
}

/// From where zeros are read back that `zero_loop` has just written: from memory of so many bytes, worked on again and again.
pub(crate) fn read_back_from(zero_loop: ZeroLoop) -> u64 {
    let distance = if zero_loop.is_streaming() {
        BEYOND_CACHES
    } else {
        zero_loop.chunk()
    };
    distance as u64
}

/// A page on the stack, aligned as pages are.
#[repr(align(4096))]
struct Page([u8; SMALLEST]);

/// Everything that is to be tried, most important first, should the time run out: the smallest size, which stands in for all
/// others, then guests' sizes. Reading comes before reading back. All loops take turns, so that whatever disturbs the machine
/// disturbs all of them.
fn trials() -> Vec<Measured> {
    let verify = VerifyLoop::available().map(Loops::Verify);
    let zero = ZeroLoop::available().map(Loops::Zero);
    let both = ZeroLoop::available().map(Loops::ZeroAndVerify);
    let loops: Vec<Loops> = verify.chain(zero).chain(both).collect();
    let [smallest, larger @ ..] = IN_CACHE;
    [smallest, BEYOND_CACHES]
        .into_iter()
        .chain(larger)
        .flat_map(|bytes| {
            loops.iter().map(move |loops| Measured {
                bytes,
                loops: *loops,
                cost: f64::INFINITY,
            })
        })
        .collect()
}

/// The measured size that stands for `bytes`: the nearest on a logarithmic scale.
fn nearest(bytes: u64) -> usize {
    let distance = |size: usize| ((size as f64).ln() - (bytes.max(1) as f64).ln()).abs();
    IN_CACHE
        .into_iter()
        .chain([BEYOND_CACHES])
        .min_by(|a, b| distance(*a).total_cmp(&distance(*b)))
        .unwrap_or(BEYOND_CACHES)
}

impl Loops {
    fn operation(self) -> Operation {
        match self {
            Loops::Zero(_) => Operation::Zero,
            Loops::Verify(_) => Operation::Verify,
            Loops::ZeroAndVerify(_) => Operation::ZeroAndVerify,
        }
    }

    fn zero_loop(self) -> Option<ZeroLoop> {
        match self {
            Loops::Zero(zero_loop) | Loops::ZeroAndVerify(zero_loop) => Some(zero_loop),
            Loops::Verify(_) => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Loops::Zero(zero_loop) | Loops::ZeroAndVerify(zero_loop) => zero_loop.name(),
            Loops::Verify(verify_loop) => verify_loop.name(),
        }
    }
}

impl Measured {
    fn rate(&self) -> Rate {
        Rate {
            operation: self.loops.operation(),
            bytes: self.bytes as u64,
            loop_name: self.loops.name().to_owned(),
            bytes_per_second: (1.0 / self.cost) as u64,
        }
    }

    /// How many bytes one pass works on.
    fn span(&self) -> usize {
        if self.bytes == BEYOND_CACHES {
            FLUSHED
        } else {
            self.bytes
        }
    }

    /// How long the next measurement may take: as long as the last one, or at the pace of the slowest memory.
    fn expected(&self) -> Duration {
        const SLOW: f64 = 1.0 / (4_u64 << 30) as f64;
        let cost = if self.cost.is_finite() {
            self.cost
        } else {
            SLOW
        };
        // A line takes as long to flush as to be zeroed, or less.
        let passes = if self.bytes == BEYOND_CACHES { 2 } else { 1 };
        Duration::from_secs_f64(f64::from(passes) * self.span() as f64 * cost).max(SHORTEST)
    }

    /// Seconds for a byte.
    fn try_on(&self, memory: &mut [u8], verify_loop: VerifyLoop) -> f64 {
        let memory = &mut memory[..self.span()];
        let mut bytes = 0;
        if self.bytes == BEYOND_CACHES {
            // SAFETY: a slice is mapped.
            unsafe { flush_from_cache(memory.as_mut_ptr(), memory.len()) };
        }
        let begun = Instant::now();
        loop {
            self.pass(memory, verify_loop);
            bytes += self.span();
            let elapsed = begun.elapsed();
            if elapsed >= SHORTEST || self.bytes == BEYOND_CACHES {
                return elapsed.as_secs_f64() / bytes as f64;
            }
        }
    }

    /// What the engine does to as much memory.
    fn pass(&self, memory: &mut [u8], verify_loop: VerifyLoop) {
        for piece in memory.chunks_mut(PIECE) {
            let (at, len) = (piece.as_mut_ptr(), piece.len());
            // SAFETY: an exclusively borrowed, initialised slice.
            unsafe {
                match self.loops {
                    Loops::Zero(zero_loop) => zero_loop.zero(at, len),
                    Loops::Verify(_) => {
                        let _ = verify_loop.first_nonzero(at, len);
                    }
                    Loops::ZeroAndVerify(zero_loop) => {
                        let _ = zero_loop.zero_and_verify(verify_loop, at, len);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(loops: Loops, bytes: usize, cost: f64) -> Measured {
        Measured { bytes, loops, cost }
    }

    fn of(measured: Vec<Measured>) -> Calibration {
        let took = Duration::ZERO;
        Calibration { measured, took }
    }

    #[test]
    fn the_cheapest_loop_of_the_nearest_size_is_chosen() {
        let mut loops = ZeroLoop::available();
        let mut readers = VerifyLoop::available();
        let (Some(a), Some(b)) = (loops.next(), loops.next()) else {
            return eprintln!("SKIPPED: this processor has one zeroing loop only");
        };
        let (Some(narrow), Some(wide)) = (readers.next(), readers.next()) else {
            return eprintln!("SKIPPED: this processor has one verification loop only");
        };
        let calibration = of(vec![
            measured(Loops::Zero(a), IN_CACHE[0], 1.0),
            measured(Loops::Zero(b), IN_CACHE[0], 2.0),
            measured(Loops::Zero(a), BEYOND_CACHES, 2.0),
            measured(Loops::Zero(b), BEYOND_CACHES, 1.0),
            measured(Loops::ZeroAndVerify(b), IN_CACHE[0], 1.0),
            measured(Loops::ZeroAndVerify(a), BEYOND_CACHES, f64::INFINITY),
            measured(Loops::Verify(narrow), IN_CACHE[0], 1.0),
            measured(Loops::Verify(wide), IN_CACHE[0], 2.0),
            measured(Loops::Verify(narrow), BEYOND_CACHES, 2.0),
            measured(Loops::Verify(wide), BEYOND_CACHES, 1.0),
        ]);
        assert_eq!(calibration.fastest_zero(0), a);
        assert_eq!(calibration.fastest_zero(4096), a);
        assert_eq!(calibration.fastest_zero(u64::MAX), b);
        assert_eq!(calibration.fastest_verify(1), narrow);
        assert_eq!(calibration.fastest_verify(1 << 40), wide);
        // The large size was not reached: the small one stands in. Its zeros are read from where they were left.
        assert!(!b.is_streaming());
        assert_eq!(calibration.fastest_zero_and_verify(u64::MAX), (b, narrow));
        assert_eq!(calibration.rates().count(), 9);
        assert_eq!(calibration.rates_for(Operation::Zero, 1 << 40).len(), 2);
        let both = calibration.rates_for(Operation::ZeroAndVerify, 1 << 40);
        assert_eq!((both.len(), both[0].loop_name.as_str()), (1, b.name()));
    }

    #[test]
    fn nothing_measured_is_what_runs_everywhere_or_the_processors_word() {
        let calibration = of(Vec::new());
        assert_eq!(calibration.fastest_zero(1), ZeroLoop::best_guess());
        assert_eq!(calibration.fastest_verify(1), VerifyLoop::portable());
        let guess = (ZeroLoop::best_guess(), VerifyLoop::portable());
        assert_eq!(calibration.fastest_zero_and_verify(1), guess);
    }

    #[test]
    fn sizes_stand_for_their_neighbourhood() {
        assert_eq!(nearest(0), IN_CACHE[0]);
        assert_eq!(nearest(5000), IN_CACHE[0]);
        assert_eq!(nearest(1 << 20), IN_CACHE[3]);
        assert_eq!(nearest(16 << 20), IN_CACHE[4]);
        assert_eq!(nearest(32 << 20), BEYOND_CACHES);
        assert_eq!(nearest(u64::MAX), BEYOND_CACHES);
    }

    #[test]
    fn a_size_at_which_not_every_loop_had_its_turn_does_not_decide() {
        let (Some(a), Some(b)) = (
            VerifyLoop::available().next(),
            VerifyLoop::available().nth(1),
        ) else {
            return eprintln!("SKIPPED: this processor has one verification loop only");
        };
        let calibration = of(vec![
            measured(Loops::Verify(a), SMALLEST, 2.0),
            measured(Loops::Verify(b), SMALLEST, 1.0),
            measured(Loops::Verify(a), BEYOND_CACHES, 1.0),
            measured(Loops::Verify(b), BEYOND_CACHES, f64::INFINITY),
        ]);
        assert_eq!(calibration.fastest_verify(u64::MAX), b);
    }

    #[test]
    fn without_any_time_nothing_is_called_measured() {
        assert!(Calibration::measure(Duration::ZERO).is_none());
    }

    #[test]
    fn one_page_is_measured_by_every_loop_and_stands_for_all_sizes() {
        let calibration = Calibration::quick();
        let loops = 2 * ZeroLoop::available().count() + VerifyLoop::available().count();
        assert_eq!(calibration.rates().count(), loops);
        assert!(
            calibration
                .rates()
                .all(|rate| rate.bytes == SMALLEST as u64)
        );
        let rates = calibration.rates_for(Operation::Verify, u64::MAX);
        assert_eq!(rates.len(), VerifyLoop::available().count());
        let fastest = rates.iter().max_by_key(|rate| rate.bytes_per_second);
        assert_eq!(
            fastest.unwrap().loop_name,
            calibration.fastest_verify(u64::MAX).name()
        );
    }

    #[test]
    fn this_host_is_measured_once() {
        // A machine that is too busy is asked again.
        while CALIBRATION.get().is_none() {
            assert!(calibration().rates().count() > 0, "a page at least");
        }
        let first = calibration();
        assert!(std::ptr::eq(first, calibration()));
        assert!(std::ptr::eq(first, calibration_for(1)));
        assert!(first.rates().all(|rate| rate.bytes_per_second > 0));
    }
}
