//! Memory that a pool lends to the kernel while a file of a shareable lease takes its place.

use super::{Extent, LeaseId, Owned, Shared, Withheld};
use crate::backing::{BLOCK, Refilled, SharedFile};
use crate::embedder::in_drop;
use crate::sys;
use std::ops::Range;
use std::sync::Arc;

impl Shared {
    /// Gives the memory of clean blocks to the kernel, because something else takes its place. What the kernel does not take
    /// is memory that the host has twice, and no more than that.
    pub(crate) fn lend(&self, extents: &[Extent]) {
        for extent in extents {
            if let Err(error) = self.backing.lend(bytes(extent)) {
                log::warn!("{extent:?} stays populated behind a shareable lease: {error}");
            }
        }
    }

    /// Puts fresh memory behind blocks that were [lent](Self::lend).
    pub(crate) fn refill(&self, extents: &[Extent]) -> sys::Result<Vec<Refilled>> {
        let refilled: sys::Result<Vec<Refilled>> = extents
            .iter()
            .map(|extent| self.backing.refill(bytes(extent)))
            .collect();
        if self.populate && refilled.is_ok() {
            // As much as a lease may leave behind.
            let mut retained = usize::try_from(self.retain).unwrap_or(usize::MAX);
            for extent in extents {
                let Range { start, end } = bytes(extent);
                let range = start..start + retained.min(end - start) / BLOCK * BLOCK;
                retained -= range.len();
                if range.is_empty() {
                    break;
                }
                if let Err(error) = self.backing.populate(range) {
                    log::warn!("{extent:?} is not populated again: {error}");
                }
            }
        }
        refilled
    }
}

fn bytes(extent: &Extent) -> Range<usize> {
    // No truncation: the arena is as long as that, and an address space holds it.
    let start = extent.first as usize * BLOCK;
    start..start + extent.blocks as usize * BLOCK
}

/// The file of a shareable lease, on its way from one owner to the next. If one of them drops it, by an error or a panic, it
/// goes into quarantine for good: the kernel would otherwise get the guest's bytes.
#[derive(Debug)]
pub(crate) struct OwnedFile {
    pool: Arc<Owned>,
    about: Withheld,
    file: Option<SharedFile>,
}

impl OwnedFile {
    /// Takes `file` for a lease.
    pub(crate) fn new(
        pool: &Arc<Owned>,
        lease: LeaseId,
        guest: Option<String>,
        file: SharedFile,
    ) -> Self {
        Self {
            pool: Arc::clone(pool),
            about: Withheld {
                for_good: true,
                ..Withheld::new(
                    lease,
                    guest,
                    file.len() as u64,
                    "its lease was not torn down to the end".to_owned(),
                )
            },
            file: Some(file),
        }
    }

    /// The file. There is one until [`take`](Self::take).
    pub(crate) fn get(&self) -> Option<&SharedFile> {
        self.file.as_ref()
    }

    /// As [`get`](Self::get).
    pub(crate) fn get_mut(&mut self) -> Option<&mut SharedFile> {
        self.file.as_mut()
    }

    /// Says why it is going to stay in quarantine.
    pub(crate) fn condemn(&mut self, reason: String) {
        self.about.reason = reason;
    }

    /// The file, for whoever takes over. There is one.
    pub(crate) fn take(&mut self) -> Option<SharedFile> {
        self.file.take()
    }
}

impl Drop for OwnedFile {
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            let pool = &self.pool;
            pool.withheld.keep(self.about.clone(), file, &pool.ledger);
            // Last: the embedder's logger may panic.
            in_drop(|| {
                log::error!(
                    "{}: {} bytes of shared memory in quarantine for good: {}",
                    self.about.lease,
                    self.about.bytes,
                    self.about.reason
                );
            });
        }
    }
}
