//! A VMM that locks its memory (`mlockall`): the kernel treats locked mappings differently when they move and when they are
//! to be discarded, and neither may keep a guest from being leased and scrubbed.
//!
//! The lock is the process's, so each test runs in a child. That memory stays locked on its way round the pool is not tested:
//! it does not, `MREMAP_DONTUNMAP` takes the lock off.

use vm_scrub::{BLOCK_SIZE, PageSize};
use vm_scrub_tests::child::{alone, with_huge_pages};
use vm_scrub_tests::{
    assert_all_zero, assert_nothing_dirty_left, fill, pool, regions, skipped, teardown,
};

fn locked(page_size: PageSize) {
    // SAFETY: a system call without pointers.
    let status = unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE) };
    if status != 0 {
        let error = std::io::Error::last_os_error();
        skipped(&format!("this process may not lock its memory: {error}"));
        return;
    }
    let pool = pool(page_size, 8);
    let granularity = page_size.granularity();
    let layouts = [
        regions(&[(0, 8 * BLOCK_SIZE)]),
        regions(&[
            (0, 3 * BLOCK_SIZE + granularity % BLOCK_SIZE),
            (1 << 32, 3 * BLOCK_SIZE),
        ]),
        regions(&[(0, granularity)]),
    ];
    for generation in 0..6 {
        let lease = pool.lease(&layouts[generation % 3]).unwrap();
        assert_all_zero(&lease);
        fill(&lease, 1);
        let receipt = teardown(lease);
        assert!(receipt.is_proven());
        assert_eq!(receipt.bytes_scrubbed, receipt.bytes_total);
    }
    assert_nothing_dirty_left(&pool);
}

#[test]
fn base_4k() {
    alone("base_4k", || locked(PageSize::Base4K));
}

#[test]
fn transparent() {
    alone("transparent", || locked(PageSize::Transparent));
}

#[test]
fn huge_2m() {
    with_huge_pages("huge_2m", 8, || locked(PageSize::Huge2M));
}
