//! Pools of a few blocks, teardowns that are expected to work, and the question whether anything dirty can be leased.

use vm_memory::GuestAddress;
use vm_scrub::lease::Outcome;
use vm_scrub::{
    BLOCK_SIZE, Lease, LeaseOptions, PageSize, Pool, PoolBuilder, Quiesced, ScrubReceipt, Verify,
};

use crate::{assert_all_zero, fill};

/// The smallest page, in bytes.
pub const PAGE: u64 = 4096;

/// A pool of `blocks` blocks that is scrubbed by two threads.
pub fn pool(page_size: PageSize, blocks: u64) -> Pool {
    builder(page_size, blocks)
        .build()
        .expect("a small pool can be built")
}

/// What [`pool`] builds, to be changed.
pub fn builder(page_size: PageSize, blocks: u64) -> PoolBuilder {
    Pool::builder()
        .capacity(blocks * BLOCK_SIZE)
        .page_size(page_size)
        .threads(2)
}

/// Guest addresses and lengths in bytes, as [`Pool::lease`] takes them.
pub fn regions(regions: &[(u64, u64)]) -> Vec<(GuestAddress, u64)> {
    regions
        .iter()
        .map(|&(address, bytes)| (GuestAddress(address), bytes))
        .collect()
}

/// The statement that a test's lease is not in use any more.
pub fn quiesce(lease: &Lease) -> Quiesced {
    // SAFETY: no test gives a lease's memory to a vCPU or a device before it calls this, and threads that write to one
    // have been joined.
    unsafe { Quiesced::assert(lease) }
}

/// Tears a lease down that nobody uses, and checks the sums in its receipt.
#[track_caller]
pub fn teardown(lease: Lease) -> ScrubReceipt {
    let (id, bytes) = (lease.id(), lease.bytes());
    let blocks = lease.blocks().to_vec();
    let quiesced = quiesce(&lease);
    let receipt = lease
        .teardown(quiesced)
        .unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(
        (receipt.lease, receipt.bytes_total, &receipt.blocks),
        (id, bytes, &blocks)
    );
    assert_adds_up(&receipt);
    receipt
}

/// Panics if the sums in a receipt do not hold, or if its outcome does not follow from them.
#[track_caller]
pub fn assert_adds_up(receipt: &ScrubReceipt) {
    assert_eq!(
        receipt.bytes_scrubbed + receipt.bytes_never_populated + receipt.bytes_quarantined,
        receipt.bytes_total,
        "{receipt:?}"
    );
    let in_regions: u64 = receipt.regions.iter().map(|region| region.bytes).sum();
    assert_eq!(in_regions, receipt.bytes_total, "{receipt:?}");
    let listed: u64 = receipt.quarantined.iter().map(|range| range.bytes).sum();
    assert_eq!(listed, receipt.bytes_quarantined, "{receipt:?}");
    let (read_back, outcome) = match receipt.verify {
        Verify::None => (0, Outcome::Unverified),
        Verify::Sampled { .. } => (receipt.bytes_verified, Outcome::Sampled),
        _ => (receipt.bytes_scrubbed, Outcome::Proven),
    };
    assert_eq!(receipt.bytes_verified, read_back, "{receipt:?}");
    let expected = if receipt.bytes_quarantined > 0 {
        Outcome::Quarantined
    } else {
        outcome
    };
    assert_eq!(receipt.outcome, expected, "{receipt:?}");
    assert_eq!(
        receipt.is_proven(),
        receipt.outcome == Outcome::Proven,
        "{receipt:?}"
    );
}

/// Leases everything that the pool has left and panics if a byte of it is not zero, or if the books are wrong.
///
/// The blocks come in leases of one block each, so that not one of them can hide.
#[track_caller]
pub fn assert_nothing_dirty_left(pool: &Pool) {
    let before = pool.accounts();
    assert_eq!(before.total(), pool.capacity());
    let mut leases = Vec::new();
    while let Ok(lease) = pool.lease(&regions(&[(0, BLOCK_SIZE)])) {
        assert_all_zero(&lease);
        leases.push(lease);
    }
    assert_eq!(
        leases.len() as u64 * BLOCK_SIZE,
        before.clean,
        "what the books call clean can be leased"
    );
    let all = pool.accounts();
    assert_eq!((all.clean, all.total()), (0, before.total()));
    for lease in leases {
        assert!(teardown(lease).bytes_quarantined == 0);
    }
    assert_eq!(pool.accounts(), before);
}

/// A shareable lease of one block, written all over.
pub fn dirty_shareable_block(pool: &Pool) -> Lease {
    dirty_block(pool, true)
}

/// A lease of one block, written all over.
pub fn dirty_block(pool: &Pool, shareable: bool) -> Lease {
    let options = LeaseOptions::new().shareable(shareable);
    let lease = pool
        .lease_with(&regions(&[(0, BLOCK_SIZE)]), options)
        .unwrap();
    fill(&lease, 0x5e);
    lease
}
