//! Where a vCPU is while nobody runs it, and the thread that it runs in.
//!
//! vCPUs are parked in slots that the machine and the threads share. Whoever runs one takes it out, so that two runs
//! can never have the same vCPU, and puts it back whatever happens: an error, a panic, a thread that could not start.

use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::error::Error;
use crate::kick;
use crate::vcpu::{Outcome, Start, Vcpu};

/// Where a vCPU is while nobody runs it.
pub(crate) type Slot = Mutex<Option<Vcpu>>;

/// What a thread says when its vCPU has stopped: which thread of the run it is, and how the run ended.
pub(crate) type Report = (usize, Result<Outcome, Error>);

/// A vCPU taken out of its slot, to which it goes back when this is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    index: usize,
    slot: Arc<Slot>,
    vcpu: Option<Vcpu>,
}

impl Claim {
    /// Takes vCPU `index` out of `slot`.
    pub(crate) fn new(index: usize, slot: &Arc<Slot>) -> Result<Self, Error> {
        let vcpu = Some(lock(slot).take().ok_or(Error::Busy)?);
        Ok(Self {
            index,
            slot: Arc::clone(slot),
            vcpu,
        })
    }

    /// Runs the vCPU in a thread, which reports to `reports` as number `place` at the end.
    pub(crate) fn spawn(
        mut self,
        start: Start,
        stop: &Arc<AtomicBool>,
        (place, reports): (usize, &Sender<Report>),
    ) -> Result<JoinHandle<()>, Error> {
        let stop = Arc::clone(stop);
        let reports = reports.clone();
        thread::Builder::new()
            .name(format!("vcpu{}", self.index))
            .spawn(move || {
                let result = kick::unblock().and_then(|()| self.run(&start, &stop));
                // Back into its slot before the report: whoever has all reports can start the next run.
                drop(self);
                // Nobody listens any more if the guest was dropped and did not stop in time.
                let _ = reports.send((place, result));
            })
            .map_err(|source| Error::Thread {
                doing: "start a vCPU thread",
                source,
            })
    }

    fn run(&mut self, start: &Start, stop: &AtomicBool) -> Result<Outcome, Error> {
        self.vcpu.as_mut().ok_or(Error::Busy)?.run(start, stop)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        *lock(&self.slot) = self.vcpu.take();
    }
}

/// A slot's content is whole at every moment, so a panic of another holder does not matter.
fn lock(slot: &Slot) -> MutexGuard<'_, Option<Vcpu>> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}
