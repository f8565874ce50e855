//! Why memory could not be leased, and why a teardown did not go through.

use super::{GuestRegion, Lease, Quiesced};
use crate::pool::{Accounts, LeaseId};
use crate::{BLOCK_SIZE, SysCall, SysError};
use std::fmt;

/// Why memory could not be leased. The pool is as it was before, but for what [`LeaseError::FoundDirty`] speaks of.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// No region was asked for.
    #[error("a lease needs at least one region: pass the guest's memory layout")]
    NoRegions,
    /// A region has no bytes.
    #[error(
        "the region at guest address {guest_address:#x} is empty: leave it out or give it a size"
    )]
    EmptyRegion {
        /// Where the region begins.
        guest_address: u64,
    },
    /// A region's address or length is not a multiple of what the pool's pages need.
    #[error(
        "the region of {bytes:#x} bytes at guest address {guest_address:#x} is not aligned: with this pool's pages both \
         numbers must be multiples of {granularity:#x}"
    )]
    Unaligned {
        /// Where the region begins.
        guest_address: u64,
        /// Its length in bytes.
        bytes: u64,
        /// What both must be multiples of, in bytes.
        granularity: u64,
    },
    /// A region ends at or past 2^64.
    #[error(
        "the region of {bytes:#x} bytes at guest address {guest_address:#x} goes to the end of the 64-bit address space or \
         past it: it must end at least one page below 2^64"
    )]
    Wraps {
        /// Where the region begins.
        guest_address: u64,
        /// Its length in bytes.
        bytes: u64,
    },
    /// Two regions share guest addresses.
    #[error(
        "the regions at guest addresses {:#x} ({:#x} bytes) and {:#x} ({:#x} bytes) overlap: move or shorten one",
        .first.guest_address, .first.bytes, .second.guest_address, .second.bytes
    )]
    Overlap {
        /// The one that begins first.
        first: GuestRegion,
        /// The other one.
        second: GuestRegion,
    },
    /// This process is a forked child of the one that built the pool.
    #[error("the pool is another process's, of which this is a forked child: build a pool here")]
    Forked,
    /// The pool has not enough clean memory.
    #[error(
        "{asked} bytes in blocks of {BLOCK_SIZE} were asked for and {} are free ({} leased, {} being scrubbed, {} \
         quarantined): tear other guests down, end the processes that still hold shared memory (`Pool::withheld`), ask \
         for less, or make a larger pool",
        .accounts.clean, .accounts.leased, .accounts.dirty, .accounts.quarantined
    )]
    NotEnough {
        /// What the regions need, rounded up to blocks, in bytes.
        asked: u64,
        /// What the pool had at that moment.
        accounts: Accounts,
    },
    /// A file to be shared with other processes could not be made.
    #[error(
        "{bytes} bytes to be shared with other processes could not be had ({source}): the host has too little memory or \
         too few free hugetlb pages (`vm.nr_hugepages`), the process too many open files (`ulimit -n`) or too little address \
         space (`ulimit -v`), or the kernel no sealable files of this kind; free some, or lease without `shareable`"
    )]
    Share {
        /// The length of the file, in bytes.
        bytes: u64,
        /// The call that failed.
        r#source: SysError,
    },
    /// Free memory was not zero any more when it was checked before the grant, and without it there is not enough.
    #[error(
        "{asked} bytes in blocks of {BLOCK_SIZE} were asked for, and of what was free {quarantined} bytes were quarantined just \
         now: they were not zero any more, or not readable; {} are left ({} leased, {} quarantined in all). Somebody writes to \
         the pool's free memory, or it is broken: see the log, and do not trust this host with another guest before you know",
        .accounts.clean, .accounts.leased, .accounts.quarantined
    )]
    FoundDirty {
        /// What the regions need, rounded up to blocks, in bytes.
        asked: u64,
        /// Bytes that were quarantined by this call.
        quarantined: u64,
        /// What the pool has left.
        accounts: Accounts,
    },
    /// The kernel did not say which free pages are populated, so that they could not be checked before the grant. The memory
    /// stays free.
    #[error(
        "free memory could not be checked before the grant ({source}): see to it that the pagemap can be read (/proc, seccomp), or \
         build the pool without `check_on_grant`"
    )]
    NotChecked {
        /// The call that failed.
        r#source: SysError,
    },
    /// The guest's window could not be locked in memory, in a pool that does so.
    #[error(
        "{bytes} bytes could not be locked in memory for the guest ({source}): raise the limit on locked memory (`ulimit -l`, \
         `LimitMEMLOCK=` of systemd) to the capacities of all pools with `lock_memory` and what else the process locks, or \
         give it CAP_IPC_LOCK"
    )]
    Lock {
        /// The region's length in bytes.
        bytes: u64,
        /// The call that failed.
        r#source: SysError,
    },
    /// The guest's window could not be mapped.
    #[error(
        "{bytes} bytes could not be mapped for the guest ({source}): the address space is exhausted or the process has too \
         many mappings; raise `ulimit -v`, `ulimit -d` or `vm.max_map_count`, or run fewer guests"
    )]
    Map {
        /// The region's length in bytes.
        bytes: u64,
        /// The call that failed.
        r#source: SysError,
    },
}

impl LeaseError {
    /// Why a region of so many bytes got no window.
    pub(super) fn no_window(bytes: u64, source: SysError) -> Self {
        match source.call {
            SysCall::Mlock => Self::Lock { bytes, source },
            _ => Self::Map { bytes, source },
        }
    }
}

/// What stands against a teardown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Memslots of this lease are still registered with a virtual machine.
    #[error("{memslots} memslots of it are still registered: call `Memslots::remove` first")]
    Registered {
        /// How many.
        memslots: usize,
    },
    /// Somebody still owns a handle to the memory.
    #[error(
        "its guest memory still has {holders} other owner(s): drop every clone of `GuestMemoryMmap`, and the regions and mappings \
         taken out of it"
    )]
    Held {
        /// How many.
        holders: usize,
    },
    /// This process is a forked child of the one that made the lease, and has none of its memory.
    #[error("it is another process's, of which this is a forked child: tear it down there")]
    Forked,
    /// The statement that the guest is stopped is about another lease.
    #[error(
        "the `Quiesced` is about {quiesced} and not about {lease}: pass the one made for this lease"
    )]
    OtherLease {
        /// The lease that was to be torn down.
        lease: LeaseId,
        /// The lease that the statement is about.
        quiesced: LeaseId,
    },
}

/// A teardown that was refused before anything changed, with all that is needed to try again.
#[derive(Debug)]
#[non_exhaustive]
pub struct Refused {
    /// What stands against it.
    pub reason: Refusal,
    /// The lease, as it was.
    pub lease: Lease,
    /// The statement that came with it.
    pub quiesced: Quiesced,
}

/// Why a teardown did not go through.
///
/// A refused teardown hands the lease back in the error. Whoever passes the error on (`?`) and drops it drops the lease:
/// match on [`TeardownError::Refused`] where the teardown is to be tried again.
#[derive(Debug)]
#[non_exhaustive]
pub enum TeardownError {
    /// Nothing was done; the lease is in here.
    Refused(Box<Refused>),
    /// A thread panicked while it scrubbed in the background: a progress callback, most likely. All of the lease's blocks are
    /// quarantined.
    Panicked {
        /// The lease.
        lease: LeaseId,
    },
    /// This process is a forked child of the one that began, and has nothing of the memory. Nothing was done; the parent goes on.
    Forked {
        /// The lease.
        lease: LeaseId,
    },
    /// The numbers of the steps do not add up. All of the lease's blocks are quarantined. This is a bug in vm-scrub.
    Unaccounted {
        /// The lease.
        lease: LeaseId,
        /// Which numbers do not fit.
        what: &'static str,
        /// What should have come out, in bytes.
        expected: u64,
        /// What came out, in bytes.
        found: u64,
    },
}

impl Refused {
    /// What it takes to try again, once the [`reason`](Refused::reason) is removed.
    pub fn into_parts(self) -> (Lease, Quiesced) {
        (self.lease, self.quiesced)
    }
}

impl TeardownError {
    /// The lease, if the teardown was refused and nothing was done to it.
    pub fn into_lease(self) -> Option<Lease> {
        match self {
            TeardownError::Refused(refused) => Some(refused.lease),
            TeardownError::Panicked { .. }
            | TeardownError::Forked { .. }
            | TeardownError::Unaccounted { .. } => None,
        }
    }
}

impl fmt::Display for TeardownError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TeardownError::Refused(refused) => {
                write!(
                    f,
                    "{} is not torn down: {}",
                    refused.lease.id(),
                    refused.reason
                )
            }
            TeardownError::Panicked { lease } => write!(
                f,
                "{lease} is quarantined as a whole: a thread panicked while it scrubbed; mend the progress callback"
            ),
            TeardownError::Forked { lease } => write!(
                f,
                "{lease} is another process's, of which this is a forked child: finish it there"
            ),
            TeardownError::Unaccounted {
                lease,
                what,
                expected,
                found,
            } => write!(
                f,
                "{lease} is quarantined as a whole: {what} should be {expected} bytes and is {found}; please report this"
            ),
        }
    }
}

// The message contains the reason, so it is not given as a source too.
impl std::error::Error for TeardownError {}
