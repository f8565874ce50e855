//! Measures which loops are fastest on this host.
//!
//! The widest vector does not win, and no loop wins everywhere: streaming stores gain on one processor what they lose on
//! the next, and lose on all of them for what fits into a cache. So each loop is tried, by size and by what comes after
//! (reading back finds zeros in the cache only if the loop left them there). Once in a process, on the calling thread, for
//! at most 50 ms. Who cannot wait for that has the same measured on a single page, in a third of a millisecond.

mod measured;
mod scratch;

use crate::arch::{VerifyLoop, ZeroLoop};
use measured::{BEYOND_CACHES, IN_CACHE, Loops, Measured, SMALLEST, nearest, trials};
use scratch::Scratch;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// After this time no measurement is begun that would not end within it. The whole may take 50 ms, less than a VM's boot; the
/// rest is for a thread that has to wait for its processor, and for giving the memory back.
const BUDGET: Duration = Duration::from_millis(40);

/// As much as one processor's own caches may hold, in bytes: the second level has 1 MiB on Cascade Lake and on Zen 4.
const LARGEST_PRIVATE: u64 = 1 << 20;

/// How often each loop is measured at each size, if time allows; the fastest counts.
const ROUNDS: usize = 5;

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
    let measured = {
        // What it guards is the processor: two who measure at the same time disturb each other.
        let mut failed = FAILED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(done) = CALIBRATION.get() {
            return done;
        }
        let may_try = *failed < TRIES;
        match may_try.then(|| Calibration::measure(BUDGET)).flatten() {
            Some(calibration) => Ok(CALIBRATION.get_or_init(|| calibration)),
            None => {
                *failed += u32::from(may_try);
                Err(may_try.then_some(*failed))
            }
        }
    };
    // Without the lock: the embedder's logger may scrub something, or build a pool.
    match measured {
        Ok(done) => {
            done.log("loops measured");
            return done;
        }
        Err(Some(attempts)) => log::warn!(
            "loops not measured beyond {SMALLEST} bytes: the host is too busy or has too little memory ({attempts} of {TRIES} \
             attempts)"
        ),
        Err(None) => {}
    }
    quick_calibration()
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
    let mut is_new = false;
    let done = QUICK.get_or_init(|| {
        is_new = true;
        Calibration::quick()
    });
    if is_new {
        // Not before: the embedder's logger may come here again.
        done.log("loops measured on one page only");
    }
    done
}

impl Calibration {
    /// The loop that is fastest where `threads` threads, at least 1, zero `bytes` bytes: by what was measured with as many bytes as one of
    /// them has to do, if that may fit into its own caches (1 MiB), and else with as many as all of them have; or with as many as come
    /// nearest to it.
    pub fn fastest_zero(&self, bytes: u64, threads: usize) -> ZeroLoop {
        self.fastest(Operation::Zero, bytes, threads)
            .and_then(Loops::zero_loop)
            .unwrap_or_else(ZeroLoop::best_guess)
    }

    /// The same for reading `bytes` bytes.
    pub fn fastest_verify(&self, bytes: u64, threads: usize) -> VerifyLoop {
        match self.fastest(Operation::Verify, bytes, threads) {
            Some(Loops::Verify(verify_loop)) => verify_loop,
            _ => VerifyLoop::portable(),
        }
    }

    /// The same for zeroing `bytes` bytes and reading them back.
    pub fn fastest_zero_and_verify(&self, bytes: u64, threads: usize) -> (ZeroLoop, VerifyLoop) {
        let zero_loop = self
            .fastest(Operation::ZeroAndVerify, bytes, threads)
            .and_then(Loops::zero_loop)
            .unwrap_or_else(ZeroLoop::best_guess);
        (zero_loop, self.partner(zero_loop))
    }

    /// What reads back fastest what `zero_loop` has just written.
    fn partner(&self, zero_loop: ZeroLoop) -> VerifyLoop {
        self.fastest_verify(read_back_from(zero_loop), 1)
    }

    /// Every rate that was measured.
    pub fn rates(&self) -> impl Iterator<Item = Rate> {
        self.measured
            .iter()
            .filter(|one| one.cost.is_finite())
            .map(Measured::rate)
    }

    /// The rates between which the choice for `threads` threads and `bytes` bytes was made.
    pub fn rates_for(&self, operation: Operation, bytes: u64, threads: usize) -> Vec<Rate> {
        self.at(operation, share(bytes, threads))
            .map(Measured::rate)
            .collect()
    }

    /// How long measuring took.
    pub fn took(&self) -> Duration {
        self.took
    }

    /// The fastest. Between several that are as good as equal decides how fast they are beyond the caches as well: what is measured finds
    /// its lines where it left them, and what a guest leaves lies anywhere. Where several threads share the work it lies in the cache
    /// of another one, if in any, and they may differ by more.
    fn fastest(&self, operation: Operation, bytes: u64, threads: usize) -> Option<Loops> {
        let equal = if threads > 1 { 1.2 } else { 1.05 };
        let on_the_whole = |one: &Measured| {
            let beyond = self
                .of(operation)
                .find(|other| other.bytes == BEYOND_CACHES && other.loops == one.loops);
            one.cost * beyond.map_or(1.0, |beyond| beyond.cost)
        };
        let size = share(bytes, threads);
        let lowest = self
            .at(operation, size)
            .map(|one| one.cost)
            .fold(f64::INFINITY, f64::min);
        self.at(operation, size)
            .filter(|one| one.cost <= equal * lowest)
            .min_by(|a, b| on_the_whole(a).total_cmp(&on_the_whole(b)))
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
        let largest = IN_CACHE[IN_CACHE.len() - 1];
        let mut scratch = Scratch::populate(largest)?;
        let mut calibration = Self::untried(trials());
        for round in 0..ROUNDS {
            calibration.round(scratch.bytes(), |one| {
                // It takes longest and matters least.
                let is_its_turn = one.bytes != largest || round >= 2;
                is_its_turn && begun.elapsed() + one.expected() < budget
            });
        }
        calibration.forget_hopeless();
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
    fn round(&mut self, memory: &mut [u8], has_time: impl Fn(&Measured) -> bool) {
        for trial in 0..self.measured.len() {
            let mut one = self.measured[trial];
            if self.may_win(&one) && has_time(&one) {
                let cost = one.try_on(memory, self.reader_for(one.loops));
                one.cost = one.cost.min(cost);
                one.turns += 1;
                self.measured[trial] = one;
            }
        }
    }

    /// Whether measuring it, or measuring it again, can make it the fastest. What was far behind makes way for those that are close to
    /// each other, and leaves the caches to them; but not after a single short turn, which something may have disturbed.
    fn may_win(&self, one: &Measured) -> bool {
        const SHORT: Duration = Duration::from_micros(500);
        let turns = if one.expected() < SHORT { 2 } else { 1 };
        if one.turns == 0 {
            !self.is_hopeless(one)
        } else {
            one.turns < turns || !self.is_far_behind(one)
        }
    }

    /// Whether the same loop is far behind at every size at which it was measured, the smallest and the largest among them: streaming
    /// stores are, where they gain nothing even beyond the caches. At sizes in between they would take most of the time.
    fn is_hopeless(&self, one: &Measured) -> bool {
        let elsewhere = || {
            self.of(one.loops.operation())
                .filter(|other| other.loops == one.loops && other.turns > 0)
        };
        [SMALLEST, BEYOND_CACHES]
            .into_iter()
            .all(|end| elsewhere().any(|other| other.bytes == end))
            && elsewhere().all(|other| self.is_far_behind(other))
    }

    /// What nobody needs to know keeps nobody from choosing at its size.
    fn forget_hopeless(&mut self) {
        let worth_knowing = |one: &&Measured| one.turns > 0 || !self.is_hopeless(one);
        self.measured = self
            .measured
            .iter()
            .filter(worth_knowing)
            .copied()
            .collect();
    }

    /// Whether another loop is 1.5 times as fast at the same size.
    fn is_far_behind(&self, one: &Measured) -> bool {
        const FAR_BEHIND: f64 = 1.5;
        let rivals = self
            .of(one.loops.operation())
            .filter(|rival| rival.bytes == one.bytes);
        let fastest = rivals.map(|rival| rival.cost).fold(f64::INFINITY, f64::min);
        one.cost > FAR_BEHIND * fastest
    }

    /// Says what was measured: a line for each operation and size.
    fn log(&self, what: &str) {
        log::info!(
            "{what} in {:?}; for large ranges: zeroing by {}, with reading back by {}",
            self.took,
            self.fastest_zero(u64::MAX, 1),
            self.fastest_zero_and_verify(u64::MAX, 1).0,
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

/// The size that decides where `threads` threads share `bytes` bytes. Each has a first and a second level of caches to itself, so it is
/// its share that they may hold; beyond those all threads share what there is.
fn share(bytes: u64, threads: usize) -> u64 {
    let share = bytes / threads.max(1) as u64;
    if share <= LARGEST_PRIVATE {
        share
    } else {
        bytes
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

#[cfg(test)]
mod tests;
