//! Memory that another process was given: taken away from it, or not leased again before it is.

use std::collections::HashSet;
use std::fs::File;
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vm_scrub::lease::QuarantineReason;
use vm_scrub::test_support::{Call, inject};
use vm_scrub::{
    BLOCK_SIZE, Lease, LeaseOptions, PageSize, Policy, Pool, Revocation, ScrubReceipt, Withheld,
};
use vm_scrub_tests::child::alone;
use vm_scrub_tests::maps::{is_readable, mappings, populated_bytes};
use vm_scrub_tests::peer::{self, Peer};
use vm_scrub_tests::{
    HugePages, assert_all_zero, assert_nothing_dirty_left, fill, huge_pages, on_every_page_size,
    on_small_page_sizes, pool, pools, quiesce, regions, smear, teardown,
};

/// Blocks of each pool, and of each guest.
const BLOCKS: u64 = 3;
const GUEST: [(u64, u64); 2] = [(0, BLOCK_SIZE), (8 * BLOCK_SIZE, 2 * BLOCK_SIZE)];

// Twice as many pages as the pool has: those that a peer keeps are not there for others.
on_every_page_size!(
    it_looks_like_memory_with_a_file: 6,
    a_peer_that_still_maps_it_keeps_it_from_being_leased: 6,
    a_peer_that_lets_go_in_time_is_no_hindrance: 6,
    a_peer_that_keeps_the_descriptor_reads_zeros_for_ever: 6,
    a_readable_mapping_counts_unless_it_can_never_be_written: 9,
    the_background_gets_it_back: 6,
    a_lease_that_needs_it_gets_it_back: 6,
    a_retired_lease_is_sealed_too: 6,
    a_pool_lends_its_own_memory_meanwhile: 3,
    a_pool_that_is_populated_stays_so: 3,
    memory_that_could_not_be_populated_is_revoked_with_proof_all_the_same: 3,
);
on_small_page_sizes!(a_pool_that_is_not_populated_stays_so);

/// Tears an ordinary lease down, which is proven and revoked as in a pool that has shared nothing.
fn taken_back_as_ever(lease: Lease, page_size: PageSize) {
    let receipt = teardown(lease);
    assert!(receipt.is_proven());
    assert_eq!(
        receipt.revocation,
        vm_scrub_tests::maps::revocation(page_size)
    );
}

#[test]
fn peer() {
    peer::serve();
}

fn lease(pool: &Pool) -> Lease {
    let options = LeaseOptions::new().guest("shared").shareable(true);
    pool.lease_with(&regions(&GUEST), options).unwrap()
}

fn file(lease: &Lease) -> Arc<File> {
    Arc::clone(lease.file_offsets()[0].1.arc())
}

/// A teardown that leaves all of the guest's memory with its peer, and what the pool says about that.
#[track_caller]
fn withheld(pool: &Pool, lease: Lease) -> Withheld {
    let receipt = teardown(lease);
    assert_eq!(receipt.bytes_quarantined, receipt.bytes_total);
    assert_eq!(receipt.revocation, Revocation::ViewReplaced);
    for range in &receipt.quarantined {
        assert_eq!(range.reason, QuarantineReason::StillShared, "{range:?}");
        assert!(range.detail.contains("F_ADD_SEALS"), "{range:?}");
    }
    assert_eq!(pool.accounts().quarantined, BLOCKS * BLOCK_SIZE);
    let [withheld] = &pool.withheld()[..] else {
        panic!("{:?}", pool.withheld());
    };
    assert_eq!(withheld.lease, receipt.lease);
    assert_eq!(withheld.guest.as_deref(), Some("shared"));
    assert_eq!(withheld.bytes, BLOCKS * BLOCK_SIZE);
    assert!(!withheld.for_good && withheld.reason.contains("F_ADD_SEALS"));
    withheld.clone()
}

#[track_caller]
fn proven(receipt: &ScrubReceipt) {
    assert!(receipt.is_proven(), "{receipt:?}");
    assert_eq!(receipt.revocation, Revocation::Sealed);
}

/// All of the pool is clean and can be leased, and zero.
#[track_caller]
fn assert_back(pool: &Pool) {
    assert_eq!(pool.withheld(), []);
    assert_eq!(pool.accounts().clean, pool.capacity());
    assert_nothing_dirty_left(pool);
}

fn it_looks_like_memory_with_a_file(page_size: PageSize) {
    let pool = pool(page_size, BLOCKS);
    let lease = lease(&pool);
    assert!(lease.is_shareable());
    let expected = match page_size {
        PageSize::Transparent => PageSize::Base4K,
        page_size => page_size,
    };
    assert_eq!(lease.page_size(), expected);
    assert_all_zero(&lease);
    fill(&lease, 3);

    let memory = lease.memory();
    let mut offsets = HashSet::new();
    for (region, (place, at)) in memory.iter().zip(lease.file_offsets()) {
        assert_eq!(region.flags(), libc::MAP_SHARED);
        let offset = region.file_offset().unwrap();
        assert_eq!(place.guest_address, region.start_addr().0);
        assert!(Arc::ptr_eq(offset.arc(), at.arc()));
        assert_eq!(offset.start(), at.start());
        assert!(offset.start().is_multiple_of(BLOCK_SIZE) && offsets.insert(offset.start()));
        // What the guest has written is there.
        let mut first = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(offset.file(), &mut first, at.start()).unwrap();
        let mut same = [0; 8];
        vm_memory::Bytes::read_slice(region, &mut same, vm_memory::MemoryRegionAddress(0)).unwrap();
        assert!(first == same && first != [0; 8]);
    }
    drop(memory);
    let receipt = teardown(lease);
    proven(&receipt);
    assert_eq!(receipt.bytes_scrubbed, receipt.bytes_total);
    assert_back(&pool);

    // Leases of both kinds side by side, and one that is not shareable has no file.
    let ordinary = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    assert!(!ordinary.is_shareable() && ordinary.file_offsets().is_empty());
    let options = LeaseOptions::new().shareable(true);
    let shareable = pool
        .lease_with(&regions(&[(0, BLOCK_SIZE)]), options)
        .unwrap();
    fill(&ordinary, 1);
    smear(&shareable, 2);
    let receipt = teardown(shareable);
    proven(&receipt);
    if page_size != PageSize::Huge2M {
        assert!(receipt.bytes_never_populated > 0, "{receipt:?}");
    }
    assert!(teardown(ordinary).is_proven());
    assert_back(&pool);
}

fn a_peer_that_still_maps_it_keeps_it_from_being_leased(page_size: PageSize) {
    let pool = pool(page_size, BLOCKS);
    let lease = lease(&pool);
    let (_, start) = lease.host_addresses().remove(0);
    let mut peer = Peer::with(&file(&lease));
    assert_eq!(peer.map(), 0);
    peer.fill();
    let before = withheld(&pool, lease);
    assert!(!is_readable(start.addr()), "the guest's window is closed");
    assert!(pool.lease(&regions(&[(0, BLOCK_SIZE)])).is_err());
    // It was zeroed nevertheless; the peer writes again, and does not let go of it by closing the descriptor.
    assert_eq!(peer.count_mapped(), 0);
    peer.fill();
    peer.close();
    assert_eq!(pool.reclaim(), 0);
    let [after] = &pool.withheld()[..] else {
        panic!("{:?}", pool.withheld());
    };
    assert!(after.attempts > before.attempts);
    assert_eq!(pool.accounts().quarantined, BLOCKS * BLOCK_SIZE);

    peer.fill();
    peer.kill();
    pool.reclaim();
    assert_back(&pool);
}

fn a_peer_that_lets_go_in_time_is_no_hindrance(page_size: PageSize) {
    let pool = pool(page_size, BLOCKS);
    let lease = lease(&pool);
    let mut peer = Peer::with(&file(&lease));
    assert_eq!(peer.map(), 0);
    peer.fill();
    peer.unmap();
    peer.close();
    let receipt = teardown(lease);
    proven(&receipt);
    assert_eq!(
        receipt.bytes_scrubbed, receipt.bytes_total,
        "the peer wrote to all of it"
    );
    assert_back(&pool);
}

/// What the kernel answers who writes to a sealed file. A hugetlb file cannot be written to by its descriptor at all.
fn refused(page_size: PageSize) -> i32 {
    match page_size {
        PageSize::Huge2M => libc::EINVAL,
        _ => libc::EPERM,
    }
}

fn a_peer_that_keeps_the_descriptor_reads_zeros_for_ever(page_size: PageSize) {
    let pool = pool(page_size, BLOCKS);
    let lease = lease(&pool);
    let mut peer = Peer::with(&file(&lease));
    assert_eq!(peer.map(), 0);
    peer.fill();
    assert!(peer.count() > 0);
    peer.unmap();
    proven(&teardown(lease));

    let next = pool.lease(&regions(&GUEST)).unwrap();
    fill(&next, 7);
    assert_eq!(
        (peer.write(), peer.map()),
        (refused(page_size), libc::EPERM)
    );
    assert_eq!(peer.count(), 0);
    peer.map_readable();
    assert_eq!(peer.count_mapped(), 0);
    assert!(teardown(next).is_proven());

    let next = self::lease(&pool);
    fill(&next, 9);
    assert_eq!(
        (peer.write(), peer.count(), peer.count_mapped()),
        (refused(page_size), 0, 0)
    );
    proven(&teardown(next));
    peer.kill();
    assert_back(&pool);
}

fn a_readable_mapping_counts_unless_it_can_never_be_written(page_size: PageSize) {
    let pool = pool(page_size, BLOCKS);
    // `mprotect` would make it writable.
    let lease = lease(&pool);
    fill(&lease, 1);
    let mut peer = Peer::with(&file(&lease));
    peer.map_readable();
    assert!(peer.count_mapped() > 0);
    withheld(&pool, lease);
    peer.unmap();
    pool.reclaim();
    assert_back(&pool);
    drop(peer);

    let lease = self::lease(&pool);
    fill(&lease, 1);
    let mut peer = Peer::with(&file(&lease));
    peer.map_reopened();
    assert!(peer.count_mapped() > 0);
    proven(&teardown(lease));
    let next = pool.lease(&regions(&GUEST)).unwrap();
    fill(&next, 2);
    assert_eq!((peer.count_mapped(), peer.count()), (0, 0));
    assert!(teardown(next).is_proven());
}

/// Waits for something that is certain to happen.
#[track_caller]
fn eventually(what: impl Fn() -> bool) {
    let begun = Instant::now();
    while !what() {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "it does not happen"
        );
        sleep(Duration::from_millis(5));
    }
}

fn the_background_gets_it_back(page_size: PageSize) {
    let pool = pool(page_size, BLOCKS);
    let lease = lease(&pool);
    let mut peer = Peer::with(&file(&lease));
    assert_eq!(peer.map(), 0);
    peer.fill();
    withheld(&pool, lease);
    eventually(|| pool.withheld()[0].attempts >= 2);
    peer.fill();
    peer.kill();
    eventually(|| pool.accounts().quarantined == 0);
    assert_back(&pool);
}

fn a_lease_that_needs_it_gets_it_back(page_size: PageSize) {
    let pool = pool(page_size, BLOCKS);
    // Nothing happens in the background: it waits for the throttle for ever.
    pool.set_scrub_rate(Some(vm_scrub::ScrubRate {
        bytes_per_second: 0,
        burst: 0,
    }));
    let lease = lease(&pool);
    let mut peer = Peer::with(&file(&lease));
    assert_eq!(peer.map(), 0);
    peer.fill();
    withheld(&pool, lease);
    assert!(pool.lease(&regions(&GUEST)).is_err());
    peer.kill();
    let next = pool.lease(&regions(&GUEST)).unwrap();
    assert_all_zero(&next);
    assert_eq!(pool.withheld(), []);
    assert!(teardown(next).is_proven());
    assert_back(&pool);
}

fn a_retired_lease_is_sealed_too(page_size: PageSize) {
    let pool = pool(page_size, BLOCKS);
    let lease = lease(&pool);
    fill(&lease, 5);
    let quiesced = quiesce(&lease);
    let ticket = lease.retire(quiesced).unwrap();
    let receipt = ticket.wait_in_background().unwrap();
    proven(&receipt);
    assert_back(&pool);

    let lease = self::lease(&pool);
    let mut peer = Peer::with(&file(&lease));
    assert_eq!(peer.map(), 0);
    peer.fill();
    let quiesced = quiesce(&lease);
    let begun = Instant::now();
    let receipt = lease.retire(quiesced).unwrap().wait().unwrap();
    // A peer has a moment to let go, and ten more.
    assert!(begun.elapsed() >= Duration::from_millis(11));
    assert_eq!(receipt.bytes_quarantined, receipt.bytes_total);
    for range in &receipt.quarantined {
        assert_eq!(range.reason, QuarantineReason::StillShared, "{range:?}");
    }
    assert_eq!(pool.withheld().len(), 1);
    peer.kill();
    pool.reclaim();
    assert_back(&pool);
}

/// The host has as many hugetlb pages as the pool, and no more.
fn a_pool_lends_its_own_memory_meanwhile(page_size: PageSize) {
    let pool = pool(page_size, BLOCKS);
    for round in 1..4 {
        let ordinary = pool.lease(&regions(&GUEST)).unwrap();
        fill(&ordinary, round);
        assert!(teardown(ordinary).is_proven());
        let shareable = lease(&pool);
        fill(&shareable, round);
        proven(&teardown(shareable));
    }
    assert_back(&pool);
}

/// What the kernel has only promised to a pool of hugetlb pages, it goes on promising until there is a page to be given back. The
/// host has as many as the pool.
#[test]
fn a_pool_that_nobody_has_touched_lends_its_memory_too() {
    let Some(_reserved) = HugePages::reserve_alone(BLOCKS) else {
        return;
    };
    let pool = pool(PageSize::Huge2M, BLOCKS);
    let others = Some(huge_pages::free()).filter(|pages| *pages > 0);
    let others = others.map(|pages| vm_scrub_tests::pool(PageSize::Huge2M, pages));
    let shareable = lease(&pool);
    fill(&shareable, 1);
    proven(&teardown(shareable));
    assert_back(&pool);
    drop(others);
}

/// No guest waits for the kernel in a pool that was populated up front, neither does one that comes after a shareable lease.
fn a_pool_that_is_populated_stays_so(page_size: PageSize) {
    let builder = pools::builder(page_size, BLOCKS).populate(true);
    let pool = builder.build().unwrap();
    for round in 1..4 {
        let shareable = lease(&pool);
        fill(&shareable, round);
        proven(&teardown(shareable));
        let ordinary = pool.lease(&regions(&GUEST)).unwrap();
        for (region, start) in ordinary.host_addresses() {
            let window = start.addr()..start.addr() + region.bytes as usize;
            assert_eq!(populated_bytes(window), region.bytes);
        }
        fill(&ordinary, round);
        taken_back_as_ever(ordinary, page_size);
    }
    assert_back(&pool);

    // But for what a lease may not leave behind.
    if page_size != PageSize::Huge2M {
        let policy = Policy::new().retain(BLOCK_SIZE + 4096);
        let builder = pools::builder(page_size, BLOCKS).populate(true);
        let pool = builder.policy(policy).build().unwrap();
        proven(&teardown(lease(&pool)));
        let all = regions(&[(0, BLOCKS * BLOCK_SIZE)]);
        let all = pool.lease(&all).unwrap();
        let (region, start) = all.host_addresses().remove(0);
        let window = start.addr()..start.addr() + region.bytes as usize;
        assert_eq!(populated_bytes(window), BLOCK_SIZE);
    }
}

/// What a shareable lease has taken the place of is not supplied before a guest needs it.
fn a_pool_that_is_not_populated_stays_so(page_size: PageSize) {
    let pool = pool(page_size, BLOCKS);
    // Given back to the kernel for the time of the next one.
    let ordinary = pool.lease(&regions(&GUEST)).unwrap();
    fill(&ordinary, 1);
    assert!(teardown(ordinary).is_proven());
    for round in 2..4 {
        let shareable = lease(&pool);
        fill(&shareable, round);
        proven(&teardown(shareable));
    }
    let ordinary = pool.lease(&regions(&GUEST)).unwrap();
    for (region, start) in ordinary.host_addresses() {
        let window = start.addr()..start.addr() + region.bytes as usize;
        assert_eq!(populated_bytes(window), 0);
    }
    assert!(teardown(ordinary).is_proven());
}

fn memory_that_could_not_be_populated_is_revoked_with_proof_all_the_same(page_size: PageSize) {
    let builder = pools::builder(page_size, BLOCKS).populate(true).threads(1);
    let pool = builder.build().unwrap();
    let shareable = lease(&pool);
    fill(&shareable, 1);
    let quiesced = quiesce(&shareable);
    let none_left = inject(Call::Populate, 0, u32::MAX, libc::ENOMEM);
    let receipt = shareable.teardown(quiesced).unwrap();
    assert!(none_left.hits() > 0);
    drop(none_left);
    if page_size != PageSize::Huge2M {
        proven(&receipt);
    }
    pool.reclaim();
    let ordinary = pool.lease(&regions(&GUEST)).unwrap();
    fill(&ordinary, 2);
    taken_back_as_ever(ordinary, page_size);
    assert_back(&pool);
}

/// While memory that was shared is read back, it is in a mapping of its own, made when the file was sealed.
#[test]
fn what_is_read_back_of_a_sealed_file_is_kept_from_children_and_dumps() {
    let test = "what_is_read_back_of_a_sealed_file_is_kept_from_children_and_dumps";
    alone(test, || {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        let pool = pools::builder(PageSize::Base4K, 1)
            .threads(1)
            .on_progress(move |_| {
                let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
                let views = maps
                    .lines()
                    .filter(|line| line.contains("memfd:vm-scrub-shared"));
                for view in views.filter(|line| line.contains(" r--s ")) {
                    let start = view.split_once('-').unwrap().0;
                    let start = usize::from_str_radix(start, 16).unwrap();
                    sink.lock().unwrap().extend(mappings(start..start + 1));
                }
            })
            .build()
            .unwrap();
        assert!(teardown(pools::dirty_shareable_block(&pool)).is_proven());
        let seen = seen.lock().unwrap();
        assert!(!seen.is_empty(), "nothing was read back");
        for view in &*seen {
            assert!(view.has("dc") && view.has("dd"), "{view:?}");
        }
    });
}
