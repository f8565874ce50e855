//! What can happen to a pool and its guests.
//!
//! Numbers that name a guest, a page or a ticket wrap around what there is, so that every input means something.

use arbitrary::Arbitrary;
use vm_scrub::test_support::Call;

use super::knobs::Rate;

/// One region of a guest, as it is asked for.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Region {
    /// So many pages of hole behind the region before, and so many pages long.
    After {
        /// Pages of hole.
        gap: u8,
        /// Pages of region, from zero on.
        pages: u16,
    },
    /// The same in units of 2 MiB, which every pool accepts.
    Blocks {
        /// Blocks of hole.
        gap: u8,
        /// Blocks of region, from zero on; few.
        blocks: u8,
    },
    /// Exactly this, whatever it is.
    At {
        /// The guest address in bytes.
        address: u64,
        /// The length in bytes.
        bytes: u64,
    },
    /// Near the end of the 64-bit address space.
    High {
        /// Pages from the end to the start.
        below: u8,
        /// Pages of region.
        pages: u8,
    },
}

/// A system call that fails.
#[derive(Debug, Clone, Arbitrary)]
pub struct Fault {
    /// Which call.
    pub call: u8,
    /// How many calls go through before, modulo eight.
    pub skip: u8,
    /// Whether it fails from then on.
    pub for_good: bool,
    /// Which error.
    pub errno: u8,
}

/// Errors that say nothing about what the kernel has and has not: the library remembers that for the whole process.
const ERRNOS: [i32; 4] = [libc::ENOMEM, libc::EFAULT, libc::EAGAIN, libc::EBUSY];

/// The calls that leasing and returning make on kernels of today.
const CALLS: [Call; 17] = [
    Call::Mmap,
    Call::Munmap,
    Call::Mremap,
    Call::Mprotect,
    Call::Getrlimit,
    Call::Madvise,
    Call::Populate,
    Call::MemfdCreate,
    Call::Ftruncate,
    Call::Fstat,
    Call::AddSeals,
    Call::SeekData,
    Call::PagemapScan,
    Call::Munlock,
    Call::UffdRegister,
    Call::UffdUnregister,
    Call::UffdMove,
];

impl Fault {
    pub(super) fn call(&self) -> Call {
        CALLS[usize::from(self.call) % CALLS.len()]
    }

    /// How many calls go through before.
    pub(super) fn skip(&self) -> u32 {
        u32::from(self.skip % 8)
    }

    pub(super) fn times(&self) -> u32 {
        if self.for_good { u32::MAX } else { 1 }
    }

    pub(super) fn errno(&self) -> i32 {
        ERRNOS[usize::from(self.errno) % ERRNOS.len()]
    }
}

/// How a guest's memory goes back.
#[derive(Debug, Clone, Copy, Arbitrary, PartialEq, Eq)]
pub enum Way {
    /// In one call.
    AtOnce,
    /// In four.
    InSteps,
    /// As far as this, and what is left is kept for later.
    HalfWay(Half),
    /// As far as this, and what is left is dropped.
    DroppedHalfWay(Half),
    /// In the background.
    Retired,
    /// In the background, and nobody waits for it.
    RetiredUnattended,
}

/// How far a teardown goes before it stops.
#[derive(Debug, Clone, Copy, Arbitrary, PartialEq, Eq)]
pub enum Half {
    /// Taken away from the guest.
    Revoked,
    /// Zeroed.
    Scrubbed,
    /// Read back.
    Verified,
}

/// What stays alive when a lease is dropped.
#[derive(Debug, Clone, Copy, Arbitrary, PartialEq, Eq)]
pub enum Holding {
    /// Nothing.
    Nothing,
    /// A handle to the guest's memory.
    Handle,
}

/// What is done with a ticket.
#[derive(Debug, Clone, Copy, Arbitrary, PartialEq, Eq)]
pub enum TicketWay {
    /// All threads finish it.
    Wait,
    /// The background finishes it.
    WaitInBackground,
    /// Stopped; what is left is kept for later.
    Cancel,
    /// Made more or less urgent.
    Priority(u8),
    /// Dropped.
    Drop,
}

/// What a VMM may do to its guest's window. Pages are 4 KiB.
#[derive(Debug, Clone, Copy, Arbitrary, PartialEq, Eq)]
pub enum Meddling {
    /// `mprotect` to nothing.
    Close,
    /// `mprotect` to reading.
    ReadOnly,
    /// `madvise` that discards.
    Discard,
    /// `madvise` that frees when memory is short.
    Free,
    /// `madvise` for huge pages.
    Huge,
    /// `madvise` against them.
    Small,
    /// `madvise` for merging.
    Mergeable,
    /// `madvise` for children and dumps.
    Inherit,
    /// `mlock`.
    Lock,
    /// Guard pages.
    Guard,
    /// Private anonymous memory mapped over it.
    MapAnonymous,
    /// Shared anonymous memory mapped over it.
    MapShared,
    /// A file mapped over it, private.
    MapSnapshot,
    /// A file mapped over it, shared.
    MapFile,
}

/// One thing that happens.
#[derive(Debug, Clone, Arbitrary)]
pub enum Op {
    /// A guest is given memory.
    Lease {
        /// Its layout; at most the first eight count.
        regions: Vec<Region>,
        /// Whether other processes are to have it too.
        shareable: bool,
    },
    /// A guest writes.
    Write {
        /// Which guest.
        guest: u8,
        /// Which of its pages.
        page: u16,
        /// Where in the page.
        at: u16,
        /// How many bytes; may reach into pages that follow.
        len: u16,
        /// Which byte; never zero.
        tag: u8,
    },
    /// A guest writes eight bytes to many of its pages, and to the last.
    Smear {
        /// Which guest.
        guest: u8,
        /// How far apart, in pages.
        stride: u8,
        /// Which byte; never zero.
        tag: u8,
    },
    /// A guest reads.
    Look {
        /// Which guest.
        guest: u8,
        /// Which of its pages.
        page: u16,
    },
    /// The VMM does something to the window.
    Vmm {
        /// Whose.
        guest: u8,
        /// What.
        what: Meddling,
        /// From which page.
        page: u16,
        /// To how many pages.
        pages: u8,
    },
    /// Pages are pinned, as for DMA, until somebody lets go.
    Pin {
        /// Whose.
        guest: u8,
        /// From which page.
        page: u16,
        /// How many pages.
        pages: u8,
    },
    /// Somebody maps the memory of a shareable lease, until he lets go.
    Share {
        /// Whose.
        guest: u8,
        /// Whether the mapping can be written to.
        writable: bool,
    },
    /// Who has mapped or pinned memory lets go.
    LetGo(u8),
    /// The VMM keeps a handle, so that teardown is refused once.
    Handle(u8),
    /// A guest is gone and its memory goes back.
    Teardown {
        /// Which guest.
        guest: u8,
        /// How.
        way: Way,
    },
    /// The lease is dropped.
    Drop {
        /// Whose.
        guest: u8,
        /// What outlives it.
        holding: Holding,
    },
    /// A teardown with the statement about another guest.
    Confuse {
        /// Whose teardown.
        one: u8,
        /// Whose statement.
        other: u8,
    },
    /// The lease is forgotten.
    Forget(u8),
    /// A teardown that was stopped goes on, by a step or to the end.
    Proceed {
        /// Which.
        which: u8,
        /// Whether to the end.
        to_the_end: bool,
    },
    /// Something is done with a ticket.
    Ticket {
        /// Which.
        which: u8,
        /// What.
        way: TicketWay,
    },
    /// What is withheld is tried again.
    Reclaim,
    /// The limit on background scrubbing changes.
    Rate(Option<Rate>),
    /// The next thing that is done meets a fault.
    Fault(Fault),
}
