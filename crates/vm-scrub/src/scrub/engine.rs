//! Which loop treats which memory, and with which threads.

use super::batches::Batches;
use super::calibrate::{Calibration, Operation, Rate, calibration};
use super::job::{Job, Watch};
use super::pass::{HostPtr, Pass, Work};
use super::policy::{Policy, Verify};
use super::workers::Workers;
use crate::arch::{UnknownLoop, VerifyLoop, ZeroLoop};
use std::env::VarError;
use std::ops::Range;

#[cfg(any(test, feature = "test-support"))]
use super::pass::Sabotage;

/// The environment variable that names the zeroing loop, where the policy does not.
const LOOP_VARIABLE: &str = "VM_SCRUB_LOOP";

/// Where the zeroing loop comes from.
#[derive(Debug, Clone, Copy)]
enum Choice {
    /// The policy or the environment names it.
    Named(ZeroLoop),
    /// It was measured, by size.
    Measured(&'static Calibration),
    /// The processor's word for it.
    Guessed(ZeroLoop),
}

/// The loops and the threads.
#[derive(Debug)]
pub(crate) struct Engine {
    workers: Workers,
    choice: Choice,
    probe: bool,
    /// The size of the pages, in bytes, as far as it is known: 4 KiB or more.
    page: usize,
    #[cfg(any(test, feature = "test-support"))]
    sabotage: Option<Sabotage>,
}

fn named(policy: &Policy) -> Result<Option<ZeroLoop>, UnknownLoop> {
    if policy.zero_loop.is_some() {
        return Ok(policy.zero_loop);
    }
    match std::env::var(LOOP_VARIABLE) {
        Ok(name) if !name.is_empty() => ZeroLoop::by_name(&name).map(Some),
        Ok(_) | Err(VarError::NotPresent) => Ok(None),
        // No loop has such a name, and the error says so.
        Err(VarError::NotUnicode(name)) => ZeroLoop::by_name(&name.to_string_lossy()).map(Some),
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
    /// An engine for memory in pages of `page` bytes that measures which loop is fastest, if no policy says it and nobody has
    /// measured yet: once in a process, for at most 50 ms.
    pub(crate) fn calibrated(
        workers: Workers,
        policy: &Policy,
        page: usize,
    ) -> Result<Self, UnknownLoop> {
        let choice = match named(policy)? {
            Some(zero_loop) => Choice::Named(zero_loop),
            None => Choice::Measured(calibration()),
        };
        Ok(Self::with(workers, choice, policy, page))
    }

    /// An engine on the calling thread, for memory of any origin, that does not stop to measure.
    pub(crate) fn immediate(policy: &Policy) -> Result<Self, UnknownLoop> {
        let choice = match (named(policy)?, Calibration::if_done()) {
            (Some(zero_loop), _) => Choice::Named(zero_loop),
            (None, Some(calibration)) => Choice::Measured(calibration),
            (None, None) => Choice::Guessed(ZeroLoop::best_guess()),
        };
        Ok(Self::with(Workers::caller(), choice, policy, 4096))
    }

    fn with(workers: Workers, choice: Choice, policy: &Policy, page: usize) -> Self {
        Self {
            workers,
            choice,
            probe: policy.probe,
            page,
            #[cfg(any(test, feature = "test-support"))]
            sabotage: None,
        }
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
    fn loops(&self, bytes: u64, verify: Verify, work: Work) -> (ZeroLoop, VerifyLoop) {
        let calibration = match self.choice {
            Choice::Measured(calibration) => calibration,
            Choice::Guessed(zero_loop) => return (zero_loop, VerifyLoop::widest()),
            Choice::Named(zero_loop) => {
                let measured = Calibration::if_done().map(|measured| measured.partner(zero_loop));
                return (zero_loop, measured.unwrap_or_else(VerifyLoop::widest));
            }
        };
        match operation(verify, work) {
            Operation::ZeroAndVerify => calibration.fastest_zero_and_verify(bytes),
            Operation::Zero | Operation::Verify => (
                calibration.fastest_zero(bytes),
                calibration.fastest_verify(bytes),
            ),
        }
    }

    /// The rates between which the zeroing loop for that was chosen; none if it was not measured.
    pub(crate) fn rates_for(&self, bytes: u64, verify: Verify, work: Work) -> Vec<Rate> {
        match self.choice {
            Choice::Named(_) | Choice::Guessed(_) => Vec::new(),
            Choice::Measured(calibration) => calibration.rates_for(operation(verify, work), bytes),
        }
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
        let bytes = ranges.iter().map(|range| range.len() as u64).sum();
        let (zero_loop, verify_loop) = self.loops(bytes, verify, work);
        let pass = Pass {
            base,
            zero_loop,
            verify_loop,
            verify,
            seed,
            probe: self.probe,
            page: self.page,
            #[cfg(any(test, feature = "test-support"))]
            sabotage: self.sabotage,
        };
        // SAFETY: passed on to the caller.
        unsafe { Job::new(pass, work, Batches::new(ranges.to_vec())) }
    }

    /// Does all of a job now. Returns with how many threads.
    pub(crate) fn run(&self, job: &Job, watch: Option<&Watch>) -> usize {
        job.work_with(&self.workers, watch)
    }
}
