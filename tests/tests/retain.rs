//! What a policy does not retain goes back to the kernel: after it was proven to be zero, and never out of quarantine.

use std::ops::Range;
use vm_scrub::test_support::{Call, Sabotage, build_sabotaged, inject};
use vm_scrub::{BLOCK_SIZE, Lease, LeaseOptions, PageSize, Policy, Pool, PoolBuilder, RevokeBy};
use vm_scrub_tests::maps::populated_bytes;
use vm_scrub_tests::{
    PAGE, assert_all_zero, assert_nothing_dirty_left, fill, on_every_page_size,
    on_small_page_sizes, pools, regions, teardown,
};

on_every_page_size!(
    everything_stays_if_not_said_otherwise: 4,
    what_is_beyond_goes: 4,
    nothing_leaves_quarantine: 4,
);
on_small_page_sizes!(
    only_what_was_touched_goes,
    what_is_shared_is_not_what_is_retained,
    what_takes_the_place_of_a_file_is_retained_once
);

fn retaining(page_size: PageSize, bytes: u64) -> PoolBuilder {
    let policy = Policy::new().retain(bytes);
    pools::builder(page_size, 4).threads(1).policy(policy)
}

fn whole(pool: &Pool) -> Lease {
    pool.lease(&regions(&[(0, pool.capacity())])).unwrap()
}

/// How much of a new lease is populated, before anybody has touched it.
fn populated(pool: &Pool) -> u64 {
    let lease = whole(pool);
    let (region, start) = lease.host_addresses().remove(0);
    let window: Range<usize> = start.addr()..start.addr() + region.bytes as usize;
    let bytes = populated_bytes(window);
    assert_all_zero(&lease);
    let _ = teardown(lease);
    bytes
}

fn everything_stays_if_not_said_otherwise(page_size: PageSize) {
    let pool = pools::builder(page_size, 4).build().unwrap();
    let lease = whole(&pool);
    fill(&lease, 1);
    let receipt = teardown(lease);
    assert_eq!(receipt.bytes_returned, 0);
    if page_size != PageSize::Huge2M {
        assert_eq!(populated(&pool), pool.capacity());
    }
}

fn what_is_beyond_goes(page_size: PageSize) {
    for keep in [0, PAGE, BLOCK_SIZE + PAGE, 4 * BLOCK_SIZE, u64::MAX] {
        let pool = retaining(page_size, keep).build().unwrap();
        let lease = whole(&pool);
        fill(&lease, 1);
        let receipt = teardown(lease);
        assert!(receipt.is_proven());
        assert_eq!(receipt.bytes_scrubbed, pool.capacity());
        assert_eq!(receipt.bytes_verified, pool.capacity());
        let beyond = pool.capacity().saturating_sub(keep);
        if page_size == PageSize::Huge2M {
            // Its pages are reserved, and would not come back for certain.
            assert_eq!(receipt.bytes_returned, 0);
        } else {
            assert_eq!(receipt.bytes_returned, beyond);
            assert_eq!(populated(&pool), pool.capacity() - beyond);
        }
        assert_nothing_dirty_left(&pool);
    }
}

/// What was never populated has nothing to give back, and does not stand for what has.
fn only_what_was_touched_goes(page_size: PageSize) {
    let pool = retaining(page_size, 0).build().unwrap();
    let lease = whole(&pool);
    let (_, start) = lease.host_addresses().remove(0);
    // SAFETY: the second block of the lease, to which nobody else has a reference.
    unsafe {
        start
            .add(BLOCK_SIZE as usize)
            .write_bytes(1, BLOCK_SIZE as usize);
    }
    assert_eq!(teardown(lease).bytes_returned, BLOCK_SIZE);
    assert_eq!(populated(&pool), 0);
}

fn nothing_leaves_quarantine(page_size: PageSize) {
    for (sabotage, lost) in [(Sabotage::SkipScrub, 4), (Sabotage::SkipChunk, 1)] {
        let pool = build_sabotaged(retaining(page_size, 0), sabotage).unwrap();
        let lease = whole(&pool);
        fill(&lease, 1);
        let receipt = teardown(lease);
        assert_eq!(receipt.bytes_quarantined, lost * BLOCK_SIZE);
        let returned = match page_size {
            PageSize::Huge2M => 0,
            _ => receipt.bytes_scrubbed,
        };
        assert_eq!(receipt.bytes_returned, returned, "{sabotage:?}");
    }
}

/// A shareable lease's file goes back as a whole, and nothing of what the pool has at the same offsets.
fn what_is_shared_is_not_what_is_retained(page_size: PageSize) {
    let pool = retaining(page_size, BLOCK_SIZE).build().unwrap();
    let options = LeaseOptions::new().shareable(true);
    let lease = pool
        .lease_with(&regions(&[(0, 2 * BLOCK_SIZE)]), options)
        .unwrap();
    fill(&lease, 1);
    let receipt = teardown(lease);
    assert!(receipt.is_proven());
    assert_eq!(receipt.bytes_returned, 0);
    assert_nothing_dirty_left(&pool);
}

/// A pool that is populated gets its memory back behind a shareable lease, but no more of it than any lease leaves behind: also where
/// that was in two places.
fn what_takes_the_place_of_a_file_is_retained_once(page_size: PageSize) {
    let pool = retaining(page_size, BLOCK_SIZE)
        .populate(true)
        .build()
        .unwrap();
    let each = || pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    let [first, second, third, fourth] = [each(), each(), each(), each()];
    for lease in [first, third] {
        assert!(teardown(lease).is_proven());
    }
    let two = regions(&[(0, 2 * BLOCK_SIZE)]);
    let options = LeaseOptions::new().shareable(true);
    let lease = pool.lease_with(&two, options).unwrap();
    assert_eq!(lease.blocks().len(), 2, "not next to each other");
    assert!(teardown(lease).is_proven());
    let lease = pool.lease(&two).unwrap();
    let (region, start) = lease.host_addresses().remove(0);
    let window = start.addr()..start.addr() + region.bytes as usize;
    assert_eq!(populated_bytes(window), BLOCK_SIZE);
    drop((second, fourth));
}

/// A refusal of the kernel costs memory and nothing else.
#[test]
fn what_cannot_be_given_back_stays() {
    // Moving with proof takes other advice, as the kernel is.
    let pool = retaining(PageSize::Base4K, 0)
        .revoke_by(RevokeBy::Mremap)
        .build()
        .unwrap();
    let lease = whole(&pool);
    fill(&lease, 1);
    // Behind the advice with which the memory is taken away from the guest.
    let fault = inject(Call::Madvise, 8, u32::MAX, libc::ENOMEM);
    let receipt = teardown(lease);
    assert_eq!(fault.hits(), 4, "block by block");
    drop(fault);
    assert!(receipt.is_proven());
    assert_eq!(receipt.bytes_returned, 0);
    assert_nothing_dirty_left(&pool);
}
