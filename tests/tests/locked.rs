//! A VMM that locks its memory (`mlockall`): the kernel treats locked mappings differently when they move and when they are
//! to be discarded, and neither may keep a guest from being leased and scrubbed.
//!
//! The lock is the process's, so each test runs in a child. Memory does not stay locked on its way round the pool, and is not counted
//! as if it did.

use vm_scrub::{BLOCK_SIZE, PageSize, RevokeBy};
use vm_scrub_tests::child::{alone, with_huge_pages};
use vm_scrub_tests::{
    assert_all_zero, assert_nothing_dirty_left, fill, limits, pool, pools, regions, skipped,
    teardown,
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

/// Each guest's memory is locked by the VMM. When the pool has it back, it counts for nobody.
fn each_guest_is_locked(page_size: PageSize) {
    for by in [RevokeBy::Automatic, RevokeBy::Mremap] {
        let pool = pools::builder(page_size, 4).revoke_by(by).build().unwrap();
        let before = limits::locked();
        for _ in 0..4 {
            let lease = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
            fill(&lease, 1);
            for (region, start) in lease.host_addresses() {
                // SAFETY: the lease's memory.
                let status = unsafe { libc::mlock(start.cast(), region.bytes as usize) };
                if status != 0 {
                    let error = std::io::Error::last_os_error();
                    skipped(&format!("this process may not lock its memory: {error}"));
                    return;
                }
            }
            assert!(limits::locked() > before);
            let receipt = teardown(lease);
            assert!(receipt.is_proven());
            assert_eq!(receipt.revocation, pool.revocation());
            assert_eq!(limits::locked(), before);
        }
    }
}

/// All that the process has while a guest has its memory: the places to which that goes back, too.
fn all_is_locked_while_a_guest_is_there(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let lease = pool.lease(&regions(&[(0, 2 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    // SAFETY: a system call without pointers.
    if unsafe { libc::mlockall(libc::MCL_CURRENT) } != 0 {
        let error = std::io::Error::last_os_error();
        skipped(&format!("this process may not lock its memory: {error}"));
        return;
    }
    let receipt = teardown(lease);
    assert!(receipt.is_proven());
    // With as much proof as the pool gives.
    assert_eq!(receipt.revocation, pool.revocation());
}

/// All that the process had when the pool had been built.
fn all_is_locked_later(page_size: PageSize) {
    // The other way has a lock, which is address space that would count as well.
    let builder = pools::builder(page_size, 4).revoke_by(RevokeBy::Mremap);
    let pool = builder.kept_windows(0).build().unwrap();
    // SAFETY: a system call without pointers.
    if unsafe { libc::mlockall(libc::MCL_CURRENT) } != 0 {
        let error = std::io::Error::last_os_error();
        skipped(&format!("this process may not lock its memory: {error}"));
        return;
    }
    // The pool's memory is locked now, and is not any more when it has been round.
    let most = limits::locked() - 4 * BLOCK_SIZE;
    for _ in 0..4 {
        let lease = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
        fill(&lease, 1);
        assert!(teardown(lease).is_proven());
        assert!(limits::locked() <= most, "{} of {most}", limits::locked());
    }
}

#[test]
fn guests_base_4k() {
    alone("guests_base_4k", || each_guest_is_locked(PageSize::Base4K));
}

#[test]
fn guests_transparent() {
    alone("guests_transparent", || {
        each_guest_is_locked(PageSize::Transparent)
    });
}

#[test]
fn meanwhile_base_4k() {
    alone("meanwhile_base_4k", || {
        all_is_locked_while_a_guest_is_there(PageSize::Base4K)
    });
}

#[test]
fn meanwhile_transparent() {
    alone("meanwhile_transparent", || {
        all_is_locked_while_a_guest_is_there(PageSize::Transparent)
    });
}

#[test]
fn later_base_4k() {
    alone("later_base_4k", || all_is_locked_later(PageSize::Base4K));
}

#[test]
fn later_transparent() {
    alone("later_transparent", || {
        all_is_locked_later(PageSize::Transparent)
    });
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
