//! Taking a guest's memory back, step by step.
//!
//! Each step is a type, and each type has only the next step:
//!
//! ```text
//! Lease --revoke--> DirtyMemory --scrub--> ScrubbedMemory --verify--> VerifiedMemory --recycle--> ScrubReceipt
//! ```
//!
//! [`Lease::teardown`] takes all of them, with zeroing and reading back fused. The memory of a shareable lease takes the same
//! ones; it is sealed before it is read back, and goes back to the kernel in the last step. Whoever stops half-way, by dropping one of
//! these values or by a panic, leaves the blocks in quarantine.
//!
//! ```
//! # use vm_scrub::{Pool, Quiesced};
//! # use vm_memory::GuestAddress;
//! let pool = Pool::builder().capacity(2 << 20).build()?;
//! let lease = pool.lease(&[(GuestAddress(0), 2 << 20)])?;
//! // SAFETY: nothing ever got the memory's address.
//! let quiesced = unsafe { Quiesced::assert(&lease) };
//! let receipt = lease.revoke(quiesced)?.scrub().verify().recycle()?;
//! assert!(receipt.is_proven());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Memory that was not scrubbed, or not verified, has no way into the pool:
//!
//! ```compile_fail,E0599
//! # use vm_scrub::{Pool, Quiesced};
//! # use vm_memory::GuestAddress;
//! # let pool = Pool::builder().capacity(2 << 20).build()?;
//! # let lease = pool.lease(&[(GuestAddress(0), 2 << 20)])?;
//! # // SAFETY: nothing ever got the memory's address.
//! # let quiesced = unsafe { Quiesced::assert(&lease) };
//! let receipt = lease.revoke(quiesced)?.recycle()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! ```compile_fail,E0599
//! # use vm_scrub::{Pool, Quiesced};
//! # use vm_memory::GuestAddress;
//! # let pool = Pool::builder().capacity(2 << 20).build()?;
//! # let lease = pool.lease(&[(GuestAddress(0), 2 << 20)])?;
//! # // SAFETY: nothing ever got the memory's address.
//! # let quiesced = unsafe { Quiesced::assert(&lease) };
//! let receipt = lease.revoke(quiesced)?.scrub().recycle()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use super::receipt::ScrubReceipt;
use super::steps::{Steps, take_away, take_away_unasked};
use super::{Lease, Quiesced, TeardownError};
use crate::pool::blocks::{Dirty, Scrubbed, Verified};
use crate::scrub::Work;
use std::mem::ManuallyDrop;

/// Out of the guest's reach, with the guest's bytes in it.
#[derive(Debug)]
#[must_use = "dropping it quarantines the memory"]
pub struct DirtyMemory {
    pub(super) steps: Steps<Dirty>,
}

/// Zeros were written; nobody has read them back.
#[derive(Debug)]
#[must_use = "dropping it quarantines the memory"]
pub struct ScrubbedMemory {
    steps: Steps<Scrubbed>,
}

/// Read back as the pool's policy says.
#[derive(Debug)]
#[must_use = "dropping it quarantines the memory"]
pub struct VerifiedMemory {
    steps: Steps<Verified>,
}

impl Lease {
    /// Takes the memory away from the guest, sets every byte to zero, reads every byte back, and puts it into the pool.
    ///
    /// The receipt accounts for every byte. Memory that could not be proven clean is quarantined and listed in it: look
    /// at [`ScrubReceipt::is_proven`].
    ///
    /// # Errors
    ///
    /// [`TeardownError::Refused`] while memslots or handles are left, or if `quiesced` is about another lease: nothing was
    /// done, and the error hands both back. [`TeardownError::Unaccounted`] if the numbers do not add up.
    pub fn teardown(self, quiesced: Quiesced) -> Result<ScrubReceipt, TeardownError> {
        self.revoke(quiesced)?.scrub_and_verify().recycle()
    }

    /// The first step alone: takes the memory out of the guest's windows, which fault from then on.
    ///
    /// # Errors
    ///
    /// [`TeardownError::Refused`], as for [`Lease::teardown`]. A range that cannot be revoked is quarantined and does not
    /// stop the rest.
    pub fn revoke(self, quiesced: Quiesced) -> Result<DirtyMemory, TeardownError> {
        Ok(DirtyMemory {
            steps: take_away(self, quiesced)?,
        })
    }
}

impl DirtyMemory {
    /// Sets every byte that can hold data to zero, in parallel. Pages that were never populated are skipped.
    pub fn scrub(self) -> ScrubbedMemory {
        let mut steps = self.steps;
        steps.find_populated();
        let job = steps.job(Work::Zero);
        let (zeroed, _) = steps.run(&job);
        ScrubbedMemory {
            steps: steps.scrubbed(&zeroed),
        }
    }

    /// Zeroes and reads back piece by piece, while each piece is in the cache: the same as [`scrub`](Self::scrub) and
    /// [`verify`](ScrubbedMemory::verify), and faster.
    pub fn scrub_and_verify(self) -> VerifiedMemory {
        if self.steps.file.is_some() {
            // Shared memory is sealed in between.
            return self.scrub().verify();
        }
        let mut steps = self.steps;
        steps.find_populated();
        let job = steps.job(Work::ZeroAndRead);
        let (zeroed, verdict) = steps.run(&job);
        VerifiedMemory {
            steps: steps.scrubbed(&zeroed).verified(&verdict),
        }
    }
}

impl ScrubbedMemory {
    /// Reads back as much as the pool's policy says. What is not zero is scrubbed once more, then quarantined.
    ///
    /// The memory of a shareable lease is sealed first, and read through a new mapping that is read-only; what is not zero
    /// then stays so.
    pub fn verify(self) -> VerifiedMemory {
        let mut steps = self.steps;
        if steps.file.is_some() {
            let steps = steps.verified_sealed();
            return VerifiedMemory { steps };
        }
        let job = steps.job(Work::Read);
        let (_, verdict) = steps.run(&job);
        VerifiedMemory {
            steps: steps.verified(&verdict),
        }
    }
}

impl VerifiedMemory {
    /// Puts what is clean into the pool and closes the account.
    ///
    /// # Errors
    ///
    /// [`TeardownError::Unaccounted`] if the numbers of the steps do not add up; everything is quarantined then.
    pub fn recycle(self) -> Result<ScrubReceipt, TeardownError> {
        self.steps.recycle()
    }
}

/// What happens to a lease that is dropped.
pub(super) fn abandon(lease: &mut Lease) {
    let Some(blocks) = lease.blocks.take() else {
        return;
    };
    if !lease.pool.is_here() {
        // The parent's, who knows best. Nothing of it is here.
        std::mem::forget((blocks, lease.file.take()));
        for region in std::mem::take(&mut lease.regions) {
            region.window.leak();
        }
        return;
    }
    let id = lease.id;
    // To count owners and to log runs code of the embedder's, which may panic: what somebody may be using stays mapped then.
    let regions = ManuallyDrop::new(std::mem::take(&mut lease.regions));
    let memslots = lease.registrations.count();
    let holders = lease.handles.holders();
    if memslots > 0 || holders > 0 {
        // Somebody may be using the memory right now. Unmapping it would crash them; leaving it mapped and never leasing
        // it again harms nobody.
        log::error!(
            "{id} dropped with {memslots} memslots and {holders} owners left: quarantined, and left mapped"
        );
        blocks.quarantine();
        return;
    }
    lease.regions = ManuallyDrop::into_inner(regions);
    let stopped = lease.registrations.all_deleted() || !lease.handles.exposed();
    let memory = DirtyMemory {
        steps: take_away_unasked(lease, blocks),
    };
    if !stopped || std::thread::panicking() {
        log::error!("{id} dropped without a teardown: quarantined");
        memory.steps.blocks.quarantine();
        return;
    }
    match memory.scrub_and_verify().recycle() {
        Ok(receipt) => log::warn!(
            "{id} dropped without a teardown: torn down now, outcome {:?}",
            receipt.outcome
        ),
        Err(error) => log::error!("{id} dropped without a teardown: {error}"),
    }
}
