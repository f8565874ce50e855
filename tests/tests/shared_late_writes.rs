//! Writes to shared memory that come when it has been scrubbed and before it is sealed: each is found, or made undone.
//!
//! The progress callback is the clock: it says when the last piece has been zeroed.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use vm_scrub::lease::QuarantineReason;
use vm_scrub::test_support::{Call, inject};
use vm_scrub::{BLOCK_SIZE, Lease, LeaseOptions, PageSize, Pool, Progress, ScrubReceipt};
use vm_scrub_tests::guest::fill_range;
use vm_scrub_tests::{
    PAGE, assert_nothing_dirty_left, on_every_page_size, on_small_page_sizes, pools, quiesce,
    regions, teardown,
};

on_every_page_size!(
    a_write_to_scrubbed_memory_is_found: 8,
    a_write_is_found_also_by_who_looks_later: 8,
    a_write_before_the_second_attempt_is_made_undone: 8,
);
on_small_page_sizes!(
    a_write_where_nothing_was_is_found,
    a_write_behind_the_guests_regions_is_found,
);

/// Where a write is to go to, once.
type Plan = Arc<Mutex<Option<(Arc<File>, u64)>>>;

/// Writes a byte as another process with the descriptor would: by a mapping that is gone at once.
fn write(file: &File, offset: u64) {
    let len = file.metadata().unwrap().len() as usize;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a mapping at a place of the kernel's choice, written to inside its length, and unmapped.
    unsafe {
        let mapping = libc::mmap(
            std::ptr::null_mut(),
            len,
            protection,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(mapping, libc::MAP_FAILED);
        mapping.cast::<u8>().add(offset as usize).write_volatile(1);
        assert_eq!(libc::munmap(mapping, len), 0);
    }
}

/// A guest with a page at its start, torn down while a byte is written at `offset` of its file right after scrubbing. The
/// sealing fails `busy` times.
fn torn_down(page_size: PageSize, bytes: u64, offset: u64, busy: u32) -> (Pool, ScrubReceipt) {
    let (pool, lease, plan) = planned(page_size, bytes, offset);
    let sealing = inject(Call::AddSeals, 0, busy, libc::EBUSY);
    let receipt = teardown(lease);
    assert_eq!(sealing.hits(), busy);
    assert!(plan.lock().unwrap().is_none(), "it was not written");
    (pool, receipt)
}

/// The same guest, retired, and scrubbed by whoever waits. Of its progress, the second half is reading back what is sealed.
fn retired(page_size: PageSize, bytes: u64, offset: u64) -> (Pool, ScrubReceipt) {
    let (pool, lease, plan) = planned_when(page_size, bytes, offset, |progress| {
        2 * progress.bytes_done == progress.bytes_total
    });
    let quiesced = quiesce(&lease);
    let receipt = lease.retire(quiesced).unwrap().wait().unwrap();
    assert!(plan.lock().unwrap().is_none(), "it was not written");
    (pool, receipt)
}

/// The same guest before it is torn down.
fn planned(page_size: PageSize, bytes: u64, offset: u64) -> (Pool, Lease, Plan) {
    planned_when(page_size, bytes, offset, |progress| {
        progress.bytes_done == progress.bytes_total
    })
}

/// The same, with the moment for the write.
fn planned_when(
    page_size: PageSize,
    bytes: u64,
    offset: u64,
    is_time: fn(&Progress) -> bool,
) -> (Pool, Lease, Plan) {
    let plan = Plan::default();
    let planned = Arc::clone(&plan);
    let pool = pools::builder(page_size, 3)
        .threads(1)
        .on_progress(move |progress| {
            if is_time(&progress)
                && let Some((file, offset)) = planned.lock().unwrap().take()
            {
                write(&file, offset);
            }
        })
        .build()
        .unwrap();
    let options = LeaseOptions::new().shareable(true);
    let lease = pool.lease_with(&regions(&[(0, bytes)]), options).unwrap();
    fill_range(&lease.memory(), 0, PAGE, 1);
    let file = Arc::clone(lease.file_offsets()[0].1.arc());
    *plan.lock().unwrap() = Some((file, offset));
    (pool, lease, plan)
}

#[track_caller]
fn assert_found(pool: &Pool, receipt: &ScrubReceipt, block: u64) {
    assert_eq!(receipt.bytes_quarantined, receipt.bytes_total);
    let found: Vec<(u64, QuarantineReason)> = receipt
        .quarantined
        .iter()
        .map(|range| (range.guest_address / BLOCK_SIZE, range.reason))
        .collect();
    let mut expected = vec![(block, QuarantineReason::NotZero)];
    if block > 0 {
        expected.insert(0, (0, QuarantineReason::SameFile));
    } else {
        expected.push((1, QuarantineReason::SameFile));
    }
    assert_eq!(found, expected, "{receipt:?}");
    assert_eq!(pool.reclaim(), 0);
    assert_eq!(pool.accounts().quarantined, 2 * BLOCK_SIZE);
    assert_nothing_dirty_left(pool);
}

fn a_write_to_scrubbed_memory_is_found(page_size: PageSize) {
    let (pool, receipt) = torn_down(page_size, 2 * BLOCK_SIZE, 77, 0);
    assert_found(&pool, &receipt, 0);
    let (pool, receipt) = retired(page_size, 2 * BLOCK_SIZE, 77);
    assert_found(&pool, &receipt, 0);
}

fn a_write_where_nothing_was_is_found(page_size: PageSize) {
    let (pool, receipt) = torn_down(page_size, 2 * BLOCK_SIZE, BLOCK_SIZE + 9 * PAGE, 0);
    assert_found(&pool, &receipt, 1);
    let (pool, receipt) = retired(page_size, 2 * BLOCK_SIZE, BLOCK_SIZE + 9 * PAGE);
    assert_found(&pool, &receipt, 1);
}

fn a_write_behind_the_guests_regions_is_found(page_size: PageSize) {
    let (pool, receipt) = torn_down(page_size, BLOCK_SIZE + PAGE, 2 * BLOCK_SIZE - 1, 0);
    assert_found(&pool, &receipt, 1);
    let (pool, receipt) = retired(page_size, BLOCK_SIZE + PAGE, 2 * BLOCK_SIZE - 1);
    assert_found(&pool, &receipt, 1);
}

fn a_write_before_the_second_attempt_is_made_undone(page_size: PageSize) {
    for offset in [77, BLOCK_SIZE + 9 * PAGE] {
        let (pool, receipt) = torn_down(page_size, 2 * BLOCK_SIZE, offset, 1);
        assert!(receipt.is_proven(), "{receipt:?}");
        assert_eq!(pool.withheld(), []);
        assert_nothing_dirty_left(&pool);
    }
}

/// Teardown sealed the file and could not read it; whoever tries again finds what was written before.
fn a_write_is_found_also_by_who_looks_later(page_size: PageSize) {
    let mut sealed_unread = 0;
    for skip in 0..8 {
        let (pool, lease, _plan) = planned(page_size, 2 * BLOCK_SIZE, 77);
        let file = Arc::clone(lease.file_offsets()[0].1.arc());
        let mapping = inject(Call::Mmap, skip, 1, libc::ENOMEM);
        let receipt = teardown(lease);
        let hits = mapping.hits();
        drop(mapping);
        // SAFETY: a call without pointers on a descriptor that is open.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        let unread = receipt
            .quarantined
            .first()
            .is_some_and(|range| range.reason == QuarantineReason::NotSealed);
        if hits == 1 && unread && seals & libc::F_SEAL_WRITE != 0 {
            sealed_unread += 1;
            assert_eq!(pool.reclaim(), 0);
            let withheld = &pool.withheld()[0];
            assert!(
                withheld.for_good && withheld.reason.contains("is not zero"),
                "{withheld:?}"
            );
            assert_eq!(pool.accounts().quarantined, 2 * BLOCK_SIZE);
            assert_nothing_dirty_left(&pool);
        }
    }
    assert!(sealed_unread > 0);
}
