//! One virtual processor: it enters a program of the guest and says how it came back.
//!
//! A vCPU that lost its memory is an expected end here, not an error, and it looks different from host to host:
//! `Shutdown` with shadow paging, `EFAULT` with nested paging, an MMIO exit where a whole memslot is gone.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use nix::errno::Errno;

use crate::arch;
use crate::error::Error;
use crate::firmware::{Firmware, Mailbox};

/// The port a guest writes to when it has finished. Any would do, since the machine has no devices.
pub(crate) const DONE_PORT: u16 = 0xF4;

/// How many exits one interrupted access may take to be completed. An access of 8 bytes has two parts at most.
const COMPLETIONS: usize = 8;

/// How a vCPU stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum VcpuStop {
    /// The guest finished what it had to do.
    Finished,
    /// It was stopped with a kick.
    Kicked,
    /// A `Shutdown` exit (triple fault): with shadow paging this is how the loss of memory looks.
    Shutdown,
    /// `KVM_RUN` failed with `EFAULT`: with nested paging this is how the loss of memory looks.
    MemoryFault,
    /// It accessed a guest-physical address that has no memslot.
    Mmio {
        /// The guest-physical address.
        gpa: u64,
        /// Whether it wanted to write.
        write: bool,
    },
    /// It exited for a reason that no guest of this crate gives.
    Unexpected(String),
}

/// The guest's programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    Fill,
    FillForever,
    Scan,
    Count,
    Spin,
}

/// With what a vCPU enters the guest.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) program: Program,
    /// The word to write or to look for.
    pub(crate) word: u64,
    pub(crate) mailbox: Mailbox,
}

/// What a guest leaves behind when it has finished. Which fields mean something depends on the program.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Answer {
    pub(crate) bytes_read: u64,
    /// Bytes or words, as the program counts.
    pub(crate) found: u64,
    pub(crate) first_gpa: u64,
    pub(crate) first_value: u64,
}

/// How a run ended, with the guest's answer if it finished.
#[derive(Debug, Clone)]
pub(crate) struct Outcome {
    pub(crate) stop: VcpuStop,
    pub(crate) answer: Answer,
}

#[derive(Debug)]
pub(crate) struct Vcpu {
    fd: VcpuFd,
    entry: arch::EntryState,
    /// KVM refers to it by address, so it must live as long as this vCPU can run.
    _firmware: Arc<Firmware>,
}

impl Vcpu {
    pub(crate) fn new(
        kvm: &Kvm,
        vm: &VmFd,
        index: usize,
        firmware: &Arc<Firmware>,
    ) -> Result<Self, Error> {
        let fd = vm
            .create_vcpu(index as u64)
            .map_err(Error::kvm("create a vCPU"))?;
        let entry = arch::EntryState::new(kvm, &fd)?;
        Ok(Self {
            fd,
            entry,
            _firmware: Arc::clone(firmware),
        })
    }

    /// Runs until the guest stops by itself, or until `stop` is set and the thread is kicked.
    pub(crate) fn run(&mut self, start: &Start, stop: &AtomicBool) -> Result<Outcome, Error> {
        self.entry.enter(&self.fd, start)?;
        let end = loop {
            if stop.load(Ordering::Acquire) {
                break VcpuStop::Kicked;
            }
            if let Some(end) = self.run_once()? {
                break end;
            }
        };
        let answer = match end {
            VcpuStop::Finished => {
                self.complete_access()?;
                arch::answer(&self.fd)?
            }
            VcpuStop::Mmio { .. } | VcpuStop::Unexpected(_) => {
                self.complete_access()?;
                Answer::default()
            }
            _ => Answer::default(),
        };
        Ok(Outcome { stop: end, answer })
    }

    /// Enters the guest once. `None` if it was only interrupted.
    fn run_once(&mut self) -> Result<Option<VcpuStop>, Error> {
        Ok(Some(match self.fd.run() {
            Ok(VcpuExit::IoOut(DONE_PORT, _)) => VcpuStop::Finished,
            Ok(VcpuExit::Shutdown) => VcpuStop::Shutdown,
            Ok(VcpuExit::MmioRead(gpa, _)) => VcpuStop::Mmio { gpa, write: false },
            Ok(VcpuExit::MmioWrite(gpa, _)) => VcpuStop::Mmio { gpa, write: true },
            Ok(VcpuExit::Intr) => return Ok(None),
            Ok(other) => VcpuStop::Unexpected(format!("{other:?}")),
            Err(error) => match Errno::from_raw(error.errno()) {
                Errno::EINTR | Errno::EAGAIN => return Ok(None),
                // The exit reason is stale then: do not look at it.
                Errno::EFAULT => VcpuStop::MemoryFault,
                _ => return Err(Error::kvm("run a vCPU")(error)),
            },
        }))
    }

    /// Lets KVM finish the access that the last exit was about. It keeps such an access until the next `KVM_RUN`, and
    /// would carry it out on top of the registers that the next run begins with.
    fn complete_access(&mut self) -> Result<(), Error> {
        self.fd.set_kvm_immediate_exit(1);
        let mut completed = Ok(());
        for _ in 0..COMPLETIONS {
            match self.fd.run() {
                Ok(_) => {}
                Err(error) if error.errno() == Errno::EINTR as i32 => break,
                Err(error) => {
                    completed = Err(Error::kvm("complete the last access of a vCPU")(error));
                    break;
                }
            }
        }
        self.fd.set_kvm_immediate_exit(0);
        completed
    }
}

impl VcpuStop {
    /// Whether the vCPU stopped because memory it wanted was no longer there, in any of the ways hosts show that.
    pub fn lost_memory(&self) -> bool {
        matches!(self, Self::Shutdown | Self::MemoryFault | Self::Mmio { .. })
    }
}

impl fmt::Display for VcpuStop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Finished => write!(f, "finished"),
            Self::Kicked => write!(f, "stopped with a kick"),
            Self::Shutdown => write!(f, "lost its memory (shutdown exit)"),
            Self::MemoryFault => write!(f, "lost its memory (KVM_RUN failed with EFAULT)"),
            Self::Mmio { gpa, write } => {
                let access = if *write { "wrote to" } else { "read from" };
                write!(f, "{access} {gpa:#x}, which has no memslot")
            }
            Self::Unexpected(exit) => write!(f, "unexpected exit: {exit}"),
        }
    }
}
