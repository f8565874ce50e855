//! A guest that runs in the background: its vCPU threads, and how they are stopped and waited for.
//!
//! Everything a [`crate::Machine`] does goes through here, so that there is one way only in which a vCPU is given a
//! thread, interrupted, and given back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::firmware::Firmware;
use crate::kick;
use crate::vcpu::{Outcome, Program, Start, VcpuStop};
use crate::vcpu_thread::{Claim, Report, Slot};

/// How long to wait for an acknowledgement before the kick is repeated. See [`kick`].
const KICK_INTERVAL: Duration = Duration::from_millis(1);

/// How long dropping a running guest may take. A vCPU leaves `KVM_RUN` within microseconds of a kick.
pub(crate) const STOP_LIMIT: Duration = Duration::from_secs(5);

/// What all vCPUs of a run have in common.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Job {
    pub(crate) program: Program,
    /// The word to write or to look for.
    pub(crate) word: u64,
    /// For errors: what is being done.
    pub(crate) what: &'static str,
}

/// A guest whose vCPUs run in threads of their own. Dropping it stops them.
///
/// It does not borrow the machine: memslots can be removed, and memory taken away, while it runs.
#[derive(Debug)]
pub struct RunningGuest {
    what: &'static str,
    vcpus: Vec<VcpuThread>,
    reports: Receiver<Report>,
    stop: Arc<AtomicBool>,
    firmware: Arc<Firmware>,
    failure: Option<Error>,
}

#[derive(Debug)]
struct VcpuThread {
    index: usize,
    thread: Option<JoinHandle<()>>,
    outcome: Option<Outcome>,
}

impl RunningGuest {
    /// Starts vCPU i on `shares[i]`; a vCPU without a share is not started.
    pub(crate) fn start(
        slots: &[Arc<Slot>],
        firmware: &Arc<Firmware>,
        shares: &[Vec<(u64, u64)>],
        job: Job,
    ) -> Result<Self, Error> {
        kick::install_handler()?;
        // All vCPUs are claimed before anything is written to a mailbox: another run may be reading them.
        let mut claims = Vec::with_capacity(slots.len());
        for (index, (slot, share)) in slots.iter().zip(shares).enumerate() {
            if !share.is_empty() || job.program == Program::Spin {
                let claim = Claim::new(index, slot)?;
                claims.push((index, claim, firmware.post(index, share)?));
            }
        }
        let (sender, reports) = mpsc::channel();
        let mut running = Self {
            what: job.what,
            vcpus: Vec::with_capacity(claims.len()),
            reports,
            stop: Arc::new(AtomicBool::new(false)),
            firmware: Arc::clone(firmware),
            failure: None,
        };
        for (place, (index, claim, mailbox)) in claims.into_iter().enumerate() {
            let start = Start {
                program: job.program,
                word: job.word,
                mailbox,
            };
            let thread = claim.spawn(start, &running.stop, (place, &sender))?;
            running.vcpus.push(VcpuThread {
                index,
                thread: Some(thread),
                outcome: None,
            });
        }
        Ok(running)
    }

    /// How often each started vCPU has been through its share, as the guest counts. Of a vCPU that fills over and over.
    ///
    /// # Errors
    ///
    /// [`Error::Firmware`] if the guest's count cannot be read.
    pub fn passes(&self) -> Result<Vec<u64>, Error> {
        self.vcpus
            .iter()
            .map(|vcpu| self.firmware.passes(vcpu.index))
            .collect()
    }

    /// Waits until every started vCPU has been through its share `passes` times since the start: it is really writing.
    ///
    /// # Errors
    ///
    /// [`Error::GuestStopped`] if a vCPU stops before that; [`Error::TimedOut`].
    pub fn wait_passes(&mut self, passes: u64, limit: Duration) -> Result<(), Error> {
        self.wait_until_passed(&vec![passes; self.vcpus.len()], limit)
    }

    /// Waits until every started vCPU has been through its share `passes` times more than it has been by now: it still writes.
    /// One that is far behind another one need not catch up.
    ///
    /// # Errors
    ///
    /// As for [`wait_passes`](Self::wait_passes).
    pub fn wait_more_passes(&mut self, passes: u64, limit: Duration) -> Result<(), Error> {
        let mut wanted = self.passes()?;
        for done in &mut wanted {
            *done = done.saturating_add(passes);
        }
        self.wait_until_passed(&wanted, limit)
    }

    fn wait_until_passed(&mut self, wanted: &[u64], limit: Duration) -> Result<(), Error> {
        let deadline = deadline(limit);
        loop {
            if self
                .passes()?
                .iter()
                .zip(wanted)
                .all(|(done, wanted)| done >= wanted)
            {
                return Ok(());
            }
            self.collect(deadline.min(Instant::now() + KICK_INTERVAL));
            self.check_failure()?;
            if let Some((vcpu, stop)) = self.vcpus.iter().find_map(VcpuThread::stopped) {
                return Err(Error::GuestStopped {
                    what: self.what,
                    vcpu,
                    stop,
                });
            }
            if Instant::now() >= deadline {
                return Err(Error::TimedOut {
                    what: "waiting for the guest to write",
                    limit,
                });
            }
        }
    }

    /// Waits until all vCPUs have stopped by themselves, and says how each one did, in the order of their numbers. The
    /// guest runs on after a time-out.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] if one still runs when `limit` is over; [`Error::Kvm`] if one could not be run.
    pub fn wait_stopped(&mut self, limit: Duration) -> Result<Vec<VcpuStop>, Error> {
        self.wait_outcomes(limit).map(|outcomes| {
            outcomes
                .into_iter()
                .map(|(_, outcome)| outcome.stop)
                .collect()
        })
    }

    /// Stops all vCPUs and says how each one ended, in the order of their numbers: [`VcpuStop::Kicked`], unless it had
    /// stopped by itself before.
    ///
    /// # Errors
    ///
    /// [`Error::TimedOut`] if one still runs when `limit` is over; [`Error::Kvm`] if one could not be run.
    pub fn stop(mut self, limit: Duration) -> Result<Vec<VcpuStop>, Error> {
        self.kick_all(limit)?;
        self.wait_stopped(Duration::ZERO)
    }

    /// As [`RunningGuest::wait_stopped`], with numbers and answers.
    pub(crate) fn wait_outcomes(
        &mut self,
        limit: Duration,
    ) -> Result<Vec<(usize, Outcome)>, Error> {
        let ended = self.collect(deadline(limit));
        self.check_failure()?;
        if !ended {
            return Err(Error::TimedOut {
                what: self.what,
                limit,
            });
        }
        let outcomes = self
            .vcpus
            .iter()
            .filter_map(|vcpu| Some((vcpu.index, vcpu.outcome.clone()?)));
        Ok(outcomes.collect())
    }

    /// Kicks every vCPU until all have stopped.
    fn kick_all(&mut self, limit: Duration) -> Result<(), Error> {
        let deadline = deadline(limit);
        self.stop.store(true, Ordering::Release);
        loop {
            self.kick_once()?;
            if self.collect(deadline.min(Instant::now() + KICK_INTERVAL)) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(Error::TimedOut {
                    what: "stopping the vCPUs",
                    limit,
                });
            }
        }
    }

    /// Interrupts every vCPU that has not stopped yet.
    pub(crate) fn kick_once(&self) -> Result<(), Error> {
        self.vcpus
            .iter()
            .filter_map(|vcpu| vcpu.thread.as_ref())
            .try_for_each(kick::kick)
    }

    /// Takes in reports until all vCPUs have stopped, which gives true, or until `deadline`.
    fn collect(&mut self, deadline: Instant) -> bool {
        while self.vcpus.iter().any(|vcpu| vcpu.thread.is_some()) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.reports.recv_timeout(left) {
                Ok((place, result)) => self.take_report(place, result),
                Err(RecvTimeoutError::Timeout) => return false,
                // All threads have ended, and one of them without a report.
                Err(RecvTimeoutError::Disconnected) => {
                    self.vcpus.iter_mut().for_each(VcpuThread::join);
                    let source = std::io::Error::other("a vCPU thread ended without a report");
                    self.failure.get_or_insert(Error::Thread {
                        doing: "run a vCPU",
                        source,
                    });
                }
            }
        }
        true
    }

    fn take_report(&mut self, place: usize, result: Result<Outcome, Error>) {
        let Some(vcpu) = self.vcpus.get_mut(place) else {
            return;
        };
        vcpu.join();
        match result {
            Ok(outcome) => vcpu.outcome = Some(outcome),
            Err(error) => {
                self.failure.get_or_insert(error);
            }
        }
    }

    fn check_failure(&mut self) -> Result<(), Error> {
        self.failure.take().map_or(Ok(()), Err)
    }
}

impl Drop for RunningGuest {
    fn drop(&mut self) {
        if let Err(error) = self.kick_all(STOP_LIMIT) {
            log::error!("a guest that was dropped is still running: {error}");
        }
    }
}

impl VcpuThread {
    /// Waits for a thread that has reported, and so has nothing left to do.
    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // A panic was printed by the thread itself, and shows as a missing report.
            let _ = thread.join();
        }
    }

    fn stopped(&self) -> Option<(usize, VcpuStop)> {
        Some((self.index, self.outcome.as_ref()?.stop.clone()))
    }
}

/// The moment when `limit` is over; a limit of more than a year is a year, so that nothing overflows.
pub(crate) fn deadline(limit: Duration) -> Instant {
    Instant::now() + limit.min(Duration::from_secs(365 * 24 * 3600))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vcpu::Answer;

    /// A run of one thread, which stands in for a vCPU that misses kicks: it stops at the third one.
    fn hard_of_hearing(reporting: bool) -> Result<RunningGuest, Error> {
        kick::install_handler()?;
        let firmware = Arc::new(Firmware::new()?);
        let (sender, reports) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            kick::unblock().expect("signal mask");
            for _ in 0..3 {
                // SAFETY: it has no preconditions; it returns when a signal handler has run.
                unsafe { libc::pause() };
            }
            if reporting {
                let outcome = Outcome {
                    stop: VcpuStop::Kicked,
                    answer: Answer::default(),
                };
                sender.send((0, Ok(outcome))).expect("report");
            }
        });
        let thread = VcpuThread {
            index: 0,
            thread: Some(thread),
            outcome: None,
        };
        let stop = Arc::new(AtomicBool::new(false));
        Ok(RunningGuest {
            what: "test",
            vcpus: vec![thread],
            reports,
            stop,
            firmware,
            failure: None,
        })
    }

    #[test]
    fn kicks_are_repeated_until_the_vcpu_reports() {
        // No firmware, no guests: nothing to test on this processor.
        let Ok(running) = hard_of_hearing(true) else {
            return;
        };
        assert_eq!(
            running.stop(STOP_LIMIT).expect("stopped"),
            [VcpuStop::Kicked]
        );
    }

    #[test]
    fn a_thread_that_ends_without_a_report_is_an_error() {
        let Ok(running) = hard_of_hearing(false) else {
            return;
        };
        let error = running.stop(STOP_LIMIT).expect_err("no report");
        assert!(matches!(error, Error::Thread { .. }), "{error}");
    }
}
