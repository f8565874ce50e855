//! Everything that can go wrong in this crate, in words that say what was being done and what to do about it.
//!
//! A guest that lost its memory is not an error in itself: see [`VcpuStop`]. It becomes one only where the caller had
//! asked for something to be completed.

use std::io;
use std::time::Duration;

use crate::VcpuStop;

/// Why something could not be done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// This crate has no guest code for the host's processor.
    #[error("KVM guests are written for x86_64 only; use `ThreadGuest` on this host")]
    Architecture,

    /// `/dev/kvm` could not be opened or used.
    #[error("cannot use /dev/kvm: {problem} ({advice})")]
    KvmUnusable {
        /// What is missing.
        problem: String,
        /// What to do about it.
        advice: &'static str,
    },

    /// A KVM call failed.
    #[error("KVM: cannot {doing}: {source}")]
    Kvm {
        /// What was being done.
        doing: &'static str,
        /// The error number KVM gave.
        source: kvm_ioctls::Error,
    },

    /// The guest's firmware (code, page tables, mailboxes) could not be mapped or written.
    #[error("cannot prepare the guest's firmware: {0}")]
    Firmware(String),

    /// A range that no guest of this crate can work on.
    #[error("guest-physical range {gpa:#x} of {bytes:#x} bytes: {problem}")]
    Range {
        /// Guest-physical address of the first byte.
        gpa: u64,
        /// Length in bytes.
        bytes: u64,
        /// What is wrong with it, and what is allowed.
        problem: &'static str,
    },

    /// More ranges than one vCPU's mailbox holds.
    #[error(
        "{given} ranges for one vCPU, but only {max} fit; join adjacent ranges or use more vCPUs"
    )]
    TooManyRanges {
        /// How many there are.
        given: usize,
        /// How many fit.
        max: usize,
    },

    /// A number of vCPUs or threads that cannot be had.
    #[error("cannot have {wanted} vCPUs: 1 to {max} are possible")]
    Vcpus {
        /// How many were asked for.
        wanted: usize,
        /// How many there can be.
        max: usize,
    },

    /// The machine's vCPUs are still in another run.
    #[error("the machine is busy with another run: stop it first")]
    Busy,

    /// The time limit was over before the work was done.
    #[error("time limit of {limit:?} ran out: {what}")]
    TimedOut {
        /// What was being done or waited for.
        what: &'static str,
        /// The limit.
        limit: Duration,
    },

    /// A vCPU stopped before its work was done.
    #[error("vCPU {vcpu} stopped before its work was done ({what}): {stop}")]
    GuestStopped {
        /// What it was doing.
        what: &'static str,
        /// Which vCPU.
        vcpu: usize,
        /// How it stopped.
        stop: VcpuStop,
    },

    /// A thread could not be started, or ended without a result.
    #[error("cannot {doing}: {source}")]
    Thread {
        /// What was being done.
        doing: &'static str,
        /// What the host said.
        source: io::Error,
    },

    /// Guest memory could not be accessed through vm-memory.
    #[error("cannot {doing} guest memory at {gpa:#x}: {source}")]
    GuestMemory {
        /// `read`, `write` or `find`.
        doing: &'static str,
        /// Guest-physical address of the access.
        gpa: u64,
        /// What vm-memory said.
        source: vm_memory::GuestMemoryError,
    },

    /// The stray device met an error other than a refused delivery.
    #[error("stray device: cannot {doing}: {source}")]
    Device {
        /// What was being done.
        doing: &'static str,
        /// What the host said.
        source: io::Error,
    },

    /// There are not enough huge pages, and they could not be added.
    #[error(
        "{wanted} huge pages of 2 MiB are wanted: {problem}; as root, \
         `echo N > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages` early after boot, or boot with `hugepages=N`"
    )]
    HugePages {
        /// How many were asked for.
        wanted: u64,
        /// What is missing.
        problem: String,
    },
}

impl Error {
    /// For `map_err` on KVM calls.
    pub(crate) fn kvm(doing: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { doing, source }
    }
}
