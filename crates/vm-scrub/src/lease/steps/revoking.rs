//! The first step: taking the memory away from the guest.

use super::{Steps, backing, in_books, nanos};
use crate::backing::{Revocation, Revoked};
use crate::lease::account::Lost;
use crate::lease::receipt::{Outcome, QuarantineReason, ScrubReceipt, StepTimes};
use crate::lease::{Lease, Leased, LeasedRegion, Quiesced, Refused, TeardownError, blocks_of};
use crate::pool::Shared;
use crate::pool::blocks::{Blocks, Dirty};
use crate::scrub::fresh_seed;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

/// Revokes every segment of a lease, unless something stands against it.
pub(in crate::lease) fn take_away(
    mut lease: Lease,
    quiesced: Quiesced,
) -> Result<Steps<Dirty>, TeardownError> {
    if let Some(reason) = lease.refusal(&quiesced) {
        return Err(TeardownError::Refused(Box::new(Refused {
            reason,
            lease,
            quiesced,
        })));
    }
    match lease.blocks.take() {
        Some(blocks) => Ok(take_away_unasked(&mut lease, blocks)),
        // Not possible: whoever takes the blocks owns the lease, as this function does.
        None => Err(TeardownError::Unaccounted {
            lease: lease.id,
            what: "the leased memory",
            expected: lease.bytes(),
            found: 0,
        }),
    }
}

/// Revokes every segment of a lease that nobody uses any more.
pub(in crate::lease) fn take_away_unasked(
    lease: &mut Lease,
    mut blocks: Blocks<Leased>,
) -> Steps<Dirty> {
    let started = Instant::now();
    let pool = Arc::clone(&lease.pool);
    let leased_blocks = blocks.count();
    let receipt = open_receipt(lease, &pool);
    let file = lease.file.take();
    let backing = backing(&pool, file.as_deref());
    let mut all_segments = Vec::new();
    let mut lost = Lost::new();
    let mut pinned: Vec<Range<usize>> = Vec::new();
    let mut unlocked = 0;
    let mut by = backing.revocation();
    let mut proofs: Vec<Revoked> = Vec::new();
    // The embedder's logger may panic: what somebody may still reach stays mapped then.
    let regions = std::mem::take(&mut lease.regions).into_iter();
    let regions: Vec<_> = regions.map(ManuallyDrop::new).collect();
    for region in regions {
        let LeasedRegion {
            window, segments, ..
        } = ManuallyDrop::into_inner(region);
        let window = ManuallyDrop::new(window);
        let mut closed = true;
        for segment in segments {
            // SAFETY: the segment was granted at this address when the lease was made. No handle is left and the guest
            // is quiesced, so nobody holds a reference; a stray pointer is what revocation is for.
            match unsafe { backing.revoke(segment.offset, segment.window.0, segment.len) } {
                Ok(revoked) => {
                    if revoked.by == Revocation::Mremap {
                        by = Revocation::Mremap;
                    }
                    for range in &revoked.pinned {
                        log::error!(
                            "{}: {} bytes pinned or shared, quarantined: {}",
                            lease.id,
                            range.len(),
                            revoked.refusal
                        );
                        let why = (QuarantineReason::PinnedOrShared, revoked.refusal.clone());
                        let blocks = blocks_of(range.start, range.end);
                        lost.extend(blocks.map(|block| (block, why.clone())));
                    }
                    pinned.extend(revoked.pinned.iter().cloned());
                    unlocked += revoked.unlocked as u64;
                    proofs.push(revoked);
                }
                Err(error) => {
                    closed = false;
                    log::error!(
                        "{}: {} bytes not revoked and quarantined: {error}",
                        lease.id,
                        segment.len
                    );
                    let why = (QuarantineReason::NotRevoked, error.to_string());
                    lost.extend(segment.blocks().map(|block| (block, why.clone())));
                }
            }
            all_segments.push(segment);
        }
        let window = ManuallyDrop::into_inner(window);
        if closed {
            pool.windows.retire(window);
        } else {
            window.leak();
        }
    }
    let shareable = file.is_some();
    blocks.quarantine_blocks(
        lost.keys()
            .map(|block| in_books(shareable, &receipt.blocks, *block)),
    );
    pinned.sort_by_key(|range| range.start);
    let mut steps = Steps {
        blocks: blocks.revoked(proofs),
        pool,
        file,
        started,
        segments: all_segments,
        leased_blocks,
        populated: Vec::new(),
        to_read: None,
        held: Vec::new(),
        bytes_held: 0,
        bytes_to_read: None,
        answered: 0,
        lost,
        named: pinned,
        seed: fresh_seed(),
        not_zeroed: 0,
        failed_bytes: 0,
        receipt,
    };
    steps.receipt.revocation = by;
    steps.receipt.bytes_unlocked = unlocked;
    steps.receipt.steps.revoke_ns = nanos(started.elapsed());
    steps
}

/// A receipt with everything that is known before the first step.
fn open_receipt(lease: &Lease, pool: &Shared) -> ScrubReceipt {
    ScrubReceipt {
        lease: lease.id,
        guest: lease.guest.clone(),
        regions: lease.guest_regions().collect(),
        blocks: lease.extents.clone(),
        page_size: lease.page_size(),
        revocation: backing(pool, lease.file.as_deref()).revocation(),
        verify: pool.verify,
        bytes_total: lease.bytes(),
        bytes_scrubbed: 0,
        bytes_never_populated: 0,
        bytes_quarantined: 0,
        bytes_verified: 0,
        quarantined: Vec::new(),
        bytes_unlocked: 0,
        bytes_returned: 0,
        // The loops depend on how much there is to do.
        zero_loop: String::new(),
        verify_loop: None,
        sample_seed: None,
        calibration: Vec::new(),
        verify_calibration: Vec::new(),
        threads: pool.engine.workers().threads(),
        elapsed_ns: 0,
        steps: StepTimes::default(),
        ended_unix_ms: 0,
        // Until the opposite is proven.
        outcome: Outcome::Quarantined,
    }
}
