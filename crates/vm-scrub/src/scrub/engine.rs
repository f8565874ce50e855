//! Which loop treats which memory, and with which threads.

use super::batches::Batches;
use super::calibrate::{
    Calibration, Operation, Rate, calibration, calibration_for, read_back_from,
};
use super::job::{FEW, Job, Watch};
use super::pass::{HostPtr, Pass, Work};
use super::plan::PIECE;
use super::policy::{Policy, Verify};
use super::workers::Workers;
use crate::arch::{UnknownLoop, VerifyLoop, ZeroLoop};
use std::env::VarError;
use std::ops::Range;

#[cfg(any(test, feature = "test-support"))]
use super::pass::Sabotage;

/// The environment variable that names the zeroing loop, where the policy does not.
const ZERO_VARIABLE: &str = "VM_SCRUB_LOOP";

/// The same for the verification loop.
const VERIFY_VARIABLE: &str = "VM_SCRUB_VERIFY_LOOP";

/// The loops for a job, and why it is these.
#[derive(Debug, Clone)]
pub(crate) struct Choice {
    pub(crate) zero_loop: ZeroLoop,
    pub(crate) verify_loop: VerifyLoop,
    /// The rates between which the zeroing loop was chosen; none if it was named.
    pub(crate) zero_rates: Vec<Rate>,
    /// The rates between which the verification loop was chosen; none if it was named, or nothing is read.
    pub(crate) verify_rates: Vec<Rate>,
}

/// The loops and the threads.
#[derive(Debug)]
pub(crate) struct Engine {
    workers: Workers,
    /// The loops that the policy or the environment names.
    zero_loop: Option<ZeroLoop>,
    verify_loop: Option<VerifyLoop>,
    /// What was measured when the pool was built. Without a pool it depends on how much there is to do.
    measured: Option<&'static Calibration>,
    probe: bool,
    /// The size of the pages, in bytes, as far as it is known: 4 KiB or more.
    page: usize,
    #[cfg(any(test, feature = "test-support"))]
    sabotage: Option<Sabotage>,
}

/// The loop that the environment variable names.
fn named<L>(
    variable: &str,
    by_name: impl Fn(&str) -> Result<L, UnknownLoop>,
) -> Result<Option<L>, UnknownLoop> {
    match std::env::var(variable) {
        Ok(name) if !name.is_empty() => by_name(&name).map(Some),
        Ok(_) | Err(VarError::NotPresent) => Ok(None),
        // No loop has such a name, and the error says so.
        Err(VarError::NotUnicode(name)) => by_name(&name.to_string_lossy()).map(Some),
    }
}

/// The environment variable that names such a loop.
pub(crate) fn variable(error: &UnknownLoop) -> &'static str {
    let (UnknownLoop::NoSuchLoop { task, .. } | UnknownLoop::NotAvailable { task, .. }) = error;
    match *task {
        VerifyLoop::TASK => VERIFY_VARIABLE,
        _ => ZERO_VARIABLE,
    }
}

/// What the loop has to be good at. Lines that are flushed before they are read need not be in the cache.
fn operation(verify: Verify, work: Work) -> Operation {
    if work == Work::ZeroAndRead && verify == Verify::Full {
        Operation::ZeroAndVerify
    } else {
        Operation::Zero
    }
}

impl Engine {
    /// An engine for memory in pages of `page` bytes that measures which loops are fastest, if the policy does not say both and
    /// nobody has measured yet: once in a process, for at most 50 ms.
    pub(crate) fn calibrated(
        workers: Workers,
        policy: &Policy,
        page: usize,
    ) -> Result<Self, UnknownLoop> {
        let mut engine = Self::new(workers, policy, page)?;
        if engine.zero_loop.is_none() || engine.verify_loop.is_none() {
            engine.measured = Some(calibration());
        }
        Ok(engine)
    }

    /// An engine on the calling thread, for memory of any origin, that stops to measure only when there is a lot to do.
    pub(crate) fn immediate(policy: &Policy) -> Result<Self, UnknownLoop> {
        Self::new(Workers::caller(), policy, 4096)
    }

    fn new(workers: Workers, policy: &Policy, page: usize) -> Result<Self, UnknownLoop> {
        let zero_loop = match policy.zero_loop {
            Some(zero_loop) => Some(zero_loop),
            None => named(ZERO_VARIABLE, ZeroLoop::by_name)?,
        };
        let verify_loop = match policy.verify_loop {
            Some(verify_loop) => Some(verify_loop),
            None => named(VERIFY_VARIABLE, VerifyLoop::by_name)?,
        };
        Ok(Self {
            workers,
            zero_loop,
            verify_loop,
            measured: None,
            probe: policy.probe,
            page,
            #[cfg(any(test, feature = "test-support"))]
            sabotage: None,
        })
    }

    /// Breaks this engine.
    #[cfg(any(test, feature = "test-support"))]
    pub(crate) fn sabotage(&mut self, sabotage: Sabotage) {
        self.sabotage = Some(sabotage);
    }

    /// The threads that do the work.
    pub(crate) fn workers(&self) -> &Workers {
        &self.workers
    }

    /// The loops that zero `bytes` bytes and read them back as `verify` says.
    fn choose(&self, bytes: u64, verify: Verify, work: Work) -> Choice {
        let reads = verify != Verify::None && work != Work::Zero;
        let (zero_rates, verify_rates) = (Vec::new(), Vec::new());
        let measured = match (self.zero_loop, self.verify_loop) {
            (Some(zero_loop), Some(verify_loop)) => {
                return Choice {
                    zero_loop,
                    verify_loop,
                    zero_rates,
                    verify_rates,
                };
            }
            _ => self.measured.unwrap_or_else(|| calibration_for(bytes)),
        };
        let operation = operation(verify, work);
        let threads = self.threads_for(bytes);
        let zero_loop = self.zero_loop.unwrap_or_else(|| match operation {
            Operation::ZeroAndVerify => measured.fastest_zero_and_verify(bytes, threads).0,
            Operation::Zero | Operation::Verify => measured.fastest_zero(bytes, threads),
        });
        // What was zeroed just now is read from where it was left, and what was flushed from memory.
        let (read_from, readers) = match (operation, verify) {
            (Operation::ZeroAndVerify, _) => (read_back_from(zero_loop), 1),
            (_, Verify::Memory) => (u64::MAX, threads),
            _ => (bytes, threads),
        };
        Choice {
            zero_loop,
            verify_loop: self
                .verify_loop
                .unwrap_or_else(|| measured.fastest_verify(read_from, readers)),
            zero_rates: match self.zero_loop {
                None if work.zeroes() => measured.rates_for(operation, bytes, threads),
                _ => zero_rates,
            },
            verify_rates: match self.verify_loop {
                None if reads => measured.rates_for(Operation::Verify, read_from, readers),
                _ => verify_rates,
            },
        }
    }

    /// How many threads share the work on `bytes` bytes, if all are there for it: one if there is [little](FEW), and no more than there
    /// are pieces.
    fn threads_for(&self, bytes: u64) -> usize {
        if bytes <= FEW {
            return 1;
        }
        let pieces = usize::try_from(bytes.div_ceil(PIECE as u64)).unwrap_or(usize::MAX);
        self.workers.threads().min(pieces)
    }

    /// A job over `ranges`, which are relative to `base`.
    ///
    /// # Safety
    /// As for [`Job::new`].
    pub(crate) unsafe fn job(
        &self,
        base: HostPtr,
        ranges: &[Range<usize>],
        work: Work,
        verify: Verify,
        seed: u64,
    ) -> Job {
        // SAFETY: passed on to the caller.
        unsafe { self.job_of(base, Batches::new(ranges.to_vec()), work, verify, seed) }
    }

    /// A job over `batches`, which are relative to `base`.
    ///
    /// # Safety
    /// As for [`Job::new`].
    pub(crate) unsafe fn job_of(
        &self,
        base: HostPtr,
        batches: Batches,
        work: Work,
        verify: Verify,
        seed: u64,
    ) -> Job {
        let choice = self.choose(batches.bytes(), verify, work);
        let pass = Pass {
            base,
            zero_loop: choice.zero_loop,
            verify_loop: choice.verify_loop,
            verify,
            seed,
            probe: self.probe,
            page: self.page,
            #[cfg(any(test, feature = "test-support"))]
            sabotage: self.sabotage,
        };
        // SAFETY: passed on to the caller.
        unsafe { Job::new(pass, work, choice, batches) }
    }

    /// Does all of a job now. Returns with how many threads.
    pub(crate) fn run(&self, job: &Job, watch: Option<&Watch<'_>>) -> usize {
        job.work_with(&self.workers, watch)
    }
}

#[cfg(all(test, feature = "rayon"))]
mod tests {
    use super::*;

    #[test]
    fn there_is_no_thread_without_a_piece() {
        let workers = Workers::start(6, None).unwrap();
        let engine = Engine::new(workers, &Policy::new(), 4096).unwrap();
        let piece = PIECE as u64;
        for (bytes, threads) in [
            (0, 1),
            (FEW, 1),
            (FEW + 1, 5),
            (5 * piece, 5),
            (6 * piece, 6),
            (7 * piece, 6),
            (u64::MAX, 6),
        ] {
            assert_eq!(engine.threads_for(bytes), threads, "{bytes}");
        }
    }
}
