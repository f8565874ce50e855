//! A guest that is gone, and what must be in the receipt for its memory.

use super::guest::Guest;
use super::peers::Peers;
use crate::{PAGE, assert_adds_up};
use std::ops::Range;
use vm_scrub::lease::QuarantineReason;
use vm_scrub::{BLOCK_SIZE, Extent, GuestRegion, LeaseId, PageSize, Revocation, ScrubReceipt};

/// Regions with their addresses in this process.
pub(super) type Windows = Vec<(GuestRegion, usize)>;

#[derive(Debug)]
pub(super) struct Gone {
    pub(super) lease: LeaseId,
    pub(super) blocks: u64,
    pub(super) shareable: bool,
    /// Whether quarantine is an answer.
    pub(super) may_lose: bool,
    pub(super) windows: Windows,
    extents: Vec<Extent>,
    regions: Vec<GuestRegion>,
    page_size: PageSize,
    /// Bytes of pages that hold data.
    written: u64,
    pinned: Vec<u64>,
    /// Whether somebody had a mapping when it went.
    shared: bool,
}

/// What must become of the memory.
#[derive(Debug, PartialEq, Eq)]
enum Fate {
    Clean,
    StillShared,
    Either,
}

impl Gone {
    pub(super) fn of(guest: &Guest, peers: &Peers) -> Self {
        let lease = &guest.lease;
        Self {
            lease: lease.id(),
            blocks: guest.blocks.len() as u64,
            shareable: lease.is_shareable(),
            // Others on this host may take the huge pages that were lent.
            may_lose: guest.may_lose
                || (lease.is_shareable() && lease.page_size() == PageSize::Huge2M),
            windows: guest.windows.clone(),
            extents: lease.blocks().to_vec(),
            regions: lease.guest_regions().collect(),
            page_size: lease.page_size(),
            written: guest.content.len() as u64 * PAGE,
            pinned: guest.pinned.clone(),
            shared: peers.have(lease.id()),
        }
    }

    /// Whether it may be in quarantine before there is a receipt: what somebody has mapped is as soon as it cannot be sealed.
    pub(super) fn may_be_lost(&self) -> bool {
        self.may_lose || self.shared
    }

    /// Checks a receipt; how many blocks are in quarantine by it, without those of shareable leases.
    pub(super) fn check(&self, receipt: &ScrubReceipt, peers: &Peers, met_fault: bool) -> u64 {
        assert_adds_up(receipt);
        assert_eq!(receipt.lease, self.lease);
        assert_eq!(receipt.regions, self.regions);
        assert_eq!(receipt.blocks, self.extents);
        assert_eq!(receipt.page_size, self.page_size);
        assert!(
            receipt.bytes_scrubbed + receipt.bytes_quarantined >= self.written,
            "{} bytes were written: {receipt:?}",
            self.written
        );
        assert!(
            receipt.bytes_returned <= receipt.bytes_scrubbed,
            "{receipt:?}"
        );
        let fate = if self.may_lose || met_fault {
            Fate::Either
        } else if peers.have(self.lease) {
            Fate::StillShared
        } else if self.shared {
            Fate::Either
        } else {
            Fate::Clean
        };
        match fate {
            Fate::Clean => assert!(receipt.quarantined.is_empty(), "{receipt:?}"),
            Fate::StillShared => assert!(
                receipt.bytes_quarantined == receipt.bytes_total
                    && receipt
                        .quarantined
                        .iter()
                        .all(|range| range.reason == QuarantineReason::StillShared),
                "{receipt:?}"
            ),
            Fate::Either => {}
        }
        if receipt.revocation == Revocation::Move
            && self.page_size == PageSize::Base4K
            && !met_fault
        {
            let held = |address: &&u64| peers.have_pinned(self.lease, **address);
            for address in self.pinned.iter().filter(held) {
                assert!(
                    covers(receipt, *address),
                    "{address:#x} is pinned: {receipt:?}"
                );
            }
        }
        if self.shareable {
            0
        } else {
            self.lost(receipt)
        }
    }

    /// How many blocks have something in quarantine.
    fn lost(&self, receipt: &ScrubReceipt) -> u64 {
        let blocks = self.regions.iter().flat_map(|region| {
            let end = region.guest_address + region.bytes;
            (region.guest_address..end)
                .step_by(BLOCK_SIZE as usize)
                .map(move |start| start..end.min(start.saturating_add(BLOCK_SIZE)))
        });
        let is_lost = |block: &Range<u64>| {
            receipt.quarantined.iter().any(|range| {
                range.guest_address < block.end && block.start < range.guest_address + range.bytes
            })
        };
        let lost: Vec<Range<u64>> = blocks.filter(is_lost).collect();
        // In whole blocks as far as the guest had them.
        let bytes: u64 = lost.iter().map(|block| block.end - block.start).sum();
        assert_eq!(receipt.bytes_quarantined, bytes, "{receipt:?}");
        lost.len() as u64
    }
}

/// Whether the page is kept where nobody else finds it, and not only beside something that is.
fn covers(receipt: &ScrubReceipt, address: u64) -> bool {
    use QuarantineReason::{NotRevoked, PinnedOrShared};
    receipt.quarantined.iter().any(|range| {
        (range.guest_address..range.guest_address + range.bytes).contains(&address)
            && matches!(range.reason, PinnedOrShared | NotRevoked)
    })
}

/// Adds the windows that had to stay open by this receipt.
pub(super) fn left_open(receipt: &ScrubReceipt, windows: &Windows, open: &mut Vec<Range<usize>>) {
    let not_revoked: Vec<u64> = receipt
        .quarantined
        .iter()
        .filter(|range| range.reason == QuarantineReason::NotRevoked)
        .map(|range| range.guest_address)
        .collect();
    for (region, start) in windows {
        let region_end = region.guest_address + region.bytes;
        if not_revoked
            .iter()
            .any(|address| (region.guest_address..region_end).contains(address))
        {
            open.push(*start..*start + region.bytes as usize);
        }
    }
}
