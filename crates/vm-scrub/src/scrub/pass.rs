//! What is done to one piece of memory: zero it, read it back, count.
//!
//! A [`Pass`] is shared by all threads that work on a range, in whatever order they come. It takes no locks while memory is
//! touched: pieces are disjoint, each is one thread's, and the results go into a [`Tally`].

use super::broken::{Broken, bytes_in, sound_parts};
use super::policy::Verify;
use super::sample;
use crate::arch::{VerifyLoop, ZeroLoop, flush_from_cache};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, MutexGuard};
use crate::sys::watched::{self, Watch};
use std::ops::Range;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// A pointer to memory that the holder may use from any thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HostPtr(pub(crate) *mut u8);

// SAFETY: it is an address; the code that dereferences it argues for itself why the access is allowed.
unsafe impl Send for HostPtr {}
// SAFETY: as above.
unsafe impl Sync for HostPtr {}

impl HostPtr {
    /// The address `offset` bytes further on.
    pub(crate) fn at(self, offset: usize) -> *mut u8 {
        self.0.wrapping_add(offset)
    }
}

/// A way to break the scrubber on purpose, so that one can see that the proof is able to fail.
#[cfg(any(test, feature = "test-support"))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// No piece is zeroed.
    SkipScrub,
    /// The last piece of the arena's first block is not zeroed.
    SkipChunk,
    /// The page at this offset of the arena raises `SIGBUS` from when the piece that it is in is first worked on: a page of 4
    /// KiB, or a hugetlb page where the memory consists of such.
    BreakMemory {
        /// In bytes.
        offset: usize,
        /// Not before it is only read.
        late: bool,
    },
}

/// Which halves of the work are to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    Zero,
    Read,
    /// Read memory that cannot be written to: what is not zero has no second chance.
    ReadSealed,
    ZeroAndRead,
    /// To read what is known to be zero, and to change nothing: there is no second chance.
    Check,
}

impl Work {
    /// Whether zeros are written.
    pub(crate) fn zeroes(self) -> bool {
        matches!(self, Work::Zero | Work::ZeroAndRead)
    }
}

/// How pieces are treated.
#[derive(Debug, Clone)]
pub(crate) struct Pass {
    /// What piece offsets are relative to.
    pub(crate) base: HostPtr,
    pub(crate) zero_loop: ZeroLoop,
    pub(crate) verify_loop: VerifyLoop,
    pub(crate) verify: Verify,
    /// Decides which lines a sample consists of.
    pub(crate) seed: u64,
    /// Whether the kernel is asked before each piece whether it can be accessed.
    pub(crate) probe: bool,
    /// The size of the pages, in bytes, as far as it is known: a whole one is lost when a part cannot be accessed.
    pub(crate) page: usize,
    #[cfg(any(test, feature = "test-support"))]
    pub(crate) sabotage: Option<Sabotage>,
}

/// What all threads of a pass have done so far.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    zeroed: AtomicU64,
    read: AtomicU64,
    zeroing_ns: AtomicU64,
    reading_ns: AtomicU64,
    suspects: Mutex<Vec<Suspect>>,
    retried: Mutex<Retried>,
    broken: Mutex<Vec<Broken>>,
}

/// What became of second chances.
#[derive(Debug, Default)]
struct Retried {
    /// Where the first piece that had one begins.
    first: Option<usize>,
    /// Pieces that were still not zero, or that get no second chance.
    failures: Vec<Suspect>,
}

/// A piece that was not zero when it was read.
#[derive(Debug)]
pub(crate) struct Suspect {
    pub(crate) piece: Range<usize>,
    /// Where the first byte that is not zero was found.
    pub(crate) offset: usize,
    /// How many bytes of the piece are broken and counted as such.
    pub(crate) broken: u64,
}

/// What one thread has found in a batch.
#[derive(Debug, Default)]
struct Found {
    zeroed: u64,
    read: u64,
    suspects: Vec<Suspect>,
    broken: Vec<Broken>,
}

impl Tally {
    /// Bytes that were zeroed.
    pub(crate) fn zeroed(&self) -> u64 {
        self.zeroed.load(Ordering::Relaxed)
    }

    /// Bytes that were read and are zero. Suspect pieces do not count.
    pub(crate) fn read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    fn suspects(&self) -> MutexGuard<'_, Vec<Suspect>> {
        self.suspects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn retried(&self) -> MutexGuard<'_, Retried> {
        self.retried.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there are pieces that wait for a second chance.
    pub(crate) fn has_suspects(&self) -> bool {
        !self.suspects().is_empty()
    }

    /// A piece that was not zero when it was read, for whoever gives it a second chance.
    pub(crate) fn take_suspect(&self) -> Option<Suspect> {
        self.suspects().pop()
    }

    /// Leaves it to others.
    pub(crate) fn put_back(&self, suspect: Suspect) {
        self.suspects().push(suspect);
    }

    /// Where one of the pieces begins that had a second chance, if any had; and those that are not zero.
    pub(crate) fn take_retried(&self) -> (Option<usize>, Vec<Suspect>) {
        let retried = std::mem::take(&mut *self.retried());
        (retried.first, retried.failures)
    }

    /// How long the threads have worked, all together.
    pub(crate) fn thread_time(&self) -> Duration {
        let nanos =
            self.zeroing_ns.load(Ordering::Relaxed) + self.reading_ns.load(Ordering::Relaxed);
        Duration::from_nanos(nanos)
    }

    /// What could not be accessed.
    pub(crate) fn take_broken(&self) -> Vec<Broken> {
        std::mem::take(&mut self.broken.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many bytes are in pieces that get a second chance.
    fn add(&self, work: Work, mut found: Found) -> u64 {
        self.zeroed.fetch_add(found.zeroed, Ordering::Relaxed);
        self.read.fetch_add(found.read, Ordering::Relaxed);
        let mut suspect = 0;
        if work == Work::Check && !found.suspects.is_empty() {
            // What was proven to be zero and is not has a writer. To zero it would only hide that.
            self.retried().failures.append(&mut found.suspects);
        } else if !found.suspects.is_empty() {
            let lens = found.suspects.iter().map(|suspect| suspect.piece.len());
            suspect = lens.sum::<usize>() as u64;
            self.suspects().append(&mut found.suspects);
        }
        if !found.broken.is_empty() {
            let mut broken = self.broken.lock().unwrap_or_else(PoisonError::into_inner);
            broken.append(&mut found.broken);
        }
        suspect
    }

    /// Counts `all` the time for a batch, divided in the ratio of `zeroing` to `reading`.
    fn add_time(&self, zeroing: Duration, reading: Duration, all: Duration) {
        let share = zeroing.as_nanos() as f64 / (zeroing + reading).as_nanos().max(1) as f64;
        let all = all.as_nanos() as u64;
        let zeroing = (all as f64 * share) as u64;
        self.zeroing_ns.fetch_add(zeroing, Ordering::Relaxed);
        self.reading_ns
            .fetch_add(all.saturating_sub(zeroing), Ordering::Relaxed);
    }

    /// Divides `elapsed` between zeroing and reading by how long the threads spent on each.
    pub(crate) fn divide(&self, elapsed: Duration) -> (Duration, Duration) {
        let zeroing = self.zeroing_ns.load(Ordering::Relaxed) as f64;
        let reading = self.reading_ns.load(Ordering::Relaxed) as f64;
        let share = if zeroing + reading > 0.0 {
            zeroing / (zeroing + reading)
        } else {
            0.0
        };
        let zeroing = elapsed.mul_f64(share);
        (zeroing, elapsed.saturating_sub(zeroing))
    }
}

impl Pass {
    /// Does `work` on `pieces` and counts it in `tally`. How many bytes are in pieces that get a second chance.
    ///
    /// # Safety
    /// The pieces must be readable and, but for [`Work::ReadSealed`], writable, and nobody else may access them meanwhile.
    pub(crate) unsafe fn run(
        &self,
        work: Work,
        pieces: impl Iterator<Item = Range<usize>>,
        tally: &Tally,
    ) -> u64 {
        let begun = Instant::now();
        let watch = watched::watch(self.page);
        let mut times = None;
        let mut found = Found::default();
        for piece in pieces {
            #[cfg(any(test, feature = "test-support"))]
            self.break_memory(work, &piece);
            #[cfg(all(test, loom, feature = "vm-memory"))]
            let _landing = crate::models::memory::zeroing(&piece);
            // What is sealed cannot be written to, and that is what the kernel would be asked.
            if !self.probe || work == Work::ReadSealed {
                // SAFETY: passed on to the caller.
                unsafe { self.run_one(work, &piece, watch.as_ref(), &mut times, &mut found) };
                continue;
            }
            // SAFETY: passed on to the caller.
            let mut broken = unsafe { Broken::by_asking(self.base, &piece) };
            for part in sound_parts(&piece, &broken) {
                // SAFETY: passed on to the caller.
                unsafe { self.run_one(work, &part, watch.as_ref(), &mut times, &mut found) };
            }
            found.broken.append(&mut broken);
        }
        let Some((zeroing, reading)) = times else {
            return tally.add(work, found);
        };
        tally.add_time(zeroing, reading, begun.elapsed());
        tally.add(work, found)
    }

    /// Does `work` on one piece. The first time it is measured how the time divides.
    ///
    /// # Safety
    /// As for [`Pass::run`].
    unsafe fn run_one(
        &self,
        work: Work,
        piece: &Range<usize>,
        watch: Option<&Watch>,
        times: &mut Option<(Duration, Duration)>,
        found: &mut Found,
    ) {
        let treat = || {
            if times.is_some() {
                // SAFETY: passed on to the caller.
                return unsafe { self.treat(work, piece, piece) };
            }
            // SAFETY: passed on to the caller.
            let (outcome, zeroing, reading) = unsafe { self.treat_and_time(work, piece) };
            *times = Some((zeroing, reading));
            outcome
        };
        let (outcome, mut broken) = self.watched(watch, piece, treat);
        let lost = bytes_in(broken.iter().map(|broken| broken.range.clone()));
        found.broken.append(&mut broken);
        if work.zeroes() {
            found.zeroed += piece.len() as u64 - lost;
        }
        match outcome {
            Ok(bytes) => found.read += bytes.saturating_sub(lost),
            Err(offset) => found.suspects.push(Suspect {
                piece: piece.clone(),
                offset,
                broken: lost,
            }),
        }
    }

    /// Calls `treat`, which accesses `piece`, and says what of it raised `SIGBUS` meanwhile.
    fn watched<T>(
        &self,
        watch: Option<&Watch>,
        piece: &Range<usize>,
        treat: impl FnOnce() -> T,
    ) -> (T, Vec<Broken>) {
        let Some(watch) = watch else {
            return (treat(), Vec::new());
        };
        let (done, bad) = watch.over(self.base.at(piece.start).addr(), piece.len(), treat);
        let broken = bad
            .into_iter()
            .map(|bad| Broken::of_signal(self.base, piece, bad))
            .collect();
        (done, broken)
    }

    /// Treats a piece, and says how long zeroing and reading took at its beginning: where the two take turns, asking for the
    /// time at each would cost as much as the work.
    ///
    /// # Safety
    /// As for [`Pass::run`].
    unsafe fn treat_and_time(
        &self,
        work: Work,
        piece: &Range<usize>,
    ) -> (Result<u64, usize>, Duration, Duration) {
        let head = if self.takes_turns(work) {
            piece.start..piece.end.min(piece.start + self.zero_loop.chunk())
        } else {
            piece.clone()
        };
        let begun = Instant::now();
        if work.zeroes() && !self.skips(piece) {
            // SAFETY: passed on to the caller.
            unsafe { self.zero(&head) };
        }
        let zeroed = Instant::now();
        let reads = work != Work::Zero && self.verify != Verify::None;
        let (mut outcome, mut reading) = (Ok(0), Duration::ZERO);
        if reads {
            // SAFETY: passed on to the caller.
            outcome = unsafe { self.read_back(&head) };
            reading = zeroed.elapsed();
        }
        let rest = head.end..piece.end;
        if !rest.is_empty() {
            // SAFETY: passed on to the caller.
            let more = unsafe { self.treat(work, piece, &rest) };
            outcome = outcome.and_then(|bytes| Ok(bytes + more?));
        }
        (outcome, zeroed - begun, reading)
    }

    /// Whether a piece is zeroed and read back a chunk at a time.
    fn takes_turns(&self, work: Work) -> bool {
        work == Work::ZeroAndRead && self.verify == Verify::Full
    }

    /// Does `work` on a part of a piece.
    ///
    /// # Safety
    /// As for [`Pass::run`].
    unsafe fn treat(
        &self,
        work: Work,
        piece: &Range<usize>,
        part: &Range<usize>,
    ) -> Result<u64, usize> {
        let zeroes = work.zeroes() && !self.skips(piece);
        // SAFETY: passed on to the caller.
        unsafe {
            if zeroes && self.takes_turns(work) {
                let at = self.base.at(part.start);
                let found = self
                    .zero_loop
                    .zero_and_verify(self.verify_loop, at, part.len());
                return found.map_or(Ok(part.len() as u64), |offset| Err(part.start + offset));
            }
            if zeroes {
                self.zero(part);
            }
            match work {
                Work::Zero => Ok(0),
                Work::Read | Work::ReadSealed | Work::ZeroAndRead | Work::Check => {
                    self.read_back(part)
                }
            }
        }
    }

    /// Scrubs a suspect piece once more, where that is possible, and counts in `tally` what became of it.
    ///
    /// # Safety
    /// As for [`Pass::run`].
    pub(crate) unsafe fn retry(&self, work: Work, mut suspect: Suspect, tally: &Tally) {
        let begun = Instant::now();
        let piece = &suspect.piece;
        let (outcome, broken) = self.watched(watched::watch(self.page).as_ref(), piece, || {
            if work != Work::ReadSealed && !self.skips(piece) {
                // SAFETY: passed on to the caller.
                unsafe { self.zero(piece) };
            }
            // SAFETY: passed on to the caller.
            unsafe { self.read_back(piece) }
        });
        let lost = bytes_in(broken.iter().map(|broken| broken.range.clone()));
        if work.zeroes() {
            // It was counted when it was zeroed for the first time.
            tally.zeroed.fetch_sub(lost, Ordering::Relaxed);
        }
        suspect.broken += lost;
        let mut found = Found {
            broken,
            ..Found::default()
        };
        let mut retried = tally.retried();
        retried.first.get_or_insert(suspect.piece.start);
        match outcome {
            Ok(bytes) => found.read = bytes.saturating_sub(suspect.broken),
            Err(offset) => {
                suspect.offset = offset;
                retried.failures.push(suspect);
            }
        }
        drop(retried);
        tally.add_time(Duration::ZERO, Duration::from_nanos(1), begun.elapsed());
        tally.add(work, found);
    }

    /// Breaks the memory of the piece, if it is to be broken.
    #[cfg(any(test, feature = "test-support"))]
    fn break_memory(&self, work: Work, piece: &Range<usize>) {
        if let Some(Sabotage::BreakMemory { offset, late }) = self.sabotage
            && piece.contains(&offset)
            && !(late && work.zeroes())
        {
            crate::test_support::break_memory(self.base.at(offset));
        }
    }

    /// Sets the range to zero. The loop fences its own streaming stores, on this thread, before it returns.
    unsafe fn zero(&self, range: &Range<usize>) {
        // SAFETY: the caller says that the range is writable and nobody else's.
        unsafe { self.zero_loop.zero(self.base.at(range.start), range.len()) };
    }

    /// Whether zeroing this piece is left out, to see whether somebody notices.
    fn skips(&self, piece: &Range<usize>) -> bool {
        #[cfg(any(test, feature = "test-support"))]
        match self.sabotage {
            Some(Sabotage::SkipScrub) => return true,
            Some(Sabotage::SkipChunk) => return piece.end == crate::BLOCK_SIZE as usize,
            Some(Sabotage::BreakMemory { .. }) | None => {}
        }
        let _ = piece;
        false
    }

    /// Reads as much of the piece as the policy says. `Ok` is how many bytes that were, `Err` the offset of the first one
    /// that is not zero.
    unsafe fn read_back(&self, piece: &Range<usize>) -> Result<u64, usize> {
        let first_nonzero = |range: Range<usize>| {
            // SAFETY: the caller says that the piece is readable and that nobody writes to it; `range` lies in it.
            let found = unsafe {
                self.verify_loop
                    .first_nonzero(self.base.at(range.start), range.len())
            };
            match found {
                None => Ok(range.len() as u64),
                Some(offset) => Err(range.start + offset),
            }
        };
        match self.verify {
            Verify::None => Ok(0),
            Verify::Full => first_nonzero(piece.clone()),
            Verify::Memory => {
                // SAFETY: the piece is mapped, and writing lines back to memory does not change what they contain.
                unsafe { flush_from_cache(self.base.at(piece.start), piece.len()) };
                first_nonzero(piece.clone())
            }
            Verify::Sampled { per_mille } => {
                let lines = sample::lines(piece, per_mille, self.seed);
                lines.map(first_nonzero).sum()
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn time_is_divided_by_what_it_was_spent_on() {
        const NOTHING: Duration = Duration::ZERO;
        const SECOND: Duration = Duration::from_secs(1);
        let tally = Tally::default();
        assert_eq!(tally.divide(SECOND), (NOTHING, SECOND), "nothing was done");
        // As without verification.
        tally.add_time(SECOND, NOTHING, SECOND);
        assert_eq!(tally.divide(SECOND), (SECOND, NOTHING));
        tally.add_time(NOTHING, SECOND, 3 * SECOND);
        assert_eq!(tally.divide(SECOND), (SECOND / 4, 3 * SECOND / 4));
        // As of what is sealed.
        let tally = Tally::default();
        tally.add_time(NOTHING, SECOND, SECOND);
        assert_eq!(tally.divide(SECOND), (NOTHING, SECOND));
    }
}
