//! Asking for memory: who must get it, and who must be told what.

use super::layout::{self, Answer};
use super::op::Region;
use super::{Guest, Model, Pages};
use crate::regions;
use vm_scrub::lease::LeaseError;
use vm_scrub::{BLOCK_SIZE, Lease, LeaseOptions};

impl Model {
    /// Asks for memory.
    pub(super) fn lease(&mut self, asked: &[Region], shareable: bool) {
        let layout = layout::in_bytes(asked);
        let expected = layout::answer(&layout, self.knobs.granularity());
        let (least, most) = self.available();
        let before = self.pool().accounts();
        let faults = self.faults();
        let options = LeaseOptions::new().guest("model").shareable(shareable);
        let result = self.pool().lease_with(&regions(&layout), options);
        let met = faults.is_some_and(|faults| faults.hits() > 0);
        if met {
            self.met_fault();
            if self.knobs.check_on_grant {
                // What could not be read is in quarantine, others were given for it, and no receipt says so.
                let after = self.pool().accounts();
                let lost = after.quarantined.saturating_sub(before.quarantined);
                self.unsaid += lost / BLOCK_SIZE;
            }
        }
        match (expected, result) {
            (Answer::Fine(sorted, blocks), Ok(lease)) => {
                assert!(blocks <= most, "{blocks} blocks of {most}");
                assert_layout(&lease, &sorted, blocks);
                assert_eq!(lease.is_shareable(), shareable);
                self.guests.push(Guest::new(lease));
            }
            (Answer::Fine(_, blocks), Err(LeaseError::NotEnough { asked, .. })) => {
                assert_eq!(asked, blocks.saturating_mul(BLOCK_SIZE));
                assert!(
                    met || blocks > least,
                    "{blocks} blocks of {least}, {before:?}"
                );
            }
            (Answer::Fine(_, blocks), Err(error)) => {
                let no_pages = shareable
                    && self.knobs.pages == Pages::Huge2M
                    && matches!(error, LeaseError::Share { .. });
                assert!(met || no_pages, "{error}");
                // What could not be had back is in quarantine, and no receipt says so.
                self.unsaid += blocks;
            }
            (answer, Ok(lease)) => panic!("{answer:?}: {lease:?}"),
            (answer, Err(error)) => {
                assert!(layout::is_answer(&answer, &error), "{answer:?}: {error}")
            }
        }
    }
}

/// The lease is what was asked for, and its blocks are its own.
fn assert_layout(lease: &Lease, sorted: &[(u64, u64)], blocks: u64) {
    let found: Vec<(u64, u64)> = lease
        .guest_regions()
        .map(|region| (region.guest_address, region.bytes))
        .collect();
    assert_eq!(found, sorted);
    let count: u64 = lease.blocks().iter().map(|extent| extent.blocks).sum();
    assert_eq!(count, blocks);
}
