//! What a pool needs to remember about its memory: at most 32 bytes for each block of 2 MiB, also when every second block is
//! somebody's.
//!
//! The only test of its process, so that what is allocated meanwhile is the pool's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicIsize, Ordering};
use std::time::Duration;
use vm_scrub::{BLOCK_SIZE, Lease, PageSize, Pool, Priority, Quiesced, ScrubRate, Ticket};
use vm_scrub_tests::{pools, regions, teardown};

/// Bytes that are allocated at the moment.
static ALLOCATED: AtomicIsize = AtomicIsize::new(0);

struct Counting;

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.fetch_add(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: passed on to the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        ALLOCATED.fetch_sub(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: passed on to the caller.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// What `make` leaves allocated, in bytes.
fn allocated_by<T>(make: impl FnOnce() -> T) -> (T, usize) {
    let before = ALLOCATED.load(Ordering::Relaxed);
    let made = make();
    let after = ALLOCATED.load(Ordering::Relaxed);
    (made, usize::try_from(after - before).unwrap_or(0))
}

fn pool(blocks: u64) -> Pool {
    pools::builder(PageSize::Base4K, blocks)
        .threads(1)
        // What is remembered about guests that are gone is a matter of that setting.
        .kept_windows(0)
        .build()
        .unwrap()
}

fn small_lease(pool: &Pool) -> Lease {
    pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap()
}

#[test]
fn at_most_32_bytes_for_each_block() {
    const LIMIT: usize = 32;

    // Measured once in a process and not for each pool.
    drop(pool(1));

    // One pool is 64 times as large as the other: the difference is what its blocks need.
    let (small, fixed) = allocated_by(|| pool(256));
    let (large, all) = allocated_by(|| pool(64 * 256));
    let blocks = 63 * 256;
    assert!(all.saturating_sub(fixed) <= LIMIT * blocks, "{fixed} {all}");

    let (lease, one_lease) =
        allocated_by(|| large.lease(&regions(&[(0, large.capacity())])).unwrap());
    assert!(one_lease <= LIMIT * 64 * 256, "{one_lease}");
    let (receipt, _) = allocated_by(|| teardown(lease));
    assert!(receipt.is_proven());

    // The same number of leases one behind the other, and with a free block behind each.
    let leases = 1024;
    let (dense, one_behind_the_other) =
        allocated_by(|| -> Vec<Lease> { (0..leases).map(|_| small_lease(&large)).collect() });
    dense.into_iter().for_each(|lease| drop(teardown(lease)));
    let (sparse, with_gaps) = allocated_by(|| -> Vec<Lease> {
        let all: Vec<Lease> = (0..2 * leases).map(|_| small_lease(&large)).collect();
        let mut kept = Vec::with_capacity(leases);
        for (number, lease) in all.into_iter().enumerate() {
            if number % 2 == 0 {
                kept.push(lease);
            } else {
                drop(teardown(lease));
            }
        }
        kept
    });
    assert_eq!(large.accounts().leased, leases as u64 * BLOCK_SIZE);
    let gaps = with_gaps.saturating_sub(one_behind_the_other);
    assert!(gaps <= LIMIT * 2 * leases, "{gaps}");
    let (waiting, begun) = retired(LIMIT);
    println!(
        "for each block: {} bytes in a pool, {} in a lease, {} with every second one leased, {waiting} in a retired lease that waits, \
         {begun} when it was begun",
        all.saturating_sub(fixed) / blocks,
        one_lease / (64 * 256),
        gaps / (2 * leases)
    );
    drop((sparse, small));
}

/// A lease of so many blocks, with every second page populated, that waits for a background which is at something else.
fn waiting(pool: &Pool, blocks: u64) -> Ticket {
    let lease = pool.lease(&regions(&[(0, blocks * BLOCK_SIZE)])).unwrap();
    let (_, start) = lease.host_addresses()[0];
    for page in (0..blocks * BLOCK_SIZE).step_by(8192) {
        // SAFETY: the lease is alive and its memory writable. Nobody uses it after the loop.
        unsafe { start.wrapping_add(page as usize).write_volatile(1) };
    }
    // SAFETY: as above.
    let quiesced = unsafe { Quiesced::assert(&lease) };
    lease.retire(quiesced).unwrap()
}

/// What is remembered of each block of a retired lease whose pages are scattered as finely as can be: while it waits, and when it was
/// begun and put aside.
fn retired(limit: usize) -> (usize, usize) {
    const BLOCKS: usize = 128;
    let pool = pool(BLOCKS as u64 + 2);
    // The first batch is on credit; there will be no second one.
    pool.set_scrub_rate(Some(ScrubRate {
        bytes_per_second: 1,
        burst: 0,
    }));
    let first = waiting(&pool, 1);
    while first.progress().bytes_done < BLOCK_SIZE / 2 + (256 << 10) {
        std::thread::yield_now();
    }
    let (small, fixed) = allocated_by(|| waiting(&pool, 1));
    let (large, all) = allocated_by(|| waiting(&pool, BLOCKS as u64));
    let waits = all.saturating_sub(fixed);
    assert!(waits <= limit * BLOCKS, "{fixed} {all}");

    // More urgent than what the background is at: it begins with a batch, and waits.
    let ((), more) = allocated_by(|| {
        large.set_priority(Priority::High);
        pool.set_scrub_rate(None);
        while large.progress().bytes_done < BLOCKS as u64 / 4 * BLOCK_SIZE {
            std::thread::yield_now();
        }
        pool.set_scrub_rate(Some(ScrubRate {
            bytes_per_second: 1,
            burst: 0,
        }));
        // What it is at may need memory until it is done.
        std::thread::sleep(Duration::from_millis(50));
    });
    let begun = waits + more;
    assert!(begun <= limit * BLOCKS + 8192, "{fixed} {all} {more}");
    for ticket in [large, small, first] {
        let receipt = ticket.wait().unwrap();
        assert!(receipt.is_proven());
        assert_eq!(receipt.bytes_scrubbed * 2, receipt.bytes_total);
    }
    (waits / BLOCKS, begun / BLOCKS)
}
