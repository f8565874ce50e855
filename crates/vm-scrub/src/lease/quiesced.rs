//! Whether a guest still runs on its memory.

use super::Lease;
use crate::pool::LeaseId;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The statement that nothing runs on a lease's memory any more: no vCPU, no memslot, no device.
///
/// [`Memslots::remove`](crate::kvm::Memslots::remove) makes it when the kernel has deleted the memslots. Embedders with
/// another hypervisor make it themselves, with [`Quiesced::assert`].
#[derive(Debug)]
#[must_use = "teardown asks for this"]
pub struct Quiesced {
    pub(super) lease: LeaseId,
}

impl Quiesced {
    /// States that nothing runs on `lease`'s memory any more.
    ///
    /// # Safety
    ///
    /// No vCPU, device, DMA mapping or thread may access the lease's memory from now on, through any address. What still
    /// reaches it through the lease's own addresses is stopped by revocation and faults; what was pinned for DMA is found by
    /// [`Revocation::Move`](crate::Revocation::Move) and [`Revocation::Sealed`](crate::Revocation::Sealed), and by no other.
    pub unsafe fn assert(lease: &Lease) -> Self {
        Self::of(lease.id)
    }

    pub(crate) fn of(lease: LeaseId) -> Self {
        Self { lease }
    }
}

/// Memslots of a lease.
#[derive(Debug, Default)]
pub(crate) struct Registrations {
    /// Which machine, by the number of its file descriptor, and which slot.
    memslots: Mutex<Vec<(RawFd, u32)>>,
    ever: AtomicBool,
}

impl Registrations {
    fn memslots(&self) -> MutexGuard<'_, Vec<(RawFd, u32)>> {
        // A vector of numbers cannot be half changed.
        self.memslots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a memslot. `false` if it is counted already: it is somebody else's to delete.
    #[cfg(feature = "kvm")]
    pub(crate) fn add(&self, machine: RawFd, slot: u32) -> bool {
        let mut memslots = self.memslots();
        let new = !memslots.contains(&(machine, slot));
        if new {
            memslots.push((machine, slot));
        }
        new
    }

    /// Remembers that the hypervisor has taken a memslot.
    #[cfg(feature = "kvm")]
    pub(crate) fn taken(&self) {
        self.ever.store(true, Ordering::SeqCst);
    }

    #[cfg(feature = "kvm")]
    pub(crate) fn remove(&self, machine: RawFd, slot: u32) {
        self.memslots().retain(|at| *at != (machine, slot));
    }

    pub(super) fn count(&self) -> usize {
        self.memslots().len()
    }

    /// Whether there were memslots and all are deleted: the hypervisor's word that the guest is stopped.
    pub(super) fn all_deleted(&self) -> bool {
        self.ever.load(Ordering::SeqCst) && self.count() == 0
    }
}
