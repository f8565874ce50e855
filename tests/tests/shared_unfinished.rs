//! Shareable leases that do not end as they should: dropped, given up half-way, sabotaged, sealed by somebody else, pinned, or
//! with a peer that is killed at any moment. Whatever is not proven stays in quarantine.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::Arc;
use std::thread::{scope, sleep};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};
use vm_scrub::lease::{Cancelled, QuarantineReason};
use vm_scrub::test_support::{Sabotage, build_sabotaged};
use vm_scrub::{BLOCK_SIZE, Lease, LeaseOptions, PageSize, Pool, ScrubReceipt};
use vm_scrub_tests::maps::is_readable;
use vm_scrub_tests::peer::{self, Peer};
use vm_scrub_tests::{
    assert_adds_up, assert_all_zero, assert_nothing_dirty_left, fill, on_every_page_size, pool,
    pools, quiesce, regions, teardown,
};

on_every_page_size!(
    dropped_before_anybody_saw_it: 4,
    dropped_after_the_descriptor_got_out: 8,
    dropped_with_a_handle_alive: 8,
    given_up_half_way: 24,
    cancelled_and_finished_by_hand: 4,
    a_scrubber_that_does_nothing_is_caught: 16,
    one_block_that_is_not_zero_keeps_the_whole_file: 16,
    sealed_by_a_peer_against_further_seals: 8,
    pinned_pages_keep_it_from_being_sealed: 8,
    a_peer_is_killed_at_any_moment: 16,
    the_pool_goes_first: 8,
);

#[test]
fn peer() {
    peer::serve();
}

const TAKEN: u64 = 3 * BLOCK_SIZE;

fn shareable(pool: &Pool) -> Lease {
    let layout = regions(&[(0, BLOCK_SIZE), (8 * BLOCK_SIZE, 2 * BLOCK_SIZE)]);
    let options = LeaseOptions::new().shareable(true);
    pool.lease_with(&layout, options).unwrap()
}

fn file(lease: &Lease) -> Arc<File> {
    Arc::clone(lease.file_offsets()[0].1.arc())
}

/// Nothing comes back, now or later, and nothing that is left is dirty.
#[track_caller]
fn assert_quarantined_for_good(pool: &Pool) {
    assert_eq!(pool.reclaim(), 0);
    let accounts = pool.accounts();
    assert_eq!(accounts.quarantined, TAKEN, "{accounts:?}");
    assert_eq!((accounts.leased, accounts.dirty), (0, 0));
    let [withheld] = &pool.withheld()[..] else {
        panic!("{:?}", pool.withheld());
    };
    assert!(withheld.for_good && withheld.bytes == TAKEN, "{withheld:?}");
    assert_nothing_dirty_left(pool);
}

#[track_caller]
fn assert_back(pool: &Pool) {
    assert_eq!(pool.withheld(), []);
    assert_eq!(pool.accounts().clean, pool.capacity());
    assert_nothing_dirty_left(pool);
}

fn dropped_before_anybody_saw_it(page_size: PageSize) {
    let pool = pool(page_size, 4);
    drop(shareable(&pool));
    assert_back(&pool);
}

fn dropped_after_the_descriptor_got_out(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let lease = shareable(&pool);
    let file = file(&lease);
    let (_, start) = lease.host_addresses()[1];
    fill(&lease, 1);
    drop(lease);
    assert!(!is_readable(start.addr()));
    assert_quarantined_for_good(&pool);
    // Whoever has it still has what was in it, and nobody else's.
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_exact_at(&*file, &mut byte, 77).unwrap();
    assert_ne!(byte, [0]);
}

fn dropped_with_a_handle_alive(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let lease = shareable(&pool);
    fill(&lease, 2);
    let memory = lease.memory();
    drop(lease);
    assert_quarantined_for_good(&pool);
    let byte: u8 = memory.read_obj(GuestAddress(8 * BLOCK_SIZE)).unwrap();
    assert_ne!(byte, 0);
    memory.write_obj(0xee_u8, GuestAddress(0)).unwrap();
    drop(memory);
    assert_quarantined_for_good(&pool);
}

fn given_up_half_way(page_size: PageSize) {
    for steps in 0..3 {
        let pool = pool(page_size, 4);
        let lease = shareable(&pool);
        fill(&lease, 3);
        let quiesced = quiesce(&lease);
        let dirty = lease.revoke(quiesced).unwrap();
        match steps {
            0 => drop(dirty),
            1 => drop(dirty.scrub()),
            _ => drop(dirty.scrub().verify()),
        }
        assert_quarantined_for_good(&pool);
    }
}

fn cancelled_and_finished_by_hand(page_size: PageSize) {
    let pool = pool(page_size, 4);
    pool.set_scrub_rate(Some(vm_scrub::ScrubRate {
        bytes_per_second: 1,
        burst: 0,
    }));
    let lease = shareable(&pool);
    fill(&lease, 4);
    let quiesced = quiesce(&lease);
    let Cancelled::Dirty(dirty) = lease.retire(quiesced).unwrap().cancel() else {
        panic!("there is no time in which it could be finished");
    };
    let receipt = dirty.scrub().verify().recycle().unwrap();
    assert_adds_up(&receipt);
    assert!(receipt.is_proven());
    assert_back(&pool);
}

fn sabotaged(page_size: PageSize, sabotage: Sabotage) -> (Pool, ScrubReceipt) {
    let pool = build_sabotaged(pools::builder(page_size, 4), sabotage).unwrap();
    let lease = shareable(&pool);
    fill(&lease, 5);
    let receipt = teardown(lease);
    assert_eq!(receipt.bytes_quarantined, TAKEN);
    assert_quarantined_for_good(&pool);
    (pool, receipt)
}

fn a_scrubber_that_does_nothing_is_caught(page_size: PageSize) {
    let (_, receipt) = sabotaged(page_size, Sabotage::SkipScrub);
    let reasons = receipt.quarantined.iter().map(|range| range.reason);
    assert!(reasons.eq([QuarantineReason::NotZero; 2]), "{receipt:?}");
}

fn one_block_that_is_not_zero_keeps_the_whole_file(page_size: PageSize) {
    let (pool, receipt) = sabotaged(page_size, Sabotage::SkipChunk);
    let found: Vec<(u64, u64, QuarantineReason)> = receipt
        .quarantined
        .iter()
        .map(|range| (range.guest_address, range.bytes, range.reason))
        .collect();
    let expected = [
        (0, BLOCK_SIZE, QuarantineReason::NotZero),
        (8 * BLOCK_SIZE, 2 * BLOCK_SIZE, QuarantineReason::SameFile),
    ];
    assert_eq!(found, expected);
    assert!(pool.withheld()[0].reason.contains("0x1c0000"));
}

fn sealed_by_a_peer_against_further_seals(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let lease = shareable(&pool);
    fill(&lease, 6);
    // SAFETY: fcntl on a descriptor that is open.
    let sealed = unsafe {
        libc::fcntl(
            file(&lease).as_raw_fd(),
            libc::F_ADD_SEALS,
            libc::F_SEAL_SEAL,
        )
    };
    assert_eq!(sealed, 0);
    let receipt = teardown(lease);
    assert_eq!(receipt.bytes_quarantined, TAKEN);
    assert_eq!(receipt.quarantined[0].reason, QuarantineReason::NotSealed);
    assert_eq!(pool.reclaim(), 0);
    assert_eq!(pool.accounts().quarantined, TAKEN);
    assert_nothing_dirty_left(&pool);
}

/// A pipe that holds pages of the guest's memory, as a device does that has pinned them.
fn pin(lease: &Lease) -> (File, File) {
    let mut ends = [0; 2];
    // SAFETY: the array has room for both.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    // SAFETY: the kernel has just made them, and nobody else knows them.
    let [read, write] = ends.map(|end| unsafe { File::from_raw_fd(end) });
    let (_, start) = lease.host_addresses()[1];
    let page = libc::iovec {
        iov_base: start.cast(),
        iov_len: 4096,
    };
    // SAFETY: the page is mapped, and stays what it is while the pipe has it.
    let spliced = unsafe { libc::vmsplice(write.as_raw_fd(), &raw const page, 1, 0) };
    assert_eq!(spliced, 4096);
    (read, write)
}

fn pinned_pages_keep_it_from_being_sealed(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let lease = shareable(&pool);
    fill(&lease, 7);
    let (mut read, write) = pin(&lease);
    let receipt = teardown(lease);
    assert_eq!(receipt.bytes_quarantined, TAKEN);
    assert_eq!(receipt.quarantined[0].reason, QuarantineReason::StillShared);
    assert_eq!(pool.reclaim(), 0);
    assert_nothing_dirty_left(&pool);
    let mut page = [0xff; 4096];
    read.read_exact(&mut page).unwrap();
    drop(write);
    assert_eq!(page, [0; 4096], "it was zeroed nevertheless");
    assert_eq!(pool.reclaim(), TAKEN);
    assert_back(&pool);
}

/// A peer writes to all of the memory as fast as it can, and dies in the middle of the teardown, or before, or later.
fn a_peer_is_killed_at_any_moment(page_size: PageSize) {
    // The same moments each time: multiples of a number that has no pattern, in microseconds.
    for moment in (0..20_u64).map(|round| round * 1_618 % 8_000) {
        let pool = pool(page_size, 4);
        let lease = shareable(&pool);
        let mut peer = Peer::with(&file(&lease));
        assert_eq!(peer.map(), 0);
        peer.fill_for_ever();
        let receipt = scope(|scope| {
            scope.spawn(|| {
                sleep(Duration::from_micros(moment));
                peer.kill();
            });
            sleep(Duration::from_millis(4));
            teardown(lease)
        });
        let lost = receipt.bytes_quarantined;
        assert!(lost == 0 || lost == TAKEN);
        pool.reclaim();
        let withheld = pool.withheld();
        // What it wrote between the scrubbing and the sealing cannot be zeroed any more.
        assert!(withheld.iter().all(|each| each.for_good), "{withheld:?}");
        let for_good: u64 = withheld.iter().map(|each| each.bytes).sum();
        assert_eq!(pool.accounts().quarantined, for_good);
        assert_nothing_dirty_left(&pool);
    }
}

fn the_pool_goes_first(page_size: PageSize) {
    // With the lease alive.
    let pool = self::pool(page_size, 4);
    let lease = shareable(&pool);
    fill(&lease, 8);
    drop(pool);
    assert!(teardown(lease).is_proven());

    // With memory in quarantine, and the background thread at it.
    let pool = self::pool(page_size, 4);
    let lease = shareable(&pool);
    let file = file(&lease);
    let mut peer = Peer::with(&file);
    assert_eq!(peer.map(), 0);
    assert_eq!(teardown(lease).bytes_quarantined, TAKEN);
    drop(pool);
    peer.fill();
    let other = self::pool(page_size, 4);
    let lease = shareable(&other);
    assert_all_zero(&lease);
    assert!(teardown(lease).is_proven());
}
