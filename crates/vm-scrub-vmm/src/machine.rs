//! A KVM virtual machine without RAM of its own: the embedder registers RAM, and the guest works on it.
//!
//! What is here is what an embedder's own monitor already has, in its shortest form: a `VmFd` that memslots are
//! registered on, and vCPUs that can be stopped before the memory is torn down.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvm_ioctls::VmFd;

use crate::arch;
use crate::error::Error;
use crate::firmware::{Firmware, MAX_VCPUS};
use crate::guest::{Guest, NonzeroWord, Scan};
use crate::kvm;
use crate::ranges::{WORD, check_ranges, split};
use crate::running::{Job, RunningGuest, STOP_LIMIT};
use crate::vcpu::{Answer, Outcome, Program, Vcpu, VcpuStop};
use crate::vcpu_thread::Slot;

/// What [`Machine::touch`] writes.
const TOUCH_WORD: u64 = u64::from_le_bytes(*b"touched!");

/// A virtual machine with vCPUs and firmware. Its RAM is what is registered on [`Machine::vm`], in memslots below
/// [`crate::FIRMWARE_SLOT`].
///
/// The guest works through [`Guest`]; one run at a time, each on all vCPUs. It can be run again whatever became of it.
#[derive(Debug)]
pub struct Machine {
    vm: Arc<VmFd>,
    firmware: Arc<Firmware>,
    vcpus: Vec<Arc<Slot>>,
}

/// What became of one write of one vCPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Touch {
    /// The write was carried out.
    Completed,
    /// The vCPU was stopped instead.
    Stopped(VcpuStop),
}

impl Machine {
    /// Creates a virtual machine with `vcpus` vCPUs.
    ///
    /// # Errors
    ///
    /// As [`crate::kvm_usable`]; [`Error::Vcpus`] for none or too many; [`Error::Kvm`] and [`Error::Firmware`] if the
    /// host is short of something.
    pub fn new(vcpus: usize) -> Result<Self, Error> {
        let kvm = kvm::open()?;
        let max = kvm.get_max_vcpus().min(MAX_VCPUS);
        if vcpus == 0 || vcpus > max {
            return Err(Error::Vcpus { wanted: vcpus, max });
        }
        let vm = Arc::new(
            kvm.create_vm()
                .map_err(Error::kvm("create a virtual machine"))?,
        );
        arch::prepare_vm(&vm)?;
        let firmware = Arc::new(Firmware::new()?);
        // SAFETY: every vCPU holds the firmware, and there are no others: only this function creates them.
        unsafe { firmware.register(&vm) }?;
        let vcpus = (0..vcpus)
            .map(|index| {
                Ok(Arc::new(Mutex::new(Some(Vcpu::new(
                    &kvm, &vm, index, &firmware,
                )?))))
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self {
            vm,
            firmware,
            vcpus,
        })
    }

    /// The virtual machine, for registering and removing the memslots of its RAM.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// Starts a guest that fills `ranges` with `pattern` over and over, on all vCPUs that get a share of at least a
    /// page, until it is stopped or loses its memory.
    ///
    /// # Errors
    ///
    /// [`Error::Range`], [`Error::TooManyRanges`]; [`Error::Busy`] while another run is not over.
    pub fn start_fill_forever(
        &self,
        ranges: &[(u64, u64)],
        pattern: u64,
    ) -> Result<RunningGuest, Error> {
        let what = "filling memory over and over";
        self.start(
            ranges,
            Job {
                program: Program::FillForever,
                word: pattern,
                what,
            },
        )
    }

    /// Starts a guest whose vCPUs touch no memory and never exit: nothing but a kick ends it.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] while another run is not over.
    pub fn start_spin(&self) -> Result<RunningGuest, Error> {
        self.start(
            &[],
            Job {
                program: Program::Spin,
                word: 0,
                what: "spinning",
            },
        )
    }

    /// Has vCPU 0 write one word at `gpa`, whether or not there is memory.
    ///
    /// # Errors
    ///
    /// [`Error::Range`], [`Error::TimedOut`]; [`Error::Busy`] while another run is not over. That the vCPU is stopped
    /// is an outcome, not an error.
    pub fn touch(&self, gpa: u64, limit: Duration) -> Result<Touch, Error> {
        let job = Job {
            program: Program::Fill,
            word: TOUCH_WORD,
            what: "touching one word",
        };
        let outcomes = self.outcomes(&[(gpa, WORD)], job, limit)?;
        Ok(match outcomes.into_iter().next() {
            Some((
                _,
                Outcome {
                    stop: VcpuStop::Finished,
                    ..
                },
            )) => Touch::Completed,
            Some((_, Outcome { stop, .. })) => Touch::Stopped(stop),
            None => return Err(Error::Busy),
        })
    }

    fn start(&self, ranges: &[(u64, u64)], job: Job) -> Result<RunningGuest, Error> {
        check_ranges(ranges)?;
        let shares = split(ranges, self.vcpus.len());
        RunningGuest::start(&self.vcpus, &self.firmware, &shares, job)
    }

    /// Runs a program that ends by itself, and stops it if it does not.
    fn outcomes(
        &self,
        ranges: &[(u64, u64)],
        job: Job,
        limit: Duration,
    ) -> Result<Vec<(usize, Outcome)>, Error> {
        let mut running = self.start(ranges, job)?;
        let result = running.wait_outcomes(limit);
        if matches!(result, Err(Error::TimedOut { .. })) {
            running.stop(STOP_LIMIT)?;
        }
        result
    }

    /// The answers of all vCPUs, in the order of the ranges, if every one finished.
    fn answers(
        &self,
        ranges: &[(u64, u64)],
        job: Job,
        limit: Duration,
    ) -> Result<impl Iterator<Item = Answer> + use<>, Error> {
        let outcomes = self.outcomes(ranges, job, limit)?;
        for (vcpu, outcome) in &outcomes {
            if outcome.stop != VcpuStop::Finished {
                let (vcpu, stop) = (*vcpu, outcome.stop.clone());
                return Err(Error::GuestStopped {
                    what: job.what,
                    vcpu,
                    stop,
                });
            }
        }
        Ok(outcomes.into_iter().map(|(_, outcome)| outcome.answer))
    }
}

impl Guest for Machine {
    fn fill(&self, ranges: &[(u64, u64)], pattern: u64, limit: Duration) -> Result<(), Error> {
        let job = Job {
            program: Program::Fill,
            word: pattern,
            what: "filling memory",
        };
        self.answers(ranges, job, limit).map(|_| ())
    }

    fn scan(&self, ranges: &[(u64, u64)], limit: Duration) -> Result<Scan, Error> {
        let job = Job {
            program: Program::Scan,
            word: 0,
            what: "scanning memory",
        };
        let scans = self.answers(ranges, job, limit)?.map(|answer| Scan {
            bytes_read: answer.bytes_read,
            nonzero_bytes: answer.found,
            first_nonzero: (answer.found > 0).then_some(NonzeroWord {
                gpa: answer.first_gpa,
                value: answer.first_value,
            }),
        });
        Ok(scans.fold(Scan::default(), Scan::followed_by))
    }

    fn count(&self, ranges: &[(u64, u64)], pattern: u64, limit: Duration) -> Result<u64, Error> {
        let job = Job {
            program: Program::Count,
            word: pattern,
            what: "looking for a pattern",
        };
        Ok(self
            .answers(ranges, job, limit)?
            .map(|answer| answer.found * WORD)
            .sum())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Write, stderr};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    fn machine() -> Option<Machine> {
        match crate::kvm_usable() {
            Ok(()) => Some(Machine::new(2).expect("machine")),
            Err(error) => {
                let _ = writeln!(stderr(), "\nSKIPPED a test of Machine: {error}");
                None
            }
        }
    }

    #[test]
    fn a_run_that_never_ends_is_stopped_at_its_limit() {
        let Some(machine) = machine() else { return };
        let job = Job {
            program: Program::Spin,
            word: 0,
            what: "spinning",
        };
        let limit = Duration::from_millis(20);
        let error = machine
            .outcomes(&[], job, limit)
            .expect_err("it never ends");
        assert!(
            matches!(
                error,
                Error::TimedOut {
                    what: "spinning",
                    ..
                }
            ),
            "{error}"
        );
        // It has really been stopped: the vCPUs are free.
        machine
            .start_spin()
            .expect("free")
            .stop(LIMIT)
            .expect("stopped");
    }

    #[test]
    fn signals_that_are_no_stop_do_not_stop_a_guest() {
        let Some(machine) = machine() else { return };
        let mut running = machine.start_spin().expect("started");
        for _ in 0..50 {
            running.kick_once().expect("kicked");
            let error = running
                .wait_stopped(Duration::from_millis(1))
                .expect_err("it runs on");
            assert!(matches!(error, Error::TimedOut { .. }), "{error}");
        }
        running.stop(LIMIT).expect("stopped");
    }
}
