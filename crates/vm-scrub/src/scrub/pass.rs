//! What is done to one piece of memory: zero it, read it back, count.
//!
//! A [`Pass`] is shared by all threads that work on a range, in whatever order they come. It takes no locks while memory is
//! touched: pieces are disjoint, each is one thread's, and the results go into a [`Tally`].

use super::policy::Verify;
use super::sample;
use crate::arch::{VerifyLoop, ZeroLoop, flush_from_cache};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
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
}

/// Which halves of the work are to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    Zero,
    Read,
    ZeroAndRead,
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
    suspects: Mutex<Vec<Range<usize>>>,
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

    /// Pieces that were not zero when they were read.
    pub(crate) fn take_suspects(&self) -> Vec<Range<usize>> {
        std::mem::take(&mut self.suspects.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How long the threads have worked, all together.
    pub(crate) fn thread_time(&self) -> Duration {
        let nanos =
            self.zeroing_ns.load(Ordering::Relaxed) + self.reading_ns.load(Ordering::Relaxed);
        Duration::from_nanos(nanos)
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
    /// Does `work` on `piece` and counts it in `tally`.
    ///
    /// # Safety
    /// The piece must be readable and writable, and nobody else may access it meanwhile.
    pub(crate) unsafe fn run(&self, work: Work, piece: Range<usize>, tally: &Tally) {
        let begun = Instant::now();
        if work != Work::Read {
            // SAFETY: passed on to the caller.
            unsafe { self.zero(&piece) };
            tally
                .zeroed
                .fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
        let zeroed = Instant::now();
        tally
            .zeroing_ns
            .fetch_add((zeroed - begun).as_nanos() as u64, Ordering::Relaxed);
        if work == Work::Zero || self.verify == Verify::None {
            return;
        }
        // SAFETY: passed on to the caller.
        match unsafe { self.read_back(&piece) } {
            Ok(bytes) => {
                tally.read.fetch_add(bytes, Ordering::Relaxed);
            }
            Err(_) => tally
                .suspects
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(piece),
        }
        tally
            .reading_ns
            .fetch_add(zeroed.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }

    /// Scrubs a suspect piece once more. `Ok` is the number of bytes that were read and are zero, `Err` the offset of the
    /// first one that still is not.
    ///
    /// # Safety
    /// As for [`Pass::run`].
    pub(crate) unsafe fn retry(&self, piece: &Range<usize>) -> Result<u64, usize> {
        // SAFETY: passed on to the caller.
        unsafe {
            self.zero(piece);
            self.read_back(piece)
        }
    }

    /// Sets the piece to zero. The loop fences its own streaming stores, on this thread, before it returns.
    unsafe fn zero(&self, piece: &Range<usize>) {
        #[cfg(any(test, feature = "test-support"))]
        match self.sabotage {
            Some(Sabotage::SkipScrub) => return,
            Some(Sabotage::SkipChunk) if piece.end == crate::BLOCK_SIZE as usize => return,
            _ => {}
        }
        // SAFETY: the caller says that the piece is writable and nobody else's.
        unsafe { self.zero_loop.zero(self.base.at(piece.start), piece.len()) };
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
