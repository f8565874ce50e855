//! Making a lease: blocks are taken, and each region gets a window with its share of them. Whatever fails, nobody has seen the memory,
//! and it goes back.

use super::handles::Handles;
use super::{
    Lease, LeaseError, LeaseOptions, LeasedRegion, Segment, blocks_of, check, region, shared,
};
use crate::backing::{Backing, NotGranted};
use crate::lease::GuestRegion;
use crate::pool::blocks::{Blocks, Taken};
use crate::pool::{Extent, LeaseId, Pool, Shared, deal};
use crate::scrub::HostPtr;
use crate::{BLOCK_SIZE, SysError};
use std::ops::Range;
use std::sync::Arc;
use vm_memory::GuestAddress;

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
        if !shared.is_here() {
            return Err(LeaseError::Forked);
        }
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
pub(super) fn close_unseen(
    shared: &Shared,
    backing: &dyn Backing,
    leased: LeasedRegion,
    stuck: Range<u64>,
) -> Vec<u64> {
    let mut lost: Vec<u64> = stuck.collect();
    for segment in &leased.segments {
        // SAFETY: granted to this window, whose address has not left this module.
        let revoked = unsafe { backing.revoke(segment.offset, segment.window.0, segment.len) };
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
