//! Every system call that is made for memory that is shared with other processes fails, once and for good: nothing panics, the
//! books add up, nobody gets a dirty byte, whoever asked is told which call it was, and what can come back does.

use std::collections::HashSet;
use vm_scrub::lease::{LeaseError, QuarantineReason};
use vm_scrub::test_support::{Call, inject};
use vm_scrub::{BLOCK_SIZE, Lease, LeaseOptions, PageSize, Pool, ScrubRate};
use vm_scrub_tests::guest::fill_range;
use vm_scrub_tests::walk::{BLOCKS, GUEST, walk_calls};
use vm_scrub_tests::{
    PAGE, assert_adds_up, assert_all_zero, assert_nothing_dirty_left, first_nonzero, pools,
    quiesce, regions, smear, teardown, walks,
};

/// Hugetlb pages for one walk. A window that cannot be closed keeps its file for as long as the process lives.
const HUGE_PAGES: u64 = 2 * BLOCKS + 20 * 4;

fn shareable(pool: &Pool) -> Result<Lease, LeaseError> {
    let options = LeaseOptions::new().shareable(true);
    pool.lease_with(&regions(&GUEST), options)
}

/// Writes to a page at either end of each region: each run of pages is a question to the kernel, and each of those can fail.
fn touch(lease: &Lease) {
    let memory = lease.memory();
    for region in lease.guest_regions() {
        for at in [0, region.bytes - PAGE] {
            fill_range(&memory, region.guest_address + at, PAGE, 2);
        }
    }
}

/// A pool in which everything has been dirty once, and a neighbour in its second block.
fn neighbour(page_size: PageSize, populate: bool) -> (Pool, Lease) {
    let builder = pools::builder(page_size, BLOCKS).threads(1);
    let pool = builder.populate(populate).build().unwrap();
    let [first, second] = [1, 2].map(|seed| {
        let lease = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
        smear(&lease, seed);
        lease
    });
    let rest = pool.lease(&regions(&[(0, 3 * BLOCK_SIZE)])).unwrap();
    smear(&rest, 3);
    assert!(teardown(first).is_proven() && teardown(rest).is_proven());
    // The background thread gets no further than one piece: what is in quarantine stays there until it is asked for.
    pool.set_scrub_rate(Some(ScrubRate {
        bytes_per_second: 1,
        burst: 0,
    }));
    (pool, second)
}

/// The books add up, nothing dirty can be leased, and what is not in quarantine for good comes back.
#[track_caller]
fn assert_sound(pool: &Pool, neighbour: Lease) {
    let accounts = pool.accounts();
    assert_eq!(accounts.total(), BLOCKS * BLOCK_SIZE);
    assert_eq!((accounts.leased, accounts.dirty), (BLOCK_SIZE, 0));
    pool.reclaim();
    let withheld = pool.withheld();
    assert!(withheld.iter().all(|each| each.for_good), "{withheld:?}");
    let for_good: u64 = withheld.iter().map(|each| each.bytes).sum();
    assert_eq!(pool.accounts().quarantined, for_good);
    assert_eq!(first_nonzero(&neighbour), Some(0));
    assert!(teardown(neighbour).is_proven());
    assert_nothing_dirty_left(pool);
}

fn a_guest_is_leased(page_size: PageSize) {
    for populate in [false, true] {
        let mut calls = vec![
            Call::MemfdCreate,
            Call::Ftruncate,
            Call::Fstat,
            Call::AddSeals,
            Call::Mmap,
            Call::Mprotect,
            Call::Madvise,
        ];
        if populate || page_size == PageSize::Huge2M {
            calls.push(Call::Populate);
        }
        walk_calls(&calls, |faults, call, errno, _| {
            let (pool, neighbour) = neighbour(page_size, populate);
            let before = pool.accounts();
            let guard = faults();
            let result = shareable(&pool);
            let hits = guard.hits();
            drop(guard);
            match result {
                Err(LeaseError::Map { source, .. } | LeaseError::Share { source, .. }) => {
                    assert!(hits > 0);
                    let found = (source.call, source.source.raw_os_error());
                    assert_eq!(found, (call, Some(errno)));
                    pool.reclaim();
                    assert_eq!(
                        pool.accounts(),
                        before,
                        "{call:?}: the pool is not as it was"
                    );
                }
                Err(error) => panic!("{call:?} {errno}: {error}"),
                Ok(lease) => {
                    assert_all_zero(&lease);
                    touch(&lease);
                    assert!(teardown(lease).is_proven(), "{call:?} {errno}");
                }
            }
            assert_sound(&pool, neighbour);
            hits > 0
        });
    }
}

fn of_teardown(page_size: PageSize) -> &'static [Call] {
    match page_size {
        PageSize::Huge2M => &[
            Call::Mmap,
            Call::Madvise,
            Call::Mprotect,
            Call::Fstat,
            Call::AddSeals,
            Call::Populate,
            Call::PopulateRead,
            Call::Munmap,
        ],
        _ => &[
            Call::Mmap,
            Call::Madvise,
            Call::Mprotect,
            Call::Fstat,
            Call::AddSeals,
            Call::SeekData,
            Call::Munmap,
        ],
    }
}

fn a_guest_is_torn_down(page_size: PageSize) {
    let mut seen = HashSet::new();
    walk_calls(of_teardown(page_size), |faults, call, errno, _| {
        let (pool, neighbour) = neighbour(page_size, false);
        let lease = shareable(&pool).unwrap();
        touch(&lease);
        let quiesced = quiesce(&lease);
        let guard = faults();
        let result = lease.teardown(quiesced);
        let hits = guard.hits();
        drop(guard);
        let receipt = result.unwrap_or_else(|error| panic!("{call:?} {errno}: {error}"));
        assert_adds_up(&receipt);
        let not_replaced = receipt.quarantined.first();
        let not_replaced =
            not_replaced.is_some_and(|range| range.reason == QuarantineReason::NotReplaced);
        let quarantined = pool.accounts().quarantined;
        // That alone is nothing to be scrubbed, so the background thread may have got it back by now.
        assert!(quarantined == receipt.bytes_quarantined || (not_replaced && quarantined == 0));
        if receipt.bytes_quarantined > 0 {
            assert!(hits > 0);
            // The file goes back as a whole or not at all.
            assert_eq!(receipt.bytes_quarantined, receipt.bytes_total);
            seen.extend(receipt.quarantined.iter().map(|range| range.reason));
            let named = receipt.quarantined.iter();
            let named = named.filter(|range| range.detail.contains(call.name()));
            assert!(named.count() > 0, "{call:?} {errno}: {receipt:?}");
        }
        assert_sound(&pool, neighbour);
        hits > 0
    });
    let mut expected = HashSet::from([
        QuarantineReason::NotRevoked,
        QuarantineReason::SameFile,
        QuarantineReason::NotSealed,
        QuarantineReason::ResidencyUnknown,
    ]);
    if page_size == PageSize::Huge2M {
        expected.insert(QuarantineReason::NotReplaced);
    }
    assert_eq!(seen, expected);
}

/// What a lease that is dropped does by itself. Nobody has seen this one, so it is scrubbed.
fn a_guest_is_dropped(page_size: PageSize) {
    // The pool's own memory is supplied again where it was before.
    let populate = page_size == PageSize::Base4K;
    let mut calls = of_teardown(page_size).to_vec();
    if populate {
        calls.extend([Call::UffdUnregister, Call::Populate, Call::UffdRegister]);
    }
    walk_calls(&calls, |faults, call, errno, _| {
        let (pool, neighbour) = neighbour(page_size, populate);
        let lease = shareable(&pool).unwrap();
        let guard = faults();
        drop(lease);
        let hits = guard.hits();
        drop(guard);
        let quarantined = pool.accounts().quarantined;
        assert!(hits > 0 || quarantined == 0, "{call:?} {errno}");
        assert_sound(&pool, neighbour);
        hits > 0
    });
}

/// What is in quarantine is tried again, and that fails too: it stays where it is until it does not.
fn a_guest_is_tried_again(page_size: PageSize) {
    walk_calls(of_teardown(page_size), |faults, call, errno, _| {
        let (pool, neighbour) = neighbour(page_size, false);
        let lease = shareable(&pool).unwrap();
        touch(&lease);
        let sealing = inject(Call::AddSeals, 0, 1, libc::EPERM);
        let receipt = teardown(lease);
        drop(sealing);
        let quarantined = receipt.bytes_quarantined;
        assert_eq!(quarantined, receipt.bytes_total);

        let guard = faults();
        let back = pool.reclaim();
        let hits = guard.hits();
        drop(guard);
        let accounts = pool.accounts();
        if back == 0 {
            assert!(hits > 0);
            assert_eq!(accounts.quarantined, quarantined);
            let withheld = &pool.withheld()[0];
            assert!(
                withheld.reason.contains(call.name()),
                "{errno}: {withheld:?}"
            );
        } else {
            assert_eq!((back, accounts.quarantined), (quarantined, 0));
        }
        assert_sound(&pool, neighbour);
        assert_eq!(pool.withheld(), []);
        hits > 0
    });
}

/// A peer that lets go a moment later costs a moment, one that does not costs the memory.
#[test]
fn a_busy_file_is_tried_a_few_times() {
    for (times, reason) in [
        (1, None),
        (2, None),
        (3, Some(QuarantineReason::StillShared)),
    ] {
        let (pool, neighbour) = neighbour(PageSize::Base4K, false);
        let lease = shareable(&pool).unwrap();
        touch(&lease);
        let quiesced = quiesce(&lease);
        let guard = inject(Call::AddSeals, 0, times, libc::EBUSY);
        let receipt = lease.teardown(quiesced).unwrap();
        assert_eq!(guard.hits(), times);
        drop(guard);
        assert_adds_up(&receipt);
        let found = receipt.quarantined.first().map(|range| range.reason);
        assert_eq!(found, reason, "{times}");
        assert_eq!(receipt.is_proven(), reason.is_none());
        assert_sound(&pool, neighbour);
    }
}

walks! {
    HUGE_PAGES;
    a_guest_is_leased: lease_4k Base4K, lease_2m Huge2M;
    a_guest_is_torn_down: teardown_4k Base4K, teardown_2m Huge2M;
    a_guest_is_dropped: drop_4k Base4K, drop_2m Huge2M;
    a_guest_is_tried_again: again_4k Base4K, again_2m Huge2M;
}
