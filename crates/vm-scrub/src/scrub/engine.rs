//! Zeroes and reads back pieces of memory, with several threads.
//!
//! The engine knows offsets and lengths and nothing of guests. It takes no locks: each piece is one thread's, and results
//! come back when all threads are done, so every store of every thread happened before the caller goes on.

use super::plan::{self, PIECE};
use super::policy::Verify;
use super::workers::Workers;
use crate::arch::{VerifyLoop, ZeroLoop};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
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

/// Proof that zeros were written to a plan's every piece. Made by [`Engine`] only.
#[derive(Debug)]
pub(crate) struct Zeroed {
    bytes: u64,
    time: Duration,
}

impl Zeroed {
    /// How many bytes were zeroed.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How long it took.
    pub(crate) fn time(&self) -> Duration {
        self.time
    }
}

/// A piece that was not zero when it was read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Where the first byte that is not zero was found.
    pub(crate) offset: usize,
}

/// What reading back found. Made by [`Engine`] only.
#[derive(Debug)]
pub(crate) struct Verdict {
    bytes: u64,
    failed_bytes: u64,
    failures: Vec<Failure>,
    time: Duration,
}

impl Verdict {
    /// How many bytes were read back and found to be zero.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many bytes are in pieces that stayed wrong after they had been scrubbed again.
    pub(crate) fn failed_bytes(&self) -> u64 {
        self.failed_bytes
    }

    /// The pieces that stayed wrong after they had been scrubbed again, in ascending order.
    pub(crate) fn failures(&self) -> &[Failure] {
        &self.failures
    }

    /// How long it took.
    pub(crate) fn time(&self) -> Duration {
        self.time
    }
}

/// The loops, the threads, and the order of work.
#[derive(Debug)]
pub(crate) struct Engine {
    workers: Workers,
    zero_loop: ZeroLoop,
    verify_loop: VerifyLoop,
    #[cfg(any(test, feature = "test-support"))]
    sabotage: Option<Sabotage>,
}

impl Engine {
    /// Scrubs with `workers`, by `zero_loop` or the loop that suits this host.
    pub(crate) fn new(workers: Workers, zero_loop: Option<ZeroLoop>) -> Self {
        Self {
            workers,
            zero_loop: zero_loop.unwrap_or_else(ZeroLoop::best_guess),
            verify_loop: VerifyLoop::widest(),
            #[cfg(any(test, feature = "test-support"))]
            sabotage: None,
        }
    }

    /// Breaks this engine.
    #[cfg(any(test, feature = "test-support"))]
    pub(crate) fn sabotage(&mut self, sabotage: Sabotage) {
        self.sabotage = Some(sabotage);
    }

    /// The loop that writes zeros.
    pub(crate) fn zero_loop(&self) -> ZeroLoop {
        self.zero_loop
    }

    /// The loop that reads them back.
    pub(crate) fn verify_loop(&self) -> VerifyLoop {
        self.verify_loop
    }

    /// The threads that do the work.
    pub(crate) fn workers(&self) -> &Workers {
        &self.workers
    }

    /// Writes zeros to `ranges`, which are relative to `base`.
    ///
    /// # Safety
    /// The ranges must be disjoint, writable, and nobody else may access them meanwhile.
    pub(crate) unsafe fn zero(&self, base: HostPtr, ranges: &[Range<usize>]) -> Zeroed {
        let started = Instant::now();
        let pieces = plan::pieces(ranges, PIECE);
        self.workers.each(&pieces, |piece| {
            // SAFETY: pieces are disjoint parts of the caller's ranges, and each goes to one thread.
            unsafe { self.zero_piece(base, piece) };
        });
        Zeroed {
            bytes: total(&pieces),
            time: started.elapsed(),
        }
    }

    /// Reads `ranges` back; what is not zero is scrubbed once more, and reported if that did not help.
    ///
    /// # Safety
    /// As for [`Engine::zero`].
    pub(crate) unsafe fn verify(
        &self,
        base: HostPtr,
        ranges: &[Range<usize>],
        verify: Verify,
    ) -> Verdict {
        let started = Instant::now();
        let pieces = plan::pieces(ranges, PIECE);
        let suspects = match verify {
            Verify::None => Vec::new(),
            Verify::Full => self.workers.filter(&pieces, |piece| {
                // SAFETY: as in `zero`.
                unsafe { self.first_nonzero(base, piece) }.is_some()
            }),
        };
        // SAFETY: passed on to the caller.
        unsafe { self.verdict(base, &pieces, suspects, verify, started.elapsed()) }
    }

    /// Zeroes and reads back piece by piece, while the piece is in the cache.
    ///
    /// The time is that of both, divided by how long the threads spent on each.
    ///
    /// # Safety
    /// As for [`Engine::zero`].
    pub(crate) unsafe fn zero_and_verify(
        &self,
        base: HostPtr,
        ranges: &[Range<usize>],
        verify: Verify,
    ) -> (Zeroed, Verdict) {
        if verify == Verify::None {
            // SAFETY: passed on to the caller.
            return unsafe { (self.zero(base, ranges), self.verify(base, ranges, verify)) };
        }
        let started = Instant::now();
        let pieces = plan::pieces(ranges, PIECE);
        let (zeroing, reading) = (AtomicU64::new(0), AtomicU64::new(0));
        let suspects = self.workers.filter(&pieces, |piece| {
            let begun = Instant::now();
            // SAFETY: as in `zero`.
            unsafe { self.zero_piece(base, piece.clone()) };
            let zeroed = Instant::now();
            // SAFETY: as in `zero`.
            let suspect = unsafe { self.first_nonzero(base, piece) }.is_some();
            zeroing.fetch_add((zeroed - begun).as_nanos() as u64, Ordering::Relaxed);
            reading.fetch_add(zeroed.elapsed().as_nanos() as u64, Ordering::Relaxed);
            suspect
        });
        let elapsed = started.elapsed();
        let (zeroing, reading) = (zeroing.into_inner() as f64, reading.into_inner() as f64);
        let share = if zeroing + reading > 0.0 {
            zeroing / (zeroing + reading)
        } else {
            1.0
        };
        let time = elapsed.mul_f64(share);
        let zeroed = Zeroed {
            bytes: total(&pieces),
            time,
        };
        // SAFETY: passed on to the caller.
        let verdict = unsafe {
            self.verdict(
                base,
                &pieces,
                suspects,
                verify,
                elapsed.saturating_sub(time),
            )
        };
        (zeroed, verdict)
    }

    /// Gives each suspect piece a second chance, and decides.
    unsafe fn verdict(
        &self,
        base: HostPtr,
        pieces: &[Range<usize>],
        suspects: Vec<Range<usize>>,
        verify: Verify,
        mut time: Duration,
    ) -> Verdict {
        let again = Instant::now();
        let mut bytes = if verify == Verify::None {
            0
        } else {
            total(pieces)
        };
        #[cfg(feature = "vm-memory")]
        if let Some(first) = suspects.first() {
            log::warn!(
                "{} of {} pieces are not zero after scrubbing, the first at pool offset {:#x}: scrubbing them again",
                suspects.len(),
                pieces.len(),
                first.start
            );
        }
        let mut failed_bytes = 0;
        let mut failures = Vec::new();
        for piece in suspects {
            // SAFETY: as in `zero`.
            let found = unsafe {
                self.zero_piece(base, piece.clone());
                self.first_nonzero(base, piece.clone())
            };
            if let Some(offset) = found {
                bytes -= piece.len() as u64;
                failed_bytes += piece.len() as u64;
                failures.push(Failure {
                    offset: piece.start + offset,
                });
            }
        }
        failures.sort_by_key(|failure| failure.offset);
        time += again.elapsed();
        Verdict {
            bytes,
            failed_bytes,
            failures,
            time,
        }
    }

    unsafe fn zero_piece(&self, base: HostPtr, piece: Range<usize>) {
        #[cfg(any(test, feature = "test-support"))]
        match self.sabotage {
            Some(Sabotage::SkipScrub) => return,
            Some(Sabotage::SkipChunk) if piece.end == crate::BLOCK_SIZE as usize => return,
            _ => {}
        }
        // SAFETY: the caller says that the piece is writable and nobody else's. The loop fences its own streaming stores,
        // on this thread, before it returns.
        unsafe { self.zero_loop.zero(base.at(piece.start), piece.len()) };
    }

    unsafe fn first_nonzero(&self, base: HostPtr, piece: Range<usize>) -> Option<usize> {
        // SAFETY: the caller says that the piece is readable and that nobody writes to it.
        unsafe {
            self.verify_loop
                .first_nonzero(base.at(piece.start), piece.len())
        }
    }
}

fn total(pieces: &[Range<usize>]) -> u64 {
    pieces.iter().map(|piece| piece.len() as u64).sum()
}
