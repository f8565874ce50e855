//! What a pool needs to remember about its memory: at most 32 bytes for each block of 2 MiB, also when every second block is
//! somebody's.
//!
//! The only test of its process, so that what is allocated meanwhile is the pool's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicIsize, Ordering};
use vm_scrub::{BLOCK_SIZE, Lease, PageSize, Pool};
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
    println!(
        "for each block: {} bytes in a pool, {} in a lease, {} with every second one leased",
        all.saturating_sub(fixed) / blocks,
        one_lease / (64 * 256),
        gaps / (2 * leases)
    );
    drop((sparse, small));
}
