//! What a teardown leaves behind: an account of every byte.

use super::GuestRegion;
use crate::pool::{Extent, LeaseId, PageSize};
use crate::{Rate, Revocation, Verify};

/// How a teardown ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Outcome {
    /// Every byte was read back as zero or never existed. All of the memory can be leased again.
    Proven,
    /// Every byte was zeroed or never existed, and by policy nothing was read back. All of it can be leased again.
    Unverified,
    /// Every byte was zeroed or never existed, and by policy a sample was read back. All of it can be leased again.
    Sampled,
    /// Something could not be proven clean and is quarantined; the rest can be leased again.
    Quarantined,
}

/// Why memory went into quarantine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum QuarantineReason {
    /// It could not be taken away from the guest's address window.
    NotRevoked,
    /// A page of it is pinned for DMA or shared with another process, for longer than the pool's
    /// [patience](crate::PoolBuilder::pin_patience): somebody may still write to it. It stays where nobody else finds it.
    PinnedOrShared,
    /// It is in one block of the pool with something that is pinned or shared. Nothing is wrong with it.
    BesidePinned,
    /// The kernel did not say which of its pages are populated.
    ResidencyUnknown,
    /// It could not be accessed: broken hardware, most likely. Found where [`memory_errors`](crate::memory_errors) are handled,
    /// where [`Policy::probe`](crate::Policy::probe) asks for them, or by what the kernel answers.
    MemoryError,
    /// It is in one block of the pool with memory that could not be accessed. Nothing is known to be wrong with it.
    BesideMemoryError,
    /// Something else than zero was read back, twice; or once, where the memory was shared and had been sealed by then.
    NotZero,
    /// It is shared, and another process can still write to it, or a device has pinned it. It is tried again later: see
    /// [`Pool::withheld`](crate::Pool::withheld).
    StillShared,
    /// It is shared, and the kernel did not unmap, seal or map it again, for another reason. It is tried again later.
    NotSealed,
    /// It is shared, and in one file with memory that is not clean: the kernel gets the whole file or nothing.
    SameFile,
    /// It was shared, zeroed and sealed, and then scrubbing was [cancelled](crate::Ticket::cancel). It is read back later.
    NotReadBack,
    /// It was shared, proven to be zero, and went back to the kernel, which has no memory to take its place. It is tried again
    /// later.
    NotReplaced,
}

/// Memory that went into quarantine: in whole blocks as far as the guest had them. What was pinned, shared or broken is
/// named to the page (or its huge page), and the rest of its block beside it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct QuarantinedRange {
    /// Where it was in guest physical memory, in bytes.
    pub guest_address: u64,
    /// Its length in bytes.
    pub bytes: u64,
    /// Why.
    pub reason: QuarantineReason,
    /// What exactly was seen.
    pub detail: String,
}

/// How long each step of a teardown took, in nanoseconds of wall-clock time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct StepTimes {
    /// Taking the memory away from the guest's windows.
    pub revoke_ns: u64,
    /// Asking the kernel which pages are populated.
    pub residency_ns: u64,
    /// Writing zeros. Where pieces are zeroed and read back in turn, the time of both is divided by how long the threads
    /// spent on each.
    pub scrub_ns: u64,
    /// Reading them back.
    pub verify_ns: u64,
    /// Putting the blocks back into the clean set.
    pub recycle_ns: u64,
}

/// The account of one teardown.
///
/// `bytes_scrubbed + bytes_never_populated + bytes_quarantined = bytes_total`, or there is no receipt but an error.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[must_use = "the receipt says whether all of the memory was proven clean"]
#[non_exhaustive]
pub struct ScrubReceipt {
    /// The lease.
    pub lease: LeaseId,
    /// The guest's name, if it had one.
    pub guest: Option<String>,
    /// The guest's regions, by ascending guest address.
    pub regions: Vec<GuestRegion>,
    /// The pool's blocks that were behind them. Two receipts that name the same block are about the same memory.
    pub blocks: Vec<Extent>,
    /// The pages the memory consists of.
    pub page_size: PageSize,
    /// How the memory was taken away from the guest, and so what that proves: the weakest way that was taken for any of it. It says
    /// nothing about what is [quarantined](Self::quarantined), least of all where that is because of
    /// [`QuarantineReason::NotRevoked`].
    pub revocation: Revocation,
    /// How much was to be read back.
    pub verify: Verify,
    /// The length of all regions, in bytes.
    pub bytes_total: u64,
    /// Bytes that were zeroed and can be leased again.
    pub bytes_scrubbed: u64,
    /// Bytes that the guest never made the kernel supply; they have no content.
    pub bytes_never_populated: u64,
    /// Bytes that are not leased again; of shareable leases other memory may take their place later
    /// ([`Pool::withheld`](crate::Pool::withheld)).
    pub bytes_quarantined: u64,
    /// Bytes of `bytes_scrubbed` that were read back and found to be zero.
    pub bytes_verified: u64,
    /// Bytes of `bytes_scrubbed` that were then given back to the kernel, because of [`Policy::retain`](crate::Policy::retain).
    pub bytes_returned: u64,
    /// Bytes that could have been swapped out from when they were taken away from the guest until they were zeroed, because the
    /// kernel did not lock them again, or because they were shareable; 0 in pools without
    /// [`lock_memory`](crate::PoolBuilder::lock_memory). They are scrubbed and counted as all others.
    #[cfg_attr(feature = "serde", serde(default))]
    pub bytes_unlocked: u64,
    /// What was quarantined and why, by ascending guest address.
    pub quarantined: Vec<QuarantinedRange>,
    /// The name of the zeroing loop.
    #[cfg_attr(feature = "serde", serde(rename = "loop"))]
    pub zero_loop: String,
    /// The name of the verification loop, if anything was read back.
    pub verify_loop: Option<String>,
    /// Decides which lines were read back, with [`Verify::Sampled`].
    pub sample_seed: Option<u64>,
    /// The rates between which the zeroing loop was chosen, at the size nearest to this lease's: of zeroing, or where everything
    /// is read back at once, of both. Empty if the loop was named.
    pub calibration: Vec<Rate>,
    /// The rates of reading between which the verification loop was chosen: at the size nearest to this lease's, or where
    /// everything is read back at once, to the distance at which that happens. Empty if the loop was named, or nothing was read.
    #[cfg_attr(feature = "serde", serde(default))]
    pub verify_calibration: Vec<Rate>,
    /// How many threads worked at the same time: one, if there was little to do.
    pub threads: usize,
    /// The time from the call of teardown to the receipt, in nanoseconds.
    pub elapsed_ns: u64,
    /// How long each step took.
    pub steps: StepTimes,
    /// When the teardown ended: milliseconds since 1970 by the host's clock.
    pub ended_unix_ms: u64,
    /// How it ended.
    pub outcome: Outcome,
}

impl ScrubReceipt {
    /// Whether every byte was proven clean: read back as zero, or never populated.
    pub fn is_proven(&self) -> bool {
        self.outcome == Outcome::Proven
    }
}
