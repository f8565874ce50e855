//! One guest's memory.
//!
//! A [`Lease`] shows blocks of a pool to one guest: each region in a window of its own, for vm-memory and for memslots. It
//! knows who still holds on to the memory, and gives it back in the steps of [`teardown`].

mod account;
mod check;
mod error;
mod handles;
mod opening;
mod options;
mod quiesced;
mod receipt;
mod region;
mod retire;
mod returning;
mod sealing;
mod shared;
mod stages;
mod steps;
pub mod teardown;
#[cfg(test)]
mod unbalanced;

pub use error::{LeaseError, Refusal, Refused, TeardownError};
use opening::close_unseen;
pub use options::LeaseOptions;
pub use quiesced::Quiesced;
pub(crate) use quiesced::Registrations;
pub use receipt::{Outcome, QuarantineReason, QuarantinedRange, ScrubReceipt, StepTimes};
pub use region::GuestRegion;
#[cfg(any(test, feature = "test-support"))]
pub(crate) use region::check as check_regions;
pub use retire::{Cancelled, Ticket};

use crate::BLOCK_SIZE;
use crate::backing::Window;
use crate::embedder::in_drop;
use crate::pool::blocks::{Blocks, Leased};
use crate::pool::{Extent, LeaseId, Owned, OwnedFile, PageSize};
use crate::scrub::HostPtr;
use handles::{Handle, Handles};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionCollection, GuestRegionMmap};

/// A part of a guest region: consecutive in the guest, in its window and in the pool's arena.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    pub(crate) guest_address: u64,
    /// Offset in the arena or, of a shareable lease, in its file; in bytes, at the start of a block.
    pub(crate) offset: usize,
    pub(crate) window: HostPtr,
    pub(crate) len: usize,
}

/// A guest region with its window and the memory behind it.
#[derive(Debug)]
pub(crate) struct LeasedRegion {
    pub(crate) region: GuestRegion,
    pub(crate) window: Window,
    pub(crate) segments: Vec<Segment>,
}

/// One guest's memory, zeroed when it is leased.
///
/// It goes back to the pool by [`Lease::teardown`]. Dropping it instead is not an error of memory safety, and never puts
/// dirty memory back: where it is certain that the guest is stopped (its memslots were registered and are deleted, or
/// nobody ever got the memory's address) and no handle is left, the teardown happens then and there and is logged. In any
/// other case, and during a panic, the blocks are quarantined; while a handle is alive the memory also stays mapped.
pub struct Lease {
    pool: Arc<Owned>,
    id: LeaseId,
    guest: Option<String>,
    regions: Vec<LeasedRegion>,
    /// `None` when teardown has taken over.
    blocks: Option<Blocks<Leased>>,
    extents: Vec<Extent>,
    /// The memory, where it is shareable; the blocks stand for so many bytes then, and what is behind them is lent.
    file: Option<Box<OwnedFile>>,
    registrations: Arc<Registrations>,
    handles: Handles,
}

impl Segment {
    /// The numbers of the blocks that this segment lies in, counted from the start of the arena or the file.
    pub(crate) fn blocks(&self) -> Range<u64> {
        blocks_of(self.offset, self.offset + self.len)
    }
}

/// The numbers of the blocks in which `[start, end)` of the arena lies.
pub(crate) fn blocks_of(start: usize, end: usize) -> Range<u64> {
    start as u64 / BLOCK_SIZE..(end as u64).div_ceil(BLOCK_SIZE)
}

impl Lease {
    /// The lease's name.
    pub fn id(&self) -> LeaseId {
        self.id
    }

    /// The guest's name, if it was given one.
    pub fn guest(&self) -> Option<&str> {
        self.guest.as_deref()
    }

    /// The guest's regions, by ascending guest address.
    pub fn guest_regions(&self) -> impl ExactSizeIterator<Item = GuestRegion> {
        self.regions.iter().map(|leased| leased.region)
    }

    /// How many bytes the regions have together.
    pub fn bytes(&self) -> u64 {
        self.guest_regions().map(|region| region.bytes).sum()
    }

    /// The pool's blocks that are behind the regions, in the order in which the regions use them.
    pub fn blocks(&self) -> &[Extent] {
        &self.extents
    }

    /// The pages the memory consists of.
    pub fn page_size(&self) -> PageSize {
        match self.pool.page_size {
            PageSize::Transparent if self.is_shareable() => PageSize::Base4K,
            page_size => page_size,
        }
    }

    /// The memory as vm-memory knows it, without a dirty bitmap.
    ///
    /// Teardown is refused while the result or a clone of it is alive.
    pub fn memory(&self) -> GuestMemoryMmap {
        let regions: Vec<Arc<GuestRegionMmap>> = self.map_regions(|_| ()).map(Arc::new).collect();
        self.handles.give_out(regions.iter().map(Handle::of_shared));
        GuestRegionCollection::from_arc_regions(regions)
            .expect("regions were sorted and checked for overlap when they were leased")
    }

    /// The memory as vm-memory regions with a bitmap of the caller's choice: `bitmap` is called once for each region with
    /// its length in bytes. By ascending guest address.
    ///
    /// The bitmaps are fresh with each call, so no dirty bits survive from an earlier guest. Teardown is refused while any
    /// of these regions is alive.
    pub fn regions<B>(&self, bitmap: impl FnMut(usize) -> B) -> Vec<GuestRegionMmap<B>>
    where
        B: Bitmap + Send + Sync + 'static,
    {
        let regions: Vec<GuestRegionMmap<B>> = self.map_regions(bitmap).collect();
        self.handles.give_out(regions.iter().map(Handle::of_owned));
        regions
    }

    fn map_regions<B: Bitmap>(
        &self,
        mut bitmap: impl FnMut(usize) -> B,
    ) -> impl Iterator<Item = GuestRegionMmap<B>> {
        let huge = self.pool.page_size == PageSize::Huge2M;
        let sharing = if huge || self.is_shareable() {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS
        };
        self.regions.iter().map(move |leased| {
            let len = leased.window.len();
            let mut builder = MmapRegionBuilder::new_with_bitmap(len, bitmap(len))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(sharing)
                .with_hugetlbfs(huge);
            if let Some(place) = self.file_offset(leased) {
                builder = builder.with_file_offset(place);
            }
            // SAFETY: the window is mapped over its whole length, and stays so while the region is alive: the lease tracks
            // it and refuses teardown, and a lease that is dropped leaves the window mapped.
            let mapping = unsafe { builder.with_raw_mmap_pointer(leased.window.start().0) }
                .build()
                .expect("windows are page aligned");
            GuestRegionMmap::new(mapping, GuestAddress(leased.region.guest_address))
                .expect("regions were checked not to wrap when they were leased")
        })
    }

    /// Where the regions are in this process, for hypervisors that are given addresses: guest region and host address,
    /// aligned to 2 MiB, by ascending guest address.
    ///
    /// The lease cannot see what becomes of these pointers. They are valid until teardown, and fault afterwards.
    pub fn host_addresses(&self) -> Vec<(GuestRegion, *mut u8)> {
        self.handles.expose();
        self.windows()
            .map(|(region, start)| (region, start.0))
            .collect()
    }

    pub(crate) fn windows(&self) -> impl Iterator<Item = (GuestRegion, HostPtr)> {
        self.regions
            .iter()
            .map(|leased| (leased.region, leased.window.start()))
    }

    #[cfg(feature = "kvm")]
    pub(crate) fn registrations(&self) -> &Arc<Registrations> {
        &self.registrations
    }

    /// What stands against taking the memory away now.
    fn refusal(&self, quiesced: &Quiesced) -> Option<Refusal> {
        let memslots = self.registrations.count();
        let holders = self.handles.holders();
        if !self.pool.is_here() {
            Some(Refusal::Forked)
        } else if quiesced.lease != self.id {
            Some(Refusal::OtherLease {
                lease: self.id,
                quiesced: quiesced.lease,
            })
        } else if memslots > 0 {
            Some(Refusal::Registered { memslots })
        } else if holders > 0 {
            Some(Refusal::Held { holders })
        } else {
            None
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("id", &self.id)
            .field("guest", &self.guest)
            .field("regions", &self.guest_regions().collect::<Vec<_>>())
            .field("blocks", &self.extents)
            .finish_non_exhaustive()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.blocks.is_some() {
            in_drop(|| teardown::abandon(self));
        }
    }
}
