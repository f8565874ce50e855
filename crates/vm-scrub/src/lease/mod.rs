//! One guest's memory.
//!
//! A [`Lease`] shows blocks of a pool to one guest: each region in a window of its own, for vm-memory and for memslots. It
//! knows who still holds on to the memory, and gives it back in the steps of [`teardown`].

mod account;
mod check;
mod error;
mod handles;
mod options;
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
pub use options::LeaseOptions;
pub use receipt::{Outcome, QuarantineReason, QuarantinedRange, ScrubReceipt, StepTimes};
pub use region::GuestRegion;
#[cfg(any(test, feature = "test-support"))]
pub(crate) use region::check as check_regions;
pub use retire::{Cancelled, Ticket};

use crate::backing::{Backing, NotGranted, Window};
use crate::pool::blocks::{Blocks, Leased, Taken};
use crate::pool::{Extent, LeaseId, Owned, OwnedFile, PageSize, Pool, Shared, deal};
use crate::scrub::HostPtr;
use crate::{BLOCK_SIZE, SysError};
use handles::{Handle, Handles};
use std::fmt;
use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionCollection, GuestRegionMmap};

/// The statement that nothing runs on a lease's memory any more: no vCPU, no memslot, no device.
///
/// [`Memslots::remove`](crate::kvm::Memslots::remove) makes it when the kernel has deleted the memslots. Embedders with
/// another hypervisor make it themselves, with [`Quiesced::assert`].
#[derive(Debug)]
#[must_use = "teardown asks for this"]
pub struct Quiesced {
    lease: LeaseId,
}

impl Quiesced {
    /// States that nothing runs on `lease`'s memory any more.
    ///
    /// # Safety
    ///
    /// No vCPU, device, DMA mapping or thread may access the lease's memory from now on, through any address. What still
    /// reaches it through the lease's own addresses is stopped by revocation and faults; what was pinned for DMA is found by
    /// [`Revocation::Move`](crate::Revocation::Move) and by no other.
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

    fn count(&self) -> usize {
        self.memslots().len()
    }

    /// Whether there were memslots and all are deleted: the hypervisor's word that the guest is stopped.
    fn all_deleted(&self) -> bool {
        self.ever.load(Ordering::SeqCst) && self.count() == 0
    }
}

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

impl Pool {
    /// Leases memory for a guest with these regions: guest physical address and length in bytes.
    ///
    /// Every byte is zero. Regions may leave holes and come in any order; their addresses and lengths must be multiples of
    /// 4 KiB, or of 2 MiB in a pool of hugetlb pages. A region takes whole blocks of 2 MiB out of the pool.
    ///
    /// # Errors
    ///
    /// Each variant of [`LeaseError`] says what to do. The pool is as it was, but for what
    /// [`check_on_grant`](crate::PoolBuilder::check_on_grant) has found.
    pub fn lease(&self, regions: &[(GuestAddress, u64)]) -> Result<Lease, LeaseError> {
        self.lease_with(regions, LeaseOptions::new())
    }

    /// The same as [`Pool::lease`] for a guest with a name, which the receipt will carry.
    pub fn lease_for(
        &self,
        guest: impl Into<String>,
        regions: &[(GuestAddress, u64)],
    ) -> Result<Lease, LeaseError> {
        self.lease_with(regions, LeaseOptions::new().guest(guest))
    }

    /// The same as [`Pool::lease`], with a choice of what the memory is to be: see [`LeaseOptions`].
    ///
    /// # Errors
    ///
    /// As for [`Pool::lease`].
    pub fn lease_with(
        &self,
        regions: &[(GuestAddress, u64)],
        options: LeaseOptions,
    ) -> Result<Lease, LeaseError> {
        let shared = &self.shared;
        let regions = region::check(regions, shared.page_size.granularity())?;
        let wanted: Vec<u64> = regions
            .iter()
            .map(|region| region.bytes.div_ceil(BLOCK_SIZE))
            .collect();
        let blocks = wanted.iter().sum();
        // What is to be shared is fresh memory, and these blocks stand for it.
        let taken = if options.shareable {
            check::take(shared, blocks)?
        } else {
            check::take_checked(shared, blocks)?
        };
        let lease = Lease {
            pool: Arc::clone(shared),
            id: LeaseId::next(),
            guest: options.guest,
            regions: Vec::with_capacity(regions.len()),
            blocks: None,
            extents: taken.extents().to_vec(),
            file: None,
            registrations: Arc::default(),
            handles: Handles::default(),
        };
        let lease = if options.shareable {
            shared::open(lease, regions, taken)?
        } else {
            open_all(lease, regions, &wanted, taken)?
        };
        log::debug!(
            "{}: {} regions, {} bytes",
            lease.id,
            lease.regions.len(),
            lease.bytes()
        );
        Ok(lease)
    }
}

/// Opens a window for each region and grants it its share of the blocks.
fn open_all(
    mut lease: Lease,
    regions: Vec<GuestRegion>,
    wanted: &[u64],
    taken: Blocks<Taken>,
) -> Result<Lease, LeaseError> {
    let pool = Arc::clone(&lease.pool);
    let shares = deal(taken.extents(), wanted);
    for (region, extents) in regions.into_iter().zip(shares) {
        match open(&pool, region, &extents) {
            Ok(region) => lease.regions.push(region),
            Err((source, lost)) => {
                withdraw(&pool, std::mem::take(&mut lease.regions), taken, lost);
                return Err(LeaseError::no_window(region.bytes, source));
            }
        }
    }
    lease.blocks = Some(taken.lease());
    Ok(lease)
}

/// Opens a window for `region` and grants it the memory in `extents`.
///
/// On failure everything is taken back; the blocks for which that failed too come with the error.
fn open(
    shared: &Shared,
    region: GuestRegion,
    extents: &[Extent],
) -> Result<LeasedRegion, (SysError, Vec<u64>)> {
    // No truncation: the pool holds this many bytes, so the address space does.
    let len = region.bytes as usize;
    let window = shared
        .windows
        .open(len)
        .map_err(|error| (error, Vec::new()))?;
    let mut leased = LeasedRegion {
        region,
        window,
        segments: Vec::with_capacity(extents.len()),
    };
    let mut done = 0;
    for extent in extents {
        let segment = Segment {
            guest_address: region.guest_address + done as u64,
            offset: (extent.first * BLOCK_SIZE) as usize,
            window: HostPtr(leased.window.start().at(done)),
            // The last block may be longer than the region: its rest stays in the arena, untouched.
            len: ((extent.blocks * BLOCK_SIZE) as usize).min(len - done),
        };
        // SAFETY: the blocks were taken out of the clean set for this lease, and this part of the window is closed.
        if let Err(NotGranted { error, stuck }) = unsafe {
            shared
                .backing
                .grant(segment.offset, segment.window.0, segment.len)
        } {
            let stuck = if stuck { segment.blocks() } else { 0..0 };
            return Err((
                error,
                close_unseen(shared, shared.backing.as_ref(), leased, stuck),
            ));
        }
        done += segment.len;
        leased.segments.push(segment);
    }
    Ok(leased)
}

/// Gives up a lease that is being made: nobody has seen the memory yet.
fn withdraw(
    shared: &Shared,
    regions: Vec<LeasedRegion>,
    mut taken: Blocks<Taken>,
    mut lost: Vec<u64>,
) {
    for region in regions {
        lost.extend(close_unseen(shared, shared.backing.as_ref(), region, 0..0));
    }
    taken.quarantine_blocks(lost);
    taken.give_back();
}

/// Takes back what was granted to a region that nobody has seen; returns the blocks for which that failed, with those that
/// are known to be stuck in the window already.
fn close_unseen(
    shared: &Shared,
    backing: &dyn Backing,
    leased: LeasedRegion,
    stuck: Range<u64>,
) -> Vec<u64> {
    let mut lost: Vec<u64> = stuck.collect();
    for segment in &leased.segments {
        // SAFETY: granted to this window, whose address has not left this module.
        let revoked = unsafe {
            backing.revoke(
                segment.offset,
                segment.window.0,
                segment.len,
                shared.engine.workers(),
            )
        };
        match revoked {
            // What nobody has seen nobody can have pinned; if so, it is lost with its block.
            Ok(revoked) => {
                let pinned = revoked.pinned.iter();
                lost.extend(pinned.flat_map(|range| blocks_of(range.start, range.end)));
            }
            Err(error) => {
                log::error!(
                    "{} bytes quarantined, not to be had back from a lease that failed: {error}",
                    segment.len
                );
                lost.extend(segment.blocks());
            }
        }
    }
    if lost.is_empty() {
        shared.windows.retire(leased.window);
    } else {
        leased.window.leak();
    }
    lost
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
        if quiesced.lease != self.id {
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
            teardown::abandon(self);
        }
    }
}
