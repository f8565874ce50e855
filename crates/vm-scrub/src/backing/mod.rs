//! How bytes change hands between the pool and a guest.
//!
//! A backing owns all memory of one pool and shows it at one private place, the *arena*, which only the scrubber uses. It
//! can grant a range of the arena to a guest's [`Window`] and take it back. Ranges are byte offsets into the arena; whoever
//! calls decides which ranges are free: nothing here keeps accounts.

mod anonymous;
mod hugetlb;
mod isolation;
mod moving;
mod remapping;
mod shared;
mod window;

pub(crate) use anonymous::AnonymousArena;
pub(crate) use hugetlb::{HugetlbArena, HugetlbError};
use remapping::{move_pieces, remove_guards};
pub(crate) use shared::{SharedFile, is_still_shared};
pub(crate) use window::{Window, WindowSpace};

use crate::BLOCK_SIZE;
use crate::scrub::{HostPtr, Residency};
use crate::sys::{self, map, mlock};
use std::fmt::Debug;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// [`BLOCK_SIZE`] as a length in this address space.
pub(crate) const BLOCK: usize = BLOCK_SIZE as usize;

/// How a range was taken away from a guest, and so what that proves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Revocation {
    /// `UFFDIO_MOVE` moved the pages into the pool, after they had left the guest's window in one step. It proves what
    /// [`Revocation::Mremap`] proves, and that at that moment none of the pages was pinned for DMA (`FOLL_PIN`: VFIO, buffers
    /// registered with io_uring, direct I/O and RDMA under way) or shared with another process. Pages that were are quarantined,
    /// and named in the receipt.
    ///
    /// References that the kernel takes for a moment, or for reading, are not pins: pages given to a pipe by `vmsplice(2)`
    /// are not found.
    Move,
    /// `mremap(2)` moved the pages out of the guest's window in one step. No address in the process that belonged to the
    /// guest reaches them any more. Pages pinned for DMA stay pinned: that no device still writes is the VMM's word.
    Mremap,
    /// The guest's view of the file behind it was replaced by inaccessible address space in one step. What it proves is what
    /// [`Revocation::Mremap`] proves; of memory that was shared with other processes, nothing about those.
    ViewReplaced,
    /// The memory was shared with other processes. After the guest's view was replaced and the memory scrubbed, the kernel
    /// sealed it (`F_SEAL_WRITE`), which it does only when nobody, in any process, has a mapping that could be written to or
    /// a page pinned for DMA. What was read back since then cannot have been changed by anybody.
    Sealed,
}

/// How a pool of anonymous memory is to take it away from guests; see [`Revocation`] for what each way proves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum RevokeBy {
    /// With [`Revocation::Move`] where the kernel has it, else in the one way that there is.
    #[default]
    Automatic,
    /// With [`Revocation::Move`], or there is no pool.
    ///
    /// What single receipts say still counts: a page that can be moved in the other way only (see [`Revocation::Mremap`]) is.
    Move,
    /// With [`Revocation::Mremap`]: faster for 4 KiB pages, and for VMMs that know of no DMA.
    Mremap,
}

/// Why a pool cannot revoke as it was asked to.
#[derive(Debug)]
pub(crate) enum NotPrepared {
    /// Memory of this kind is revoked in one way only.
    OtherKind,
    /// The host does not do it.
    Sys(sys::Error),
}

/// Proof that a range has left its guest's window. Made by [`Backing::revoke`] only.
#[derive(Debug)]
pub(crate) struct Revoked {
    /// What that proves.
    pub(crate) by: Revocation,
    /// What somebody else may still write to, as arena offsets, ascending. It is not in the arena.
    pub(crate) pinned: Vec<Range<usize>>,
    /// What the kernel answered about that.
    pub(crate) refusal: String,
    /// Bytes that were locked in memory and are not any more, because the kernel did not lock them again.
    pub(crate) unlocked: usize,
    _proof: (),
}

impl Revoked {
    fn new(by: Revocation, pinned: Vec<Range<usize>>, refusal: String) -> Self {
        Self {
            by,
            pinned,
            refusal,
            unlocked: 0,
            _proof: (),
        }
    }

    /// All of the range is in the arena.
    fn whole(by: Revocation) -> Self {
        Self::new(by, Vec::new(), String::new())
    }
}

/// Proof that a range of the arena whose memory was lent has memory again. Made by [`Backing::refill`] only.
#[derive(Debug)]
pub(crate) struct Refilled(());

/// A range that could not be granted.
#[derive(Debug)]
pub(crate) struct NotGranted {
    /// The call that failed.
    pub(crate) error: sys::Error,
    /// Whether some of the range may still be reachable in the window.
    pub(crate) stuck: bool,
}

/// Memory that can be shown to one guest at a time.
pub(crate) trait Backing: Debug + Send + Sync {
    /// Where the arena begins. Aligned to [`BLOCK`].
    fn arena(&self) -> HostPtr;

    /// How this backing takes memory away from a guest, if all goes well.
    fn revocation(&self) -> Revocation;

    /// Called once, before the first grant and after the arena has been populated: makes ready to revoke in this way, and to
    /// try for so long what somebody else holds.
    fn prepare(&mut self, by: RevokeBy, patience: Duration) -> Result<(), NotPrepared>;

    /// Shows `[offset, offset + len)` of the arena at `window`.
    ///
    /// On failure the range is the arena's alone and the window is closed, unless the error says that it is stuck.
    ///
    /// # Safety
    /// The range must be free, and `window` must be a closed part of a [`Window`] of the same length.
    unsafe fn grant(&self, offset: usize, window: *mut u8, len: usize) -> Result<(), NotGranted>;

    /// Takes `[offset, offset + len)` back from `window`, which is inaccessible afterwards. What others can still write to
    /// is not taken back, and is named in the proof.
    ///
    /// On failure it is unknown who can reach the range.
    ///
    /// # Safety
    /// The range must have been granted at `window`, and nobody may hold a Rust reference into it.
    unsafe fn revoke(&self, offset: usize, window: *mut u8, len: usize) -> sys::Result<Revoked>;

    /// Which pages of `range` can hold data. Everything that is not known to be empty counts.
    fn residency(&self, range: Range<usize>) -> sys::Result<Residency>;

    /// Gives the pages of `range` (clean, page aligned) back to the kernel, where that loses nothing. Returns how many bytes.
    fn give_back(&self, range: Range<usize>) -> sys::Result<u64>;

    /// Gives the memory of `range` (clean) to the kernel, so that as much can be had for something else.
    fn lend(&self, range: Range<usize>) -> sys::Result<()> {
        self.give_back(range).map(drop)
    }

    /// Sees to it that `range`, whose memory was lent, can be granted again: it is zero.
    fn refill(&self, _range: Range<usize>) -> sys::Result<Refilled> {
        Ok(Refilled(()))
    }

    /// Faults in `range` of the arena.
    fn populate(&self, range: Range<usize>) -> sys::Result<()> {
        // SAFETY: the arena is mapped writable and belongs to this backing.
        unsafe { map::populate(self.arena().at(range.start), range.len()) }
    }
}

/// Locks `[address, address + len)` again; returns how many bytes the kernel did not lock.
///
/// # Safety
/// The range must belong to the caller.
unsafe fn lock_again(address: *mut u8, len: usize) -> usize {
    if len == 0 {
        return 0;
    }
    // SAFETY: passed on to the caller.
    match unsafe { mlock::lock(address, len) } {
        Ok(()) => 0,
        Err(error) => {
            log::error!("{len} bytes of guest memory are not locked any more: {error}");
            len
        }
    }
}

/// Maps `len` bytes of a file from `offset` on at `address`, readable and writable.
///
/// Not before it is kept from children: a thread that forks in between would give the child a way into the memory of all guests to
/// come.
///
/// # Safety
/// The range must belong to the caller, who must not mind that what was there is gone, also after a failure.
unsafe fn map_shared(
    address: *mut u8,
    len: usize,
    file: BorrowedFd<'_>,
    offset: u64,
) -> sys::Result<()> {
    // SAFETY: passed on to the caller.
    unsafe {
        map::map_shared_inaccessible(address, len, file, offset)?;
        keep_private(address, len);
        map::make_writable(address, len)
    }
}

/// Keeps `[address, address + len)` out of core dumps, forked children and page merging, where the kernel can.
///
/// A refusal is logged and not an error: kernels are built without KSM, and then nothing is ever merged.
///
/// # Safety
/// The range must belong to the caller.
unsafe fn keep_private(address: *mut u8, len: usize) {
    use crate::sys::map::Advice;
    for advice in [Advice::DontFork, Advice::DontDump, Advice::Unmergeable] {
        // SAFETY: passed on to the caller.
        if let Err(error) = unsafe { map::advise(address, len, advice) } {
            let absent = advice == Advice::Unmergeable && error.errno() == Some(libc::EINVAL);
            let level = if absent {
                log::Level::Debug
            } else {
                log::Level::Warn
            };
            log::log!(
                level,
                "{advice:?} is not in force for {len} bytes of guest memory: {error}"
            );
        }
    }
}
