//! What the threads of one pool know together: who has which block, what was given up for good, and what one thread leaves for another.

use super::random::Random;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use vm_memory::MmapRegion;
use vm_scrub::lease::{Cancelled, Outcome, QuarantineReason, QuarantinedRange};
use vm_scrub::{Extent, Lease, Pool, Priority, ScrubReceipt, Ticket};
use vm_scrub_tests::assert_adds_up;

/// Blocks that all threads together may give up in a pool, so that there is something left to lease.
const MAY_BE_LOST: u64 = 8;

/// A pool and what is known about it.
pub(crate) struct Arena {
    pool: Pool,
    /// Whether a guest has the block.
    out: Vec<AtomicBool>,
    /// Blocks that may still be given up.
    to_lose: AtomicU64,
    /// Blocks of leases that nobody gives back.
    forgotten: AtomicU64,
    /// Those leases. They end with the pool, whose memory would otherwise stay behind.
    stranded: Mutex<Vec<Lease>>,
    /// Blocks that went into quarantine for good.
    lost: AtomicU64,
    leases: AtomicU64,
    present: AtomicUsize,
    /// Tickets for whoever comes by, with the number of blocks.
    tickets: Mutex<Vec<(Ticket, u64)>>,
    /// Other mappings of shareable leases' memory.
    mappings: Mutex<Vec<MmapRegion>>,
}

/// A guest's thread that has not ended.
pub(crate) struct Presence<'a>(&'a AtomicUsize);

impl Drop for Presence<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn count(blocks: &[Extent]) -> u64 {
    blocks.iter().map(|extent| extent.blocks).sum()
}

impl Arena {
    pub(crate) fn new(pool: &Pool, blocks: u64) -> Self {
        Self {
            pool: pool.clone(),
            out: (0..blocks).map(|_| AtomicBool::new(false)).collect(),
            to_lose: AtomicU64::new(MAY_BE_LOST),
            forgotten: AtomicU64::new(0),
            stranded: Mutex::default(),
            lost: AtomicU64::new(0),
            leases: AtomicU64::new(0),
            present: AtomicUsize::new(super::GUESTS),
            tickets: Mutex::default(),
            mappings: Mutex::default(),
        }
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Counts the calling thread out at the end, also when it panics.
    pub(crate) fn presence(&self) -> Presence<'_> {
        Presence(&self.present)
    }

    pub(crate) fn anybody_left(&self) -> bool {
        self.present.load(Ordering::SeqCst) > 0
    }

    /// A guest has got these blocks.
    pub(crate) fn arrive(&self, blocks: &[Extent]) {
        self.leases.fetch_add(1, Ordering::Relaxed);
        self.mark(blocks, true);
    }

    /// A guest is about to give these blocks back: afterwards they may be somebody else's at once.
    pub(crate) fn leave(&self, blocks: &[Extent]) {
        self.mark(blocks, false);
    }

    fn mark(&self, blocks: &[Extent], out: bool) {
        for block in blocks
            .iter()
            .flat_map(|extent| extent.first..extent.first + extent.blocks)
        {
            let before = self.out[block as usize].swap(out, Ordering::SeqCst);
            assert_ne!(before, out, "block {block} is in two hands");
        }
    }

    fn may_lose(&self, blocks: u64) -> bool {
        self.to_lose
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(blocks)
            })
            .is_ok()
    }

    /// Whether these blocks may go into quarantine for good; then they count as gone there. Their marks stay.
    pub(crate) fn lose(&self, blocks: &[Extent]) -> bool {
        let may = self.may_lose(count(blocks));
        if may {
            self.lost.fetch_add(count(blocks), Ordering::Relaxed);
        }
        may
    }

    /// The same for a lease that is never given back.
    pub(crate) fn forget(&self, blocks: &[Extent]) -> bool {
        let may = self.may_lose(count(blocks));
        if may {
            self.forgotten.fetch_add(count(blocks), Ordering::Relaxed);
        }
        may
    }

    /// Leaves a lease as it is, for as long as there are guests.
    pub(crate) fn strand(&self, lease: Lease) {
        self.stranded.lock().unwrap().push(lease);
    }

    /// Blocks that were forgotten, and blocks that were lost.
    pub(crate) fn gone(&self) -> (u64, u64) {
        let of = |blocks: &AtomicU64| blocks.load(Ordering::Relaxed);
        (of(&self.forgotten), of(&self.lost))
    }

    pub(crate) fn leases(&self) -> u64 {
        self.leases.load(Ordering::Relaxed)
    }

    pub(crate) fn keep_mapping(&self, mapping: MmapRegion) {
        self.mappings.lock().unwrap().push(mapping);
    }

    /// Lets go of everything that other mappings reach.
    pub(crate) fn let_go(&self) {
        self.mappings.lock().unwrap().clear();
    }

    pub(crate) fn leave_ticket(&self, ticket: Ticket, blocks: &[Extent]) {
        self.tickets.lock().unwrap().push((ticket, count(blocks)));
    }

    pub(crate) fn has_tickets(&self) -> bool {
        !self.tickets.lock().unwrap().is_empty()
    }

    /// Ends a ticket that somebody has left, in some way.
    pub(crate) fn finish_a_ticket(&self, random: &mut Random) {
        let next = {
            let mut tickets = self.tickets.lock().unwrap();
            let many = tickets.len() as u64;
            (many > 0).then(|| tickets.swap_remove(random.below(many) as usize))
        };
        if let Some((ticket, blocks)) = next {
            self.finish(ticket, blocks, random);
        }
    }

    /// Ends a ticket in some way; those of so many blocks.
    pub(crate) fn finish(&self, ticket: Ticket, blocks: u64, random: &mut Random) {
        let progress = ticket.progress();
        assert!(progress.bytes_done <= progress.bytes_total);
        match random.below(6) {
            0 => check(&ticket.wait().unwrap()),
            1 => {
                ticket.set_priority(Priority::High);
                check(&ticket.wait_in_background().unwrap());
            }
            2 => {
                ticket.set_priority(Priority::Low);
                drop(ticket);
            }
            3 => drop(ticket),
            _ => match ticket.cancel() {
                Cancelled::Finished(receipt) => check(&receipt.unwrap()),
                Cancelled::Dirty(dirty) if random.one_in(2) && self.may_lose(blocks) => {
                    self.lost.fetch_add(blocks, Ordering::Relaxed);
                    drop(dirty);
                }
                Cancelled::Dirty(dirty) => check(&dirty.scrub_and_verify().recycle().unwrap()),
            },
        }
    }
}

/// All of it is proven, or withheld because another mapping of it was left, or because it was cancelled once it was sealed.
pub(crate) fn check(receipt: &ScrubReceipt) {
    assert_adds_up(receipt);
    assert!(
        matches!(receipt.outcome, Outcome::Proven | Outcome::Quarantined),
        "{receipt:?}"
    );
    if receipt.outcome == Outcome::Quarantined {
        let withheld = |range: &QuarantinedRange| {
            let reason = range.reason;
            [QuarantineReason::StillShared, QuarantineReason::NotReadBack].contains(&reason)
        };
        assert!(receipt.quarantined.iter().all(withheld), "{receipt:?}");
    }
}
