//! One measurement: a loop at a size.

use super::{Operation, Rate};
use crate::arch::{VerifyLoop, ZeroLoop, flush_from_cache};
use crate::scrub::plan::PIECE;
use std::time::{Duration, Instant};

/// The shortest measurement: a thousand times what reading the clock takes, and several passes over the second-level cache.
const SHORTEST: Duration = Duration::from_micros(40);

/// The shortest at the smallest size: a hundred passes. Somebody who has no pool waits for it.
const SHORTEST_OF_A_PAGE: Duration = Duration::from_micros(10);

/// The smallest size in bytes: a page, which a thread's stack has room for.
pub(super) const SMALLEST: usize = 4 << 10;

/// Sizes in bytes that are worked on again and again: what fits into one or another cache stays there. Second-level caches have 1 or
/// 2 MiB; the last size is beyond those, and small enough for every loop to have its turns in time.
pub(super) const IN_CACHE: [usize; 5] = [SMALLEST, 32 << 10, 256 << 10, 1 << 20, 8 << 20];

/// Stands for memory that no cache holds. So much need not be populated to measure it: a part of it will do, if its lines are
/// flushed beforehand.
pub(super) const BEYOND_CACHES: usize = 64 << 20;

/// That part, in bytes: long enough for the clock.
const FLUSHED: usize = 1 << 20;

#[derive(Debug, Clone, Copy)]
pub(super) struct Measured {
    pub(super) bytes: usize,
    pub(super) loops: Loops,
    /// Seconds for a byte; infinite if the time ran out before it was measured.
    pub(super) cost: f64,
    /// How often it was measured.
    pub(super) turns: u32,
}

/// An operation, and what carries it out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Loops {
    Zero(ZeroLoop),
    Verify(VerifyLoop),
    ZeroAndVerify(ZeroLoop),
}

/// Everything that is to be tried, most important first, should the time run out: the smallest size, which stands in for all
/// others, then guests' sizes. Reading comes before reading back. All loops take turns, so that whatever disturbs the machine
/// disturbs all of them.
pub(super) fn trials() -> Vec<Measured> {
    let verify = VerifyLoop::available().map(Loops::Verify);
    let zero = ZeroLoop::available().map(Loops::Zero);
    let both = ZeroLoop::available().map(Loops::ZeroAndVerify);
    let mut loops: Vec<Loops> = verify.chain(zero).chain(both).collect();
    // Those that stream come last. What is zeroed next in the same lines takes longer, and not by its own fault: on Cascade Lake by 1.7
    // times.
    loops.sort_by_key(|loops| loops.zero_loop().is_some_and(ZeroLoop::is_streaming));
    let [smallest, larger @ ..] = IN_CACHE;
    [smallest, BEYOND_CACHES]
        .into_iter()
        .chain(larger)
        .flat_map(|bytes| {
            loops.iter().map(move |loops| Measured {
                bytes,
                loops: *loops,
                cost: f64::INFINITY,
                turns: 0,
            })
        })
        .collect()
}

/// The measured size that stands for `bytes`: the nearest on a logarithmic scale.
pub(super) fn nearest(bytes: u64) -> usize {
    let distance = |size: usize| ((size as f64).ln() - (bytes.max(1) as f64).ln()).abs();
    IN_CACHE
        .into_iter()
        .chain([BEYOND_CACHES])
        .min_by(|a, b| distance(*a).total_cmp(&distance(*b)))
        .unwrap_or(BEYOND_CACHES)
}

impl Loops {
    pub(super) fn operation(self) -> Operation {
        match self {
            Loops::Zero(_) => Operation::Zero,
            Loops::Verify(_) => Operation::Verify,
            Loops::ZeroAndVerify(_) => Operation::ZeroAndVerify,
        }
    }

    pub(super) fn zero_loop(self) -> Option<ZeroLoop> {
        match self {
            Loops::Zero(zero_loop) | Loops::ZeroAndVerify(zero_loop) => Some(zero_loop),
            Loops::Verify(_) => None,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Loops::Zero(zero_loop) | Loops::ZeroAndVerify(zero_loop) => zero_loop.name(),
            Loops::Verify(verify_loop) => verify_loop.name(),
        }
    }
}

impl Measured {
    pub(super) fn rate(&self) -> Rate {
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
    pub(super) fn expected(&self) -> Duration {
        const SLOW: f64 = 1.0 / (4_u64 << 30) as f64;
        let cost = if self.cost.is_finite() {
            self.cost
        } else {
            SLOW
        };
        // A line takes as long to flush as to be zeroed, or less; else there is one pass before those that count.
        Duration::from_secs_f64(2.0 * self.span() as f64 * cost).max(self.shortest())
    }

    fn shortest(&self) -> Duration {
        if self.bytes == SMALLEST {
            SHORTEST_OF_A_PAGE
        } else {
            SHORTEST
        }
    }

    /// Seconds for a byte.
    pub(super) fn try_on(&self, memory: &mut [u8], verify_loop: VerifyLoop) -> f64 {
        let memory = &mut memory[..self.span()];
        let mut bytes = 0;
        if self.bytes == BEYOND_CACHES {
            // SAFETY: a slice is mapped.
            unsafe { flush_from_cache(memory.as_mut_ptr(), memory.len()) };
        } else {
            // What the loop before has left in the caches, or thrown out of them, is not to its credit.
            self.pass(memory, verify_loop);
        }
        let begun = Instant::now();
        loop {
            self.pass(memory, verify_loop);
            bytes += self.span();
            let elapsed = begun.elapsed();
            if elapsed >= self.shortest() || self.bytes == BEYOND_CACHES {
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
