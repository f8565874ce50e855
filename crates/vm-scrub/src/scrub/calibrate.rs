//! Measures which zeroing loop is fastest on this host.
//!
//! The widest vector does not win, and no loop wins everywhere: streaming stores gain on one processor what they lose on
//! the next, and lose on all of them for what fits into a cache. So each loop is tried, by size and by what comes after
//! (reading back finds zeros in the cache only if the loop left them there). Once in a process, on the calling thread, for
//! at most 50 ms.

use super::plan::PIECE;
use crate::arch::{VerifyLoop, ZeroLoop};
use crate::sys::map::{self, Advice};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The longest that measuring may take. The issue of a stall when a pool is built: less than a VM's boot.
const BUDGET: Duration = Duration::from_millis(50);

/// The part of the budget after which no more memory is populated for it.
const POPULATE_BUDGET: Duration = Duration::from_millis(12);

/// The shortest measurement: a thousand times what reading the clock takes.
const SHORTEST: Duration = Duration::from_micros(40);

/// How often each loop is measured at each size, if time allows; the fastest counts.
const ROUNDS: usize = 3;

/// The sizes in bytes at which loops are measured: from a page to more than most last-level caches hold.
const SIZES: [usize; 6] = [4 << 10, 32 << 10, 256 << 10, 2 << 20, 8 << 20, 48 << 20];

/// What is done to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Operation {
    /// Zeros are written.
    Zero,
    /// Zeros are written and read back, in pieces of 256 KiB.
    ZeroAndVerify,
}

/// How fast one loop was.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Rate {
    /// What was done.
    pub operation: Operation,
    /// To how many bytes at a time.
    pub bytes: u64,
    /// The name of the zeroing loop.
    #[cfg_attr(feature = "serde", serde(rename = "loop"))]
    pub zero_loop: String,
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
    operation: Operation,
    bytes: usize,
    zero_loop: ZeroLoop,
    /// Seconds for a byte; infinite if the time ran out before it was measured.
    cost: f64,
}

static CALIBRATION: OnceLock<Calibration> = OnceLock::new();

/// What was measured on this host. The first call in a process measures, on the calling thread and for at most 50 ms; pools
/// call it when they are built, unless they are told which loop to use.
pub fn calibration() -> &'static Calibration {
    CALIBRATION.get_or_init(|| {
        let calibration = Calibration::measure();
        for rate in calibration.rates() {
            log::debug!(
                "{:?} {} bytes by {}: {:.1} GiB/s",
                rate.operation,
                rate.bytes,
                rate.zero_loop,
                rate.bytes_per_second as f64 / (1_u64 << 30) as f64
            );
        }
        log::info!(
            "loops measured in {:?}: zeroing by {}, with reading back by {} (large ranges)",
            calibration.took,
            calibration.fastest(Operation::Zero, u64::MAX),
            calibration.fastest(Operation::ZeroAndVerify, u64::MAX),
        );
        calibration
    })
}

impl Calibration {
    /// What was measured, if somebody has measured already.
    pub(crate) fn if_done() -> Option<&'static Self> {
        CALIBRATION.get()
    }

    /// The measurements that stand for `bytes` bytes: at the nearest size, or where time ran out before that, at the next
    /// size below.
    fn at(&self, operation: Operation, bytes: u64) -> impl Iterator<Item = &Measured> {
        let wanted = nearest(bytes);
        let of_operation =
            move |one: &&Measured| one.operation == operation && one.cost.is_finite();
        let sizes = self
            .measured
            .iter()
            .filter(of_operation)
            .map(|one| one.bytes);
        let size = sizes.filter(|size| *size <= wanted).max();
        self.measured
            .iter()
            .filter(of_operation)
            .filter(move |one| Some(one.bytes) == size)
    }

    /// The loop that was fastest at `bytes` bytes, or at the nearest size that was measured.
    pub fn fastest(&self, operation: Operation, bytes: u64) -> ZeroLoop {
        self.at(operation, bytes)
            .min_by(|a, b| a.cost.total_cmp(&b.cost))
            .map_or_else(ZeroLoop::best_guess, |one| one.zero_loop)
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

    fn measure() -> Self {
        let begun = Instant::now();
        let mut measured: Vec<Measured> = Vec::new();
        for operation in [Operation::Zero, Operation::ZeroAndVerify] {
            for bytes in SIZES {
                measured.extend(ZeroLoop::available().map(|zero_loop| Measured {
                    operation,
                    bytes,
                    zero_loop,
                    cost: f64::INFINITY,
                }));
            }
        }
        if let Some(scratch) = Scratch::populate(begun) {
            // Small sizes first: they cost little, and large ones fall back on them. Loops in turn, so that whatever disturbs
            // the machine disturbs all of them.
            measured.sort_by_key(|one| one.bytes);
            for _ in 0..ROUNDS {
                for one in &mut measured {
                    if one.bytes <= scratch.len && begun.elapsed() + one.expected() < BUDGET {
                        one.cost = one.cost.min(one.try_on(&scratch));
                    }
                }
            }
        }
        Self {
            measured,
            took: begun.elapsed(),
        }
    }
}

/// The measured size that stands for `bytes`: the nearest on a logarithmic scale.
fn nearest(bytes: u64) -> usize {
    let distance = |size: usize| ((size as f64).ln() - (bytes.max(1) as f64).ln()).abs();
    SIZES
        .into_iter()
        .min_by(|a, b| distance(*a).total_cmp(&distance(*b)))
        .unwrap_or(SIZES[0])
}

impl Measured {
    fn rate(&self) -> Rate {
        Rate {
            operation: self.operation,
            bytes: self.bytes as u64,
            zero_loop: self.zero_loop.name().to_owned(),
            bytes_per_second: (1.0 / self.cost) as u64,
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
        Duration::from_secs_f64(self.bytes as f64 * cost).max(SHORTEST)
    }

    /// Seconds for a byte.
    fn try_on(&self, scratch: &Scratch) -> f64 {
        let verify_loop = VerifyLoop::widest();
        let begun = Instant::now();
        let mut bytes = 0;
        loop {
            for start in (0..self.bytes).step_by(PIECE) {
                let at = scratch.start.wrapping_add(start);
                let len = PIECE.min(self.bytes - start);
                // SAFETY: the scratch memory is mapped, at least `self.bytes` long and nobody else's.
                unsafe {
                    self.zero_loop.zero(at, len);
                    if self.operation == Operation::ZeroAndVerify {
                        let _ = verify_loop.first_nonzero(at, len);
                    }
                }
            }
            bytes += self.bytes;
            let elapsed = begun.elapsed();
            if elapsed >= SHORTEST {
                return elapsed.as_secs_f64() / bytes as f64;
            }
        }
    }
}

/// Memory to measure on.
struct Scratch {
    reservation: *mut u8,
    reserved: usize,
    start: *mut u8,
    /// How much of it is populated, in bytes.
    len: usize,
}

impl Scratch {
    /// Maps as much as the largest size needs, and populates what it gets in its share of the budget.
    fn populate(begun: Instant) -> Option<Self> {
        const STEP: usize = 2 << 20;
        let wanted = SIZES[SIZES.len() - 1];
        let reserved = wanted + STEP;
        let reservation = map::reserve(reserved).ok()?;
        let start = reservation.wrapping_add(reservation.align_offset(STEP));
        let mut scratch = Self {
            reservation,
            reserved,
            start,
            len: 0,
        };
        // SAFETY: the range lies in our own reservation, which nobody else knows.
        unsafe {
            map::map_anonymous(start, wanted).ok()?;
            // Where there are no huge pages small ones will do.
            let _ = map::advise(start, wanted, Advice::HugePage);
        }
        while scratch.len < wanted && begun.elapsed() < POPULATE_BUDGET {
            for page in (scratch.len..scratch.len + STEP).step_by(4096) {
                // SAFETY: mapped and ours. Touching, not asking to populate: it works on every kernel.
                unsafe { start.wrapping_add(page).write_volatile(0) };
            }
            scratch.len += STEP;
        }
        Some(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: the reservation is ours and nobody refers to it any more.
        if let Err(error) = unsafe { map::unmap(self.reservation, self.reserved) } {
            log::warn!("the memory for measuring loops stays mapped: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured(operation: Operation, bytes: usize, zero_loop: ZeroLoop, cost: f64) -> Measured {
        Measured {
            operation,
            bytes,
            zero_loop,
            cost,
        }
    }

    #[test]
    fn the_cheapest_loop_of_the_nearest_size_is_chosen() {
        let mut loops = ZeroLoop::available();
        let (Some(a), Some(b)) = (loops.next(), loops.next()) else {
            return eprintln!("SKIPPED: this processor has one loop only");
        };
        let calibration = Calibration {
            measured: vec![
                measured(Operation::Zero, SIZES[0], a, 1.0),
                measured(Operation::Zero, SIZES[0], b, 2.0),
                measured(Operation::Zero, SIZES[5], a, 2.0),
                measured(Operation::Zero, SIZES[5], b, 1.0),
                measured(Operation::ZeroAndVerify, SIZES[0], b, 1.0),
                measured(Operation::ZeroAndVerify, SIZES[5], a, f64::INFINITY),
            ],
            took: Duration::ZERO,
        };
        assert_eq!(calibration.fastest(Operation::Zero, 0), a);
        assert_eq!(calibration.fastest(Operation::Zero, 4096), a);
        assert_eq!(calibration.fastest(Operation::Zero, u64::MAX), b);
        // The large size was not reached: the small one stands in.
        assert_eq!(calibration.fastest(Operation::ZeroAndVerify, u64::MAX), b);
        assert_eq!(calibration.rates().count(), 5);
        assert_eq!(calibration.rates_for(Operation::Zero, 1 << 40).len(), 2);
        assert_eq!(
            calibration
                .rates_for(Operation::ZeroAndVerify, 1 << 40)
                .len(),
            1
        );
    }

    #[test]
    fn nothing_measured_is_the_processors_word() {
        let calibration = Calibration {
            measured: Vec::new(),
            took: Duration::ZERO,
        };
        assert_eq!(
            calibration.fastest(Operation::Zero, 1),
            ZeroLoop::best_guess()
        );
    }

    #[test]
    fn sizes_stand_for_their_neighbourhood() {
        assert_eq!(nearest(0), SIZES[0]);
        assert_eq!(nearest(5000), SIZES[0]);
        assert_eq!(nearest(1 << 20), SIZES[3]);
        assert_eq!(nearest(1 << 30), SIZES[5]);
        assert_eq!(nearest(u64::MAX), SIZES[5]);
    }

    #[test]
    fn this_host_is_measured_once() {
        let first = calibration();
        assert!(std::ptr::eq(first, calibration()));
        // How many rates there are depends on how busy the machine is.
        assert!(first.rates().all(|rate| rate.bytes_per_second > 0));
    }
}
